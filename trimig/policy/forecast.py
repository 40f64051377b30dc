"""Forecasts the total time and the downtime of a migration from a few measured passes.

The forecast simulates precopy passes. A pass sends the remaining bytes, which takes these bytes divided by the
bandwidth. In that time the guest dirties the bytes that the next pass has to send. The dirtied bytes follow the
measured points (seconds of a pass, bytes dirtied in it), with straight lines between them: memory that is written again
and again counts once per pass, so long passes dirty less per second than short passes.

There are three simulations: as measured, and at either end of the measurement (fast link and calm guest, slow link and
busy guest). So each figure is an interval. If only one end converges, the verdict says so. Quantities: bytes, seconds,
bytes per second. No clock, no I/O.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

from .. import formats

#: A simulation with this many passes counts as endless.
MAX_PASSES: Final = 200
#: The spread that is assumed if too few passes were measured to show one: a tenth up and down.
LEAST_SPREAD: Final = 0.1
#: Seconds. Shorter passes do not measure the bandwidth: buffers of the transport take their bytes at once.
_SHORT: Final = 0.02
#: Passes that send less than this share of the largest pass do not measure it either: most of their time is overhead.
_SMALL: Final = 0.2
#: The advised dirty rate is below the bandwidth by this factor, so that the advice is enough with certainty.
_MARGIN: Final = 1.1
_MIB: Final = 1 << 20


class ForecastVerdict(enum.Enum):
    """Whether the migration converges, as far as the passes show."""

    CONVERGES = "converges"
    #: It converges as measured, and does not converge at the unfavourable end of the measurement.
    PERHAPS = "may not converge"
    DIVERGES = "does not converge"
    #: The dirty rate of the guest was not measured.
    UNKNOWN = "cannot be told"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One whole measured pass.

    Attributes:
        sent: bytes sent over the transport.
        seconds: duration of the pass.
        dirty_rate: bytes per second of guest memory that the guest dirtied during the pass, each page counted once.
    """

    sent: float
    seconds: float
    dirty_rate: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with its uncertainty; ``high`` is infinite where the unfavourable end never converges."""

    low: float
    likely: float
    high: float


#: Seconds that a switchover takes in addition to the remaining memory: stop, device state, the answer, start. A dry run
#: does not include the switchover, so this is an assumption and no measurement.
SWITCHOVER: Final = Interval(low=0.001, likely=0.01, high=0.05)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The forecast.

    Attributes:
        verdict: whether the migration converges.
        total_time: seconds from the start until the guest runs at the destination; None if there is no end or it is not
            known.
        downtime: seconds in which the guest runs on neither side; None likewise.
        passes: passes over the memory, as measured; None likewise.
        first_copy: seconds that the first copy of all memory takes.
        bandwidth: bytes per second.
        dirty_rate: bytes per second during the passes after the first copy, as measured; None if it was not measured.
        shortest_downtime: the shortest downtime in seconds that the passes can reach; None if it was not measured.
        reason: one sentence: why the migration converges or does not.
        advice: measures that would help, one clause each; empty if none is needed.
    """

    verdict: ForecastVerdict
    total_time: Interval | None
    downtime: Interval | None
    passes: int | None
    first_copy: Interval
    bandwidth: Interval
    dirty_rate: float | None
    shortest_downtime: float | None
    reason: str
    advice: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One simulation. ``left`` is the number of bytes to send with the guest stopped, or the smallest rest if there is
    no end.
    """

    ends: bool
    seconds: float
    passes: int
    left: float


def forecast(
    samples: Sequence[Sample],
    *,
    first_copy: float,
    total: float,
    downtime_limit: float,
    bandwidth: float | None = None,
    switchover: Interval = SWITCHOVER,
) -> Forecast:
    """Forecast a migration.

    Args:
        samples: whole passes in order, the first copy first. Empty if the first copy was not finished; then *bandwidth*
            must be given.
        first_copy: bytes that the first copy takes on the transport (zero pages take hardly any).
        total: bytes of guest memory; no pass sends more.
        downtime_limit: seconds.
        bandwidth: bytes per second to assume instead of the measured value.
        switchover: seconds of downtime in addition to the memory.

    Raises:
        ValueError: no bandwidth can be computed, or a figure is negative or not finite.
    """
    _check(samples, first_copy, total, downtime_limit, bandwidth)
    speed = _bandwidth(samples, bandwidth)
    copy = Interval(low=first_copy / speed.high, likely=first_copy / speed.likely, high=first_copy / speed.low)
    if not samples:
        return _unknown(copy, speed)
    spread = _spread([s.dirty_rate for s in samples if s.seconds > 0])
    curve = _dirtied([(s.seconds, s.seconds * s.dirty_rate) for s in samples if s.seconds > 0])

    def play(speed: float, busy: float, limit: float = downtime_limit) -> _Run:
        return _simulate(first_copy, speed, lambda seconds: min(total, busy * curve(seconds)), limit)

    likely, calm, busy = play(speed.likely, 1.0), play(speed.high, 1 - spread), play(speed.low, 1 + spread)
    unlimited = play(speed.likely, 1.0, limit=0.0)  # the smallest rest, without a limit
    shortest_downtime = unlimited.left / speed.likely
    rate = _rate_at(curve, max(shortest_downtime, _SHORT))
    if likely.ends:
        verdict = ForecastVerdict.CONVERGES if busy.ends else ForecastVerdict.PERHAPS
    else:
        verdict = ForecastVerdict.DIVERGES
    ended = likely.ends
    return Forecast(
        verdict=verdict,
        total_time=_interval(calm, likely, busy, lambda r, s: r.seconds + r.left / s, speed, switchover)
        if ended
        else None,
        downtime=_interval(calm, likely, busy, lambda r, s: r.left / s, speed, switchover) if ended else None,
        passes=likely.passes if ended else None,
        first_copy=copy,
        bandwidth=speed,
        dirty_rate=rate,
        shortest_downtime=shortest_downtime,
        reason=_reason(verdict, speed.likely, rate, shortest_downtime, downtime_limit),
        advice=()
        if verdict is ForecastVerdict.CONVERGES
        else _advice(play, speed, shortest_downtime, spread, downtime_limit),
    )


def _check(
    samples: Sequence[Sample], first_copy: float, total: float, downtime_limit: float, bandwidth: float | None
) -> None:
    figures = [first_copy, total, downtime_limit, *(v for s in samples for v in (s.sent, s.seconds, s.dirty_rate))]
    if bandwidth is not None:
        figures.append(bandwidth)
    if any(not math.isfinite(value) or value < 0 for value in figures):
        raise ValueError("a forecast needs figures that are finite and not negative")
    if bandwidth == 0 or (bandwidth is None and not any(s.sent > 0 and s.seconds > 0 for s in samples)):
        raise ValueError("a forecast needs a bandwidth: one measured pass, or one that is given")


def _bandwidth(samples: Sequence[Sample], given: float | None) -> Interval:
    """The mean bandwidth over all passes, with the slowest and the fastest; a given one counts as exact."""
    if given is not None:
        return Interval(low=given, likely=given, high=given)
    most = max(s.sent for s in samples if s.seconds > 0)
    telling = [s for s in samples if s.seconds >= _SHORT and s.sent >= most * _SMALL and s.sent > 0]
    telling = telling or [s for s in samples if s.seconds > 0 and s.sent > 0]
    mean = sum(s.sent for s in telling) / sum(s.seconds for s in telling)
    speeds = [s.sent / s.seconds for s in telling]
    return Interval(
        low=min(*speeds, mean * (1 - LEAST_SPREAD)), likely=mean, high=max(*speeds, mean * (1 + LEAST_SPREAD))
    )


def _spread(rates: Sequence[float]) -> float:
    """The variation of the dirty rate between passes, as a share of its mean, halved; at most nine tenths.

    A part of the variation comes from the length of the passes, which the curve has already: so it is halved.
    """
    mean = sum(rates) / len(rates) if rates else 0.0
    if mean <= 0:
        return LEAST_SPREAD
    return min(0.9, max(LEAST_SPREAD, (max(rates) - min(rates)) / mean / 2))


def _dirtied(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Seconds of a pass -> bytes dirtied in it: straight lines from zero through the measured points.

    After the longest measured pass the curve goes on at the rate of that pass. The curve never falls: bytes dirtied in
    a short pass are dirtied in a longer pass as well.
    """
    line = [(0.0, 0.0)]
    for seconds, dirtied in sorted(points):
        if seconds == line[-1][0] and len(line) > 1:
            line[-1] = (seconds, max(line[-1][1], dirtied))
        else:
            line.append((seconds, max(line[-1][1], dirtied)))

    def curve(seconds: float) -> float:
        for (t0, d0), (t1, d1) in itertools.pairwise(line):
            if seconds <= t1:
                return d0 + (d1 - d0) * (seconds - t0) / (t1 - t0)
        last, most = line[-1]
        return most * seconds / last if last > 0 else 0.0

    return curve


