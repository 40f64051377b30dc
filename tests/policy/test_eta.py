"""How long it still takes: against a simulation of the passes, and what cannot be told."""

from __future__ import annotations

import math

import pytest

from trimig.policy.eta import UNKNOWN, Estimate, FallingQuantity, RemainingTime, Stall, later_passes_seconds

MiB = 1 << 20


def played(ahead: float, bandwidth: float, dirty_rate: float, limit: float) -> float:
    """Pass by pass."""
    elapsed = 0.0
    for _ in range(10_000):
        if ahead / bandwidth <= max(limit, 4096 / bandwidth):
            return elapsed + ahead / bandwidth
        seconds = ahead / bandwidth
        elapsed += seconds
        ahead = seconds * dirty_rate
    return math.inf


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3, 5.0])
@pytest.mark.parametrize("dirty_rate", [0, 1 * MiB, 50 * MiB, 90 * MiB, 99 * MiB])
@pytest.mark.parametrize("ahead", [0, 1, 10 * MiB, 1000 * MiB])
def test_chase_is_what_the_passes_take(ahead: float, dirty_rate: float, limit: float) -> None:
    told = later_passes_seconds(ahead=ahead, bandwidth=100 * MiB, dirty_rate=dirty_rate, downtime_limit=limit)
    assert told == pytest.approx(played(ahead, 100 * MiB, dirty_rate, limit), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("ahead", "bandwidth", "dirty_rate", "seconds"),
    [
        (1000 * MiB, 100 * MiB, 100 * MiB, math.inf),
        (1000 * MiB, 100 * MiB, 500 * MiB, math.inf),
        (1000 * MiB, 0, 0, math.inf),
        (0, 0, 0, 0.0),
        (10 * MiB, 100 * MiB, 500 * MiB, 0.1),  # it fits, whatever the guest writes
    ],
)
def test_chase_without_an_end(ahead: float, bandwidth: float, dirty_rate: float, seconds: float) -> None:
    told = later_passes_seconds(ahead=ahead, bandwidth=bandwidth, dirty_rate=dirty_rate, downtime_limit=0.3)
    assert told == pytest.approx(seconds)


def told(falling: FallingQuantity) -> tuple[float | None, float | None]:
    return falling.per_second, falling.seconds


def test_what_falls_is_told_from_its_present_speed() -> None:
    falling = FallingQuantity(window=5.0)
    falling.record(0.0, 1000)
    assert told(falling) == (None, None)
    falling.record(0.1, 990)  # too soon
    assert told(falling) == (None, None)
    falling.record(1.0, 900)
    assert told(falling) == (100, 9)
    for second in range(2, 8):
        falling.record(float(second), 900 - 10.0 * (second - 1))  # it has become slower
    assert told(falling)[0] == pytest.approx(10)
    assert told(falling)[1] == pytest.approx(84)
    falling.record(60.0, 0)
    assert told(falling)[1] == 0
    stuck = FallingQuantity()
    for second in range(10):
        stuck.record(float(second), 500)
    assert told(stuck) == (0, None)


def test_a_rise_begins_anew() -> None:
    falling = FallingQuantity()
    for second in range(5):
        falling.record(float(second), 100 - second)
    falling.record(5.0, 1000)
    assert falling.per_second is None


def test_outlook_follows_the_stages() -> None:
    remaining_time = RemainingTime()
    assert remaining_time.estimate(0.0, "first copy", 1000) == UNKNOWN
    assert remaining_time.estimate(1.0, "first copy", 900) == Estimate(9.0, at_least=True)
    assert remaining_time.estimate(9.0, "later passes", 0) == UNKNOWN
    remaining_time.passed(10.0, 5.0)
    assert remaining_time.estimate(12.0, "later passes", 0) == Estimate(3.0)
    assert remaining_time.estimate(20.0, "later passes", 0) == Estimate(0.0)
    remaining_time.passed(20.0, math.inf)
    assert remaining_time.estimate(21.0, "later passes", 0) == Estimate(math.inf)
    assert remaining_time.estimate(22.0, "following", 800) == UNKNOWN
    assert remaining_time.estimate(23.0, "following", 700) == Estimate(7.0)


@pytest.mark.parametrize(
    ("rests", "told"),
    [
        ([100, 100, 100, 100, 100, 100], 3),  # the first copy, and three passes
        ([100, 120, 110, 130], 3),
        ([100, 96, 97, 96], 3),
        ([100, 90, 80, 70, 60], None),
        ([100, 100, 100, 50, 50, 50], None),  # it has come nearer meanwhile
        ([100, 100, 100, 50, 50, 50, 50], 6),
        ([100], None),
    ],
)
def test_third_pass_that_comes_no_nearer_is_told_once(rests: list[int], told: int | None) -> None:
    stall = Stall()
    found = [number for number, rest in enumerate(rests) if stall.passed(rest)]
    assert found == ([] if told is None else [told])
