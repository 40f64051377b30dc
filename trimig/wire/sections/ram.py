"""Reads the section ``ram`` (ram.md): the size list, page records by their encodings, and the end word."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE
from ..constants import RamFlag, Section
from ..events import Element, PageElement, PageRun, RamEnd, RamList, RamSync, SectionHeader
from ..pages.compressed import read_compressed
from ..pages.mixed import read_mixed
from ..pages.plain import FIRST_LOOK, PAGE_AGAIN, RECORD, ZERO_AGAIN, ZERO_RECORD, read_pages, read_zeros
from ..pages.xbzrle import read_deltas
from ..refusals import Unsupported, wrong_page_size

if TYPE_CHECKING:
    from ..pages.state import PageState
    from .reader import Window

_BE64 = struct.Struct(">Q")
_FLAGS: Final = PAGE_SIZE - 1
#: As an int, because the complement of a RamFlag has only the bits of named flags.
_CONTINUE: Final = int(RamFlag.CONTINUE)
#: Bytes needed to find out whether records alternate.
_MIXED_LOOK: Final = 2 * RECORD
#: The most blocks in one RAM START; a QEMU machine has a handful.
MAX_BLOCKS: Final = 4096

#: Reads the records of one encoding at the start of a window: ``(state, window, block, head)``.
#:
#: *block* is the block of the first record, and *head* the bytes in front of its content: 8 if it continues the block
#: of the record before, and more if it contains the name. The result is an event of at least one record and the bytes
#: that it takes, or ``(None, 0)`` if more bytes are needed. Only the first record of an event may have a name. The
#: encoding checks that the pages are inside the block (:meth:`PageState.inside`) and says whether they go on as a run.
PageEncoding = Callable[["PageState", "Window", str, int], tuple[Element | None, int]]

#: The encodings that are read, by the flag of their records.
ENCODINGS: Final[Mapping[int, PageEncoding]] = MappingProxyType(
    {
        RamFlag.PAGE: read_pages,
        RamFlag.ZERO: read_zeros,
        RamFlag.XBZRLE: read_deltas,
        RamFlag.COMPRESS_PAGE: read_compressed,
    }
)

#: Records that are not supported, and the capability that makes a sender use them.
_NOT_BUILT: Final[Mapping[int, str]] = MappingProxyType(
    {
        RamFlag.HOOK: "a record private to the RDMA transport",
        RamFlag.FULL: "an obsolete FULL record",
    }
)


class RamReader:
    """Reads the RAM sections of one stream.

    Args:
        state: of the stream's pages.
        encodings: as :data:`ENCODINGS`.
        multifd: pages may come on data channels too, so that the stream may have :class:`trimig.wire.events.RamSync`.
    """

    def __init__(
        self, state: PageState, encodings: Mapping[int, PageEncoding] = ENCODINGS, *, multifd: bool = False
    ) -> None:
        self._state = state
        self._multifd = multifd
        self._encodings = encodings
        self._queued: Element | None = None
        self._expect_list = False
        self._ended = False

    @property
    def ended(self) -> bool:
        """The last event was the end word."""
        return self._ended

    def begin(self, header: SectionHeader) -> None:
        """The content of *header* follows; the first record of a START is the size list."""
        self._ended = False
        if header.kind is Section.START:
            self._expect_list = True

    def read(self, window: Window) -> tuple[Element | None, int]:
        """Read the next event, and the number of bytes that it takes. ``(None, 0)``: more bytes are needed."""
        sizes, offset = self._state.sizes, window.offset
        try:
            event, used = self._read(window)
        except RemoteProtocolError:
            size = sizes.of_content() or sizes.of_lookahead(window.array, window.pos, window.end, offset)
            if size is None and not window.final and sizes.more_could_tell(offset, window.have):
                return None, 0
            if size is None:
                raise
            raise wrong_page_size(size, offset=offset, section="ram") from None
        if isinstance(event, PageElement):
            sizes.add(event.offsets)
            if isinstance(event, PageRun):
                # In a run the first record ends before *used*. Only a single record may be misread.
                sizes.keep(int(event.offsets[0]), event.data[0], offset + used if len(event.offsets) == 1 else -1)
        return event, used

    def _read(self, window: Window) -> tuple[Element | None, int]:
        if self._queued is not None:
            event, self._queued = self._queued, None
            return event, 0
        if window.have < 8:
            return None, 0
        offset = window.offset
        word = int(_BE64.unpack_from(window.array.data, window.pos)[0])
        flags = word & _FLAGS
        encoding = self._encodings.get(flags & ~_CONTINUE)
        if encoding is not None:
            if not flags & _CONTINUE:
                return self._named(window, encoding)
            return self._continued(window, encoding, flags)
        if flags == RamFlag.EOS:
            self._state.end_run()
            if self._expect_list:
                raise RemoteProtocolError("RAM START without a size list", offset=offset, section="ram")
            self._ended = True
            return RamEnd(at=offset), 8
        if flags == RamFlag.MULTIFD_FLUSH and self._multifd:
            self._state.end_run()
            return RamSync(at=offset), 8
        if flags == RamFlag.MEM_SIZE and self._expect_list:
            return self._size_list(window, word & ~_FLAGS)
        raise self._refuse(word, offset)

    def _continued(self, window: Window, encoding: PageEncoding, flags: int) -> tuple[Element | None, int]:
        state = self._state
        block = state.block
        if block is None:
            raise RemoteProtocolError(
                "page record without a block: it continues a block that was never named",
                offset=window.offset,
                section="ram",
            )
        if state.reorder and window.have > _MIXED_LOOK and flags in (PAGE_AGAIN, ZERO_AGAIN):
            mixed = self._alternating(window, block)
            if mixed is not None:
                return mixed
        return encoding(state, window, block, 8)

    def _named(self, window: Window, encoding: PageEncoding) -> tuple[Element | None, int]:
        array, pos, have = window.array, window.pos, window.have
        if have < 9:
            return None, 0
        head = 9 + int(array[pos + 8])  # as an int: with the array's own type the sum would wrap at 256
        if have < head:
            return None, 0
        name = array[pos + 9 : pos + head].tobytes().decode("utf-8", "surrogateescape")
        if name not in self._state.blocks:
            raise RemoteProtocolError(f"page of the unknown RAM block {name!r}", offset=window.offset, section="ram")
        event, used = encoding(self._state, window, name, head)
        if event is not None:
            self._state.block = name
        return event, used

    def _alternating(self, window: Window, block: str) -> tuple[Element, int] | None:
        """Read the next records, if they change their kind often; None if a run follows, or may follow."""
        array, pos, end, offset, _ = window
        # Two words are enough: a long run has the same flags in the next record, and again a few records later.
        size = RECORD if array[pos + 7] == PAGE_AGAIN else ZERO_RECORD
        near, far = pos + size + 7, pos + FIRST_LOOK * size + 7
        if far >= end or (array[near] == array[pos + 7] and array[far] == array[pos + 7]):
            return None
        found = read_mixed(array, pos, end, block, self._state.blocks[block], offset)
        if found is None:
            return None
        zeros, pages, used = found
        self._state.end_run()
        self._queued = pages
        return zeros, used

    def _refuse(self, word: int, offset: int) -> RemoteProtocolError:
        if (size := self._state.sizes.of_flags(word)) is not None:
            return wrong_page_size(size, offset=offset, section="ram")
        flags = word & _FLAGS
        if flags == RamFlag.MULTIFD_FLUSH:
            return Unsupported(
                "a synchronisation mark of multifd channels (capability multifd), and multifd is off here: turn it on here, or "
                "off at the source",
                offset=offset,
                section="ram",
            )
        known = _NOT_BUILT.get(flags & ~_CONTINUE)
        if known is not None:
            return Unsupported(f"{known}, which is not supported yet (flags {flags:#x})", offset=offset, section="ram")
        if flags == RamFlag.MEM_SIZE:
            text = "a size list outside of RAM START"
        else:
            text = f"unknown combination of RAM flags {flags:#x}"
        return RemoteProtocolError(text, offset=offset, section="ram")

    def _size_list(self, window: Window, total: int) -> tuple[Element | None, int]:
        state, array, pos, have, offset = self._state, window.array, window.pos, window.have, window.offset
        if total > state.max_ram_bytes:
            raise RemoteProtocolError(
                f"{total} bytes of RAM announced, at most {state.max_ram_bytes} are accepted",
                offset=offset,
                section="ram",
            )
        blocks: dict[str, int] = {}
        page_sizes: dict[str, int] = {}
        large = state.host_page_sizes & ~PAGE_SIZE
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
        state.know(blocks)
        state.block = None
        state.end_run()
        self._expect_list = False
        return RamList(blocks=tuple(blocks.items()), page_sizes=page_sizes, at=offset), used
