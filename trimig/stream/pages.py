"""The set of pages of a RAM block that a stream has. Its memory depends on the pages sent, not on the announced
length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ..wire.postcopy import runs_of

if TYPE_CHECKING:
    from ..guest import PageBitmap

#: Pages of one piece of the map: a single page costs this many bytes.
_PIECE: Final = 512


class PageSet:
    """A set of pages of a block of *length* pages.

    It takes at most a kilobyte for each page in the set, for a block of any length, and about a byte for each page if
    the pages are close together.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._pieces: dict[int, PageBitmap] = {}

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(piece)) for piece in self._pieces.values())

    @property
    def missing(self) -> int:
        """Number of pages of the block that are not in the set."""
        return self._length - len(self)

    def add(self, pages: NDArray[np.int64]) -> None:
        """Add *pages*, which are all inside the block."""
        for number, where in self._split(pages):
            piece = self._pieces.get(number)
            if piece is None:
                piece = self._pieces[number] = np.zeros(_PIECE, np.bool_)
            piece[pages[where] % _PIECE] = True

    def contains(self, pages: NDArray[np.int64]) -> PageBitmap:
        """For each of *pages* whether it is in the set."""
        found = np.zeros(len(pages), np.bool_)
        for number, where in self._split(pages):
            piece = self._pieces.get(number)
            if piece is not None:
                found[where] = piece[pages[where] % _PIECE]
        return found

    def holes(self) -> Iterator[tuple[int, int]]:
        """The runs of pages that are not in the set: the first page, and the page after the last."""
        begin = at = 0
        for number in sorted(self._pieces):
            at = number * _PIECE
            for first, end in runs_of(self._pieces[number]).tolist():
                if begin < at + first:
                    yield begin, at + first
                begin = at + end
        if begin < self._length:
            yield begin, self._length

    @staticmethod
    def _split(pages: NDArray[np.int64]) -> Iterator[tuple[int, slice | NDArray[np.int64]]]:
        """The pieces of the map that contain *pages*, and the pages in each piece."""
        if not len(pages):
            return
        numbers = pages // _PIECE
        if numbers[0] == numbers[-1] and bool((numbers == numbers[0]).all()):
            yield int(numbers[0]), slice(None)
            return
        order = np.argsort(numbers, kind="stable")
        borders = np.flatnonzero(np.diff(numbers[order])) + 1
        for group in np.split(order, borders):
            yield int(numbers[group[0]]), group
