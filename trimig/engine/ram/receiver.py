"""Page records -> guest memory on the destination, in batches.

What the decoder found in its buffer is copied to its place a run at a time. Most of a first pass does not even go
through that buffer: :mod:`.placement` lets the kernel put the pages where they belong.

Memory that was never touched is *written to its file* instead of through the mapping, where it has one: the first
touch of a mapped page costs a fault and the zeroing of a page that is overwritten at once, which is several times what
the copy costs (256 MiB: 0.30 s through the mapping, 0.12 s by pwrite).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import trio
from numpy.typing import NDArray

from ... import formats
from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE, PageBitmap, RamBlock
from .marked import MarkedPages
from .placement import Placer, Target
from .zeros import zero_pages

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...monitor.statistics import Counters
    from ...wire.decoder import Decoder
    from ...wire.events import RamList
    from ...wire.postcopy import Discard
    from .scatter import Indices, Next, Place, Scatterer

#: Pages read at once to see whether they are zero already: half a millisecond.
_LOOK_PAGES = 1024
#: Pages copied at once: below a millisecond, unless their memory has to be found first.
_SLICE_PAGES = 256


def never_received(name: str, here: PageBitmap) -> str:
    """What a block lacks, in words.

    Args:
        here: its pages that have come; one is missing at least.
    """
    count, first = len(here) - int(np.count_nonzero(here)), int(here.argmin())
    return f"{count} pages of RAM block {name!r} were never received, the first at offset {first * PAGE_SIZE:#x} of it"


class RamReceiver:
    """Fills the guest's RAM blocks. A :class:`trimig.wire.pages.sink.PageSink`.

    Args:
        predicts: pages may be placed by prediction; only if no other connection brings pages.
    """

    def __init__(self, counters: Counters, *, predicts: bool = True) -> None:
        self._counters = counters
        self._predicts = predicts
        self._targets: dict[str, Target] = {}
        self._placer = Placer()
        #: The source has said which blocks there are, and they are the guest's own.
        self.opened = False

    def open(self, announced: RamList, blocks: Sequence[RamBlock]) -> None:
        """Check the size list against the guest's blocks and get ready.

        Raises:
            RemoteProtocolError: a block is unknown here, has another size, or is missing in the list.
        """
        mine = {block.name: block for block in blocks}
        for name, length in announced.blocks:
            block = mine.get(name)
            if block is None:
                known = ", ".join(repr(n) for n in mine) or "none"
                raise RemoteProtocolError(
                    f"unknown RAM block {name!r}; this guest has {known}", offset=announced.at, section="ram"
                )
            if block.length != length:
                raise RemoteProtocolError(
                    f"RAM block {name!r} has {formats.size(length)} ({length:#x} bytes) at the source and "
                    f"{formats.size(block.length)} ({block.length:#x} bytes) at the destination",
                    offset=announced.at,
                    section="ram",
                )
        if missing := sorted(set(mine) - {name for name, _ in announced.blocks}):
            raise RemoteProtocolError(
                f"the source has no RAM block {missing[0]!r}, which this guest needs",
                offset=announced.at,
                section="ram",
            )
        if not self.opened:  # a second START repeats the list (stream.md part 10)
            self._targets = {name: Target(mine[name]) for name, _ in announced.blocks}
            self.opened = True
        self._counters.total = sum(length for _, length in announced.blocks)

    def missing(self) -> Mapping[str, int]:
        """Pages per block that were never received; blocks without any are left out."""
        counts = {name: len(t.received) - int(np.count_nonzero(t.received)) for name, t in self._targets.items()}
        return {name: count for name, count in counts.items() if count}

    def received(self) -> Mapping[str, PageBitmap]:
        """The pages that have come, by the block's name; the order says nothing."""
        return {name: target.received for name, target in self._targets.items()}

    def watch(self) -> MarkedPages:
        """From here on each page that has come is marked in what this returns."""
        marks = MarkedPages({name: len(target.pages) * PAGE_SIZE for name, target in self._targets.items()})
        for target in self._targets.values():
            target.marks = marks
        return marks

    def forget(self, discard: Discard) -> None:
        """Those pages have changed at the source since they came."""
        received = self._targets[discard.block].received
        for first, end in discard.runs.tolist():
            received[first:end] = False

    def read(self, block: str, index: int) -> NDArray[np.uint8] | None:
        """See :class:`trimig.wire.pages.sink.PageSink`. What the guest had there before this attempt is not such a page."""
        target = self._targets[block]
        return target.pages[index] if target.received[index] else None

    async def pages(self, block: str, indices: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Copy pages to their places, see :class:`trimig.wire.pages.sink.PageSink`.

        **Cancellation:** some are there.
        """
        target = self._targets[block]
        first, count = int(indices[0]), len(indices)
        if count == 1 or (int(indices[-1]) - first == count - 1 and bool((np.diff(indices) == 1).all())):
            for start in range(0, count, _SLICE_PAGES):
                if start:
                    await trio.lowlevel.checkpoint()
                target.put(first + start, data[start : start + _SLICE_PAGES])
        else:
            target.pages[indices] = data
            target.arrived_each(indices)
        self._counters.normal += count

    async def zeros(self, block: str, indices: NDArray[np.int64], fills: NDArray[np.uint8]) -> None:
        """Fill pages, see :class:`trimig.wire.pages.sink.PageSink`; memory that is zero already is not touched.

        **Cancellation:** some are filled.
        """
        target = self._targets[block]
        self._counters.duplicate += len(indices)
        if fills.any():
            target.pages[indices] = fills[:, None]
            target.arrived_each(indices)
            return
        look = indices[~target.untouched[indices]]
        for start in range(0, len(look), _LOOK_PAGES):
            if start:
                await trio.lowlevel.checkpoint()
            part = look[start : start + _LOOK_PAGES]
            zero = zero_pages(target.pages, part)
            if not zero.all():
                target.pages[part[~zero]] = 0
        target.arrived_each(indices, touched=False)

    def shorten(self, view: memoryview) -> memoryview:
        """The part of *view* that a read of the stream's bytes should fill at most, where pages can be placed."""
        return self._placer.shorten(view)

    async def place_run(self, channel: Channel, decoder: Decoder) -> bool:
        """Let the kernel place the predicted continuation of the open run; False if nothing can be predicted.

        True: bytes were read (or the stream has ended, which the next ordinary read will find out as well).

        **Cancellation:** a page that was not received yet may hold part of its content; the decoder is unusable.
        """
        if not self._predicts or channel.socket_fd is None or (run := decoder.open_run) is None:
            return False
        name, next_offset, length = run
        placed = await self._placer.place(channel, decoder, self._targets[name], next_offset // PAGE_SIZE, length)
        if placed is None:
            return False
        self._counters.normal += placed
        return True

    def place_of(self, block: str, indices: Indices) -> Place:
        """Where pages of *block* go that a :class:`.scatter.Scatterer` reads. A thread may call this."""
        return self._targets[block], indices

    async def scatter(
        self, scatterer: Scatterer, channel: Channel, place: Place, most: int = 0, following: Next | None = None
    ) -> tuple[list[int], bool]:
        """Let the kernel put the next bytes of *channel* into pages.

        Args:
            scatterer: that of *channel*.
            place: of the pages, see :meth:`place_of`.
            most: see :meth:`.scatter.Scatterer.read`.
            following: likewise.

        Returns:
            See :meth:`.scatter.Scatterer.read`.

        **Cancellation:** pages that were not received yet may hold a part of their content.
        """
        counts, whole = await scatterer.read(channel, *place, most, following)
        self._counters.normal += sum(counts)
        return counts, whole
