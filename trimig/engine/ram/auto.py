"""The encoder for ``encoding = "auto"``: each batch of pages goes by the encoding that :mod:`trimig.policy.encoding` chooses.

It has the encoders of the capabilities in force, and measures what each of them takes and saves. A page whose content is in the
cache of XBZRLE and that goes in another way leaves the cache, because a difference from that content would be wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...channel.offload import MAX_CALLS
from ...guest import PAGE_SIZE
from ...monitor.statistics import EncodingUse
from ...policy.encoding import PLAIN, PLAIN_BYTES, TRIAL_PAGES, Average, Encoding, EncodingChoice, Rates
from .effort import Effort

if TYPE_CHECKING:
    from ...config.parameters import Parameters
    from ...guest import Pages, RamBlock
    from ...monitor.statistics import Counters
    from .compress import CompressEncoder
    from .records import PageSender
    from .xbzrle import XbzrleEncoder

Indices = NDArray[np.int64]

XBZRLE: Final = "xbzrle"
COMPRESS: Final = "compress"
#: Seconds of sending after which an older rate of the connection has half its weight.
_LINK_HALF_LIFE: Final = 1.0
#: So many plain pages measure the connection while another encoding is chosen: at most once in a second, and with at most one
#: part in so many of the time.
_LINK_PAGES: Final = 256
_LINK_EVERY: Final = 1.0
_LINK_PART: Final = 32
#: Pages are put into the cache in the first pass if that takes at most one part in so many of the time that sending takes. The
#: seconds for a page are an assumption, until they are measured.
_STORE_PART: Final = 8
_STORE_SECONDS: Final = 2e-6
#: Of a multiplicative hash of 32 bits: pages are tried by their numbers, so that the cache knows those that are tried.
_HASH: Final = 0x9E3779B1
_HASH_BITS: Final = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Where the pages of a batch are, and what writes them."""

    records: PageSender
    block: str
    pages: Pages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """The counters before some pages."""

    normal: int
    encoded_bytes: int
    effort: Effort


