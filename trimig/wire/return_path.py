"""Return-path messages, from the destination to the source (return_path.md).

Each message is be16 type, be16 length, payload. One table is used for both directions, so they always agree.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ..errors import RemoteProtocolError
from ..guest import PAGE_SIZE, PageBitmap
from .constants import ReturnPath
from .encoder import cstr
from .marks import PONG_MARK, Mark, is_mark, wrong_length
from .postcopy import BITMAP_FRAME, bitmap_bytes, check_bitmap_size, decode_received_bitmap, received_bitmap

#: No message of any version is longer than this; QEMU's own reader has the same bound (return_path.md part 5).
MAX_PAYLOAD: Final = 512

#: The first bytes of programs that are no destination.
_OTHERS: Final[Mapping[bytes, str]] = {b'{"QM': "it is a QMP socket", b"HTTP": "it is an HTTP server"}
_HEADER = struct.Struct(">HH")
_BE32 = struct.Struct(">I")
_REQUEST = struct.Struct(">QI")

_FIXED_LENGTH: Final = MappingProxyType(
    {
        ReturnPath.SHUT: 4,
        ReturnPath.PONG: 4,
        ReturnPath.REQ_PAGES: 12,
        ReturnPath.RESUME_ACK: 4,
        ReturnPath.SWITCHOVER_ACK: 0,
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shut:
    """The last message: 0 means that the destination owns the guest; any other value, that the destination refused."""

    status: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to a PING: everything before it has been loaded."""

    value: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """The destination's guest waits for these bytes (postcopy).

    ``named`` is False for a message without a name, which means the block of the previous request. A decoder fills in the
    name of that block.
    """

    block: str
    start: int
    length: int
    named: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResumeAck:
    """The destination goes on with a paused postcopy migration; the value is always 1."""

    value: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReceivedPages:
    """The received pages of one block, sent in a recovery: True for each page that the destination has."""

    block: str
    pages: PageBitmap


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SwitchoverAck:
    """The destination allows the switchover (capability switchover-ack)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """The reason why a trimig gives up the migration; SHUT follows. Show it only through
    :func:`trimig.wire.marks.shown_reason`.
    """

    payload: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The id of the attempt, as the source has sent it."""

    id: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """The destination's monotonic clock in microseconds, in answer to the source's clock."""

    microseconds: int


Message = Shut | Pong | PageRequest | ResumeAck | ReceivedPages | SwitchoverAck | Reason | Attempt | Clock


def encode(message: Message) -> bytes:
    """The bytes of one message, to be sent as a unit.

    Raises:
        LocalProtocolError: a block's name of more than 255 bytes.
    """
    match message:
        case Shut(status=value):
            return _HEADER.pack(ReturnPath.SHUT, 4) + _BE32.pack(value)
        case Pong(value=value):
            return _HEADER.pack(ReturnPath.PONG, 4) + _BE32.pack(value)
        case ResumeAck(value=value):
            return _HEADER.pack(ReturnPath.RESUME_ACK, 4) + _BE32.pack(value)
        case SwitchoverAck():
            return _HEADER.pack(ReturnPath.SWITCHOVER_ACK, 0)
        case Reason(payload=payload):
            return _HEADER.pack(Mark.REASON, len(payload)) + payload
        case Attempt(id=payload):
            return _HEADER.pack(Mark.ATTEMPT, len(payload)) + payload
        case Clock(microseconds=value):
            return _HEADER.pack(Mark.CLOCK, 8) + value.to_bytes(8)
        case ReceivedPages(block=block, pages=pages):
            name = cstr(block)
            return _HEADER.pack(ReturnPath.RECV_BITMAP, len(name)) + name + received_bitmap(pages)
        case PageRequest(block=block, start=start, length=length, named=True):
            body = _REQUEST.pack(start, length) + cstr(block)
            return _HEADER.pack(ReturnPath.REQ_PAGES_ID, len(body)) + body
        case PageRequest(start=start, length=length):
            return _HEADER.pack(ReturnPath.REQ_PAGES, 12) + _REQUEST.pack(start, length)


def _no_destination(first: bytes) -> str:
    """What the first bytes of another protocol say, at least four; empty if they look like no other one."""
    if first[:2] == b"\x15\x03":
        return "the destination answered with an alert of TLS: TLS is on there (tls-creds), and off at this side"
    there = _OTHERS.get(first[:4])
    if there is None and all(32 <= byte < 127 for byte in first[:4]):
        there = f"it answered with {first[:4].decode()!r}"
    if there is not None:
        return f"there is no migration destination at that address: {there}"
    return ""


