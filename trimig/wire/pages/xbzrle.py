"""XBZRLE: a page as the difference from its former content (ram.md part 6).

A delta is a row of pairs: a number of equal bytes, a number of different bytes, and these. The runs are as long as
possible, so a pair of pages has exactly one delta. A receiver needs no cache: it changes the page that it has.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE
from ..constants import RamFlag
from ..events import PageElement, PageRun

if TYPE_CHECKING:
    from ..encoder import RecordWriter
    from ..events import Element, ReadPage
    from ..sections.reader import Window
    from .state import PageState

#: Behind the word, and the name: the kind of the encoding, and the number of bytes of the delta.
_HEAD: Final = struct.Struct(">BH")
_KIND: Final = 1
_BE64: Final = struct.Struct(">Q")
_FLAGS: Final = PAGE_SIZE - 1
_AGAIN: Final = int(RamFlag.XBZRLE | RamFlag.CONTINUE)
#: Records of one event, and bytes of its deltas behind which no further record is added: deltas of very many runs take about a
#: third of a microsecond for each byte to apply.
MOST_RECORDS: Final = 256
MOST_BYTES: Final = 16 << 10
_TWO_BYTES: Final = 0x80
_MOST: Final = 0x3FFF


def encode(old: NDArray[np.uint8], new: NDArray[np.uint8]) -> bytes | None:
    """The delta that makes *new* of *old*.

    Args:
        old: uint8, shape (page size,).
        new: the same.

    Returns:
        An empty delta for equal pages; None if the delta would be longer than the page.
    """
    different = old != new
    edges = np.flatnonzero(different[1:] != different[:-1]) + 1
    # Begin and end of each run of different bytes, in turns.
    borders = edges.tolist()
    if different[0]:
        borders.insert(0, 0)
    if different[-1]:
        borders.append(len(new))
    out = bytearray()
    at = 0
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        if len(out) + 2 > PAGE_SIZE:
            return None
        out += _uleb(begin - at)
        if len(out) + 2 > PAGE_SIZE:
            return None
        out += _uleb(end - begin)
        if len(out) + end - begin > PAGE_SIZE:
            return None
        out += new[begin:end].tobytes()
        at = end
    # QEMU wants room for one more number as long as bytes are left, even if these are equal.
    if at < PAGE_SIZE and len(out) + 2 > PAGE_SIZE:
        return None
    return bytes(out)


def decode(delta: bytes, page: NDArray[np.uint8], at: int) -> None:
    """Apply *delta* to *page*, uint8, shape (page size,).

    Args:
        at: offset of the record in the stream, for the error.

    Raises:
        RemoteProtocolError: it is malformed; *page* may be changed.
    """
    view, size = page.data, len(delta)
    position = place = 0
    while position < size:
        equal, position = _number(delta, position, at)
        if not equal and place:
            raise _malformed("a run of no equal bytes", at)
        place += equal
        if place > PAGE_SIZE:
            raise _malformed(f"equal bytes up to {place}", at)
        count, position = _number(delta, position, at)
        end, behind = place + count, position + count
        if not count:
            raise _malformed("a run of no different bytes", at)
        if end > PAGE_SIZE:
            raise _malformed(f"different bytes up to {end}", at)
        if behind > size:
            raise _malformed(f"a run of {count} bytes, of which {size - position} are there", at)
        view[place:end] = delta[position:behind]
        place, position = end, behind


def record_content(delta: bytes) -> bytes:
    """What follows the word of the record with *delta*, and the block's name."""
    return _HEAD.pack(_KIND, len(delta)) + delta


def read_deltas(state: PageState, window: Window, block: str, head: int) -> tuple[Element | None, int]:
    """Read XBZRLE records; see :data:`trimig.wire.sections.ram.PageEncoding`."""
    memory, pos, end, at, _ = window.array.data, window.pos, window.end, window.offset, window.final
    offsets: list[int] = []
    deltas: list[bytes] = []
    place, skip, total = pos, head, 0
    while len(offsets) < MOST_RECORDS and total < MOST_BYTES and end - place >= skip + _HEAD.size:
        kind, size = _HEAD.unpack_from(memory, place + skip)
        problem = None
        if kind != _KIND:
            problem = f"encoding {kind} of an XBZRLE page; only {_KIND} is known"
        elif size > PAGE_SIZE:
            problem = f"XBZRLE delta of {size} bytes for a page of {PAGE_SIZE}"
        if problem is not None:
            if offsets:  # the records in front of it are good
                break
            raise RemoteProtocolError(problem, offset=at, section="ram")
        start = place + skip + _HEAD.size
        if end - start < size:
            break
        offsets.append(_BE64.unpack_from(memory, place)[0] & ~_FLAGS)
        deltas.append(bytes(memory[start : start + size]))
        place, skip, total = start + size, 8, total + size
        if end - place < 8 or _BE64.unpack_from(memory, place)[0] & _FLAGS != _AGAIN:
            break
    if not offsets:
        return None, 0
    # Through uint64: the highest bit of a word may be set.
    where = state.inside(block, np.array(offsets, np.uint64).astype(np.int64), at)
    count = len(where)
    state.end_run()
    used = (place - pos) if count == len(offsets) else head - 8 + sum(11 + len(delta) for delta in deltas[:count])
    return DeltaRun(block=block, named=head > 8, offsets=where, deltas=tuple(deltas[:count]), at=at), used


def _uleb(count: int) -> bytes:
    return bytes([count]) if count < _TWO_BYTES else bytes([count & 0x7F | _TWO_BYTES, count >> 7])


def _number(delta: bytes, position: int, at: int) -> tuple[int, int]:
    if position + 2 > len(delta):
        raise _malformed("it ends inside a run", at)
    first = delta[position]
    if first < _TWO_BYTES:
        return first, position + 1
    second = delta[position + 1]
    if second >= _TWO_BYTES:
        raise _malformed(f"a number of three bytes; the largest is {_MOST}", at)
    return first & 0x7F | second << 7, position + 2


def _malformed(what: str, at: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"XBZRLE delta of a page of {PAGE_SIZE} bytes: {what}", offset=at, section="ram")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaRun(PageElement):
    """Pages of one block, as differences from their former content.

    Attributes:
        deltas: one for each page; an empty one changes nothing.
    """

    deltas: tuple[bytes, ...]

    def content(self, read: ReadPage) -> PageRun:
        """The pages, with each delta applied to the page that *read* returns. A page may occur several times."""
        data = np.empty((len(self.deltas), PAGE_SIZE), np.uint8)
        done: dict[int, int] = {}
        for row, (offset, delta) in enumerate(zip(self.offsets.tolist(), self.deltas, strict=True)):
            index = offset // PAGE_SIZE
            former = data[done[index]] if index in done else read(self.block, index)
            if former is None:
                raise RemoteProtocolError(
                    f"page {index} of RAM block {self.block!r} came as a difference, and it has not come whole before",
                    offset=self.at,
                    section="ram",
                )
            data[row] = former
            decode(delta, data[row], self.at)
            done[index] = row
        return PageRun(block=self.block, named=self.named, offsets=self.offsets, data=data, at=self.at)

    def records(self, writer: RecordWriter) -> bytes:
        """The bytes of these records."""
        contents = [record_content(delta) for delta in self.deltas]
        return writer.records(self.block, self.offsets, RamFlag.XBZRLE, contents)
