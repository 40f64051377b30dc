"""How long does a migration still take, and does it go on without an end? Time is an argument; seconds, bytes."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Final

#: A rest below this is sent in no time: one target page.
_LEAST: Final = 4096.0
#: Seconds of the past that the present speed is taken from.
_WINDOW: Final = 5.0
#: Seconds that must have been seen before a speed is told.
_SEEN: Final = 0.5
#: So many passes in a row that leave no less make it worth a warning.
STALLED_PASSES: Final = 3
#: A pass that leaves more than this share of the best one before it has not come nearer.
NEARER: Final = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """The time that is left.

    Attributes:
        seconds: infinite where no end is in sight, None where nothing is known yet.
        at_least: what comes after it cannot be told yet, so that it takes so long at least.
    """

    seconds: float | None = None
    at_least: bool = False


UNKNOWN: Final = Estimate()


def chase_seconds(*, ahead: float, bandwidth: float, dirty_rate: float, downtime_limit: float) -> float:
    """From the end of a pass until the guest runs at the destination, if rates stay as they are.

    A pass sends what is ahead, and meanwhile the guest dirties ``dirty_rate / bandwidth`` of it anew: a geometric series,
    up to the pass that leaves what fits into the downtime limit. Infinite where a pass leaves no less than the one before.
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


class Falling:
    """Something that falls to nothing, seen now and then: how fast it falls, and how long it still takes."""

    def __init__(self, window: float = _WINDOW) -> None:
        """*window*: seconds of the past that count."""
        self._window = window
        self._seen: collections.deque[tuple[float, float]] = collections.deque()

    def see(self, now: float, left: float) -> None:
        """So much is *left* at *now*; a rise begins anew."""
        if self._seen and (left > self._seen[-1][1] or now < self._seen[-1][0]):
            self._seen.clear()
        self._seen.append((now, left))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """How fast it falls at present; None where too little has been seen."""
        if len(self._seen) < 2 or self._seen[-1][0] - self._seen[0][0] < _SEEN:
            return None
        (since, before), (now, left) = self._seen[0], self._seen[-1]
        return (before - left) / (now - since)

    @property
    def seconds(self) -> float | None:
        """How long it still takes; None where it cannot be told, or where nothing moves at present."""
        if self._seen and self._seen[-1][1] <= 0:
            return 0.0
        speed = self.per_second
        return self._seen[-1][1] / speed if speed else None


class Outlook:
    """The time that is left of one migration, told from what is seen of it."""

    def __init__(self) -> None:
        self._end: float | None = None
        self._stage = ""
        self._falling = Falling()

    def passed(self, now: float, seconds: float) -> None:
        """A pass is over at *now*, and it takes so long from there (:func:`chase_seconds`; infinite for no end)."""
        self._end = now + seconds

    def look(self, now: float, stage: str, left: float) -> Estimate:
        """The estimate at *now*.

        Args:
            stage: ``first copy`` (what follows is not known yet), ``chase``, or ``following`` (postcopy).
            left: bytes of the first copy, or of what follows; not looked at in the chase.
        """
        if stage != self._stage:
            self._stage, self._falling = stage, Falling()
        if stage == "chase":
            return UNKNOWN if self._end is None else Estimate(max(0.0, self._end - now))
        self._falling.see(now, left)
        if self._falling.seconds is None:
            return UNKNOWN
        return Estimate(self._falling.seconds, at_least=stage == "first copy")


class Stall:
    """Notices, once, that passes leave no less than those before them."""

    def __init__(self) -> None:
        self._least: float | None = None
        self._in_a_row = 0
        self._told = False

    @property
    def least(self) -> float | None:
        """The smallest rest so far; None before the first pass is over."""
        return self._least

    def passed(self, remaining: float) -> bool:
        """A pass has left so much. True for the third in a row that does not come nearer, and never again."""
        nearer = self._least is None or remaining <= self._least * NEARER
        self._in_a_row = 0 if nearer else self._in_a_row + 1
        self._least = remaining if self._least is None else min(self._least, remaining)
        if self._in_a_row < STALLED_PASSES or self._told:
            return False
        self._told = True
        return True