class _Link:
    """Measures the bytes per second that the connections take while they are kept busy.

    Attributes:
        measured: when that was done last.
    """

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0
        self.measured = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second; 0 before the first measurement."""
        return self._bytes / self._seconds if self._seconds else 0.0

    @contextlib.contextmanager
    def busy(self, pages: int, delivered: Callable[[], int], without: Effort | None = None) -> Iterator[None]:
        """So many plain pages are sent in the block.

        Args:
            without: effort in the block that is no sending.
        """
        began, before, encoding = trio.current_time(), delivered(), 0.0 if without is None else without.elapsed
        yield
        now = trio.current_time()
        seconds = now - began - (0.0 if without is None else without.elapsed - encoding)
        if pages < TRIAL_PAGES or seconds <= 0:
            return
        kept = 0.5 ** (seconds / _LINK_HALF_LIFE)
        self._bytes = self._bytes * kept + delivered() - before
        self._seconds = self._seconds * kept + seconds
        self.measured = now


class AutoEncoder:
    """A :class:`trimig.engine.ram.records.PageEncoder`.

    Args:
        compress, xbzrle: the encoders of these capabilities; None if the capability is off. At least one is given.
        parameters: returns the present parameters.
        blocks: the guest's RAM.
        counters: get what was chosen, and what it has saved.
        delivered: returns the number of bytes that the connections have transported.
    """

    def __init__(
        self,
        compress: CompressEncoder | None,
        xbzrle: XbzrleEncoder | None,
        parameters: Callable[[], Parameters],
        blocks: Sequence[RamBlock],
        counters: Counters,
        delivered: Callable[[], int],
    ) -> None:
        self._compress, self._xbzrle = compress, xbzrle
        self._parameters, self._counters, self._delivered = parameters, counters, delivered
        starts = np.cumsum([0, *(block.length // PAGE_SIZE for block in blocks)]).tolist()
        self._bases = {block.name: start for block, start in zip(blocks, starts, strict=False)}
        threads = min(parameters().compress_threads, MAX_CALLS)
        self._encodings = (
            *([Encoding(name=XBZRLE)] if xbzrle else ()),
            *([Encoding(name=COMPRESS, threads=threads, overlapped=True)] if compress else ()),
        )
        self._choice = EncodingChoice(self._encodings, len(os.sched_getaffinity(0)))
        self._first = self._last = False
        self._link = _Link()
        self._store_seconds = Average(half_life=1024)
        for name in (PLAIN, *(encoding.name for encoding in self._encodings)):
            counters.encodings[name] = EncodingUse(name=name)
        counters.members["encoding"] = self._members

    def _members(self) -> Mapping[str, object]:
        """The member ``encoding`` of ``query-migrate``."""
        used = [use.members() for use in self._counters.encodings.values()]
        return {"mode": "auto", "present": self._choice.present, "used": used}

    def begin_pass(self, *, first: bool, last: bool) -> None:
        """See :class:`trimig.engine.ram.records.PageEncoder`."""
        self._first, self._last = first, last
        for encoder in (self._compress, self._xbzrle):
            if encoder is not None:
                encoder.begin_pass(first=first, last=last)

    def zeros(self, block: str, indices: Indices) -> None:
        """See :class:`trimig.engine.ram.records.PageEncoder`."""
        if self._xbzrle is not None:
            self._xbzrle.zeros(block, indices)

    async def send(self, records: PageSender, block: str, pages: Pages, indices: Indices) -> Indices:
        """See :class:`trimig.engine.ram.records.PageEncoder`. No page is left.

        **Cancellation:** as for :meth:`.records.PageSender.send`; no thread works any more.
        """
        batch = _Batch(records=records, block=block, pages=pages)
        rest = indices
        if not self._last:
            rest = await self._measure(batch, rest)
        best = self._choice.choose(self._rates(), without=XBZRLE if self._first else None)
        for name, part in self._divided(best, block, rest):
            if len(part):
                await self._send_by(name, batch, part)
        return indices[:0]

    async def _measure(self, batch: _Batch, indices: Indices) -> Indices:
        """Send some pages by encodings that are not known yet; and some plain ones, if the connection was not measured for long.

        Returns:
            The other pages.
        """
        rates, now = self._rates(), trio.current_time()
        for name in (encoding.name for encoding in self._encodings):
            if self._choice.is_known(name) or (name == XBZRLE and self._first) or not len(indices):
                continue
            fit = self._known(batch.block, indices) if name == XBZRLE else np.ones(len(indices), np.bool_)
            fit[np.flatnonzero(fit)[TRIAL_PAGES:]] = False
            if fit.any():
                await self._send_by(name, batch, indices[fit])
                indices = indices[~fit]
        every = max(_LINK_EVERY, _LINK_PART * _LINK_PAGES * self._choice.page_seconds(PLAIN, rates))
        due = now - self._link.measured >= every and len(indices) >= TRIAL_PAGES
        if due and self._choice.present != PLAIN and not rates.bound:
            await self._send_by(PLAIN, batch, indices[:_LINK_PAGES])
            indices = indices[_LINK_PAGES:]
        return indices

    def _divided(self, best: str, block: str, indices: Indices) -> Iterator[tuple[str, Indices]]:
        """The encodings, and the pages that go by each of them."""
        if self._first and best == PLAIN and self._stores_all():
            best = XBZRLE  # they go as they are, and are in the cache then
        taken = np.zeros(len(indices), np.bool_)
        if not self._last:
            numbers = (
                (indices + self._bases[block] + 1).astype(np.uint64) * np.uint64(_HASH) % np.uint64(1 << _HASH_BITS)
            )
            rates = self._rates()
            for place, name in enumerate(encoding.name for encoding in self._encodings):
                if name != best:
                    wanted = numbers if place else numbers ^ np.uint64((1 << _HASH_BITS) - 1)
                    tried = wanted < (1 << _HASH_BITS) // self._choice.one_in(name, rates)
                    yield name, indices[tried & ~taken]
                    taken |= tried
        yield best, indices[~taken]

    def _stores_all(self) -> bool:
        """In the first pass: put all pages into the cache."""
        if self._xbzrle is None:
            return False
        seconds = _STORE_SECONDS if self._store_seconds.value is None else self._store_seconds.value
        return seconds * _STORE_PART <= self._choice.page_seconds(PLAIN, self._rates())

    def _known(self, block: str, indices: Indices) -> NDArray[np.bool_]:
        """For each page whether it can go as a difference."""
        assert self._xbzrle is not None
        return np.zeros(len(indices), np.bool_) if self._first else self._xbzrle.knows(block, indices)

    def _rates(self) -> Rates:
        """The limit does not hold while the guest is stopped. It is all that is known of a connection that was not measured."""
        lifted = self._last and self._link.rate > 0
        return Rates(link=self._link.rate, limit=0 if lifted else self._parameters().max_bandwidth)

    async def _send_by(self, name: str, batch: _Batch, indices: Indices) -> None:
        if name == XBZRLE:
            await self._send_differences(batch, indices)
            return
        if self._xbzrle is not None and not self._last:
            self._xbzrle.forget(batch.block, indices)
        if name == PLAIN:
            await self._send_plain(batch, indices)
            return
        assert self._compress is not None
        before = self._before(self._compress.effort)
        left = await self._compress.send(batch.records, batch.block, batch.pages, indices)
        if len(left):
            await batch.records.send_whole(batch.block, batch.pages, left)
        self._record(name, len(indices), before, self._compress.effort)

    async def _send_plain(self, batch: _Batch, indices: Indices) -> None:
        with self._link.busy(len(indices), self._delivered):
            await batch.records.send_whole(batch.block, batch.pages, indices)
        self._use(PLAIN, len(indices))

    async def _send_differences(self, batch: _Batch, indices: Indices) -> None:
        """Pages that are not in the cache go as they are, and are put into it."""
        assert self._xbzrle is not None
        known, effort = self._known(batch.block, indices), self._xbzrle.effort
        if known.any():
            before = self._before(effort)
            await self._xbzrle.send(batch.records, batch.block, batch.pages, indices[known])
            self._record(XBZRLE, int(np.count_nonzero(known)), before, effort)
        if known.all():
            return
        before, count = self._before(effort), int(np.count_nonzero(~known))
        with self._link.busy(count, self._delivered, without=effort):
            left = await self._xbzrle.send(batch.records, batch.block, batch.pages, indices[~known])
            if len(left):
                await batch.records.send_whole(batch.block, batch.pages, left)
        took = effort.processor - before.effort.processor
        self._store_seconds.add(took / count, count)
        self._use(PLAIN, count, processor=took)

    def _before(self, effort: Effort) -> _Before:
        c = self._counters
        return _Before(normal=c.normal, encoded_bytes=c.encoded_bytes, effort=dataclasses.replace(effort))

    def _record(self, name: str, count: int, before: _Before, effort: Effort) -> None:
        """*count* pages have gone by an encoding."""
        c = self._counters
        size = c.encoded_bytes - before.encoded_bytes + (c.normal - before.normal) * PLAIN_BYTES
        processor = effort.processor - before.effort.processor
        elapsed = effort.elapsed - before.effort.elapsed
        self._choice.record(name, pages=count, size=size, processor=processor, elapsed=elapsed)
        self._use(name, count, saved=count * PLAIN_BYTES - size, processor=processor)

    def _use(self, name: str, count: int, *, saved: int = 0, processor: float = 0.0) -> None:
        use = self._counters.encodings[name]
        self._counters.encodings[name] = EncodingUse(
            name=name,
            pages=use.pages + count,
            saved_bytes=use.saved_bytes + saved,
            processor_time=use.processor_time + processor,
        )