def _rate_at(curve: Callable[[float], float], seconds: float) -> float:
    return curve(seconds) / seconds


def _simulate(first: float, bandwidth: float, dirtied: Callable[[float], float], limit: float) -> _Run:
    """Simulate passes until the rest can be sent within *limit* seconds, or until there is clearly no end."""
    left, elapsed, passes, least = first, 0.0, 0, math.inf
    while passes < MAX_PASSES:
        seconds = left / bandwidth
        elapsed += seconds
        passes += 1
        left = dirtied(seconds)
        if left / bandwidth <= limit:
            return _Run(ends=True, seconds=elapsed, passes=passes, left=left)
        if left >= least * (1 - 1e-9):
            break  # each pass is as long as the last one, or longer
        least = min(least, left)
    return _Run(ends=False, seconds=elapsed, passes=passes, left=min(least, left))


def _interval(
    calm: _Run,
    likely: _Run,
    busy: _Run,
    figure: Callable[[_Run, float], float],
    speed: Interval,
    switchover: Interval,
) -> Interval:
    """A figure of the three simulations. The figures may be in another order: one pass more ends with less downtime."""
    ends = [figure(calm, speed.high)] if calm.ends else []
    middle = figure(likely, speed.likely)
    if busy.ends:
        ends.append(figure(busy, speed.low))
    high = max(*ends, middle) + switchover.high if busy.ends else math.inf
    return Interval(low=min([*ends, middle]) + switchover.low, likely=middle + switchover.likely, high=high)


