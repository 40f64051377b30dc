"""Auto-converge: how much of the guest's running time is taken away, after each dirty sync (ram.md part 7.1).

QEMU's rule: when a period of a second or more has dirtied too much for the second time, the throttle begins or rises.
Times are seconds, amounts bytes, throttles percent of the guest's running time.
"""

from __future__ import annotations

import dataclasses
from typing import Final

#: A sync ends the period if more seconds have passed, as in QEMU.
PERIOD: Final = 1.0
#: The number of periods with too many dirty pages before each step.
_HITS: Final = 2
#: The range of a throttle that is on.
_LEAST: Final = 1
_MOST: Final = 99


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The parameters of auto-converge, all but one in percent.

    Attributes:
        threshold: of the bytes that a period has sent; if more are dirtied, the period is one with too many dirty pages.
        initial: the first throttle.
        increment: the most that each later step adds.
        tailslow: a step adds no more than is needed to dirty *threshold* percent.
        maximum: the largest throttle.
    """

    threshold: int
    initial: int
    increment: int
    tailslow: bool
    maximum: int


class AutoConverge:
    """Decides after each dirty sync of one migration.

    Args:
        now: when the first period begins.
        dirtied: bytes found dirty by all syncs before.
        sent: bytes sent before.
    """

    def __init__(self, now: float, *, dirtied: int, sent: int) -> None:
        self._since = now
        self._dirtied = dirtied
        self._sent = sent
        self._high = 0

    def synced(self, now: float, *, dirtied: int, sent: int, throttle: int, steps: Steps) -> int:
        """The throttle from now on, 0 to 99.

        Args:
            now: the time of this sync.
            dirtied: bytes found dirty by all syncs up to this one; a page that was dirty before is not counted again.
            sent: bytes sent up to now.
            throttle: the present throttle; 0 for none.
            steps: the parameters in force.
        """
        throttle = min(throttle, steps.maximum)
        if now <= self._since + PERIOD:
            return throttle
        period, allowed = dirtied - self._dirtied, (sent - self._sent) * steps.threshold // 100
        self._since, self._dirtied, self._sent = now, dirtied, sent
        if period <= allowed:
            return throttle
        self._high += 1
        if self._high < _HITS:
            return throttle
        self._high = 0
        return _next(throttle, period, allowed, steps)


def _next(throttle: int, period: int, allowed: int, steps: Steps) -> int:
    if not throttle:
        return min(steps.initial, steps.maximum)
    step = steps.increment
    if steps.tailslow:
        running = 100 - throttle
        step = min(step, running - int(running * (allowed / period)))
    return max(_LEAST, min(throttle + step, steps.maximum, _MOST))
