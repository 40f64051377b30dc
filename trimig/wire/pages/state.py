"""What the readers of a stream's pages share: the blocks, the last block named, and the run of pages that is open."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE
from .size import PageSizes


class PageState:
    """The state of the pages of one stream. It outlives the sections, as in the wire format.

    Args:
        reorder: alternating records of pages and of zero pages may be returned as one event of each kind.
        max_ram_bytes: largest accepted sum of the RAM blocks.
    """

    def __init__(self, *, reorder: bool = False, max_ram_bytes: int = 1 << 48) -> None:
        self.reorder = reorder
        self.max_ram_bytes = max_ram_bytes
        self._blocks: dict[str, int] = {}
        #: The block that the last record named.
        self.block: str | None = None
        #: The page size as far as the offsets of the pages show it.
        self.sizes = PageSizes()
        #: The host page sizes that ADVISE has announced, or'ed; 0 before it.
        self.host_page_sizes = 0
        self._run_next = 0
        self._run_length = 0

    def know(self, blocks: Mapping[str, int]) -> None:
        """Set the blocks: used lengths in bytes, by name."""
        self._blocks = dict(blocks)

    @property
    def blocks(self) -> MappingProxyType[str, int]:
        """Used length by block name, from the size list."""
        return MappingProxyType(self._blocks)

    @property
    def open_run(self) -> tuple[str, int, int] | None:
        """``(block, next offset, pages so far)`` of the last run of consecutive pages, if there is one."""
        if self.block is None or not self._run_length:
            return None
        return self.block, self._run_next, self._run_length

    def begin_run(self, offset: int) -> None:
        """A run begins with the page at *offset*."""
        self._run_next, self._run_length = offset + PAGE_SIZE, 1

    def continue_run(self, offsets: NDArray[np.int64]) -> None:
        """Pages at *offsets* of the same block have come: they extend the open run, or begin one if they are consecutive."""
        count, first, last = len(offsets), int(offsets[0]), int(offsets[-1])
        if last - first == (count - 1) * PAGE_SIZE and (count == 1 or bool((np.diff(offsets) == PAGE_SIZE).all())):
            self._run_length = self._run_length + count if first == self._run_next else count
        else:
            self._run_length = 0
        self._run_next = last + PAGE_SIZE

    def extend_run(self, pages: int) -> None:
        """Extend the open run by *pages* pages that the caller has read."""
        self._run_next += pages * PAGE_SIZE
        self._run_length += pages
        self.sizes.adjoining()

    def end_run(self) -> None:
        """End the open run, because the next record does not continue it."""
        self._run_length = 0

    def inside(self, block: str, offsets: NDArray[np.int64], at: int) -> NDArray[np.int64]:
        """The offsets before the first one that is outside of *block*; an error if it is the first of all.

        So the events before an error are the same for any division of the bytes into pieces.

        Args:
            at: the stream offset of the first record, for the error.
        """
        length = self._blocks[block]
        if len(offsets) == 1 and 0 <= int(offsets[0]) < length:
            return offsets
        if int(offsets.max()) < length and int(offsets.min()) >= 0:
            return offsets
        good = int(np.argmax((offsets >= length) | (offsets < 0)))
        if good:
            return offsets[:good]
        raise RemoteProtocolError(
            f"page at {int(offsets[0]) & (2**64 - 1):#x} is outside of RAM block {block!r}, "
            f"which has {length:#x} bytes",
            offset=at,
            section="ram",
        )
