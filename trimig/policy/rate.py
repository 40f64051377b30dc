"""The bytes that may be sent now, under a limit in bytes per second.

The limit is enforced in windows of 100 ms, as QEMU does (states.md part 13: XFER_LIMIT_RATIO). If a window exceeds its
share, the excess is subtracted from the next window, so the mean is exact although pages are not divisible.
"""

from __future__ import annotations

#: Length of one window in seconds; QEMU's BUFFER_DELAY.
WINDOW = 0.1


class Budget:
    """The bytes that the present window may still send.

    Args:
        rate: bytes per second; 0 means no limit.
        now: the present time in seconds, of any monotonic clock.
    """

    def __init__(self, rate: int, now: float) -> None:
        self._rate = rate
        self._start = now
        self._used = 0.0

    @property
    def rate(self) -> int:
        """The limit in bytes per second; 0 means none."""
        return self._rate

    @property
    def window_end(self) -> float:
        """When the next window begins."""
        return self._start + WINDOW

    def set_rate(self, rate: int, now: float) -> None:
        """Change the limit, at once.

        Bytes sent in the present window still count (otherwise a limit that is set again and again would not limit),
        but the excess under an old, higher limit is dropped at the end of the window.
        """
        self.roll(now)
        self._rate = rate
        self._used = min(self._used, rate * WINDOW)

    def roll(self, now: float) -> None:
        """Begin a new window if the present one is over. An unused share is lost, so that no burst follows an idle
        time.
        """
        # The margin is for rounding: at `window_end` the window is over.
        passed = int((now - self._start) / WINDOW + 1e-6)
        if passed > 0:
            self._start += passed * WINDOW
            self._used = max(0.0, self._used - passed * self._rate * WINDOW)

    def available(self, now: float) -> float:
        """Bytes that may be sent now; zero or negative if the caller must wait for :attr:`window_end`."""
        if not self._rate:
            return float("inf")
        self.roll(now)
        return self._rate * WINDOW - self._used

    def spend(self, count: int) -> None:
        """*count* bytes are being sent; may exceed the available bytes by less than one indivisible piece."""
        if self._rate:
            self._used += count

    def give_back(self, count: int) -> None:
        """*count* of the spent bytes were not sent. What was spent in a window that is over does not come back."""
        self._used = max(0.0, self._used - count)
