"""The busy guest of :mod:`bench.encodings`: the same memory and the same writes in trimig and in a QEMU.

Its memory is a real image (:mod:`bench.image`). At 100 ticks a second it adds 1 to the first 4 bytes of some of its *hot*
pages, each hot page in turn, scattered over all of them. So a written page differs from its last version in a few bytes,
which suits XBZRLE, and the memory can be checked: after each number of writes the content of every page is known.

In trimig the guest is a worker process (:mod:`bench.busy_worker`), in a QEMU a boot sector (:mod:`bench.busy_boot`). The
first pages of a PC are the BIOS's and so are its last ones, so both guests leave them alone.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError
from bench.memory import PAGE_SIZE, Pages, differing, expected, fill

#: The timer of the guest.
TICKS_PER_SECOND: Final = 100
#: The first page of the image and of the hot pages: 16 MiB.
FIRST: Final = (16 << 20) // PAGE_SIZE
#: Pages at the end that the BIOS of a PC uses: 17 MiB. SeaBIOS runs a copy of itself right below the last 16 MiB.
LAST: Final = (17 << 20) // PAGE_SIZE
_SLICE: Final = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The settings of the guest.

    Raises:
        BenchError: the hot pages do not fit into the memory.
    """

    #: Bytes of RAM.
    size: int
    #: Hot pages, from FIRST on; a power of two.
    hot: int
    #: Pages that are written each second.
    rate: int

    def __post_init__(self) -> None:
        if self.hot < TICKS_PER_SECOND or self.hot & (self.hot - 1):
            raise BenchError(f"{self.hot} hot pages are not a power of two of at least {TICKS_PER_SECOND}")
        if FIRST + self.hot + LAST > self.size // PAGE_SIZE:
            most = (self.size // PAGE_SIZE - FIRST - LAST) * PAGE_SIZE >> 20
            raise BenchError(f"{self.hot * PAGE_SIZE >> 20} MiB of hot pages do not fit: at most {most} MiB")
        if not TICKS_PER_SECOND <= self.rate <= self.hot * TICKS_PER_SECOND:
            raise BenchError(
                f"{self.rate} writes a second: at least one and at most all hot pages are written each tick"
            )

    @property
    def per_tick(self) -> int:
        """Pages that are written in one tick."""
        return self.rate // TICKS_PER_SECOND

    @property
    def stride(self) -> int:
        """Pages from one write to the next; odd, so that each hot page has its turn."""
        return (self.hot * 5 // 8) | 1

    def indices(self, first: int, count: int) -> NDArray[np.intp]:
        """The pages of the writes *first*, *first* + 1, …, counted from 0; at most one turn of all hot pages."""
        turn = np.arange(first, first + count, dtype=np.int64) % self.hot
        return (FIRST + turn * self.stride % self.hot).astype(np.intp)

    def fill(self, pages: Pages) -> None:
        """Write the image into memory that is zero so far."""
        fill(self._image(pages), "image")

    def count(self, pages: Pages) -> int:
        """The writes that the memory has seen.

        The guest must not run.

        Raises:
            BenchError: a page is not what so many writes leave: one was lost, or made twice.
        """
        image = self._image(pages)
        turns = np.zeros(self.hot, np.int64)
        for first in range(0, len(image), _SLICE):
            part = image[first : first + _SLICE].copy()
            wanted = expected(first, len(part), len(image), "image")
            hot = slice(0, max(0, min(len(part), self.hot - first)))
            made = _word(part)[hot] - _word(wanted)[hot]
            turns[first : first + len(made)] = made
            part[hot, :4] = wanted[hot, :4]
            if wrong := differing(part, wanted):
                raise BenchError(f"{wrong} of the pages from {FIRST + first} on are not what the guest had")
        # In the order of the writes: pages of the present turn come first.
        turns = turns[self.indices(0, self.hot) - FIRST]
        begun = int(turns[0])
        current = int(np.count_nonzero(turns == begun))
        if not ((turns[:current] == begun).all() and (turns[current:] == begun - 1).all()):
            raise BenchError("the hot pages are not what any number of writes leaves: a write was lost")
        return current + (begun - 1) * self.hot if current < self.hot else begun * self.hot

    def _image(self, pages: Pages) -> Pages:
        return pages[FIRST : len(pages) - LAST]


def _word(pages: Pages) -> NDArray[np.uint32]:
    """The first word of each page."""
    words: NDArray[np.uint32] = pages.view(np.uint32)[:, 0]
    return words