def _unknown(copy: Interval, speed: Interval) -> Forecast:
    return Forecast(
        verdict=ForecastVerdict.UNKNOWN,
        total_time=None,
        downtime=None,
        passes=None,
        first_copy=copy,
        bandwidth=speed,
        dirty_rate=None,
        shortest_downtime=None,
        reason=f"the first copy takes about {formats.duration(copy.likely)} and was not finished, "
        "so it was not measured how fast the guest dirties its memory",
        advice=(f"measure for longer: {math.ceil(copy.high * 1.2 + 1)} seconds would do",),
    )


def _reason(verdict: ForecastVerdict, bandwidth: float, rate: float, shortest_downtime: float, limit: float) -> str:
    """The reason for the verdict, with the deciding figures."""
    figures = f"{formats.rate(rate)} are dirtied and {formats.rate(bandwidth)} can be sent"
    if verdict is ForecastVerdict.CONVERGES:
        return f"{figures}, so that what is left fits into the downtime limit of {formats.duration(limit)}"
    if verdict is ForecastVerdict.PERHAPS:
        return f"{figures}, which is too close to the downtime limit of {formats.duration(limit)} to be sure"
    return (
        f"{figures}: the passes do not get shorter than {formats.duration(shortest_downtime)}, which is the downtime, and the limit is "
        f"{formats.duration(limit)}"
    )


def _advice(
    play: Callable[..., _Run], speed: Interval, shortest_downtime: float, spread: float, limit: float
) -> tuple[str, ...]:
    """Measures that make even the unfavourable end converge, found by trying."""
    busy = 1 + spread
    found = []
    needed = _least(lambda factor: play(speed.low * factor, busy).ends)
    if needed is not None:
        found.append(
            f"a bandwidth of {formats.rate(math.ceil(speed.low * needed * _MARGIN / _MIB) * _MIB)} (max-bandwidth, or a faster link)"
        )
    longest = play(speed.low, busy, limit=0.0).left / speed.low
    found.append(
        f"a downtime-limit of {formats.whole_ms(math.ceil(max(longest, shortest_downtime, limit) * _MARGIN * 1000) / 1000)}"
    )
    calmer = _least(lambda factor: play(speed.low, busy / factor).ends)
    if calmer is not None and calmer < 100:
        percent = min(99, math.ceil((1 - 1 / (calmer * _MARGIN)) * 100))
        found.append(f"a guest that is slowed down by {formats.percent(percent / 100)} (auto-converge)")
    return tuple(found)


def _least(ends: Callable[[float], bool]) -> float | None:
    """The smallest factor from 1 to a million for which *ends* is true, to about a percent; None if there is none."""
    high = 1.0
    while not ends(high):
        high *= 2
        if high > 1e6:
            return None
    low = high / 2
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (low, middle) if ends(middle) else (middle, high)
    return high
