"""The task that enforces the bandwidth limit and measures the bandwidth of the transport.

The sender spends a budget of bytes. When the budget is used up, the sender waits until this task opens the next window.
Once in a window of 100 ms the task also updates the bandwidth and the pages per second, even without a limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ..guest import PAGE_SIZE
from ..policy.rate import WINDOW, Budget
from .vectored import BATCH_PAGES

if TYPE_CHECKING:
    from ..monitor.statistics import Counters
    from .channels import Channels

_RECORD = 8 + PAGE_SIZE
#: Batches of pages grow while one takes less than half of these seconds, and shrink when one takes more: a change of the limit,
#: and a switch to postcopy, wait for the end of a batch.
_BATCH_SECONDS = WINDOW
#: The first batch, and the smallest one, in pages.
_FIRST_PAGES = 1024
_FEW_PAGES = 256


class Limiter:
    """Bandwidth limit of one attempt.

    Args:
        channels: the connections whose sent bytes are measured together.
        rate: bytes per second; 0 for no limit.
        counters: receives the measurements.
    """

    def __init__(self, channels: Channels, rate: int, counters: Counters) -> None:
        self._channels = channels
        self._counters = counters
        self._budget = Budget(rate, trio.current_time())
        self._opened = trio.Event()
        self._lifted = False
        self._resting = False
        self._batch = _FIRST_PAGES
        self._granted_at = trio.current_time()
        self._granted = 0

    def set_rate(self, rate: int) -> None:
        """Change the limit to *rate* bytes per second, at once."""
        self._budget.set_rate(rate, trio.current_time())
        self._wake()

    def resume(self, rate: int) -> None:
        """Measure again, with a limit of *rate* bytes per second. Ends :meth:`lift` and :meth:`rest`."""
        self._lifted = self._resting = False
        self.set_rate(rate)

    def rest(self) -> None:
        """Measure nothing until :meth:`resume`, because the connections are lost."""
        self._resting = True

    def lift(self) -> None:
        """Remove the limit, because the guest is stopped and each byte adds to the downtime."""
        self._lifted = True
        self._wake()

    def _wake(self) -> None:
        self._opened.set()
        self._opened = trio.Event()

    @property
    def unlimited(self) -> bool:
        """There is no limit at present."""
        return self._lifted or not self._budget.rate

    async def wait_limited(self) -> None:
        """Wait until there is a limit.

        **Cancellation:** no effect.
        """
        while self.unlimited:
            await self._opened.wait()

    async def pages(self, wanted: int) -> int:
        """The number of PAGE records that may be sent now, 1 to *wanted*; waits until the budget allows at least one.

        **Cancellation:** nothing was spent.
        """
        self._adapt(trio.current_time() - self._granted_at)
        while True:
            available = float("inf") if self._lifted else self._budget.available(trio.current_time())
            if available > 0:
                self._granted = int(min(wanted, self._batch, max(1.0, available / _RECORD)))
                self._granted_at = trio.current_time()
                self._budget.spend(self._granted * _RECORD)
                return self._granted
            await self._opened.wait()

    def _adapt(self, took: float) -> None:
        """The last batch took *took* seconds, as far as this object can tell."""
        if took > _BATCH_SECONDS:
            self._batch = max(self._batch // 2, _FEW_PAGES)
        elif self._granted == self._batch and took < _BATCH_SECONDS / 2:
            self._batch = min(2 * self._batch, BATCH_PAGES)

    def give_back(self, pages: int, sent: int) -> None:
        """*pages* PAGE records were allowed, and they took *sent* bytes: zero pages take less than others."""
        self._budget.give_back(max(0, pages * _RECORD - sent))

    def refund(self, count: int) -> None:
        """*count* bytes of those that were spent have not been sent."""
        if count > 0:
            self._budget.give_back(count)
            self._wake()

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
        c, channels = self._counters, self._channels
        then, sent, pages = trio.current_time(), 0, c.handled
        while True:
            # Without a limit, and while a write blocks, no other call moves the window on.
            self._budget.roll(trio.current_time())
            await trio.sleep(min(max(self._budget.window_end - trio.current_time(), 0.001), WINDOW))
            self._wake()
            now = trio.current_time()
            if (passed := now - then) < WINDOW:
                continue
            # Bytes that are still in the kernel's buffers have not been transported.
            delivered, handled = channels.delivered, c.handled
            if self._resting:
                then, sent, pages = now, delivered, handled
                continue
            if channels.writing and delivered == sent:
                # A slow write to a stream that is not a socket is in progress. Its bytes are counted when it has ended,
                # and are then divided by the whole time that it took.
                continue
            c.pages_per_second = (handled - pages) / passed
            # Windows with at most 10 kB are left out: there the guest's dirty rate was the limit, not the transport
            # (states.md part 13).
            if delivered - sent > 10_000:
                c.bandwidth = (delivered - sent) / passed
            then, sent, pages = now, delivered, handled
