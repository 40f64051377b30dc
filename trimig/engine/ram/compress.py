"""Compression at the source (capability ``compress``): each page goes as a zlib stream of its own.

Some pages at a time are compressed in a thread, up to ``compress-threads`` of them at once, and the task that writes the
records waits for no thread longer than for one such piece. The guest may write meanwhile, so a page is copied first.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...channel.offload import MAX_CALLS, offload
from ...errors import TrimigError
from ...guest import PAGE_SIZE, Pages
from ...wire.constants import RamFlag
from ...wire.pages.compressed import deflate
from .effort import Effort, timed

if TYPE_CHECKING:
    from ...config.parameters import Parameters
    from ...monitor.statistics import Counters
    from .records import PageSender

#: Pages of one call in a thread: 1 to 10 ms, most for text. A cancellation waits for it.
PIECE_PAGES: Final = 32
#: So few pages are compressed at once, without a thread: a millisecond at most.
INLINE_PAGES: Final = 4


@dataclasses.dataclass(slots=True)
class CompressionFigures:
    """The figures of one migration: a record that the encoder writes.

    Attributes:
        pages: pages sent compressed.
        busy: pages sent as they are because no thread was free (``compress-wait-thread`` off).
        compressed_size: bytes of the zlib streams, and of their lengths in front of them.
        handled: pages that came to the encoder.
    """

    pages: int = 0
    busy: int = 0
    compressed_size: int = 0
    handled: int = 0

    def members(self) -> Mapping[str, object]:
        """The member ``compression`` of ``query-migrate``; its two rates are those of the whole migration so far."""
        size = self.compressed_size
        return {
            "pages": self.pages,
            "busy": self.busy,
            "busy-rate": self.busy / self.handled if self.handled else 0.0,
            "compressed-size": size,
            "compression-rate": self.pages * PAGE_SIZE / size if size else 0.0,
        }


@dataclasses.dataclass(slots=True)
class _Piece:
    """Some pages in work. ``contents`` is None until the thread has ended."""

    indices: NDArray[np.int64]
    contents: Sequence[bytes] | None = None


def compress_pages(pages: Pages, indices: NDArray[np.int64], level: int) -> list[bytes]:
    """The contents of the records of some pages; made in a thread."""
    copies = pages[indices]  # a copy, so that the guest cannot change what zlib is reading
    return [deflate(row.data, level) for row in copies]


class CompressEncoder:
    """A :class:`trimig.engine.ram.records.PageEncoder`.

    Args:
        parameters: returns the present parameters; a change counts from the next batch on.

    Attributes:
        figures: of this migration.
        effort: of all pages so far.
    """

    def __init__(self, parameters: Callable[[], Parameters], counters: Counters) -> None:
        self._parameters = parameters
        self.figures = figures = CompressionFigures()
        self.effort = Effort()
        counters.members["compression"] = figures.members

    def begin_pass(self, *, first: bool, last: bool) -> None:
        """See :class:`trimig.engine.ram.records.PageEncoder`. All passes are alike."""

    def zeros(self, block: str, indices: NDArray[np.int64]) -> None:
        """See :class:`trimig.engine.ram.records.PageEncoder`. Nothing is kept of a page."""

    async def send(
        self, records: PageSender, block: str, pages: Pages, indices: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """See :class:`trimig.engine.ram.records.PageEncoder`. Pages are left that zlib does not make shorter.

        **Cancellation:** as for :meth:`PageSender.send`; no thread works any more.
        """
        self.figures.handled += len(indices)
        level = self._parameters().compress_level
        if len(indices) <= INLINE_PAGES:
            contents, took = timed(compress_pages, pages, indices, level)
            self.effort.add(took)
            return await self._write(records, block, indices, contents, level)
        failure: TrimigError | None = None
        left = indices[:0]
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            try:
                left = await self._send_pieces(nursery, records, block, pages, indices)
            except TrimigError as error:  # raised behind the nursery, which would make a group of it
                failure = error
        if failure is not None:
            raise failure
        return left

    async def _send_pieces(
        self, nursery: trio.Nursery, records: PageSender, block: str, pages: Pages, indices: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        parameters = self._parameters()
        level, threads = parameters.compress_level, min(parameters.compress_threads, MAX_CALLS)
        working: collections.deque[_Piece] = collections.deque()
        ended = trio.Event()

        async def work(piece: _Piece) -> None:
            nonlocal ended
            piece.contents, took = await offload(timed, compress_pages, pages, piece.indices, level)
            self.effort.add(took)
            ended.set()

        left: list[NDArray[np.int64]] = []
        position = 0
        while working or position < len(indices):
            while len(working) < threads and position < len(indices):
                working.append(_Piece(indices[position : position + PIECE_PAGES]))
                position += PIECE_PAGES
                nursery.start_soon(work, working[-1], name="trimig.compress")
            if (contents := working[0].contents) is not None:
                left.append(await self._write(records, block, working.popleft().indices, contents, level))
            elif position < len(indices) and not parameters.compress_wait_thread:
                whole = indices[position : position + PIECE_PAGES]
                position += PIECE_PAGES
                self.figures.busy += len(whole)
                await records.send_whole(block, pages, whole)
            else:
                await ended.wait()
                ended = trio.Event()
        return np.sort(np.concatenate(left))

    async def _write(
        self, records: PageSender, block: str, indices: NDArray[np.int64], contents: Sequence[bytes], level: int
    ) -> NDArray[np.int64]:
        """Send the records that are shorter than the pages, and return the other pages."""
        if level:
            short = np.array([len(content) < PAGE_SIZE for content in contents], np.bool_)
        else:  # stored on purpose
            short = np.ones(len(contents), np.bool_)
        if short.any():
            chosen = [content for content, good in zip(contents, short.tolist(), strict=True) if good]
            await records.send_encoded(block, indices[short], RamFlag.COMPRESS_PAGE, chosen)
            self.figures.pages += len(chosen)
            self.figures.compressed_size += sum(map(len, chosen))
        return indices[~short]
