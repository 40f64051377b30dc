"""Finds the size of target pages of other architectures: only 4096 bytes are read, every other size is an error that
names it.

QEMU's page size is that of the guest's processor: 256 bytes on AVR, 1 KiB on small ARM, 8 KiB on Alpha, 16 KiB on some ARM
boards. A stream says it in its configuration (where it may vary) and in its description, which comes last. Before that
it can be found from the offsets of the pages.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...guest import PAGE_SIZE
from ..constants import RamFlag, Section

_BE64: Final = struct.Struct(">Q")
_BASE_FLAGS: Final = 0xFF
_CONTINUE: Final = int(RamFlag.CONTINUE)
_KINDS: Final = frozenset({int(RamFlag.PAGE), int(RamFlag.ZERO)})
#: The elements that follow the end of a section of RAM: a footer, or without footers another section.
_BEHIND_END: Final = frozenset({Section.FOOTER, Section.PART, Section.END, Section.FULL})
_SMALL: Final = (256, 512, 1024, 2048)
_LARGE: Final = (8192, 16384, 32768, 65536)


class PageSizes:
    """The page size of one stream, as far as the offsets of its pages show it."""

    def __init__(self) -> None:
        self._seen = 0  # bitwise or of the offsets
        self._count = 0
        self._first: tuple[int, bytes] | None = None
        self._first_end = -1

    def add(self, offsets: NDArray[np.int64]) -> None:
        """Record pages at *offsets*."""
        if not self._seen & PAGE_SIZE:
            self._seen |= int(np.bitwise_or.reduce(offsets))
            self._count += len(offsets)

    def adjoining(self) -> None:
        """Record that two pages were adjacent, so pages have 4096 bytes."""
        self._seen |= PAGE_SIZE

    def keep(self, offset: int, content: NDArray[np.uint8], end: int) -> None:
        """Record the first PAGE record: its *content*, if pages have 4096 bytes, and its *end* in the stream."""
        if self._first is None:
            self._first = (offset, content.tobytes())
            self._first_end = end

    def of_flags(self, word: int) -> int | None:
        """The page size by a record's first word with illegal flags; None if the page size is not the reason.

        Offsets are multiples of the page size, so those of smaller pages have bits where other flags are.
        """
        high = word & (PAGE_SIZE - 1) & ~_BASE_FLAGS
        if word & _BASE_FLAGS & ~_CONTINUE not in _KINDS or not high:
            return None
        return high & -high

    def of_content(self) -> int | None:
        """The page size by the content of the first page: with smaller pages it contains the next records."""
        if self._first is None:
            return None
        at, content = self._first
        for size in _SMALL:
            word = int(_BE64.unpack_from(content, size)[0])
            offset = word & ~(size - 1)
            kind = word & (size - 1) & ~_CONTINUE
            follows = kind in _KINDS and at < offset <= at + 64 * size
            ends = word == RamFlag.EOS and content[size + 8] in _BEHIND_END
            if follows or ends:
                return size
        return None

    def more_could_tell(self, offset: int, have: int) -> bool:
        """Whether the bytes after *offset*, of which *have* bytes are there, could show that pages are larger.

        This is possible directly after the first page: an apparently damaged record there may be the rest of that page.
        """
        return offset == self._first_end and have < _LARGE[-1] - PAGE_SIZE + 8

    def of_lookahead(self, array: NDArray[np.uint8], pos: int, end: int, offset: int) -> int | None:
        """The page size by the bytes at the position of the second record, for each larger page size."""
        for size in _LARGE if offset == self._first_end else ():
            at = pos + size - PAGE_SIZE
            if at + 8 > end:
                return None
            word = int(_BE64.unpack_from(array.data, at)[0])
            assert self._first is not None
            kind, offset_there = word & (size - 1) & ~_CONTINUE, word & ~(size - 1)
            follows = kind in _KINDS and 0 < offset_there - self._first[0] <= 64 * size
            if follows or (word == RamFlag.EOS and at + 8 < end and array[at + 8] in _BEHIND_END):
                return size
        return None

    def of_places(self, blocks: Mapping[str, int]) -> int | None:
        """The page size by the offsets of all pages: a larger one, if all offsets are its multiples and all pages have
        come.
        """
        if self._count < 2 or not self._seen:
            return None
        size = self._seen & -self._seen
        if size <= PAGE_SIZE:
            return None
        # The count excludes an incomplete stream that lacks every second page.
        return size if self._count >= sum(-(-length // size) for length in blocks.values()) else None
