"""Estimates the remaining time of a migration, and detects passes without progress. Time is an argument; seconds,
bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Final

#: A rest below this counts as sent: one target page.
_LEAST: Final = 4096.0
#: The present speed is measured over this many past seconds.
_WINDOW: Final = 5.0
#: Seconds of measurement before a speed is reported.
_SEEN: Final = 0.5
#: This many passes in a row without progress cause a warning.
STALLED_PASSES: Final = 3
#: A pass that leaves more than this share of the smallest earlier rest has made no progress.
NEARER: Final = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """The remaining time.

    Attributes:
        seconds: infinite if the passes do not converge, None before the first measurement.
        at_least: True if *seconds* is a lower bound, because the time of the later passes is not known yet.
    """

    seconds: float | None = None
    at_least: bool = False


UNKNOWN: Final = Estimate()


def later_passes_seconds(*, ahead: float, bandwidth: float, dirty_rate: float, downtime_limit: float) -> float:
    """Seconds from the end of a pass until the guest runs at the destination, if the rates stay the same.

    A pass sends *ahead* bytes, and meanwhile the guest dirties ``dirty_rate / bandwidth`` of that amount again: a
    geometric series, up to the pass whose rest fits into the downtime limit. Infinite where a pass leaves no less than
    the one before.
    """
    if bandwidth <= 0:
        return math.inf if ahead > 0 else 0.0
    fits = max(downtime_limit * bandwidth, _LEAST)
    if ahead <= fits:
        return ahead / bandwidth
    share = dirty_rate / bandwidth
    if share >= 1:
        return math.inf
    passes = math.ceil(math.log(fits / ahead) / math.log(share)) if share > 0 else 1
    last = ahead * share**passes
    return (ahead * (1 - share**passes) / (1 - share) + last) / bandwidth


class FallingQuantity:
    """A quantity that falls to zero, measured from time to time: its speed, and the time until it is zero."""

    def __init__(self, window: float = _WINDOW) -> None:
        """*window*: seconds of the past that count."""
        self._window = window
        self._seen: collections.deque[tuple[float, float]] = collections.deque()

    def record(self, now: float, left: float) -> None:
        """Record that *left* remains at *now*; a rise restarts the measurement."""
        if self._seen and (left > self._seen[-1][1] or now < self._seen[-1][0]):
            self._seen.clear()
        self._seen.append((now, left))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """The present speed of the fall; None after too short a measurement."""
        if len(self._seen) < 2 or self._seen[-1][0] - self._seen[0][0] < _SEEN:
            return None
        (since, before), (now, left) = self._seen[0], self._seen[-1]
        return (before - left) / (now - since)

    @property
    def seconds(self) -> float | None:
        """The time until zero; None if the speed is not known, or if the quantity does not fall at present."""
        if self._seen and self._seen[-1][1] <= 0:
            return 0.0
        speed = self.per_second
        return self._seen[-1][1] / speed if speed else None


class RemainingTime:
    """The remaining time of one migration, estimated from its measured progress."""

    def __init__(self) -> None:
        self._end: float | None = None
        self._stage = ""
        self._falling = FallingQuantity()

    def passed(self, now: float, seconds: float) -> None:
        """A pass has ended at *now*, and the rest takes *seconds* from there (:func:`later_passes_seconds`; infinite for no
        end).
        """
        self._end = now + seconds

    def estimate(self, now: float, stage: str, left: float) -> Estimate:
        """The estimate at *now*.

        Args:
            stage: ``first copy`` (the time of later passes is not known yet), ``later passes``, or
                ``following`` (postcopy).
            left: remaining bytes of the first copy, or of postcopy; not used in ``later passes``.
        """
        if stage != self._stage:
            self._stage, self._falling = stage, FallingQuantity()
        if stage == "later passes":
            return UNKNOWN if self._end is None else Estimate(max(0.0, self._end - now))
        self._falling.record(now, left)
        if self._falling.seconds is None:
            return UNKNOWN
        return Estimate(self._falling.seconds, at_least=stage == "first copy")


class Stall:
    """Detects, once, that passes leave no less than earlier passes."""

    def __init__(self) -> None:
        self._least: float | None = None
        self._in_a_row = 0
        self._told = False

    @property
    def least(self) -> float | None:
        """The smallest rest so far; None before the end of the first pass."""
        return self._least

    def passed(self, remaining: float, *, helped: bool = False) -> bool:
        """A pass has left *remaining* bytes. True for the third pass in a row without progress, and never again.

        Args:
            helped: something is being done about it, so it is told later, if at all.
        """
        nearer = self._least is None or remaining <= self._least * NEARER
        self._in_a_row = 0 if nearer else self._in_a_row + 1
        self._least = remaining if self._least is None else min(self._least, remaining)
        if self._in_a_row < STALLED_PASSES or self._told or helped:
            return False
        self._told = True
        return True
