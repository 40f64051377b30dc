"""Passes that were measured, and what is said from them: an end with an interval, or none, why, and what would help."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.policy.forecast import SWITCHOVER, Forecast, ForecastVerdict, Interval, Sample, forecast

MiB = 1 << 20
NOTHING = Interval(low=0.0, likely=0.0, high=0.0)


def passes(*seconds: float, bandwidth: float, dirty: float) -> list[Sample]:
    """Passes of these lengths, on a link and of a guest that never change."""
    return [Sample(sent=bandwidth * s, seconds=s, dirty_rate=dirty) for s in seconds]


def said(samples: list[Sample], **changes: Any) -> Forecast:
    """The forecast for a guest of 1000 MiB and a limit of 300 ms; the first sample is the first copy."""
    arguments = {"first_copy": samples[0].sent if samples else 1000 * MiB, "total": 1000 * MiB, "downtime_limit": 0.3}
    return forecast(samples, **(arguments | {"switchover": NOTHING} | changes))


def test_calm_guest_converges() -> None:
    """100 MiB/s against 10: 10 s, 1 s, 0.1 s; the tenth of a second fits into the limit."""
    found = said(passes(10, 1, 0.1, bandwidth=100 * MiB, dirty=10 * MiB))
    assert found.verdict is ForecastVerdict.CONVERGES
    assert found.passes == 2
    assert found.total_time is not None
    assert found.downtime is not None
    assert found.total_time.likely == pytest.approx(10 + 1 + 0.1)
    assert found.downtime.likely == pytest.approx(0.1)
    assert found.total_time.low < found.total_time.likely < found.total_time.high < 14
    assert found.downtime.low < 0.1 < found.downtime.high <= 0.3
    assert found.advice == ()
    assert "10 MiB/s are dirtied and 100 MiB/s can be sent" in found.reason


def test_idle_guest_needs_one_pass_and_no_downtime_but_the_switchover() -> None:
    found = said(passes(10, bandwidth=100 * MiB, dirty=0), switchover=SWITCHOVER)
    assert (found.verdict, found.passes, found.shortest_downtime) == (ForecastVerdict.CONVERGES, 1, 0.0)
    assert found.downtime == SWITCHOVER


def test_guest_that_is_faster_than_the_link_does_not_converge_and_the_advice_holds() -> None:
    samples = passes(10, 10, 10, bandwidth=100 * MiB, dirty=150 * MiB)
    found = said(samples)
    assert found.verdict is ForecastVerdict.DIVERGES
    assert (found.total_time, found.downtime, found.passes) == (None, None, None)
    # Every page is dirtied in each pass: ten seconds of downtime is what it comes down to.
    assert found.shortest_downtime == pytest.approx(10)
    assert "do not get shorter than 10 s" in found.reason
    bandwidth, limit, slowed = found.advice
    assert said(samples, bandwidth=number(bandwidth) * MiB).verdict is ForecastVerdict.CONVERGES
    assert said(samples, downtime_limit=number(limit) / 1000).verdict is ForecastVerdict.CONVERGES
    calmer = 150 * MiB * (1 - number(slowed) / 100)
    assert said(passes(10, 10, 10, bandwidth=100 * MiB, dirty=calmer)).verdict is ForecastVerdict.CONVERGES


def number(text: str) -> float:
    """The first number of an advice."""
    found = re.search(r"\d+", text)
    assert found is not None
    return float(found.group())


def test_small_hot_set_is_a_floor_that_a_longer_downtime_gets_over() -> None:
    """32 MiB are written over and over, within 10 ms: half a second at 64 MiB/s, however short the pass."""
    lengths = (15.6, 0.5, 0.5)
    samples = [Sample(sent=64 * MiB * s, seconds=s, dirty_rate=32 * MiB / s) for s in lengths]
    found = said(samples)
    assert found.verdict is ForecastVerdict.DIVERGES
    assert found.shortest_downtime == pytest.approx(0.5)
    assert said(samples, downtime_limit=0.6).verdict is not ForecastVerdict.DIVERGES
    # Longer passes do not dirty more of it: the rate of a long pass is not taken for that of a short one.
    assert found.dirty_rate == pytest.approx(64 * MiB)


def test_verdict_on_the_edge_is_left_open_and_the_interval_has_no_end() -> None:
    samples = passes(10, 9.5, 9.0, bandwidth=100 * MiB, dirty=95 * MiB)
    found = said(samples)
    assert found.verdict is ForecastVerdict.PERHAPS
    assert found.total_time is not None
    assert found.total_time.high == math.inf
    assert found.total_time.likely < math.inf
    assert len(found.advice) >= 2


def test_given_bandwidth_replaces_the_measured_one() -> None:
    samples = passes(1, 0.1, bandwidth=1000 * MiB, dirty=100 * MiB)
    fast, slow = said(samples), said(samples, bandwidth=50 * MiB)
    assert fast.verdict is ForecastVerdict.CONVERGES
    assert slow.verdict is ForecastVerdict.DIVERGES
    assert slow.bandwidth == Interval(low=50 * MiB, likely=50 * MiB, high=50 * MiB)
    assert slow.first_copy.likely == pytest.approx(20)


def test_unsteady_link_widens_the_interval() -> None:
    steady = said(passes(10, 1, bandwidth=100 * MiB, dirty=10 * MiB))
    shaky = said(
        [
            Sample(sent=1000 * MiB, seconds=10, dirty_rate=10 * MiB),
            Sample(sent=250 * MiB, seconds=5, dirty_rate=10 * MiB),
        ]
    )
    assert steady.total_time is not None
    assert shaky.total_time is not None
    assert shaky.total_time.high - shaky.total_time.low > 2 * (steady.total_time.high - steady.total_time.low)


def test_short_passes_are_not_taken_for_a_slow_link() -> None:
    """A pass of 100 KB takes as long as it takes to look at the dirty pages, not to send them."""
    samples = (
        passes(1, bandwidth=100 * MiB, dirty=4 * MiB) + [Sample(sent=0.1 * MiB, seconds=0.025, dirty_rate=4 * MiB)] * 2
    )
    found = said(samples)
    assert found.verdict is ForecastVerdict.CONVERGES
    assert found.bandwidth.likely == pytest.approx(100 * MiB)


def test_first_copy_that_was_not_finished_gives_no_verdict() -> None:
    found = said([], bandwidth=10 * MiB)
    assert found.verdict is ForecastVerdict.UNKNOWN
    assert found.first_copy.likely == pytest.approx(100)
    assert (found.total_time, found.downtime, found.dirty_rate) == (None, None, None)
    assert number(found.advice[0]) > 100


@pytest.mark.parametrize(
    ("samples", "changes"),
    [
        ([], {}),
        ([], {"bandwidth": 0}),
        ([Sample(sent=0, seconds=0, dirty_rate=0)], {}),
        ([Sample(sent=1, seconds=-1, dirty_rate=0)], {}),
        ([Sample(sent=1, seconds=1, dirty_rate=math.nan)], {}),
        ([Sample(sent=1, seconds=1, dirty_rate=0)], {"bandwidth": math.inf}),
    ],
)
def test_figures_that_say_nothing_are_refused(samples: list[Sample], changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a forecast needs"):
        said(samples, **changes)


SAMPLES = st.lists(
    st.builds(Sample, sent=st.floats(0, 1e12), seconds=st.floats(0, 1e4), dirty_rate=st.floats(0, 1e12)), min_size=1
)


@given(samples=SAMPLES, first=st.floats(0, 1e12), limit=st.floats(0, 100), bandwidth=st.floats(1, 1e12))
def test_any_figures_give_a_forecast_in_order(
    samples: list[Sample], first: float, limit: float, bandwidth: float
) -> None:
    found = forecast(samples, first_copy=first, total=1e12, downtime_limit=limit, bandwidth=bandwidth)
    for interval in (found.total_time, found.downtime):
        assert (interval is None) == (found.verdict is ForecastVerdict.DIVERGES)
        if interval is not None:
            assert 0 <= interval.low <= interval.likely <= interval.high
    if found.verdict is ForecastVerdict.CONVERGES:
        assert found.downtime is not None
        assert found.downtime.high <= limit + SWITCHOVER.high + 1e-9
    assert found.reason


@given(
    seconds=st.lists(st.floats(0.05, 20), min_size=2, max_size=5),
    bandwidth=st.floats(1 * MiB, 1000 * MiB),
    dirty=st.floats(0, 2000 * MiB),
)
def test_more_bandwidth_never_makes_it_worse(seconds: list[float], bandwidth: float, dirty: float) -> None:
    samples = passes(*seconds, bandwidth=bandwidth, dirty=dirty)
    order = [ForecastVerdict.CONVERGES, ForecastVerdict.PERHAPS, ForecastVerdict.DIVERGES]
    at, faster = (said(samples, bandwidth=bandwidth * factor).verdict for factor in (1, 2))
    assert order.index(faster) <= order.index(at)
