"""The section ``ram``: which pages go, and in which pass; and their places at the destination."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...channel.channels import MULTIFD, PREEMPT, Beside
from ...guest import PAGE_SIZE, PageBitmap, RamBlock
from ...memory.block import find_absent
from ...memory.tracking import LateTracker, end_tracking, snapshot_of, start_tracking
from ...wire import events as ev
from ...wire import postcopy as wire_postcopy
from ...wire.pages import multifd
from .. import guest_calls
from ..guest_results import absent_pages
from ..ram.inflate import put_inflated
from ..ram.records import PageSender
from ..ram.sender import RamSender

if TYPE_CHECKING:
    import trio

    from ...channel.channel import Channel
    from ...channel.limiter import Limiter
    from ...channel.reception import Reception
    from ...config.config import Config
    from ...guest import DirtyTracker, Guest
    from ...monitor.statistics import Counters
    from ..ram.multifd_receiver import MultifdReceiver
    from ..ram.multifd_sender import MultifdSender
    from ..ram.preempt_receiver import PreemptReceiver
    from ..ram.receiver import RamReceiver
    from ..ram.records import PageEncoder
    from ..ram.sample import PageSampler


def at_least_one(unsent: Sequence[PageBitmap]) -> None:
    """Where nothing is left to follow the guest, one page goes a second time.

    A QEMU that was told no DISCARD makes LISTEN the first one, and then refuses RUN: the guest would be lost.

    Args:
        unsent: by block; changed in place.
    """
    if unsent and not any(bitmap.any() for bitmap in unsent):
        max(unsent, key=len)[-1:] = True


def beside_of(config: Config) -> tuple[Beside, ...]:
    """The connections beside the main one on which pages go."""
    wanted = []
    if config.capabilities.multifd and config.peer.multifd_scheme != "2.11":
        count = config.parameters.multifd_channels
        wanted.append(Beside(kind=MULTIFD, capability="multifd", count=count, early=True, magic=multifd.MAGIC))
    if config.capabilities.postcopy_preempt:
        early = config.peer.preempt_pre_7_2
        wanted.append(Beside(kind=PREEMPT, capability="postcopy-preempt", count=1, early=early))
    return tuple(wanted)


class RamSection:
    """The RAM of one outgoing migration. A :class:`trimig.engine.sections.SectionHandler`.

    Args:
        channel: the main one.
        blocks: the guest's RAM.
        tracker: one that has not been started.
        encoder: sends pages of the passes; None for PAGE and ZERO records only.
        data: writes pages to the data channels of multifd, if there are any.
        sampler: looks at pages of all passes but the first one.

    Attributes:
        sender: writes the section. No other object uses it while a method of this one runs.
        blocks: the guest's RAM.
        unsent: pages that have not been sent as they are now, by block, as far as that was found.
    """

    def __init__(
        self,
        channel: Channel,
        limiter: Limiter,
        config: Config,
        counters: Counters,
        blocks: Sequence[RamBlock],
        tracker: DirtyTracker,
        encoder: PageEncoder | None = None,
        data: MultifdSender | None = None,
        sampler: PageSampler | None = None,
    ) -> None:
        self._channel = channel
        self._limiter = limiter
        self._config = config
        self._counters = counters
        self._tracker = tracker
        self._late: LateTracker | None = None
        self._encoder = encoder
        self._data = data
        self._sampler = sampler
        self._first = True
        self.blocks = tuple(blocks)
        self.sender = self._sender_on(channel, data)
        self.unsent: list[PageBitmap] = [np.ones(b.length // PAGE_SIZE, np.bool_) for b in blocks]

    def _sender_on(self, channel: Channel, data: MultifdSender | None = None) -> RamSender:
        look = self._config.parameters.zero_page_detection != "none"
        pages = PageSender(channel, self._counters, self._encoder, look_for_zeros=look)
        footers = self._config.peer.send_section_footer
        return RamSender(channel, self._limiter, pages, data=data, footers=footers)

    @property
    def tasks(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """Those of the data channels."""
        return {} if self._data is None else self._data.tasks

    @property
    def boundary(self) -> bytes:
        """See :class:`trimig.engine.sections.SectionHandler`."""
        return self.sender.boundary

    async def setup(self) -> None:
        """The list of blocks; dirty tracking begins. The data channels are opened: the begin of the stream has been sent.

        **Cancellation:** tracking may be on.
        """
        if self._data is not None:
            self._data.open()
        await self.sender.start(self.blocks)
        self._late = await guest_calls.call(
            "starting dirty tracking", functools.partial(start_tracking, self._tracker), self._config.handover_timeout
        )
        self._counters.dirty_tracking = self._tracker.method

    async def iterate(self, stop: Callable[[], bool]) -> None:
        """One pass over the pages that are not sent.

        **Cancellation:** some have been sent; the channel is poisoned if one was cut.
        """
        self._begin_pass(last=False)
        if self._sampler is not None:
            self._sampler.begin_pass()
        for number, block in enumerate(self.blocks):
            with guest_calls.guarded("looking at the guest's memory"):
                pages = snapshot_of(self._tracker, block)
                todo = self.unsent[number]
                if self._sampler is not None and not self._first:
                    self._sampler.look(block.name, pages, todo)
            absent = await self._absent(block) if self._first else None
            left = await self.sender.send_pass(block, pages, todo, absent, stop, self._protector(block.name))
            self.unsent[number] = np.zeros_like(todo) if left is None else left
        await self.sender.end_pass()
        self._first = False

    async def _absent(self, block: RamBlock) -> PageBitmap | None:
        """Pages of *block* without memory, any write to which will be found; None if none are known."""
        absent = await self._find_absent(block)
        protect = self._protector(block.name)
        if protect is None or absent is None or not absent.any():
            return absent
        await protect(np.flatnonzero(absent))
        still = await self._find_absent(block)
        return None if still is None else absent & still

    async def _find_absent(self, block: RamBlock) -> PageBitmap | None:
        with guest_calls.guarded("looking at the guest's memory"):
            return absent_pages(await find_absent(block), block)

    def _protector(self, block: str) -> Callable[[NDArray[np.int64]], Awaitable[None]] | None:
        """What is to be called with the numbers of pages of *block* before they are read."""
        late = self._late
        if late is None:
            return None

        async def protect(indices: NDArray[np.int64]) -> None:
            await guest_calls.call(
                "protecting the pages that are sent",
                lambda: late.protect(block, indices),
                self._config.handover_timeout,
            )

        return protect

    def _begin_pass(self, *, last: bool) -> None:
        if self._encoder is not None:
            self._encoder.begin_pass(first=self._first, last=last)

    async def find_pending(self) -> int:
        """Ask the tracker.

        **Cancellation:** pages written since the last call may be lost.
        """
        written = await guest_calls.find_written(self._tracker, self.blocks, self._config.handover_timeout)
        before = sum(int(np.count_nonzero(bitmap)) for bitmap in self.unsent)
        self.unsent = [written[b.name] | left for b, left in zip(self.blocks, self.unsent, strict=True)]
        pending = sum(int(np.count_nonzero(bitmap)) for bitmap in self.unsent)
        self._counters.dirtied += (pending - before) * PAGE_SIZE
        return pending * PAGE_SIZE

    async def complete(self) -> None:
        """The last pages.

        **Cancellation:** as for a pass.
        """
        self._begin_pass(last=True)
        rest = zip(self.blocks, self.unsent, strict=True)
        await self.sender.end([(block, snapshot_of(self._tracker, block), unsent) for block, unsent in rest])

    async def switch_to_postcopy(self) -> None:
        """The pages that follow, as ranges that the destination drops. They will go as PAGE and ZERO records.

        **Cancellation:** some ranges have been sent.
        """
        self._drop_encoder()
        self.sender.leave_channels()
        at_least_one(self.unsent)
        for block, bitmap in zip(self.blocks, self.unsent, strict=True):
            await self._channel.send(b"".join(wire_postcopy.discards(block.name, bitmap)))

    def _drop_encoder(self) -> None:
        self._encoder = None
        self.sender.stop_encoding()

    def move_to(self, channel: Channel) -> None:
        """Go on over another main connection."""
        self._channel = channel
        self.sender = self._sender_on(channel)

    async def cleanup(self) -> None:
        """Dirty tracking ends, and the encoder's memory is released.

        **Cancellation:** tracking ends at once.
        """
        self._drop_encoder()
        with guest_calls.guarded("ending the dirty tracking"):
            await end_tracking(self._tracker)


class RamLoader:
    """The RAM of one incoming migration, up to the end of precopy. A :class:`trimig.engine.sections.SectionLoader`.

    Args:
        threads: returns the parameter ``decompress-threads``.
    """

    def __init__(
        self,
        guest: Guest,
        ram: RamReceiver,
        reception: Reception,
        preempt: PreemptReceiver,
        data: MultifdReceiver,
        threads: Callable[[], int],
    ) -> None:
        self._guest = guest
        self._ram = ram
        self._reception = reception
        self._preempt = preempt
        self._data = data
        self._threads = threads

    def begin(self, nursery: trio.Nursery) -> None:
        """Expect the preempt channel and data channels, see :class:`trimig.engine.sections.SectionLoader`."""
        self._preempt.expect(nursery)
        self._data.expect(nursery)

    async def load(self, event: ev.Element) -> None:
        """Place pages, wait for the data channels, or check the list of blocks where a second START repeats it.

        **Cancellation:** some pages are in their places.
        """
        match event:
            case ev.PageElement():
                if not isinstance(event, ev.ZeroRun):
                    self._data.check_main_page(event.at)
                    self._reception.settle()
                await put_inflated(self._ram, event, self._threads())
            case ev.RamSync():
                await self._data.mark(event.at)
            case ev.RamEnd():
                await self._data.section_ended(event.at)
            case ev.RamList():
                self._ram.open(event, self._guest.ram)
