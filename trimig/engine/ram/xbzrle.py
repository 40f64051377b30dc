"""XBZRLE at the source (capability ``xbzrle``): pages that were sent before go as the difference from what was sent.

The page that is compared, the page that is sent and the page in the cache must be the same bytes, and the guest may write
meanwhile. So a page that goes into the cache is copied first, and everything is done with the copy.

QEMU begins in its second pass, and fills the cache then. Here the first pass fills it with the pages that it has room for, so
that the second pass can send differences. Other pages may replace these at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ... import formats
from ...guest import PAGE_SIZE, PageBitmap, Pages
from ...wire.constants import RamFlag
from ...wire.pages.xbzrle import record_content
from ...wire.pages.xbzrle_pages import encode_pages
from .effort import Effort, timed
from .page_cache import LIFETIME, PageCache

if TYPE_CHECKING:
    from ...guest import RamBlock
    from ...monitor.statistics import Counters
    from .records import PageSender

#: Pages that are copied, compared and encoded without a turn for other tasks: a millisecond, if few bytes of them differ.
TURN_PAGES: Final = 64
#: Bytes of differences that are encoded in one turn, as far as the turn before shows how many there are.
_TURN_DELTAS: Final = 64 << 10
_FEWEST_PAGES: Final = 8
#: Ages of pages that the first pass has put into the cache. A zero page may be replaced in the first pass already.
_FIRST_AGE: Final = 1 - LIFETIME
_FIRST_ZERO_AGE: Final = -LIFETIME


@dataclasses.dataclass(slots=True)
class XbzrleFigures:
    """The figures of one migration: a record that the encoder writes.

    Attributes:
        pages: pages that were in the cache when they had to be sent: sent as differences, not sent because they had not
            changed, or sent whole because the difference was longer.
        bytes: of their records, without the words; of a page that was sent whole the page.
        misses: pages that were not in the cache, from the second pass on.
        overflows: pages whose difference was longer than the page.
        miss_rate: of all pages of the last pass the share that was not in the cache, 0 to 1.
        encoding_rate: in the last pass, bytes of the pages for each byte that was sent of them.
    """

    pages: int = 0
    bytes: int = 0
    misses: int = 0
    overflows: int = 0
    miss_rate: float = 0.0
    encoding_rate: float = 0.0

    def members(self, cache_size: int) -> Mapping[str, object]:
        """The member ``xbzrle-cache`` of ``query-migrate``.

        Args:
            cache_size: bytes of the cache in use.
        """
        return {
            "cache-size": cache_size,
            "bytes": self.bytes,
            "pages": self.pages,
            "cache-miss": self.misses,
            "cache-miss-rate": self.miss_rate,
            "encoding-rate": self.encoding_rate,
            "overflow": self.overflows,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """What becomes of some pages.

    Attributes:
        changed: pages that go as differences, and the differences.
        whole: pages that go as PAGE records with the content of ``copies``.
        left: pages that go as PAGE records from guest memory.
        same: number of pages that are not sent.
    """

    changed: NDArray[np.int64]
    deltas: Sequence[bytes]
    whole: NDArray[np.int64]
    copies: Pages
    left: NDArray[np.int64]
    same: int


class XbzrleEncoder:
    """A :class:`trimig.engine.ram.records.PageEncoder`.

    Args:
        blocks: the guest's RAM.
        cache_size: returns ``xbzrle-cache-size`` in bytes. If it changes, an empty cache replaces the old one.
        turn_pages: the most pages that are encoded without a turn for other tasks.

    Attributes:
        figures: of this migration.
        effort: of all pages so far.

    Raises:
        MemoryError: there is not enough for the cache.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        cache_size: Callable[[], int],
        counters: Counters,
        *,
        turn_pages: int = TURN_PAGES,
    ) -> None:
        lengths = [block.length // PAGE_SIZE for block in blocks]
        starts = np.cumsum([0, *lengths]).tolist()
        self._bases = {block.name: start for block, start in zip(blocks, starts, strict=False)}
        self._pages: int = starts[-1]
        self._counters = counters
        self._cache_size = cache_size
        self._size = cache_size()
        self._cache = PageCache(self._size, self._pages)
        self.figures = figures = XbzrleFigures()
        self.effort = Effort()
        counters.members["xbzrle-cache"] = lambda: figures.members(self._cache.size)
        self._most_pages = self._turn_pages = turn_pages
        self._pass = 0
        self._first = self._last = False
        self._before = (0, 0, 0, 0)

    def begin_pass(self, *, first: bool, last: bool) -> None:
        """See :class:`trimig.engine.ram.records.PageEncoder`."""
        self._first, self._last = first, last
        self._pass += not first
        self._update_rates()

    def _update_rates(self) -> None:
        c, f = self._counters, self.figures
        now = (c.normal + c.duplicate + c.encoded, f.misses, f.pages, f.bytes)
        handled, misses, pages, size = (new - old for new, old in zip(now, self._before, strict=True))
        if handled:
            f.miss_rate = misses / handled
            f.encoding_rate = pages * PAGE_SIZE / size if size else 0.0
        self._before = now

    def _resize(self) -> None:
        """Follow a changed ``xbzrle-cache-size``."""
        if (size := self._cache_size()) == self._size:
            return
        self._size = size
        try:
            self._cache = PageCache(size, self._pages)
        except MemoryError:
            self._counters.warnings.append(
                f"there is not enough memory for an XBZRLE cache of {formats.size(size)}, so it keeps its "
                f"{formats.size(self._cache.size)}"
            )

    def knows(self, block: str, indices: NDArray[np.int64]) -> PageBitmap:
        """For each of the pages *indices* of *block* whether the destination's content of it is in the cache."""
        self._resize()
        return self._cache.hits(indices + self._bases[block])

    def forget(self, block: str, indices: NDArray[np.int64]) -> None:
        """The pages *indices* of *block* are sent in another way, so their content in the cache is no longer that of the destination."""
        self._cache.forget(indices + self._bases[block])

    def zeros(self, block: str, indices: NDArray[np.int64]) -> None:
        """See :class:`trimig.engine.ram.records.PageEncoder`."""
        if self._last:
            return
        self._resize()
        cache, numbers = self._cache, indices + self._bases[block]
        here = cache.hits(numbers)
        cache.touch(numbers[here], self._pass)
        here[~here] = cache.claim(numbers[~here], self._pass, _FIRST_ZERO_AGE if self._first else self._pass)
        cache.store_zeros(numbers[here])

    async def send(
        self, records: PageSender, block: str, pages: Pages, indices: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """See :class:`trimig.engine.ram.records.PageEncoder`.

        **Cancellation:** as for :meth:`PageSender.send`.
        """
        left: list[NDArray[np.int64]] = []
        position = 0
        while position < len(indices):
            part = indices[position : position + self._turn_pages]
            position += len(part)
            turn, took = timed(self._encode, block, pages, part)
            self.effort.add(took)
            if len(turn.changed):
                contents = [record_content(delta) for delta in turn.deltas]
                await records.send_encoded(block, turn.changed, RamFlag.XBZRLE, contents)
            if turn.same:
                records.skip(turn.same)
                await trio.lowlevel.checkpoint()
            if len(turn.whole):
                await records.send_copies(block, turn.whole, turn.copies)
            if len(turn.left):
                left.append(turn.left)
        return np.concatenate(left) if left else indices[:0]

    def _encode(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> _Turn:
        """Decide about some pages, and put into the cache what is going to be sent of them."""
        self._resize()
        cache, figures = self._cache, self.figures
        numbers = indices + self._bases[block]
        hit = cache.hits(numbers)
        taken = np.zeros(len(indices), np.bool_)
        if not self._last:
            cache.touch(numbers[hit], self._pass)
            age = _FIRST_AGE if self._first else self._pass
            taken[~hit] = cache.claim(numbers[~hit], self._pass, age)
        if not self._first:
            figures.misses += int(np.count_nonzero(~hit))
        copied = hit | taken
        copies, known = pages[indices[copied]], hit[copied]
        deltas = self._compare(cache.content(numbers[hit]), copies[known])
        same, whole = np.zeros(len(copies), np.bool_), ~known
        same[known] = [delta == b"" for delta in deltas]
        whole[known] = [delta is None for delta in deltas]
        if not self._last:
            cache.store(numbers[copied][~same], copies[~same])
        return _Turn(
            changed=indices[copied][~same & ~whole],
            deltas=[delta for delta in deltas if delta],
            whole=indices[copied][whole],
            copies=copies[whole],
            left=indices[~copied],
            same=int(np.count_nonzero(same)),
        )

    def _compare(self, old: Pages, new: Pages) -> list[bytes | None]:
        """The differences of pages, which are counted."""
        if not len(new):
            return []
        deltas, figures = encode_pages(old, new), self.figures
        size = sum(len(delta) for delta in deltas if delta)
        overflows = deltas.count(None)
        figures.pages += len(deltas)
        figures.overflows += overflows
        figures.bytes += size + 3 * sum(1 for delta in deltas if delta) + overflows * PAGE_SIZE
        dense = size + overflows * PAGE_SIZE
        wanted = max(_FEWEST_PAGES, _TURN_DELTAS * len(new) // max(1, dense))
        self._turn_pages = min(self._most_pages, wanted)
        return deltas
