"""The page encodings PAGE and ZERO (ram.md), read in runs.

A record is a be64 word (offset | flags), the block's name unless CONTINUE is set, and the content. Reading page by page
would cost a Python call for every 4 KiB, so runs of equal records are found with NumPy: the buffer is viewed as an
array of records, all their words are checked at once, and the pages are returned as a view without a copy.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...guest import PAGE_SIZE
from ..constants import RamFlag
from ..events import Element, PageRun, ZeroRun

if TYPE_CHECKING:
    from ..sections.reader import Window
    from .state import PageState

_BE64 = struct.Struct(">Q")
_FLAGS: Final = PAGE_SIZE - 1
PAGE_AGAIN: Final = RamFlag.PAGE | RamFlag.CONTINUE
ZERO_AGAIN: Final = RamFlag.ZERO | RamFlag.CONTINUE
#: Bytes of a record that continues the block.
RECORD: Final = 8 + PAGE_SIZE
ZERO_RECORD: Final = 9
#: Records checked before a run is known to be long: in mixed memory the run ends soon, and the bytes after it are not
#: records of this size.
FIRST_LOOK: Final = 16


def read_pages(state: PageState, window: Window, block: str, head: int) -> tuple[Element | None, int]:
    """Read PAGE records; see :data:`trimig.wire.sections.ram.PageEncoding`."""
    array, pos, end, at, _ = window
    if head > 8:
        return _named_page(state, window, block, head)
    count = (end - pos) // RECORD
    if count == 0:
        return None, 0
    words = _words(array, pos, count, RECORD, PAGE_AGAIN) if count > 1 else _one_offset(window)
    offsets = state.inside(block, words, at)
    count = len(offsets)
    data = np.ndarray((count, PAGE_SIZE), np.uint8, array, pos + 8, (RECORD, 1))
    state.continue_run(offsets)
    return PageRun(block=block, named=False, offsets=offsets, data=data, at=at), count * RECORD


def read_zeros(state: PageState, window: Window, block: str, head: int) -> tuple[Element | None, int]:
    """Read ZERO records; see :data:`trimig.wire.sections.ram.PageEncoding`."""
    array, pos, end, at, _ = window
    if head > 8:
        return _named_zero(state, window, block, head)
    count = (end - pos) // ZERO_RECORD
    if count == 0:
        return None, 0
    offsets = state.inside(block, _words(array, pos, count, ZERO_RECORD, ZERO_AGAIN), at)
    count = len(offsets)
    state.end_run()
    fills = array[pos + 8 : pos + count * ZERO_RECORD : ZERO_RECORD].copy()
    return ZeroRun(block=block, named=False, offsets=offsets, fills=fills, at=at), count * ZERO_RECORD


def first_offset(window: Window) -> int:
    """The offset in the first record's word."""
    return int(_BE64.unpack_from(window.array.data, window.pos)[0]) & ~_FLAGS


def _named_page(state: PageState, window: Window, block: str, head: int) -> tuple[Element | None, int]:
    size = head + PAGE_SIZE
    if window.have < size:
        return None, 0
    offsets = _one_inside(state, window, block)
    state.begin_run(int(offsets[0]))
    data = window.array[window.pos + head : window.pos + size].reshape(1, -1)
    return PageRun(block=block, named=True, offsets=offsets, data=data, at=window.offset), size


def _named_zero(state: PageState, window: Window, block: str, head: int) -> tuple[Element | None, int]:
    size = head + 1
    if window.have < size:
        return None, 0
    offsets = _one_inside(state, window, block)
    state.end_run()
    fills = window.array[window.pos + head : window.pos + size].copy()
    return ZeroRun(block=block, named=True, offsets=offsets, fills=fills, at=window.offset), size


def _one_inside(state: PageState, window: Window, block: str) -> NDArray[np.int64]:
    return state.inside(block, _one_offset(window), window.offset)


def _one_offset(window: Window) -> NDArray[np.int64]:
    # Through uint64: the word's highest bit may be set.
    return np.array([first_offset(window)], np.uint64).astype(np.int64)


def _words(array: NDArray[np.uint8], pos: int, count: int, record: int, flags: int) -> NDArray[np.int64]:
    """Offsets of the longest run of records with exactly *flags* at *pos*; at least one, at most *count*."""
    look = min(count, FIRST_LOOK)
    while True:
        view = np.ndarray((look, 8), np.uint8, array, pos, (record, 1))
        words = np.ascontiguousarray(view).view(">u8").reshape(-1).astype(np.uint64)
        same = (words & np.uint64(_FLAGS)) == np.uint64(flags)
        if np.count_nonzero(same) < look:
            words = words[: int(np.argmin(same))]
            break
        if look == count:
            break
        look = min(count, look * 8)
    return (words & ~np.uint64(_FLAGS)).astype(np.int64)
