"""The source's part of postcopy that waits for nothing: reads requests for pages, and sends pages.

A :class:`PageSending` is a :class:`trimig.channel.service.Service`: a thread drives it where the connections are kernel sockets.
What was asked for goes first, as far as the kernel takes it: on the second connection, if there is one, else on the main one
between two batches of the others. Messages that are no requests are left to trio.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...channel.service import Awaited
from ...guest import Pages
from ...policy.page_order import REQUESTED_PAGES

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.return_path import ReturnPathReader
    from ...channel.step import SendPlan
    from ...policy.page_order import Batch, PageOrder
    from ...wire.return_path import PageRequest

#: Background pages handed over at once: a request that comes meanwhile waits for 128 KiB, less than 0.2 ms.
BACKGROUND_PAGES: Final = 32
#: The same where no page was asked for during a while: each batch twice the one before, up to 512 KiB. With 2 MiB a page
#: that is asked for came after 17 ms in the median instead of 2.4.
_CALM_PAGES: Final = 128
#: The same with a second connection, where a page that is asked for only waits for a turn of this process.
_CALM_PAGES_BESIDE: Final = 256

#: What is to be sent for pages of a block: its name, its memory, and the numbers of the pages.
MakePlan: TypeAlias = Callable[[str, Pages, NDArray[np.int64]], "SendPlan"]


class Growing:
    """The size of the batches of background pages, which grows as long as no page is asked for.

    Args:
        beside: there is a second connection.
    """

    def __init__(self, *, beside: bool) -> None:
        self._most = _CALM_PAGES_BESIDE if beside else _CALM_PAGES
        self._beside = beside
        #: Pages of the next batch.
        self.pages = BACKGROUND_PAGES

    def grow(self) -> None:
        """A batch is sent."""
        self.pages = min(2 * self.pages, self._most)

    def asked(self) -> None:
        """A page was asked for."""
        if not self._beside:
            self.pages = BACKGROUND_PAGES


class Outlet:
    """Sends batches over one connection, one after the other.

    Args:
        memory: name and pages of each block.
        sent: told each batch that has gone whole.
    """

    def __init__(
        self,
        channel: Channel,
        memory: Sequence[tuple[str, Pages]],
        plan: MakePlan,
        sent: Callable[[Batch], None],
    ) -> None:
        self.channel = channel
        self._memory = memory
        self._plan = plan
        self._sent = sent
        self._batch: Batch | None = None

    @property
    def idle(self) -> bool:
        """Every batch has gone whole."""
        return self._batch is None

    def begin(self, batch: Batch) -> bool:
        """Send *batch*; only if :attr:`idle`. As :meth:`go_on`."""
        name, pages = self._memory[batch.block]
        self.channel.begin_sending(self._plan(name, pages, batch.pages))
        self._batch = batch
        return self.go_on()

    async def finish(self) -> None:
        """Send by trio what is left of a batch that was begun. TransportFailed.

        **Cancellation:** the channel is poisoned.
        """
        await self.channel.finish_sending()
        self.go_on()

    def go_on(self) -> bool:
        """Send what the kernel takes of a batch that was begun; True if nothing is left of it. TransportFailed."""
        if not self.channel.send_more_now():
            return False
        if self._batch is not None:
            self._sent(self._batch)
            self._batch = None
        return True


class PageSending:
    """Sends what is unsent, each page once, and what was asked for first.

    Args:
        reader: of the return path.
        request: notes a request in *order*.
        growing: the size of the batches of the background.
        main: the main connection.
        urgent: the second one, if there is one.

    Attributes:
        allowance: pages of the background that may be sent; ``math.inf`` for no limit.
    """

    def __init__(
        self,
        reader: ReturnPathReader,
        request: Callable[[PageRequest], object],
        order: PageOrder,
        growing: Growing,
        main: Outlet,
        urgent: Outlet | None,
    ) -> None:
        self._reader = reader
        self._request = request
        self._order = order
        self._growing = growing
        self._main = main
        self._urgent = urgent
        self.allowance = 0.0
        self._spends = False

    def allow(self, pages: float) -> None:
        """Set :attr:`allowance`. With 0 only what is asked for is sent, until another number is set."""
        self.allowance = pages
        self._spends = pages > 0

    @property
    def idle(self) -> bool:
        """Every page that was handed out has gone whole."""
        return self._main.idle and (self._urgent is None or self._urgent.idle)

    def advance(self) -> Awaited | None:
        """See :class:`trimig.channel.service.Service`. None also if the allowance is spent, and at the end.

        Raises:
            TransportFailed: a connection is lost.
        """
        for request in self._reader.requests_now():
            self._request(request)
        if self._reader.keeps:
            return None
        self._main.go_on()
        _send_requested(self._urgent or self._main, self._order)
        if self._more and _takes_more(self._main.channel.descriptor):
            self._send_background()
        if self.idle and (not self._order.remaining or (self._spends and not self.allowance)):
            return None
        return self._awaited()

    @property
    def _more(self) -> bool:
        """The next batch of the background may go, if the queue is short."""
        return self._main.idle and bool(self._order.remaining) and self.allowance > 0

    def _send_background(self) -> None:
        batch = self._order.background(int(min(self._growing.pages, self.allowance)))
        if batch is not None:
            self._growing.grow()
            self.allowance -= len(batch.pages)
            self._main.begin(batch)

    def _awaited(self) -> Awaited:
        main, urgent = self._main.channel, self._urgent
        out = self._more or not self._main.idle
        ports = {main.descriptor: select.POLLIN | (select.POLLOUT if out else 0)}
        slow = main
        if urgent is not None and not urgent.idle:
            ports[urgent.channel.descriptor] = select.POLLOUT
            slow = urgent.channel
        seconds = slow.stall_timeout if out or slow is not main else math.inf
        return Awaited(ports=ports, progress=slow.sent, seconds=seconds, fault="took no data")


def _takes_more(descriptor: int) -> bool:
    """The queue of that socket is short, see :meth:`trimig.channel.channel.Channel.keep_queue_short`; or it is broken."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))


def _send_requested(outlet: Outlet, order: PageOrder) -> None:
    outlet.go_on()
    while outlet.idle and (batch := order.requested(REQUESTED_PAGES)) is not None:
        outlet.begin(batch)
