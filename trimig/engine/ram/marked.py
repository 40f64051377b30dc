"""Pages on their way from the stream to a guest that writes itself out while it arrives.

The engine marks a page when its content is in memory; the guest takes the mark away before it reads the page. Both happen in
the run loop, only the reading in a thread. So a page that changes while it is read is marked again, and read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...guest import PAGE_SIZE

#: Pages with one bit in the coarse map, which spares looking at every page to find a few.
_PART: Final = 1024


class MarkedPages:
    """Implements :class:`trimig.guest.ArrivingPages`.

    Args:
        lengths: bytes of each block, by its name.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._marks = {name: np.zeros(length // PAGE_SIZE, np.bool_) for name, length in lengths.items()}
        self._parts = {name: np.zeros(-(-len(marks) // _PART), np.bool_) for name, marks in self._marks.items()}
        self._came = trio.Event()
        self._went = trio.Event()
        #: Pages that are marked.
        self.count = 0

    def mark(self, name: str, first: int, count: int) -> None:
        """Pages from *first* on hold what has come."""
        if not count:
            return
        marks = self._marks[name][first : first + count]
        self._parts[name][first // _PART : (first + count - 1) // _PART + 1] = True
        self._add(count - int(np.count_nonzero(marks)))
        marks[:] = True

    def mark_each(self, name: str, indices: NDArray[np.int64]) -> None:
        """The same for pages in any order."""
        marks = self._marks[name]
        self._parts[name][indices // _PART] = True
        new = np.unique(indices[~marks[indices]])
        marks[new] = True
        self._add(len(new))

    def _add(self, count: int) -> None:
        self.count += count
        if count and not self._came.is_set():
            self._came.set()

    def take(self, most: int) -> tuple[str, NDArray[np.int64]] | None:
        """Take marks away. They are of one part of one block."""
        for name, parts in self._parts.items():
            while parts[part := int(parts.argmax())]:
                first = part * _PART
                marks = self._marks[name][first : first + _PART]
                indices = np.flatnonzero(marks)
                taken = indices[:most]
                marks[taken] = False
                parts[part] = len(taken) < len(indices)
                if len(taken):
                    self._subtract(len(taken))
                    return name, taken + first
        return None

    def _subtract(self, count: int) -> None:
        self.count -= count
        if not self.count:
            self._came = trio.Event()
        self.wake()

    def wake(self) -> None:
        """Let :meth:`wait_taken` return."""
        self._went.set()
        self._went = trio.Event()

    async def wait(self) -> None:
        """Wait until a page is marked.

        **Cancellation:** no effect.
        """
        await self._came.wait()

    async def wait_taken(self) -> None:
        """Wait until a page is taken, or :meth:`wake` is called.

        **Cancellation:** no effect.
        """
        await self._went.wait()
