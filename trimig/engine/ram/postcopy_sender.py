"""The source in postcopy: pages for a guest that runs at the other end already.

What the guest waits for goes first, and no bandwidth limit holds it up. On one connection everything that is handed to the
kernel goes out before it, so nothing is handed over that the kernel could not send soon: background pages wait until its
queue is short. With a second one (:mod:`.preempt_sender`) the two do not meet.

What shares the run loop with a request delays it. So on kernel sockets one thread reads the requests and sends all pages
(:mod:`.sending`); see :mod:`trimig.channel.service` for what belongs to whom meanwhile. It returns to trio for every message that is no
request, and where the bandwidth limit has to be asked. On other streams tasks of trio do the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from ...channel.service import Attendant
from ...errors import TransportFailed
from ...guest import PAGE_SIZE, DiscardableBlock, RamBlock
from ...policy.page_order import REQUESTED_PAGES
from ...wire.postcopy import runs_of
from .preempt_sender import PreemptSender
from .sending import Growing, MakePlan, Outlet, PageSending

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.limiter import Limiter
    from ...channel.return_path import ReturnPathReader
    from ...monitor.statistics import Counters
    from ...policy.page_order import Batch, PageOrder
    from ...wire.return_path import PageRequest
    from .sender import RamSender


class PostcopySender:
    """Sends what is unsent, each page once.

    Args:
        sender: of the records; no other object uses it meanwhile.
        limiter: of the background pages.
        blocks: the guest's RAM, which does not change any more.
        order: what is unsent, by the blocks' numbers.
        urgent: the second connection, for pages that were asked for.
        reader: of the return path, from which a thread may read; None if :meth:`request` is the only way for requests.
    """

    def __init__(
        self,
        channel: Channel,
        sender: RamSender,
        limiter: Limiter,
        blocks: Sequence[RamBlock],
        order: PageOrder,
        counters: Counters,
        urgent: Channel | None = None,
        reader: ReturnPathReader | None = None,
    ) -> None:
        self._channel = channel
        self._reader = reader
        self._channels = [channel] if urgent is None else [channel, urgent]
        self._attendant = Attendant()
        self._granted = 0  # pages of the background that the limiter has allowed
        self._threaded = False  # a thread sends; tasks only note requests
        self._sender = sender
        self._limiter = limiter
        self._blocks = tuple(blocks)
        self._numbers = {block.name: number for number, block in enumerate(blocks)}
        self._order = order
        self._counters = counters
        self._urgent = PreemptSender(urgent, blocks, order, counters, self._sent) if urgent is not None else None
        self._idle: trio.CancelScope | None = None
        self._growing = Growing(beside=urgent is not None)
        self._rest = b""  # of a page that the kernel did not take whole
        self._release = False
        self._released = False

    def release_sent(self) -> None:
        """From now on give sent pages back to the host (release-ram). They cannot be sent again."""
        self._release = True

    def request(self, message: PageRequest) -> None:
        """The guest waits for these bytes; the decoder of the return path has looked at the range.

        A single page goes at once, from here, if no other task is in the middle of sending: waking the sending task would cost
        as much as the page.
        """
        if not self._note(message) or self._threaded:
            return
        if self._urgent is not None:
            self._urgent.requested()
            return
        if self._idle is None:
            return
        if message.length > PAGE_SIZE or self._rest or not self._at_once():
            self._idle.cancel("the guest waits for a page")

    def _note(self, message: PageRequest) -> bool:
        """Put a request into the order; False if it is not new."""
        block = self._numbers[message.block]
        if not self._order.request(block, message.start // PAGE_SIZE, message.length // PAGE_SIZE):
            return False
        self._counters.page_requests += 1
        self._growing.asked()
        return True

    def _at_once(self) -> bool:
        """Send the page that was just asked for; False if the sending task must do that, or what is left of it."""
        batch = self._order.next_batch(1)
        assert batch is not None
        block, page = self._blocks[batch.block], int(batch.pages[0])
        rest = self._sender.send_page_now(block.name, block.pages, page)
        if rest is None:
            self._order.take_back(batch)
            return False
        self._sent(batch)
        self._rest = rest
        return not rest and bool(self._order.remaining)

    async def run(self) -> None:
        """Send until every page has gone.

        Raises:
            TransportFailed: the connection broke. What :attr:`PageOrder.unsent` says was handed out may not have arrived.

        **Cancellation:** as for TransportFailed.
        """
        self._channel.keep_queue_short()
        if all(channel.direct for channel in self._channels):
            try:
                await self._send_by_threads()
            finally:
                self._threaded = False
                for channel in self._channels:
                    channel.end_sending()
        if self._urgent is not None and self._order.urgent:
            self._urgent.requested()
        if self._urgent is None:
            await self._send_all()
            return
        failed: TransportFailed | None = None

        async def serve(urgent: PreemptSender) -> None:
            nonlocal failed
            try:
                await urgent.run()
            except TransportFailed as error:
                failed = error
                nursery.cancel_scope.cancel("the connection for urgent pages broke")

        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            nursery.start_soon(serve, self._urgent, name="trimig.urgent")
            try:
                await self._send_all()
                await self._urgent.wait_idle()
                await self._urgent.end()
            except TransportFailed as error:
                failed = error
            nursery.cancel_scope.cancel("everything has been sent")
        if failed is not None:
            raise failed

    async def _send_by_threads(self) -> None:
        """Send in a thread, until every page has gone or there is no thread."""
        reader, main = self._reader, self._outlet(self._channel, self._sender.plan)
        if reader is None or self._rest:
            return
        urgent = self._outlet(self._channels[1], self._urgent.plan) if self._urgent is not None else None
        sending = PageSending(reader, self._note, self._order, self._growing, main, urgent)
        self._threaded = True
        while self._order.remaining or not sending.idle:
            async with reader.owner:
                done = await self._serve(sending)
            if reader.keeps:
                reader.take_kept()
                await trio.lowlevel.checkpoint()
            if reader.lost is not None:
                raise reader.lost
            if not done:
                break
        for outlet in filter(None, (main, urgent)):
            await outlet.finish()

    async def _serve(self, sending: PageSending) -> bool:
        """Let a thread work within the bandwidth limit, until it needs trio; False if there is no thread."""
        if self._limiter.unlimited:
            sending.allow(math.inf)
        elif not 0 < sending.allowance < math.inf:
            granted, self._granted = self._granted, 0
            sending.allow(granted)
        if 0 < sending.allowance < math.inf:
            return await self._attendant.run(sending, self._channels)
        done, failed = False, None
        wanted = None if sending.allowance else min(self._growing.pages, self._order.remaining)
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            nursery.start_soon(self._watch_limit, wanted, name="trimig.limit")
            try:
                done = await self._attendant.run(sending, self._channels)
            except TransportFailed as error:
                failed = error
            nursery.cancel_scope.cancel("the thread has returned")
        if failed is not None:
            raise failed
        return done

    async def _watch_limit(self, wanted: int | None) -> None:
        """End the thread's work when *wanted* pages may be sent; with None when there is a limit."""
        if wanted is None:
            await self._limiter.wait_limited()
        elif wanted:
            self._granted = await self._limiter.pages(wanted)
        else:
            await trio.sleep_forever()
        self._attendant.recall()

    def _outlet(self, channel: Channel, plan: MakePlan) -> Outlet:
        """Sends over *channel* in a thread."""
        return Outlet(channel, [(block.name, block.pages) for block in self._blocks], plan, self._sent)

    async def _send_all(self) -> None:
        while self._order.remaining or self._rest:
            self._release_first()
            if self._rest:
                rest, self._rest = self._rest, b""
                await self._channel.send(rest)
                continue
            if self._urgent is None and self._order.urgent:
                batch = self._order.next_batch(REQUESTED_PAGES)
            else:
                limit = await self._background()
                # With a second connection it is that one's business to send what was asked for.
                next_batch = self._order.next_batch if self._urgent is None else self._order.background
                batch = next_batch(limit) if limit else None
            if batch is not None:
                await self._send(batch)

    async def _send(self, batch: Batch) -> None:
        block = self._blocks[batch.block]
        await self._sender.send_unlimited(block.name, block.pages, batch.pages)
        self._sent(batch)

    def _sent(self, batch: Batch) -> None:
        self._counters.remaining = self._order.remaining * PAGE_SIZE
        if self._released:
            for page in batch.pages.tolist():
                _give_back(self._blocks[batch.block], page, 1)

    def _release_first(self) -> None:
        """Once, between two runs: what had been sent before it was allowed."""
        if self._release and not self._released and not (self._urgent is not None and self._urgent.busy):
            self._released = True
            for block, unsent in zip(self._blocks, self._order.unsent, strict=True):
                for first, end in runs_of(~unsent).tolist():
                    _give_back(block, first, end - first)

    async def _background(self) -> int:
        """How many pages of the background may go; 0 if the guest has begun to wait for a page meanwhile."""
        count = 0
        with trio.CancelScope() as self._idle:
            await self._channel.wait_queue_short()
            count = await self._limiter.pages(min(self._growing.pages, self._order.remaining))
            self._growing.grow()
        self._idle = None
        return count


def _give_back(block: RamBlock, first: int, count: int) -> None:
    if isinstance(block, DiscardableBlock):
        block.discard_slice(first, count)
