"""Reads page and zero records that alternate often, as in memory with scattered data.

Runs of equal records are found with NumPy (:mod:`.plain`), which costs the same for two records as for two hundred. If
the kind changes every few records, a plain loop over the words is several times faster. The loop makes two events of
many records: the zero pages, and the pages. This is not their order on the wire, but the order has no effect on memory
if no page occurs twice.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...guest import PAGE_SIZE
from ..constants import RamFlag
from ..events import PageRun, ZeroRun

_BE64 = struct.Struct(">Q")
_FLAGS: Final = PAGE_SIZE - 1
_PAGE_AGAIN: Final = int(RamFlag.PAGE | RamFlag.CONTINUE)
_ZERO_AGAIN: Final = int(RamFlag.ZERO | RamFlag.CONTINUE)
_RECORD: Final = 8 + PAGE_SIZE
_ZERO_RECORD: Final = 9
#: Records of one event: this many take less than a millisecond.
MAX_RECORDS: Final = 512
#: Equal records in a row after which the search for runs is faster again.
_UNIFORM: Final = 48


def read_mixed(
    array: NDArray[np.uint8], pos: int, end: int, block: str, length: int, at: int
) -> tuple[ZeroRun, PageRun, int] | None:
    """Read the continuing records at the start of ``array[pos:end]`` that form one event pair, and the bytes they take.

    Their offsets ascend and are inside the block of *length* bytes; the first other record ends the run and is left to
    the caller. None: the records are all of one kind.
    """
    offsets: list[int] = []
    places: list[int] = []
    kinds = bytearray()
    fills = bytearray()
    unpack = _BE64.unpack_from
    memory = array.data
    start = pos
    last = -1
    uniform = 0
    while pos + _ZERO_RECORD <= end and len(offsets) < MAX_RECORDS:
        word = unpack(memory, pos)[0]
        flags = word & _FLAGS
        offset = word - flags
        if not last < offset < length:
            break
        if flags == _ZERO_AGAIN:
            kind, fill, size = 0, memory[pos + 8], _ZERO_RECORD
        elif flags == _PAGE_AGAIN and pos + _RECORD <= end:
            kind, fill, size = 1, 0, _RECORD
            places.append(pos + 8)
        else:
            break
        uniform = uniform + 1 if kinds and kinds[-1] == kind else 1
        kinds.append(kind)
        fills.append(fill)
        offsets.append(offset)
        last = offset
        pos += size
        if uniform > _UNIFORM:
            break
    is_page = np.frombuffer(kinds, np.bool_)
    if not places or len(places) == len(offsets):
        return None
    data = np.empty((len(places), PAGE_SIZE), np.uint8)
    for row, place in enumerate(places):
        data[row] = array[place : place + PAGE_SIZE]
    where = np.array(offsets, np.int64)
    filled = np.frombuffer(fills, np.uint8)[~is_page]
    zeros = ZeroRun(block=block, named=False, offsets=where[~is_page], fills=filled, at=at)
    pages = PageRun(block=block, named=False, offsets=where[is_page], data=data, at=at)
    return zeros, pages, pos - start
