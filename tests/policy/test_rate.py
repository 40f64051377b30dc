"""The bandwidth limit, with the time as an argument (L7, D13, states.md part 13)."""

from __future__ import annotations

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from trimig.policy.rate import WINDOW, Budget

RECORD = 8 + 4096


def sent_in(budget: Budget, start: float, seconds: float, record: int) -> int:
    """Bytes that a sender gets through which sends a record whenever anything is available, and else waits."""
    now, sent = start, 0
    while now < start + seconds:
        while budget.available(now) > 0:
            budget.spend(record)
            sent += record
        assert budget.window_end > now
        now = budget.window_end
    return sent


@pytest.mark.parametrize(
    ("rate", "record"),
    [(100_000, 1), (1_000_000, 9)]
    + [(rate, record) for rate in (1_000_000, 3_333_333, 33_554_432, 125_000_000) for record in (1000, RECORD, 50_000)],
)
def test_mean_rate_is_within_five_per_cent(rate: int, record: int) -> None:
    """L7: over 2 s; also where a record is half of a window's share."""
    budget = Budget(rate, 1000.0)
    assert sent_in(budget, 1000.0, 2.0, record) == pytest.approx(2 * rate, rel=0.05)


@pytest.mark.parametrize("rate", [10_000, 41_040, 100_000])
def test_record_larger_than_a_window_is_paid_off(rate: int) -> None:
    """A page cannot be divided: what it exceeds a window by is taken off the next ones, so that the mean is exact."""
    budget = Budget(rate, 0.0)
    assert sent_in(budget, 0.0, 60.0, RECORD) == pytest.approx(60 * rate, rel=0.02)


@hypothesis.settings(max_examples=100, derandomize=True)
@hypothesis.given(
    rate=st.integers(50_000, 10**9),
    record=st.integers(500, 8192),
    start=st.floats(0, 1e6),
    seconds=st.floats(0.2, 2.0),
)
def test_never_more_than_the_limit_and_one_window(rate: int, record: int, start: float, seconds: float) -> None:
    hypothesis.assume(rate / record < 20_000)
    sent = sent_in(Budget(rate, start), start, seconds, record)
    assert sent <= rate * (seconds + WINDOW) * 1.001 + 2 * record


@hypothesis.settings(max_examples=100, derandomize=True)
@hypothesis.given(start=st.floats(0, 1e9), share=st.integers(1, 10**9))
def test_window_is_over_when_it_says_so(start: float, share: int) -> None:
    """Rounding: a sender that sleeps until `window_end` must find budget then, not sleep again for no time."""
    budget = Budget(10 * share, start)
    budget.spend(share)
    assert budget.available(start) <= 0
    now = budget.window_end
    assert budget.available(now) > 0
    assert budget.window_end > now


def test_idle_time_gives_no_burst() -> None:
    budget = Budget(1_000_000, 0.0)
    assert budget.available(500.0) == pytest.approx(100_000)
    budget.spend(60_000)
    assert budget.available(500.05) == pytest.approx(40_000)
    assert budget.available(500.1) == pytest.approx(100_000)


def test_idle_time_pays_a_debt() -> None:
    budget = Budget(1_000_000, 0.0)
    budget.spend(250_000)
    assert budget.available(0.1) == pytest.approx(-50_000)
    assert budget.available(0.2) == pytest.approx(50_000)
    assert budget.available(0.3) == pytest.approx(100_000)


def test_no_limit() -> None:
    budget = Budget(0, 5.0)
    budget.spend(10**12)
    assert budget.available(5.0) == math.inf
    assert budget.rate == 0


def test_higher_limit_applies_at_once() -> None:
    """D13: in the middle of a window that was used up."""
    budget = Budget(1_000_000, 0.0)
    budget.spend(100_000)
    assert budget.available(0.05) <= 0
    budget.set_rate(10_000_000, 0.05)
    assert budget.available(0.05) == pytest.approx(900_000)
    assert budget.rate == 10_000_000


def test_lower_limit_forgives_the_debt_of_the_higher_with_the_window() -> None:
    """D13: else a stop of minutes could follow the step from 10 GB/s to 1 MB/s."""
    budget = Budget(10_000_000_000, 0.0)
    budget.spend(1_000_000_000)
    budget.set_rate(1_000_000, 0.05)
    assert budget.available(0.05) <= 0
    assert budget.window_end == pytest.approx(0.1)
    assert budget.available(0.1) == pytest.approx(100_000)


def test_limit_after_none_and_none_after_a_limit() -> None:
    budget = Budget(0, 0.0)
    budget.spend(10**9)
    budget.set_rate(1_000_000, 7.0)
    assert budget.available(7.0) == pytest.approx(100_000)
    budget.spend(10**9)
    budget.set_rate(0, 7.01)
    assert budget.available(7.01) == math.inf


@pytest.mark.parametrize("pause", [0.001, 0.02, 0.099])
def test_limit_that_is_set_again_and_again_is_still_one(pause: float) -> None:
    """Every change of any parameter sets the limit again."""
    budget = Budget(1_000_000, 0.0)
    sent, n = 0, 0
    while (now := n * pause) < 2.0:
        budget.set_rate(1_000_000, now)
        while budget.available(now) > 0:
            budget.spend(1000)
            sent += 1000
        n += 1
    assert sent == pytest.approx(2_000_000, rel=0.06)


def test_mean_follows_a_live_change() -> None:
    """D13: within 200 ms."""
    budget = Budget(1_000_000, 0.0)
    sent_in(budget, 0.0, 1.0, RECORD)
    budget.set_rate(5_000_000, 1.0)
    sent_in(budget, 1.0, 0.2, RECORD)
    assert sent_in(budget, 1.2, 2.0, RECORD) == pytest.approx(10_000_000, rel=0.05)


def test_what_was_not_sent_comes_back_within_its_window() -> None:
    budget = Budget(1000, 0.0)
    budget.spend(100)
    assert budget.available(0.05) == 0
    budget.give_back(60)
    assert budget.available(0.05) == 60
    budget.give_back(60)
    assert budget.available(0.05) == 100, "never more than a window's share"
    assert Budget(0, 0.0).available(0.0) == math.inf
