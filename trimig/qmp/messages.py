"""Bytes -> QMP messages, without I/O.

A QMP stream is a sequence of JSON values; between them is white space or nothing. So the reader finds the end of a
message by its brackets, not by a line: half a message waits for the other half, and one packet may hold several
messages. If brackets and strings are so broken that the end of the message cannot be found, the reader goes on
behind the next line feed, so that one bad line costs one error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from typing import Any, Final

#: The largest message that is accepted, in bytes. A list of all parameters has about one KiB.
MAX_MESSAGE: Final = 1 << 20
#: Greatest depth of nested arrays and objects. No command needs more than four levels.
MAX_DEPTH: Final = 64

#: Characters that change the state of the scan: brackets, the start of a string, the end of a line outside of one.
_OUTSIDE: Final = re.compile(rb'[{}\[\]"\n]')
#: Inside a string: its end, an escape, or a character that a string may not contain.
_INSIDE: Final = re.compile(rb'["\\\x00-\x1f]')
_SOLID: Final = re.compile(rb"[^ \t\r\n]")
#: How an HTTP request begins: a method, a blank, and a target. A page on any web site can make a browser send
#: a request to a port of this machine, with a QMP command as its body.
_HTTP: Final = re.compile(
    rb"CONNECT +[^ \t\r\n{}\[\]\"]|[A-Za-z0-9!#$%&'*+.^_`|~-]+ +(?:[/*]|[A-Za-z][A-Za-z0-9+.-]*://)"
)
#: How a TLS handshake begins.
_TLS: Final = b"\x16\x03"
#: A surrogate, as JSON can spell it; a lone surrogate is no character, and no later step could encode it.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclasses.dataclass(frozen=True, slots=True)
class Malformed:
    """Input that is no message; the text is for the ``desc`` of the error."""

    desc: str
    #: The connection must be closed: the beginning of the next message cannot be found.
    fatal: bool = False


class MessageReader:
    """Takes bytes and gives messages.

    Use::

        reader.feed(data)
        while (message := reader.next_message()) is not None:
            ...                                   # any JSON value in a list of one, or Malformed
    """

    def __init__(self, *, max_message: int = MAX_MESSAGE) -> None:
        self._max = max_message
        self._buffer = bytearray()
        self._at = 0
        self._depth = 0
        self._string = False
        self._skipping = False
        self._dead = False

    @property
    def partial(self) -> bool:
        """A message has begun and is incomplete."""
        return _SOLID.search(self._buffer) is not None

    @property
    def held(self) -> int:
        """The number of bytes that wait for the rest of their message."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes."""
        if not self._dead:
            self._buffer += data

    def next_message(self) -> tuple[Any] | Malformed | None:
        """The next message as a tuple of one, or a :class:`Malformed` that says what is wrong; None: more bytes are
        needed.

        There is no message after a fatal error.
        """
        while not self._dead:
            if self._skipping and not self._skip():
                return None
            if self._at == 0 and not self._begin():
                return None
            if (stranger := self._stranger()) is not None:
                return self._end(f"this is {stranger}, and not QMP: the connection is closed, nothing was executed")
            found = self._scan()
            if found is not None:
                return found
            if self._skipping:
                continue
            return self._too_long() if len(self._buffer) > self._max else None
        return None

    def _stranger(self) -> str | None:
        """The other protocol that the client speaks, if the beginning of the message shows one."""
        if _HTTP.match(self._buffer):
            return "HTTP"
        return "TLS" if self._buffer.startswith(_TLS) else None

    def _skip(self) -> bool:
        """Throw away everything up to the end of the line."""
        end = self._buffer.find(b"\n")
        if end < 0:
            self._buffer.clear()
            return False
        del self._buffer[: end + 1]
        self._skipping = False
        return True

    def _begin(self) -> bool:
        """Skip to the first byte of the next message; False if there is none yet."""
        first = _SOLID.search(self._buffer)
        del self._buffer[: first.start() if first else len(self._buffer)]
        return first is not None

    def _scan(self) -> tuple[Any] | Malformed | None:
        """Go on looking for the end of the message that starts at the front of the buffer."""
        buffer = self._buffer
        while True:
            match = (_INSIDE if self._string else _OUTSIDE).search(buffer, self._at)
            if match is None:
                self._at = len(buffer)
                return None
            at, byte = match.start(), match.group()
            if self._string:
                if byte == b"\\":
                    if at + 1 >= len(buffer):
                        self._at = at  # skip the escaped character: a quote here does not end the string
                        return None
                    self._at = at + 2
                    continue
                if byte != b'"':
                    return self._bad("a control character inside a string", at)
                self._string = False
            elif byte == b'"':
                self._string = True
            elif byte in b"{[":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    return self._bad(f"more than {MAX_DEPTH} levels", at)
            elif byte in b"}]":
                self._depth -= 1
                if self._depth < 0:
                    return self._bad(f"stray '{byte.decode()}'", at)
            self._at = at + 1
            if self._depth == 0 and not self._string and byte != b'"':
                return self._take()

    def _take(self) -> tuple[Any] | Malformed:
        """Take the message that ends here: at its last bracket, or at a line feed if the message has no brackets."""
        if self._at > self._max:
            return self._too_long()
        text = bytes(self._buffer[: self._at])
        self._forget(self._at)
        try:
            message = json.loads(
                text.decode("utf-8"), parse_constant=_no_constant, parse_float=_number, object_pairs_hook=unique_members
            )
            if _SURROGATE.search(text):
                json.dumps(message, ensure_ascii=False).encode()
            return (message,)
        except UnicodeEncodeError:
            return Malformed("JSON parse error, half of a surrogate pair is not a character")
        except UnicodeDecodeError as error:
            return Malformed(f"JSON parse error, not UTF-8 at byte {error.start} of the message")
        except json.JSONDecodeError as error:
            return Malformed(f"JSON parse error, {error.msg} at character {error.pos} of the message")
        except (ValueError, RecursionError) as error:
            return Malformed(f"JSON parse error, {error}")

    def _bad(self, what: str, at: int) -> Malformed:
        """Throw the message away, and the rest of its line."""
        del self._buffer[:at]
        self._forget(0)
        self._skipping = True
        return Malformed(f"JSON parse error, {what}")

    def _too_long(self) -> Malformed:
        return self._end(f"a message of more than {self._max} bytes")

    def _end(self, desc: str) -> Malformed:
        self._forget(len(self._buffer))
        self._dead = True
        return Malformed(desc, fatal=True)

    def _forget(self, count: int) -> None:
        del self._buffer[:count]
        self._at = self._depth = 0
        self._string = False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def unique_members(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object of its members; ValueError for a repeated name: readers would disagree on which member counts."""
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def encode(message: Any) -> bytes:
    """One message as a line."""
    return json.dumps(message).encode() + b"\r\n"
