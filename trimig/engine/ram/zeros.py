"""Which pages hold nothing but zeros: one vectorised look for both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import trio
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ...guest import PageBitmap, Pages

#: Pages looked at to guess whether a run is zero throughout.
_PROBES = 8
#: Pages that are looked at between two turns of other tasks: 8 MiB, below two milliseconds.
_SLICE_PAGES = 2048


async def find_zero_pages(pages: Pages, indices: NDArray[np.int64]) -> PageBitmap:
    """:func:`zero_pages` in slices, between which other tasks have a turn.

    **Cancellation:** no effect.
    """
    found = [zero_pages(pages, indices[:_SLICE_PAGES])]
    for start in range(_SLICE_PAGES, len(indices), _SLICE_PAGES):
        await trio.lowlevel.checkpoint()
        found.append(zero_pages(pages, indices[start : start + _SLICE_PAGES]))
    return found[0] if len(found) == 1 else np.concatenate(found)


def zero_pages(pages: Pages, indices: NDArray[np.int64]) -> PageBitmap:
    """Which of the pages *indices* (at least one, in any order) are all zero.

    The first word settles nearly every page that holds data, so only pages that begin with zeros are read whole. If
    those are many, reading the span as it lies (17-29 GB/s) beats picking them out of it, which copies them.

    Args:
        pages: the block's memory, shape (n, page size).
    """
    words = pages.view(np.uint64)
    first, last, count = int(indices[0]), int(indices[-1]), len(indices)
    consecutive = last - first == count - 1 and bool((np.diff(indices) == 1).all())
    if not consecutive:
        first, last = int(indices.min()), int(indices.max())
    dense = last - first < 2 * count
    if consecutive and not words[first : last + 1 : -(-count // _PROBES), 0].any():
        throughout: PageBitmap = np.bitwise_or.reduce(words[first : last + 1], axis=1) == 0  # very likely: one pass
        return throughout
    begins = (words[first : last + 1, 0] if consecutive else words[indices, 0]) == 0
    zero: PageBitmap = begins
    maybe = int(np.count_nonzero(begins))
    if not maybe:
        return zero
    if dense and 4 * maybe > count:
        every = np.bitwise_or.reduce(words[first : last + 1], axis=1) == 0
        zero = every if consecutive else every[indices - first]
        return zero
    zero[begins] = np.bitwise_or.reduce(words[indices[begins]], axis=1) == 0
    return zero
