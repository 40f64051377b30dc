"""The source's second connection (postcopy-preempt): pages that the guest waits for, and nothing else.

No background page is ever ahead of them in a queue. There are page records on it and, when everything has gone, one end
word; it has no sections and no way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import trio
from numpy.typing import NDArray

from ...guest import Pages
from ...policy.page_order import REQUESTED_PAGES
from ...wire import encoder as wire
from .records import PageSender

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.step import SendPlan
    from ...guest import RamBlock
    from ...monitor.statistics import Counters
    from ...policy.page_order import Batch, PageOrder


class PreemptSender:
    """Sends what was asked for, as soon as it is asked for.

    Args:
        channel: used by this object alone.
        order: what is unsent; the background of it goes on the main channel.
        told: gets each batch that has been handed over.
    """

    def __init__(
        self,
        channel: Channel,
        blocks: Sequence[RamBlock],
        order: PageOrder,
        counters: Counters,
        told: Callable[[Batch], None],
    ) -> None:
        self._channel = channel
        self._sender = PageSender(channel, counters)
        self._blocks = tuple(blocks)
        self._order = order
        self._told = told
        self._rest = b""  # of a page that the kernel did not take whole
        self._work = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    @property
    def busy(self) -> bool:
        """A page has been taken from the order and not been handed over whole."""
        return not self._idle.is_set()

    def requested(self) -> None:
        """The order has a request: send it, from here if no other task is in the middle of sending.

        Waking the sending task would cost as much as the page.
        """
        if self._idle.is_set() and (batch := self._order.requested(1)) is not None:
            block = self._blocks[batch.block]
            self._rest = self._sender.send_now(block.name, block.pages, int(batch.pages[0]))
            self._told(batch)
        if self._rest or self._order.urgent:
            if self._idle.is_set():
                self._idle = trio.Event()
            self._work.set()

    async def run(self) -> None:
        """Send what could not be sent at once, until cancelled.

        Raises:
            TransportFailed: the connection broke.

        **Cancellation:** as for TransportFailed.
        """
        while True:
            await self._work.wait()
            self._work = trio.Event()
            if self._rest:
                rest, self._rest = self._rest, b""
                await self._channel.send(rest)
            while (batch := self._order.requested(REQUESTED_PAGES)) is not None:
                block = self._blocks[batch.block]
                await self._sender.send(block.name, block.pages, batch.pages)
                self._told(batch)
            self._idle.set()

    def plan(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> SendPlan:
        """What is to be sent for these pages of *block*, by a thread, while no other method is used."""
        return self._sender.plan(b"", block, pages, indices)

    async def wait_idle(self) -> None:
        """Wait until everything that was asked for has been handed over.

        **Cancellation:** no effect.
        """
        await self._idle.wait()

    async def end(self) -> None:
        """Say that nothing more will come. TransportFailed.

        **Cancellation:** as for TransportFailed.
        """
        await self._channel.send(wire.END_WORD)
