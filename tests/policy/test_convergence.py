"""Iterate, switch over, or give up: the table of decisions (L6), and the sentence that explains them."""

from __future__ import annotations

import math

import pytest

from trimig.policy.convergence import Bounds, Decision, Progress, decide, expected_downtime, explain, reached

MB = 1_000_000
ITERATE, SWITCH, GIVE_UP = Decision.ITERATE, Decision.SWITCH_OVER, Decision.GIVE_UP


def at(
    remaining: int, bandwidth: float, *, iteration: int = 1, elapsed: float = 1.0, dirty_rate: float = 0.0
) -> Progress:
    """Where a migration stands."""
    return Progress(
        remaining=remaining, bandwidth=bandwidth, iteration=iteration, elapsed=elapsed, dirty_rate=dirty_rate
    )


@pytest.mark.parametrize(
    ("progress", "seconds"),
    [
        (at(0, 0.0), 0.0),
        (at(0, 5.0 * MB), 0.0),
        (at(1, 0.0), math.inf),
        (at(300 * MB, 1000.0 * MB), 0.3),
        (at(MB, 0.5), 2.0 * MB),
    ],
)
def test_expected_downtime(progress: Progress, seconds: float) -> None:
    """states.md part 13: what remains over the bandwidth."""
    assert expected_downtime(progress) == pytest.approx(seconds)


LIMIT = Bounds(downtime_limit=0.3)
BOTH = Bounds(downtime_limit=0.3, max_iterations=5, max_total_time=60)
FORCED = Bounds(downtime_limit=0.3, max_iterations=5, max_total_time=60, switch_over=True)

TABLE = [
    # progress, bounds, decision
    (at(0, 0.0), LIMIT, SWITCH),  # an empty guest needs no pass at all
    (at(1, 0.0), LIMIT, ITERATE),  # nothing was measured yet: the threshold is 0
    (at(300 * MB, 1000.0 * MB), LIMIT, SWITCH),  # exactly the limit
    (at(300 * MB + 1, 1000.0 * MB), LIMIT, ITERATE),
    (at(10**15, 1.0, iteration=10**6, elapsed=1e9), LIMIT, ITERATE),  # without bounds it is chased for ever
    (at(0, 0.0), Bounds(downtime_limit=0.0), SWITCH),
    (at(1, 1e12), Bounds(downtime_limit=0.0), ITERATE),
    (at(500 * MB, 1000.0 * MB, iteration=4, elapsed=59.9), BOTH, ITERATE),
    (at(500 * MB, 1000.0 * MB, iteration=5), BOTH, GIVE_UP),
    (at(500 * MB, 1000.0 * MB, iteration=6), BOTH, GIVE_UP),
    (at(500 * MB, 1000.0 * MB, elapsed=60.0), BOTH, GIVE_UP),
    (at(500 * MB, 1000.0 * MB, iteration=5), FORCED, SWITCH),
    (at(500 * MB, 1000.0 * MB, elapsed=61.0), FORCED, SWITCH),
    (at(500 * MB, 1000.0 * MB, iteration=4, elapsed=59.0), FORCED, ITERATE),
    # A bound does not stop what fits within the limit.
    (at(1 * MB, 1000.0 * MB, iteration=99, elapsed=1e6), BOTH, SWITCH),
]


@pytest.mark.parametrize(("progress", "bounds", "expected"), TABLE)
def test_decision(progress: Progress, bounds: Bounds, expected: Decision) -> None:
    """L6, D16."""
    assert decide(progress, bounds) is expected


@pytest.mark.parametrize(
    ("progress", "bounds", "words"),
    [
        (at(1, 1.0, iteration=10**6, elapsed=1e9), LIMIT, None),
        (at(1, 1.0, iteration=4, elapsed=59.9), BOTH, None),
        (at(1, 1.0, iteration=5), BOTH, "5 iterations (the limit is 5)"),
        (at(1, 1.0, iteration=7), BOTH, "7 iterations (the limit is 5)"),
        (at(1, 1.0, elapsed=61.25), BOTH, "61.2 s (the limit is 60 s)"),
        (at(1, 1.0, iteration=5, elapsed=61.0), BOTH, "5 iterations (the limit is 5)"),
    ],
)
def test_bound_that_was_reached(progress: Progress, bounds: Bounds, words: str | None) -> None:
    assert reached(progress, bounds) == words


def test_guest_that_is_faster_than_the_link_is_explained() -> None:
    text = explain(at(500 * MB, 100.0 * MB, dirty_rate=250.0 * MB), BOTH)
    assert "250.0 MB/s are dirtied" in text
    assert "100.0 MB/s can be sent" in text
    assert "500.0 MB are left, which is 5000 ms of downtime against a limit of 300 ms" in text
    assert text.endswith("raise max-bandwidth or slow the guest down")


def test_limit_that_would_do_is_named() -> None:
    text = explain(at(50 * MB, 100.0 * MB, dirty_rate=20.0 * MB), BOTH)
    assert text.endswith("a downtime-limit of 500 ms would do")
    assert decide(at(50 * MB, 100.0 * MB), Bounds(downtime_limit=0.5)) is SWITCH


def test_nothing_measured_yet_is_explained_without_figures_that_are_not_known() -> None:
    text = explain(at(50 * MB, 0.0), BOTH)
    assert "inf" not in text
    assert "50.0 MB are left" in text
