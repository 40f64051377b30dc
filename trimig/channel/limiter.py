"""The task that enforces the bandwidth limit and measures what the transport really takes.

The sender spends from a budget; when that is used up it waits for this task to open the next window. Once per window
the task also updates bandwidth, dirty rate and the expected downtime, whether there is a limit or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ..guest import PAGE_SIZE
from ..policy.rate import WINDOW, Budget
from .channel import BATCH_PAGES, Channel

if TYPE_CHECKING:
    from ..monitor.statistics import Counters

_RECORD = 8 + PAGE_SIZE


class Limiter:
    """Bandwidth limit of one attempt.

    Args:
        channel: whose byte count is measured.
        rate: bytes per second; 0 for no limit.
        counters: receives the measurements.
    """

    def __init__(self, channel: Channel, rate: int, counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._budget = Budget(rate, trio.current_time())
        self._opened = trio.Event()
        self._lifted = False
        self._resting = False

    def set_rate(self, rate: int) -> None:
        """A new limit, at once."""
        self._budget.set_rate(rate, trio.current_time())
        self._wake()

    def move_to(self, channel: Channel, rate: int) -> None:
        """Go on with another connection, or another kind of traffic."""
        self._channel = channel
        self._lifted = self._resting = False
        self.set_rate(rate)

    def rest(self) -> None:
        """The connection is lost: there is nothing to measure until :meth:`move_to`."""
        self._resting = True

    def lift(self) -> None:
        """No limit any more: the guest stands still."""
        self._lifted = True
        self._wake()

    def _wake(self) -> None:
        self._opened.set()
        self._opened = trio.Event()

    async def pages(self, wanted: int) -> int:
        """How many PAGE records may be sent now, 1 to *wanted*; waits while the answer would be none.

        **Cancellation:** nothing was spent.
        """
        while True:
            available = float("inf") if self._lifted else self._budget.available(trio.current_time())
            if available > 0:
                count = int(min(wanted, BATCH_PAGES, max(1.0, available / _RECORD)))
                self._budget.spend(count * _RECORD)
                return count
            await self._opened.wait()

    async def bytes(self, count: int) -> None:
        """Wait until *count* bytes (small against a window) may be sent, and spend them.

        **Cancellation:** nothing was spent.
        """
        while not self._lifted and self._budget.available(trio.current_time()) <= 0:
            await self._opened.wait()
        self._budget.spend(count)

    async def run(self) -> None:
        """Open a window every 100 ms, until cancelled.

        **Cancellation:** the sender gets no further budget.
        """
        c = self._counters
        then, sent, pages = trio.current_time(), 0, c.normal + c.duplicate
        channel = self._channel
        while True:
            self._budget.roll(trio.current_time())  # nothing else does where there is no limit, or while a write blocks
            await trio.sleep(min(max(self._budget.window_end - trio.current_time(), 0.001), WINDOW))
            self._wake()
            now = trio.current_time()
            if self._channel is not channel:
                channel, then, sent = self._channel, now, 0
            if (passed := now - then) < WINDOW or self._resting:
                continue
            if self._channel.writing and self._channel.sent == sent:
                continue  # one slow write of a stream that is not a socket: it counts when it is done, over its whole time
            handled = c.normal + c.duplicate
            c.pages_per_second = (handled - pages) / passed
            # A window in which little was sent tells the guest's appetite, not the transport's (states.md part 13).
            # What merely fills the kernel's buffers has not been transported.
            delivered = self._channel.sent - self._channel.backlog()
            if delivered - sent > 10_000:
                c.bandwidth = (delivered - sent) / passed
            then, sent, pages = now, delivered, handled
