"""The messages between trimig and a worker process (protocol/worker.md): bytes in, messages out.

A message is one packet: a line of words in ASCII, and a body of any bytes behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

#: The version of the protocol.
VERSION: Final = 1
#: Bytes of a packet, at most.
MAX_PACKET: Final = 1 << 16
#: Bytes of the line, its end included, at most.
MAX_LINE: Final = 1024
#: Bytes of a body, at most.
MAX_BODY: Final = MAX_PACKET - MAX_LINE
#: Characters of a worker's text that an error quotes, at most.
MOST_QUOTED: Final = 300

_WORD: Final = re.compile(rb"[!-~]+")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")


class Nonsense(ValueError):
    """A packet that is no message of the protocol."""


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """A request of trimig."""

    #: The number that the reply repeats, 1 to 2**63 - 1.
    number: int
    verb: str
    words: tuple[str, ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class WorkerReply:
    """The reply of a worker."""

    number: int
    #: Why the worker refused; None if it did what was asked for.
    refused: str | None = None
    words: tuple[str, ...] = ()
    body: bytes = b""


def decimal(word: str) -> int:
    """The number in *word*: decimal digits, at most 19. Nonsense."""
    if not _NUMBER.fullmatch(word):
        raise Nonsense(f"{quoted(word)} is no number")
    return int(word)


def quoted(text: bytes | str) -> str:
    """*text* of a worker for an error: one line, printable, at most :data:`MOST_QUOTED` characters."""
    if isinstance(text, bytes):
        text = text[: 4 * MOST_QUOTED].decode(errors="replace")
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 2 * MOST_QUOTED].split()))
    return repr(line if len(line) <= MOST_QUOTED else f"{line[:MOST_QUOTED]}…")


def _packet(words: tuple[str, ...], body: bytes) -> bytes:
    for word in words:
        if not _WORD.fullmatch(word.encode(errors="replace")):
            raise ValueError(f"{word!r:.200} {_why_no_word(word)}; put it into the body")
    line = b" ".join(word.encode("ascii") for word in words) + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of {len(line)} bytes; {MAX_LINE} is the most. Put long values into the body")
    if len(body) > MAX_BODY:
        raise ValueError(f"a body of {len(body)} bytes; {MAX_BODY} is the most")
    return line + body


def _why_no_word(word: str) -> str:
    if not word:
        return "is empty"
    return "has a space" if " " in word else "is not printable ASCII"


def _parts(packet: bytes) -> tuple[list[str], bytes]:
    if len(packet) > MAX_PACKET:
        raise Nonsense(f"a packet of more than {MAX_PACKET} bytes")
    line, end, body = packet.partition(b"\n")
    if not end or len(line) >= MAX_LINE:
        raise Nonsense(f"no line of at most {MAX_LINE} bytes: {quoted(packet)}")
    words = line.split(b" ")
    if not all(_WORD.fullmatch(word) for word in words):
        raise Nonsense(f"a line that is not words in ASCII with one space between: {quoted(line)}")
    if len(body) > MAX_BODY:
        raise Nonsense(f"a body of {len(body)} bytes; {MAX_BODY} is the most")
    return [word.decode("ascii") for word in words], body


def encode_request(request: WorkerRequest) -> bytes:
    """The packet of *request*. ValueError for a word that is no word, or for too many bytes."""
    return _packet((str(request.number), request.verb, *request.words), request.body)


def encode_reply(reply: WorkerReply) -> bytes:
    """The packet of *reply*. ValueError as for :func:`encode_request`; a long reason is cut."""
    if reply.refused is not None:
        return _packet((str(reply.number), "error"), reply.refused.encode()[:MAX_BODY])
    return _packet((str(reply.number), "ok", *reply.words), reply.body)


def parse_request(packet: bytes) -> WorkerRequest:
    """The request in *packet*. Nonsense."""
    words, body = _parts(packet)
    if len(words) < 2:
        raise Nonsense(f"a request without a verb: {quoted(packet)}")
    return WorkerRequest(decimal(words[0]), words[1], tuple(words[2:]), body)


def parse_reply(packet: bytes) -> WorkerReply:
    """The reply in *packet*. Nonsense."""
    words, body = _parts(packet)
    match words:
        case [number, "ok", *rest]:
            return WorkerReply(decimal(number), None, tuple(rest), body)
        case [number, "error"]:
            return WorkerReply(decimal(number), body.decode(errors="replace"))
    raise Nonsense(f"neither 'NUMBER ok …' nor 'NUMBER error': {quoted(packet)}")
