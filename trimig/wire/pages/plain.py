"""Reads page records inside the section ``ram`` (ram.md), in runs.

A record is a be64 word (offset | flags), the block's name unless CONTINUE is set, and the content. Reading page by page
would cost a Python call for every 4 KiB, so runs of equal records are found with NumPy: the buffer is viewed as an
array of records, all their words are checked at once, and the pages are returned as a view without a copy.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE
from ..constants import RamFlag
from ..events import Element, PageRun, RamEnd, RamList, ZeroRun
from ..refusals import Unsupported
from .mixed import read_mixed
from .size import PageSizes, wrong_page_size

_BE64 = struct.Struct(">Q")
_FLAGS: Final = PAGE_SIZE - 1
#: As an int, because the complement of a RamFlag has only the bits of named flags.
_CONTINUE: Final = int(RamFlag.CONTINUE)
_PAGE_AGAIN: Final = RamFlag.PAGE | RamFlag.CONTINUE
_ZERO_AGAIN: Final = RamFlag.ZERO | RamFlag.CONTINUE
_RECORD: Final = 8 + PAGE_SIZE
_ZERO_RECORD: Final = 9
#: Records checked before a run is known to be long: in mixed memory the run ends soon, and the bytes after it are not
#: records of this size.
_FIRST_LOOK: Final = 16
#: Bytes needed to find out whether records alternate.
_MIXED_LOOK: Final = 2 * _RECORD
#: The most blocks in one RAM START; a QEMU machine has a handful.
MAX_BLOCKS: Final = 4096

#: Records that are not supported, and the capability that makes a sender use them.
_NOT_BUILT: Final[Mapping[int, str]] = MappingProxyType(
    {
        RamFlag.XBZRLE: "a delta-encoded page (capability xbzrle)",
        RamFlag.COMPRESS_PAGE: "a compressed page (capability compress)",
        RamFlag.HOOK: "a record private to the RDMA transport",
        RamFlag.MULTIFD_FLUSH: "a synchronisation mark of multifd channels (capability multifd)",
        RamFlag.FULL: "an obsolete FULL record",
    }
)


class RecordReader:
    """Reads the records of one stream's RAM sections; keeps the last block across sections, as the wire format does."""

    def __init__(self, *, reorder: bool = False) -> None:
        self._reorder = reorder
        self._queued: Element | None = None
        self._blocks: dict[str, int] = {}
        self._block: str | None = None
        self._run_next = 0
        self._run_length = 0
        #: The next record must be the size list of a START section.
        self.expect_list = False
        #: The page size as far as the offsets of the pages show it.
        self.sizes = PageSizes()
        #: The host page sizes that ADVISE has announced, or'ed; 0 before it.
        self.page_sizes = 0

    def know(self, blocks: Mapping[str, int]) -> None:
        """Set the blocks of a size list that was received on another connection."""
        self._blocks = dict(blocks)

    @property
    def blocks(self) -> MappingProxyType[str, int]:
        """Used length by block name, from the size list."""
        return MappingProxyType(self._blocks)

    @property
    def open_run(self) -> tuple[str, int, int] | None:
        """``(block, next offset, pages so far)`` of the last run of consecutive pages, if there is one."""
        if self._block is None or not self._run_length:
            return None
        return self._block, self._run_next, self._run_length

    def extend_run(self, pages: int) -> None:
        """Extend the open run by *pages* pages that the caller has read."""
        self._run_next += pages * PAGE_SIZE
        self._run_length += pages
        self.sizes.adjoining()

    def end_run(self) -> None:
        """End the open run, because the next record does not continue it."""
        self._run_length = 0

    def read(
        self,
        array: NDArray[np.uint8],
        pos: int,
        end: int,
        offset: int,
        max_ram_bytes: int,
        *,
        final: bool = True,
    ) -> tuple[Element | None, int]:
        """Read the next event from ``array[pos:end]``, which is at stream *offset*, and the number of bytes used.

        ``(None, 0)``: not enough bytes. *final*: no more will come.
        """
        try:
            event, used = self._read(array, pos, end, offset, max_ram_bytes)
        except RemoteProtocolError:
            size = self.sizes.of_content() or self.sizes.of_lookahead(array, pos, end, offset)
            if size is None and not final and self.sizes.more_could_tell(offset, end - pos):
                return None, 0
            if size is None:
                raise
            raise wrong_page_size(size, offset=offset, section="ram") from None
        if isinstance(event, PageRun | ZeroRun):
            self.sizes.add(event.offsets)
            if isinstance(event, PageRun):
                # In a run the first record ends before *used*. Only a single record may be misread.
                self.sizes.keep(int(event.offsets[0]), event.data[0], offset + used if len(event.offsets) == 1 else -1)
        return event, used

    def _read(
        self, array: NDArray[np.uint8], pos: int, end: int, offset: int, max_ram_bytes: int
    ) -> tuple[Element | None, int]:
        if self._queued is not None:
            event, self._queued = self._queued, None
            return event, 0
        have = end - pos
        if have < 8:
            return None, 0
        word = int(_BE64.unpack_from(array.data, pos)[0])
        flags = word & _FLAGS
        if flags in (_PAGE_AGAIN, _ZERO_AGAIN):
            if self._block is None:
                raise RemoteProtocolError(
                    "page record without a block: it continues a block that was never named",
                    offset=offset,
                    section="ram",
                )
            if self._reorder and have > _MIXED_LOOK and (mixed := self._alternating(array, pos, end, offset)):
                return mixed
            if flags == _PAGE_AGAIN:
                return self._page_run(array, pos, have, offset)
            return self._zero_run(array, pos, have, offset)
        kind = flags & ~_CONTINUE
        if kind in (RamFlag.PAGE, RamFlag.ZERO):
            return self._named(array, pos, have, offset, word, RamFlag(kind))
        if flags == RamFlag.EOS:
            self._run_length = 0
            if self.expect_list:
                raise RemoteProtocolError("RAM START without a size list", offset=offset, section="ram")
            return RamEnd(at=offset), 8
        if flags == RamFlag.MEM_SIZE and self.expect_list:
            return self._size_list(array, pos, have, offset, word & ~_FLAGS, max_ram_bytes)
        raise self._refuse(word, offset)

    def _alternating(self, array: NDArray[np.uint8], pos: int, end: int, offset: int) -> tuple[Element, int] | None:
        """Read the next records, if they change their kind often; None if a run follows, or may follow."""
        # Two words are enough: a long run has the same flags in the next record, and again a few records later.
        size = _RECORD if array[pos + 7] == _PAGE_AGAIN else _ZERO_RECORD
        near, far = pos + size + 7, pos + _FIRST_LOOK * size + 7
        if far >= end or (array[near] == array[pos + 7] and array[far] == array[pos + 7]):
            return None
        assert self._block is not None
        found = read_mixed(array, pos, end, self._block, self._blocks[self._block], offset)
        if found is None:
            return None
        zeros, pages, used = found
        self._run_length = 0
        self._queued = pages
        return zeros, used

    def _refuse(self, word: int, offset: int) -> RemoteProtocolError:
        if (size := self.sizes.of_flags(word)) is not None:
            return wrong_page_size(size, offset=offset, section="ram")
        flags = word & _FLAGS
        known = _NOT_BUILT.get(flags & ~_CONTINUE)
        if known is not None:
            return Unsupported(f"{known}, which is not supported yet (flags {flags:#x})", offset=offset, section="ram")
        if flags == RamFlag.MEM_SIZE:
            text = "a size list outside of RAM START"
        else:
            text = f"unknown combination of RAM flags {flags:#x}"
        return RemoteProtocolError(text, offset=offset, section="ram")

    def _inside(self, offsets: NDArray[np.int64], offset: int) -> NDArray[np.int64]:
        """The offsets before the first one that is outside of the block; an error if it is the first of all.

        So the events before an error are the same for any division of the bytes into pieces.
        """
        assert self._block is not None
        length = self._blocks[self._block]
        if int(offsets.max()) < length and int(offsets.min()) >= 0:
            return offsets
        good = int(np.argmax((offsets >= length) | (offsets < 0)))
        if good:
            return offsets[:good]
        raise RemoteProtocolError(
            f"page at {int(offsets[0]) & (2**64 - 1):#x} is outside of RAM block {self._block!r}, "
            f"which has {length:#x} bytes",
            offset=offset,
            section="ram",
        )

    def _words(self, array: NDArray[np.uint8], pos: int, count: int, record: int, flags: int) -> NDArray[np.int64]:
        """Offsets of the longest run of records with exactly *flags* at *pos*; at least one, at most *count*."""
        look = min(count, _FIRST_LOOK)
        while True:
            view = as_strided(array[pos:], shape=(look, 8), strides=(record, 1))
            words = np.ascontiguousarray(view).view(">u8").reshape(-1).astype(np.uint64)
            same = (words & np.uint64(_FLAGS)) == np.uint64(flags)
            if not same.all():
                words = words[: int(np.argmin(same))]
                break
            if look == count:
                break
            look = min(count, look * 8)
        return (words & ~np.uint64(_FLAGS)).astype(np.int64)

    def _page_run(self, array: NDArray[np.uint8], pos: int, have: int, offset: int) -> tuple[Element | None, int]:
        count = have // _RECORD
        if count == 0:
            return None, 0
        offsets = self._inside(self._words(array, pos, count, _RECORD, _PAGE_AGAIN), offset)
        assert self._block is not None
        count = len(offsets)
        data = as_strided(array[pos + 8 :], shape=(count, PAGE_SIZE), strides=(_RECORD, 1))
        first, last = int(offsets[0]), int(offsets[-1])
        if last - first == (count - 1) * PAGE_SIZE and (count == 1 or bool((np.diff(offsets) == PAGE_SIZE).all())):
            self._run_length = self._run_length + count if first == self._run_next else count
        else:
            self._run_length = 0
        self._run_next = last + PAGE_SIZE
        return PageRun(block=self._block, named=False, offsets=offsets, data=data, at=offset), count * _RECORD

    def _zero_run(self, array: NDArray[np.uint8], pos: int, have: int, offset: int) -> tuple[Element | None, int]:
        count = have // _ZERO_RECORD
        if count == 0:
            return None, 0
        offsets = self._inside(self._words(array, pos, count, _ZERO_RECORD, _ZERO_AGAIN), offset)
        assert self._block is not None
        count = len(offsets)
        self._run_length = 0
        fills = array[pos + 8 : pos + count * _ZERO_RECORD : _ZERO_RECORD].copy()
        event = ZeroRun(block=self._block, named=False, offsets=offsets, fills=fills, at=offset)
        return event, count * _ZERO_RECORD

    def _named(
        self, array: NDArray[np.uint8], pos: int, have: int, offset: int, word: int, kind: RamFlag
    ) -> tuple[Element | None, int]:
        if have < 9:
            return None, 0
        head = 9 + int(array[pos + 8])  # as an int: with the array's own type the sum would wrap at 256
        if have < head:
            return None, 0
        size = head + (PAGE_SIZE if kind is RamFlag.PAGE else 1)
        name = array[pos + 9 : pos + head].tobytes().decode("utf-8", "surrogateescape")
        if name not in self._blocks:
            raise RemoteProtocolError(f"page of the unknown RAM block {name!r}", offset=offset, section="ram")
        if have < size:
            return None, 0
        self._block = name
        at = word & ~_FLAGS
        if at >= self._blocks[name]:
            raise RemoteProtocolError(
                f"page at {at:#x} is outside of RAM block {name!r}, which has {self._blocks[name]:#x} bytes",
                offset=offset,
                section="ram",
            )
        offsets = np.array([at], np.int64)
        self._run_next, self._run_length = at + PAGE_SIZE, 1 if kind is RamFlag.PAGE else 0
        content = array[pos + head : pos + size]
        if kind is RamFlag.PAGE:
            return PageRun(block=name, named=True, offsets=offsets, data=content.reshape(1, -1), at=offset), size
        return ZeroRun(block=name, named=True, offsets=offsets, fills=content.copy(), at=offset), size

    def _size_list(
        self, array: NDArray[np.uint8], pos: int, have: int, offset: int, total: int, max_ram_bytes: int
    ) -> tuple[Element | None, int]:
        if total > max_ram_bytes:
            raise RemoteProtocolError(
                f"{total} bytes of RAM announced, at most {max_ram_bytes} are accepted", offset=offset, section="ram"
            )
        blocks: dict[str, int] = {}
        page_sizes: dict[str, int] = {}
        large = self.page_sizes & ~PAGE_SIZE
        used = 8
        left = total
        while left:
            if have < used + 1:
                return None, 0
            size = int(array[pos + used])
            if have < used + 1 + size + 8:
                return None, 0
            name = array[pos + used + 1 : pos + used + 1 + size].tobytes().decode("utf-8", "surrogateescape")
            length = int(_BE64.unpack_from(array.data, pos + used + 1 + size)[0])
            problem = None
            if name in blocks:
                problem = f"RAM block {name!r} is announced twice"
            elif not name:
                problem = "RAM block without a name"
            elif length % PAGE_SIZE or not 0 < length <= left:
                problem = f"RAM block {name!r} of {length} bytes does not fit the announced total of {total}"
            elif len(blocks) >= MAX_BLOCKS:
                problem = f"more than {MAX_BLOCKS} RAM blocks"
            if problem is not None:
                raise RemoteProtocolError(problem, offset=offset + used, section="ram")
            blocks[name] = length
            used += 1 + size + 8
            left -= length
            if large:
                # The list contains a page size only if it is not the usual one. No other element that may follow looks
                # like a page size: a name does not begin with a zero, and the end word is no page size.
                if have < used + 8:
                    return None, 0
                found = int(_BE64.unpack_from(array.data, pos + used)[0])
                if found & large == found and found.bit_count() == 1:
                    page_sizes[name] = found
                    used += 8
        self._blocks = blocks
        self._block = None
        self._run_length = 0
        self.expect_list = False
        return RamList(blocks=tuple(blocks.items()), page_sizes=page_sizes, at=offset), used
