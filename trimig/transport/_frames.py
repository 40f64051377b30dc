"""Websocket frames (RFC 6455 part 5): headers and masks. No I/O.

wsproto can do this too, but its Python loops process each message several times: 0.4 GB/s at best, less from
the client to the server, whose bytes must be masked. Here a mask is one pass of NumPy over eight bytes at a time, and
payloads are never collected: each piece is passed on as it arrives.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

import numpy as np

#: The longest header: two bytes, eight of length, four of the mask.
MAX_HEADER: Final = 14
#: The largest payload of a control frame.
MAX_CONTROL: Final = 125
_KEY_SIZE: Final = 4


class Opcode(enum.IntEnum):
    """The kind of a frame."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(enum.IntEnum):
    """Why a connection ends; only the codes that trimig uses."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED = 1003
    #: Never sent: stands for a close without a code.
    NONE = 1005
    #: Text that is not UTF-8.
    INVALID = 1007
    TOO_BIG = 1009


class FrameError(Exception):
    """The peer sent an invalid frame, or a frame that the peer may not send.

    Attributes:
        code: the code to close the connection with.
    """

    def __init__(self, code: CloseCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A frame without its payload."""

    opcode: Opcode
    final: bool
    #: Bytes of the payload.
    length: int
    #: Four bytes, from a client; empty from a server.
    key: bytes = b""

    @property
    def is_control(self) -> bool:
        """Whether the frame may come between the fragments of a message."""
        return self.opcode >= Opcode.CLOSE

    def encode(self) -> bytes:
        """The header as bytes."""
        masked = 0x80 if self.key else 0
        first = self.opcode | (0x80 if self.final else 0)
        if self.length < 126:
            return bytes((first, masked | self.length)) + self.key
        if self.length < 1 << 16:
            return bytes((first, masked | 126)) + self.length.to_bytes(2, "big") + self.key
        return bytes((first, masked | 127)) + self.length.to_bytes(8, "big") + self.key


def read_header(data: memoryview, *, from_client: bool) -> tuple[Header, int] | None:
    """The header at the start of *data* and its length in bytes; None if more bytes are needed.

    Raises:
        FrameError: the header breaks a rule.
    """
    if len(data) < 2:
        return None
    first, second = data[0], data[1]
    if first & 0x70:
        raise FrameError(CloseCode.PROTOCOL_ERROR, "a frame uses an extension that was not agreed on")
    try:
        opcode = Opcode(first & 0x0F)
    except ValueError:
        raise FrameError(CloseCode.PROTOCOL_ERROR, f"a frame of the unknown kind {first & 0x0F}") from None
    if bool(second & 0x80) is not from_client:
        words = "a client sent a frame without a mask" if from_client else "a server sent a frame with a mask"
        raise FrameError(CloseCode.PROTOCOL_ERROR, words)
    length = second & 0x7F
    at = 2
    if length > MAX_CONTROL:
        size = 2 if length == 126 else 8
        if len(data) < at + size:
            return None
        length = int.from_bytes(data[at : at + size], "big")
        at += size
        if length < (126 if size == 2 else 1 << 16) or length >> 63:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a frame's length is not written in the shortest form")
    final = bool(first & 0x80)
    if opcode >= Opcode.CLOSE and (at > 2 or not final):
        raise FrameError(CloseCode.PROTOCOL_ERROR, "a control frame is too long or in pieces")
    key = b""
    if from_client:
        if len(data) < at + _KEY_SIZE:
            return None
        key = bytes(data[at : at + _KEY_SIZE])
        at += _KEY_SIZE
    return Header(opcode=opcode, final=final, length=length, key=key), at


def mask(data: memoryview, key: bytes, place: int = 0) -> None:
    """Mask, or unmask, *data* in place; *data* begins at byte *place* of its payload."""
    octets = np.frombuffer(data, np.uint8)
    size = len(octets)
    # NumPy copies through a buffer unless the words are aligned.
    lead = min(size, -int(octets.__array_interface__["data"][0]) % 8)
    body = (size - lead) // 8 * 8
    turn = place % _KEY_SIZE
    pattern = np.frombuffer((key[turn:] + key[:turn]) * 4, np.uint8)
    if lead:
        octets[:lead] ^= pattern[:lead]
    if body:
        shift = lead % _KEY_SIZE
        words = octets[lead : lead + body].view(np.uint64)
        words ^= np.frombuffer(pattern[shift : shift + 8].tobytes(), np.uint64)[0]
    if tail := size - lead - body:
        octets[-tail:] ^= pattern[lead % _KEY_SIZE : lead % _KEY_SIZE + tail]


def mask_into(target: memoryview, data: memoryview, key: bytes) -> None:
    """Write the masked *data*, a whole payload, into *target*, which is aligned and as long: one pass instead of
    two."""
    body = len(data) // 8 * 8
    word = np.frombuffer(key * 2, np.uint64)[0]
    np.bitwise_xor(np.frombuffer(data[:body], np.uint64), word, out=np.frombuffer(target[:body], np.uint64))
    if body < len(data):
        target[body:] = data[body:]
        mask(target[body:], key)


def close_payload(code: int, reason: str) -> bytes:
    """The payload of a CLOSE; a reason that is too long loses its end."""
    text = reason.encode()[: MAX_CONTROL - 2].decode(errors="ignore")
    return code.to_bytes(2, "big") + text.encode()


def read_close(payload: bytes) -> tuple[int, str]:
    """Code and reason of a CLOSE.

    Raises:
        FrameError: half a code, a code that may not be sent, or text that is not UTF-8.
    """
    if not payload:
        return CloseCode.NONE, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (1000 <= code <= 1014 or 3000 <= code <= 4999) or code in (1004, 1005, 1006):
        raise FrameError(CloseCode.PROTOCOL_ERROR, "the connection was closed with an invalid code")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise FrameError(CloseCode.PROTOCOL_ERROR, "the connection was closed with a reason that is no text") from None
