"""The cache of XBZRLE at the source (ram.md part 6.1): pages with the content that the destination has.

It is direct-mapped: a page has one slot, which several pages share. A slot has an *age*, the number of the pass in which
its page was last sent; a page whose age is below that number by two or more may be replaced by another one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...guest import PAGE_SIZE, PageBitmap, Pages

Numbers = NDArray[np.int64]

#: Passes that a page stays in its slot without being sent again, as in QEMU.
LIFETIME: Final = 2
_EMPTY: Final = -1


class PageCache:
    """Content of pages, by the number of the page among all pages of the guest.

    A zero page takes no memory. Slots that no page of the guest has are not allocated, so the memory is at most *size*, and
    at most that of the guest.

    Args:
        size: bytes, a power of two and at least one page.
        pages: number of pages of the guest.

    Attributes:
        size: as given.

    Raises:
        MemoryError: there is not enough.
    """

    def __init__(self, size: int, pages: int) -> None:
        self.size = size
        self._slots = size // PAGE_SIZE
        count = min(self._slots, pages)
        self._page: Numbers = np.full(count, _EMPTY, np.int64)
        self._age: Numbers = np.zeros(count, np.int64)
        self._zero: PageBitmap = np.zeros(count, np.bool_)
        self._content: Pages = np.empty((count, PAGE_SIZE), np.uint8)

    def hits(self, numbers: Numbers) -> PageBitmap:
        """For each page of *numbers* whether it is in the cache."""
        found: PageBitmap = self._page[numbers % self._slots] == numbers
        return found

    def content(self, numbers: Numbers) -> Pages:
        """A copy of the pages *numbers*, which are in the cache."""
        slots = numbers % self._slots
        pages: Pages = self._content[slots]
        pages[self._zero[slots]] = 0
        return pages

    def touch(self, numbers: Numbers, age: int) -> None:
        """The pages *numbers*, which are in the cache, are sent in pass *age*."""
        self._age[numbers % self._slots] = age

    def claim(self, numbers: Numbers, now: int, age: int) -> PageBitmap:
        """Give slots to pages that are not in the cache. Each page that gets one must be stored.

        Args:
            numbers: of the pages, each once.
            now: number of the pass.
            age: the age that the slots get.

        Returns:
            For each page whether it got its slot.
        """
        slots = numbers % self._slots
        free = (self._page[slots] == _EMPTY) | (self._age[slots] + LIFETIME <= now)
        # Of several pages with one slot the first gets it.
        rows = np.flatnonzero(free)
        _, first = np.unique(slots[rows], return_index=True)
        taken: PageBitmap = np.zeros(len(numbers), np.bool_)
        taken[rows[first]] = True
        self._page[slots[taken]] = numbers[taken]
        self._age[slots[taken]] = age
        return taken

    def forget(self, numbers: Numbers) -> None:
        """Those of the pages *numbers* that are in the cache leave it."""
        slots = numbers % self._slots
        self._page[slots[self._page[slots] == numbers]] = _EMPTY

    def store(self, numbers: Numbers, pages: Pages) -> None:
        """Replace the content of the pages *numbers*, which are in the cache."""
        slots = numbers % self._slots
        self._content[slots] = pages
        self._zero[slots] = False

    def store_zeros(self, numbers: Numbers) -> None:
        """The same with zeros."""
        self._zero[numbers % self._slots] = True
