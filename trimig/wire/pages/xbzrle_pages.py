"""XBZRLE of many pages at once (ram.md part 6): as :func:`.xbzrle.encode` for each pair of pages.

The borders between equal and different bytes of all pages are found with NumPy, and the deltas are written with it into one
buffer: the work of a page is a few passes over its bytes, and some for each run.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...guest import PAGE_SIZE, Pages
from .xbzrle_kernel import Encode, load

Numbers = NDArray[np.int64]
Bits = NDArray[np.bool_]

#: A run of at least this many bytes has its length in two bytes.
_TWO_BYTES: Final = 0x80
#: Bytes of a row of borders: those in front of each byte, the one behind the page, and zeros up to a whole word.
_ROW: Final = PAGE_SIZE + 8
#: Up to one differing byte in so many, picking each by its number is faster than a pass over all bytes.
_FEW: Final = 8


def encode_with_numpy(old: Pages, new: Pages) -> list[bytes | None]:
    """The deltas that make the pages *new* of the pages *old*.

    Args:
        old: uint8, shape (n, page size).
        new: the same.

    Returns:
        For each page its delta: empty for equal pages, None if it would be longer than the page.
    """
    deltas: list[bytes | None] = [b""] * len(new)
    different = old != new
    sizes = _counts(different)
    rows = np.flatnonzero(sizes)
    if not len(rows):
        return deltas
    if len(rows) < len(new):
        new, different, sizes = new[rows], different[rows], sizes[rows]
    border = np.zeros((len(rows), _ROW), np.bool_)
    border[:, 0] = different[:, 0]
    np.not_equal(different[:, 1:], different[:, :-1], out=border[:, 1:PAGE_SIZE])
    border[:, PAGE_SIZE] = different[:, -1]
    # A delta has at least two bytes for each run besides the bytes that differ, and each run has one of these and two borders.
    longer = 3 * sizes > PAGE_SIZE
    if longer.any():
        longer[longer] = sizes[longer] + np.count_nonzero(border[longer], axis=1) > PAGE_SIZE
        for row in rows[longer].tolist():
            deltas[row] = None
        rows, new, different, border = rows[~longer], new[~longer], different[~longer], border[~longer]
    if len(rows):
        _write(new, different, *_runs(border), rows, deltas)
    return deltas


_KERNEL: Final = load()

#: Encodes pages: see :func:`encode_with_numpy`, whose bytes are those of the C encoder.
encode_pages: Final[Encode] = _KERNEL or encode_with_numpy
#: The encoder that is used.
XBZRLE_ENCODER: Final = "C" if _KERNEL is not None else "NumPy"


def _counts(bits: Bits) -> Numbers:
    """The number of set bits in each row, eight of them at a time: no byte of a word overflows in 128 sums."""
    words = bits.view(np.uint64).reshape(len(bits), 4, 128).sum(axis=2)
    counts: Numbers = words.view(np.uint8).sum(axis=1, dtype=np.int64)
    return counts


def _runs(border: Bits) -> tuple[Numbers, Numbers, Numbers]:
    """The runs of different bytes: row of the page, first byte, and byte behind the last one."""
    words = np.flatnonzero(border.view(np.uint64))
    found: Numbers = (words[:, None] * 8 + np.arange(8))[border.reshape(-1, 8)[words]]
    row = found[::2] // _ROW
    return row, found[::2] - row * _ROW, found[1::2] - row * _ROW


def _write(
    new: Pages, different: Bits, row: Numbers, start: Numbers, end: Numbers, rows: Numbers, deltas: list[bytes | None]
) -> None:
    """Write the deltas of the pages *new*, whose numbers are *rows*."""
    first = np.searchsorted(row, np.arange(len(rows)))
    equal = start.copy()
    equal[1:] -= end[:-1]
    equal[first] = start[first]
    length = end - start
    wide_equal, wide_length = equal >= _TWO_BYTES, length >= _TWO_BYTES
    ends = np.cumsum(2 + wide_equal + wide_length + length)
    behind = ends - length
    at = behind - 2 - wide_equal - wide_length
    out = np.empty(int(ends[-1]), np.uint8)
    # For each byte of the deltas whether it is one of a page.
    content = np.ones(len(out), np.bool_)
    _write_numbers(out, content, at, equal, wide_equal)
    _write_numbers(out, content, at + 1 + wide_equal, length, wide_length)
    count = int(length.sum())
    if count * _FEW < new.size:
        within = np.arange(count) - np.repeat(np.cumsum(length) - length, length)
        out[np.repeat(behind, length) + within] = new.reshape(-1)[np.repeat(row * PAGE_SIZE + start, length) + within]
    else:
        out[content] = new[different]
    data = out.tobytes()
    last = np.append(first[1:], len(row)) - 1
    # QEMU wants room for one more number as long as the page has bytes left, even if these are equal.
    room = np.where(end[last] == PAGE_SIZE, PAGE_SIZE, PAGE_SIZE - 2)
    fits = ends[last] - at[first] <= room
    for number, begin, behind_last, fit in zip(
        rows.tolist(), at[first].tolist(), ends[last].tolist(), fits.tolist(), strict=True
    ):
        deltas[number] = data[begin:behind_last] if fit else None


def _write_numbers(out: NDArray[np.uint8], content: Bits, at: Numbers, numbers: Numbers, wide: Bits) -> None:
    out[at] = np.where(wide, (numbers & 0x7F) | _TWO_BYTES, numbers)
    content[at] = False
    second = at[wide] + 1
    out[second] = numbers[wide] >> 7
    content[second] = False