class ReturnPathDecoder:
    """Turns the bytes of the return path into messages.

    Args:
        blocks: used length in bytes of every RAM block by name, to check page requests.
        marks: the source has sent its mark, so a trimig destination answers it and may use :mod:`.marks`.
    """

    def __init__(self, blocks: Mapping[str, int], *, marks: bool = False) -> None:
        self._marks = marks
        #: True once the destination has answered the mark.
        self.marked = False
        self._blocks = dict(blocks)
        self._buffer = bytearray()
        self._offset = 0
        self._block: str | None = None
        self._shut = False
        #: Blocks whose bitmap was requested and has not come.
        self._asked: set[str] = set()

    def expect_bitmap(self, block: str) -> None:
        """Record that the destination was asked for the received pages of *block*."""
        self._asked.add(block)

    @property
    def pending(self) -> int:
        """Bytes of a message that has begun and is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """All messages that *data* completes. Bytes after SHUT are ignored (return_path.md part 4.1).

        Raises:
            RemoteProtocolError: unknown type, wrong length, or a request for memory that does not exist.
        """
        self._buffer += data
        messages: list[Message] = []
        while not self._shut and (message := self._next()) is not None:
            messages.append(message)
        if self._shut:
            self._buffer.clear()
        return messages

    def _next(self) -> Message | None:
        """The message at the front, with its data; None if it is not complete yet."""
        if len(self._buffer) < 4:
            return None
        number, length = _HEADER.unpack_from(self._buffer)
        if self.marked and is_mark(number):
            return self._mark(Mark(number), length)
        kind = self._check_header(number, length)
        if len(self._buffer) < 4 + length:
            return None
        payload = bytes(self._buffer[4 : 4 + length])
        if kind is ReturnPath.RECV_BITMAP:
            return self._received_pages(payload)
        message = self._decode(kind, payload)
        self._drop(4 + length)
        return message

    def _mark(self, mark: Mark, length: int) -> Message | None:
        if (problem := wrong_length(mark, length)) is not None:
            raise self._error(problem)
        if len(self._buffer) < 4 + length:
            return None
        payload = bytes(self._buffer[4 : 4 + length])
        self._drop(4 + length)
        match mark:
            case Mark.REASON:
                return Reason(payload=payload)
            case Mark.CLOCK:
                return Clock(microseconds=int.from_bytes(payload))
            case Mark.ATTEMPT:
                return Attempt(id=payload)

    def _received_pages(self, payload: bytes) -> ReceivedPages | None:
        """The bitmap that follows the RECV_BITMAP message at the front; None if it is not complete yet."""
        if not payload or len(payload) != 1 + payload[0]:
            raise self._error(f"RECV_BITMAP of {len(payload)} bytes does not fit the name inside it")
        name = payload[1:].decode("utf-8", "surrogateescape")
        if name not in self._asked:
            raise self._error(f"RECV_BITMAP of the RAM block {name!r} was not asked for")
        count = self._blocks[name] // PAGE_SIZE
        start = 4 + len(payload)
        end = start + bitmap_bytes(count) + BITMAP_FRAME
        # Check the length before the rest has come, to refuse a wrong bitmap early.
        check_bitmap_size(self._buffer[start : start + 8], count, offset=self._offset, block=name)
        if len(self._buffer) < end:
            return None
        pages = decode_received_bitmap(bytes(self._buffer[start:end]), count, offset=self._offset, block=name)
        self._asked.remove(name)
        self._drop(end)
        return ReceivedPages(block=name, pages=pages)

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._offset += count

    def _error(self, text: str) -> RemoteProtocolError:
        return RemoteProtocolError(text, offset=self._offset, section="return path")

    def _check_header(self, number: int, length: int) -> ReturnPath:
        try:
            kind = ReturnPath(number)
        except ValueError:
            if not self._offset and (problem := _no_destination(bytes(self._buffer))):
                raise self._error(problem) from None
            raise self._error(f"invalid return-path message type {number:#06x} (length {length})") from None
        expected = _FIXED_LENGTH.get(kind)
        if expected is not None and length != expected:
            raise self._error(f"{kind.name} with {length} bytes of payload, expected {expected}")
        if length > MAX_PAYLOAD:
            raise self._error(f"{kind.name} with {length} bytes of payload, at most {MAX_PAYLOAD} are possible")
        return kind

    def _decode(self, kind: ReturnPath, payload: bytes) -> Message:
        match kind:
            case ReturnPath.SHUT:
                self._shut = True
                return Shut(status=_BE32.unpack(payload)[0])
            case ReturnPath.PONG:
                value = _BE32.unpack(payload)[0]
                self.marked = self.marked or (self._marks and value == PONG_MARK)
                return Pong(value=value)
            case ReturnPath.RESUME_ACK:
                value = _BE32.unpack(payload)[0]
                if value != 1:
                    raise self._error(f"RESUME_ACK with the value {value}, only 1 is defined")
                return ResumeAck(value=value)
            case ReturnPath.REQ_PAGES_ID:
                if len(payload) < 13 or len(payload) != 13 + payload[12]:
                    raise self._error(f"REQ_PAGES_ID of {len(payload)} bytes does not fit the name inside it")
                name = payload[13:].decode("utf-8", "surrogateescape")
                return self._request(name, payload, named=True)
            case ReturnPath.REQ_PAGES:
                if self._block is None:
                    raise self._error("REQ_PAGES before any REQ_PAGES_ID: there is no previous block")
                return self._request(self._block, payload, named=False)
            case ReturnPath.SWITCHOVER_ACK:
                return SwitchoverAck()
            case ReturnPath.RECV_BITMAP:  # a RECV_BITMAP is complete only with its bitmap
                raise self._error(f"{kind.name} was not asked for: this migration does not use it")

    def _request(self, block: str, payload: bytes, *, named: bool) -> PageRequest:
        start, length = _REQUEST.unpack_from(payload)
        if block not in self._blocks:
            raise self._error(f"page request for the unknown RAM block {block!r}")
        if start % PAGE_SIZE or length % PAGE_SIZE:
            raise self._error(f"misaligned page request: start {start:#x}, length {length:#x} in {block!r}")
        if length == 0 or start + length > self._blocks[block]:
            raise self._error(
                f"page request {start:#x}+{length:#x} overruns {block!r} of {self._blocks[block]:#x} bytes"
            )
        self._block = block
        return PageRequest(block=block, start=start, length=length, named=named)
