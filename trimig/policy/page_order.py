"""The order of pages in postcopy: first the pages that the guest waits for, then their neighbours, then the rest.

Every page is sent once. A request moves the background position to the page after the requested page, because a guest
that touched one page is likely to touch the next pages (ram.md part 10).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..guest import PageBitmap

#: Pages of one request handed over at once; QEMU asks for one host page, which may be 2 MiB.
REQUESTED_PAGES: Final = 512
#: Pages searched in one step for the next unsent page: few enough to cost microseconds.
_LOOK = 1 << 14


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Pages of one block to be sent now, in ascending order. ``urgent``: the guest waits for them."""

    block: int
    pages: NDArray[np.int64]
    urgent: bool


class PageOrder:
    """The pages still to be sent, and their order.

    Args:
        unsent: a bitmap for each block; this object owns them from now on, and clears a page when it is handed out.
    """

    def __init__(self, unsent: Sequence[PageBitmap]) -> None:
        self._unsent = tuple(unsent)
        self._wanted = tuple(np.zeros_like(bitmap) for bitmap in unsent)
        self._requests: collections.deque[tuple[int, int, int]] = collections.deque()
        self._block = 0
        self._position = 0
        self.remaining = sum(int(np.count_nonzero(bitmap)) for bitmap in unsent)

    @property
    def unsent(self) -> Sequence[PageBitmap]:
        """The pages that have not been handed out, for each block; do not change the arrays."""
        return self._unsent

    @property
    def urgent(self) -> bool:
        """Whether the guest waits for a page that has not been handed out."""
        return bool(self._requests)

    def request(self, block: int, first: int, count: int) -> bool:
        """The guest waits for these pages, which exist.

        Returns:
            Whether the request is new. Requests for pages that were sent, or asked for before, are not new: so many
            requests cannot make the queue longer than the number of pages.
        """
        if count == 1:  # as a rule; an array of one page takes several times as long
            if not self._unsent[block][first] or self._wanted[block][first]:
                return False
            self._wanted[block][first] = True
            self._requests.append((block, first, count))
            return True
        pages = slice(first, first + count)
        news = self._unsent[block][pages] & ~self._wanted[block][pages]
        if not news.any():
            return False
        self._wanted[block][pages] |= news
        self._requests.append((block, first, count))
        return True

    def next_batch(self, limit: int) -> Batch | None:
        """Up to *limit* pages to be sent now; None when every page was handed out."""
        return self.requested(limit) or self.background(limit)

    def take_back(self, batch: Batch) -> None:
        """*batch* was not sent: make it the next one."""
        self._unsent[batch.block][batch.pages] = True
        self.remaining += len(batch.pages)
        for page in batch.pages[::-1].tolist():
            self._requests.appendleft((batch.block, page, 1))

    def requested(self, limit: int) -> Batch | None:
        """Up to *limit* pages that the guest waits for; None if there are none."""
        while self._requests:
            block, first, count = self._requests[0]
            one = count == 1 and bool(self._unsent[block][first])
            found = first if one else self._first_unsent(block, first, first + count)
            if found is None:
                self._requests.popleft()
                continue
            batch = self._take_one(block, first) if one else self._take(block, found, first + count, limit, urgent=True)
            if int(batch.pages[-1]) >= first + count - 1:
                self._requests.popleft()
            self._block, self._position = block, int(batch.pages[-1]) + 1
            return batch
        return None

    def background(self, limit: int) -> Batch | None:
        """Up to *limit* pages in the background order; None when every page was handed out."""
        if not self.remaining:
            return None
        while True:
            end = len(self._unsent[self._block])
            found = self._first_unsent(self._block, self._position, end)
            if found is not None:
                batch = self._take(self._block, found, min(end, found + _LOOK), limit, urgent=False)
                self._position = int(batch.pages[-1]) + 1
                return batch
            self._block, self._position = (self._block + 1) % len(self._unsent), 0

    def _first_unsent(self, block: int, first: int, end: int) -> int | None:
        for start in range(first, end, _LOOK):
            part = self._unsent[block][start : min(start + _LOOK, end)]
            at = int(part.argmax())
            if part[at]:
                return start + at
        return None

    def _take_one(self, block: int, page: int) -> Batch:
        """:meth:`_take` of one unsent page that the guest waits for."""
        self._unsent[block][page] = False
        self.remaining -= 1
        return Batch(block=block, pages=np.array([page], np.int64), urgent=True)

    def _take(self, block: int, first: int, end: int, limit: int, *, urgent: bool) -> Batch:
        """Hand out the first *limit* unsent pages from *first*, which is unsent, to *end* at most. No page is handed
        out twice.
        """
        unsent = self._unsent[block]
        near = np.flatnonzero(unsent[first : min(end, first + 4 * limit)])
        pages = (near if len(near) >= limit else np.flatnonzero(unsent[first:end]))[:limit] + first
        unsent[pages] = False
        self.remaining -= len(pages)
        return Batch(block=block, pages=pages, urgent=urgent)
