"""Which pages of a RAM block a stream has, in memory that follows from the stream and not from what it announces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ..wire.postcopy import runs_of

if TYPE_CHECKING:
    from ..guest import PageBitmap

#: Pages of one piece of the map: a page that comes alone costs so many bytes.
_PIECE: Final = 512


class PageSet:
    """A set of pages of a block of *length* pages.

    It takes at most a kilobyte for each page that is in it, however long the block is, and about a byte for each page
    where pages lie close together.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._pieces: dict[int, PageBitmap] = {}

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(piece)) for piece in self._pieces.values())

    @property
    def missing(self) -> int:
        """Pages of the block that are not in it."""
        return self._length - len(self)

    def add(self, pages: NDArray[np.int64]) -> None:
        """Put *pages*, all inside the block, into it."""
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
        """The runs of pages that are not in it: the first page, and the one behind the last."""
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
        """The pieces that *pages* are in, and which of them are in each."""
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
