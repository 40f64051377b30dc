"""Messages that only two trimigs exchange (return_path.md part 9): the marks, and then reasons, clocks and ids.

The source sends an additional PING, its mark. Every QEMU echoes it. A trimig answers with an additional PONG, its own
mark. After the two marks both sides may use the commands and messages of this file, which a QEMU would refuse. Their texts
and figures come from an untrusted peer: they are bounded, escaped before they are shown, and never interpreted.
"""

from __future__ import annotations

import enum
from typing import Final

#: The source's mark, version 1: a PING directly after QEMU's first one.
PING_MARK: Final = 0x74726D01
#: The destination's mark: a PONG after the echo of the source's mark.
PONG_MARK: Final = 0x74726D81

#: The most bytes of a reason.
MAX_REASON: Final = 512
#: The most bytes of a command with a reason.
REASON_ELEMENT: Final = 5 + MAX_REASON
#: Bytes of the id of an attempt.
ATTEMPT_BYTES: Final = 16


class Mark(enum.IntEnum):
    """Number of a command, and type of a return-path message."""

    #: The reason why this side gives up the migration, in UTF-8.
    REASON = 0x7401
    #: The sender's monotonic clock in microseconds, be64; the answer is the receiver's clock.
    CLOCK = 0x7402
    #: The id of the attempt, chosen by the source at random.
    ATTEMPT = 0x7403


#: Marks whose payload has a fixed length.
LENGTH: Final = {Mark.CLOCK: 8, Mark.ATTEMPT: ATTEMPT_BYTES}


def is_mark(number: int) -> bool:
    """Whether *number* is one of :class:`Mark`."""
    return number in list(Mark)


def wrong_length(mark: Mark, length: int) -> str | None:
    """The error in a payload of *length* bytes, as a sentence; None if the length is legal."""
    expected = LENGTH.get(mark)
    if expected is not None and length != expected:
        return f"mark {mark.name} with {length} bytes of payload, expected {expected}"
    if length > MAX_REASON:
        return f"mark {mark.name} with {length} bytes of payload, at most {MAX_REASON} are possible"
    return None


def reason_bytes(text: str) -> bytes:
    """The payload for a reason: the text on one line, cut between characters if it is too long."""
    data = " ".join(text.split()).encode("utf-8", "replace")
    return data[:MAX_REASON].decode("utf-8", "ignore").encode()


def shown_reason(payload: bytes) -> str:
    """A reason for people: characters that are not printable are escaped."""
    text = payload.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def trailing_reason(data: bytes) -> str | None:
    """The reason in a command at the end of *data* (the last 517 bytes of a stream are enough); None if there is none."""
    head = b"\x08" + Mark.REASON.to_bytes(2)
    at = data.rfind(head)
    while at >= 0:
        payload = data[at + 5 :]
        if len(data) >= at + 5 and int.from_bytes(data[at + 3 : at + 5]) == len(payload) <= MAX_REASON:
            return shown_reason(payload)
        at = data.rfind(head, 0, at)
    return None
