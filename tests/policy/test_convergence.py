"""Iterate, switch over, or give up: the table of decisions (L6), and the sentence that explains them."""

from __future__ import annotations

import dataclasses
import math

import pytest

from trimig.policy.convergence import (
    Bounds,
    Decision,
    Progress,
    convergence_progress,
    decide,
    expected_downtime,
    explain,
    reached,
    sentence,
)

MiB = 1 << 20
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
        (at(0, 5.0 * MiB), 0.0),
        (at(1, 0.0), math.inf),
        (at(300 * MiB, 1000.0 * MiB), 0.3),
        (at(MiB, 0.5), 2.0 * MiB),
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
    (at(300 * MiB, 1000.0 * MiB), LIMIT, SWITCH),  # exactly the limit
    (at(300 * MiB + 1, 1000.0 * MiB), LIMIT, ITERATE),
    (at(10**15, 1.0, iteration=10**6, elapsed=1e9), LIMIT, ITERATE),  # without bounds it is chased for ever
    (at(0, 0.0), Bounds(downtime_limit=0.0), SWITCH),
    (at(1, 1e12), Bounds(downtime_limit=0.0), ITERATE),
    (at(500 * MiB, 1000.0 * MiB, iteration=4, elapsed=59.9), BOTH, ITERATE),
    (at(500 * MiB, 1000.0 * MiB, iteration=5), BOTH, GIVE_UP),
    (at(500 * MiB, 1000.0 * MiB, iteration=6), BOTH, GIVE_UP),
    (at(500 * MiB, 1000.0 * MiB, elapsed=60.0), BOTH, GIVE_UP),
    (at(500 * MiB, 1000.0 * MiB, iteration=5), FORCED, SWITCH),
    (at(500 * MiB, 1000.0 * MiB, elapsed=61.0), FORCED, SWITCH),
    (at(500 * MiB, 1000.0 * MiB, iteration=4, elapsed=59.0), FORCED, ITERATE),
    # A bound does not stop what fits within the limit.
    (at(1 * MiB, 1000.0 * MiB, iteration=99, elapsed=1e6), BOTH, SWITCH),
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
    why = explain(at(500 * MiB, 100.0 * MiB, dirty_rate=250.0 * MiB), BOTH)
    assert not why.converging
    assert "250 MiB/s are dirtied" in why.reason
    assert "100 MiB/s can be sent" in why.reason
    assert "500 MiB are left, which is 5000 ms of downtime against a limit of 300 ms" in why.reason
    assert why.advice == (
        "raise downtime-limit to 5500 ms",
        "throttle the guest by 64 % (capability auto-converge), which leaves 90 MiB/s dirtied",
    )
    assert sentence(why) == f"{why.reason}; {why.advice[0]} or {why.advice[1]}"


@pytest.mark.parametrize(
    ("throttle", "most", "dirty_rate", "advice"),
    [
        (0, 99, 250.0, "let auto-converge go on from 0 % to 64 %, which leaves 90 MiB/s dirtied"),
        # The guest would dirty 500 MiB/s at its full speed.
        (50, 99, 250.0, "let auto-converge go on from 50 % to 82 %, which leaves 90 MiB/s dirtied"),
        (20, 60, 250.0, "raise max-cpu-throttle (60 %) to 71 %, which leaves 90.6 MiB/s dirtied"),
        # At 80 % of its running time it leaves 5 s of downtime.
        (20, 99, 90.0, "let auto-converge go on from 20 % to 96 %, which leaves about 250 ms of downtime"),
    ],
)
def test_advice_with_auto_converge_names_the_throttle_that_is_enough(
    throttle: int, most: int, dirty_rate: float, advice: str
) -> None:
    bounds = Bounds(downtime_limit=0.3, auto_converge=True, max_throttle=most)
    progress = dataclasses.replace(
        at(500 * MiB, 100.0 * MiB, dirty_rate=dirty_rate * MiB), least=400.0 * MiB, throttle=throttle
    )
    assert explain(progress, bounds).advice[-1] == advice


def test_advice_is_enough() -> None:
    """The downtime limit that is named makes the next decision a switchover."""
    why = explain(at(50 * MiB, 100.0 * MiB, dirty_rate=100.0 * MiB), BOTH)
    assert "raise downtime-limit to 550 ms" in why.advice
    assert decide(at(50 * MiB, 100.0 * MiB), Bounds(downtime_limit=0.55)) is SWITCH


@pytest.mark.parametrize(
    ("limit", "dirty_rate", "first"),
    [
        (100 * MiB, 250.0 * MiB, "raise max-bandwidth (100 MiB/s), to more than 275 MiB/s"),
        (105 * MiB, 20.0 * MiB, "raise max-bandwidth (105 MiB/s)"),
        (200 * MiB, 250.0 * MiB, "raise downtime-limit to 5500 ms"),  # the link binds, not the limit
        (0, 250.0 * MiB, "raise downtime-limit to 5500 ms"),
    ],
)
def test_bandwidth_limit_is_blamed_only_if_it_binds(limit: int, dirty_rate: float, first: str) -> None:
    bounds = Bounds(downtime_limit=0.3, max_bandwidth=limit)
    progress = dataclasses.replace(at(500 * MiB, 100.0 * MiB, dirty_rate=dirty_rate), least=400 * MiB)
    assert explain(progress, bounds).advice[0] == first


def test_limit_that_cannot_be_set_is_not_advised() -> None:
    why = explain(at(3_000_000 * MiB, 1.0 * MiB, dirty_rate=2.0 * MiB), LIMIT)
    assert not any("downtime-limit" in clause for clause in why.advice)


def test_postcopy_is_advised_where_it_may_be_used() -> None:
    progress = at(500 * MiB, 100.0 * MiB, dirty_rate=250.0 * MiB)
    assert "start postcopy" in explain(progress, dataclasses.replace(LIMIT, postcopy=True)).advice
    assert "start postcopy" not in explain(progress, LIMIT).advice


@pytest.mark.parametrize(
    ("progress", "bounds", "converging"),
    [
        (at(30 * MiB, 100.0 * MiB, dirty_rate=900.0 * MiB), LIMIT, True),  # it fits, whatever the rates
        (at(50 * MiB, 100.0 * MiB, dirty_rate=50.0 * MiB), LIMIT, True),  # the first pass: a good sign
        (at(50 * MiB, 100.0 * MiB, dirty_rate=100.0 * MiB), LIMIT, False),
        (dataclasses.replace(at(50 * MiB, 100.0 * MiB, dirty_rate=50.0 * MiB), least=90 * MiB), LIMIT, True),
        (dataclasses.replace(at(50 * MiB, 100.0 * MiB, dirty_rate=50.0 * MiB), least=51 * MiB), LIMIT, False),
        (at(50 * MiB, 100.0 * MiB, dirty_rate=50.0 * MiB, iteration=5), BOTH, False),  # it would, but may not go on
    ],
)
def test_converging_is_what_comes_nearer(progress: Progress, bounds: Bounds, converging: bool) -> None:
    why = explain(progress, bounds)
    assert why.converging is converging
    assert bool(why.advice) is not converging


def test_bound_that_comes_too_early_is_named_first() -> None:
    why = explain(at(50 * MiB, 100.0 * MiB, dirty_rate=50.0 * MiB, iteration=5), BOTH)
    assert "each pass leaves less" in why.reason
    assert why.advice[0] == "allow more iterations or time"


def test_nothing_measured_yet_is_explained_without_figures_that_are_not_known() -> None:
    why = explain(at(50 * MiB, 0.0), BOTH)
    assert "inf" not in sentence(why)
    assert "50 MiB are left" in why.reason
    assert why.advice == ("give it more time",)


@pytest.mark.parametrize(
    ("progress", "share"),
    [(at(0, 0.0), 1.0), (at(30 * MiB, 100.0 * MiB), 1.0), (at(60 * MiB, 100.0 * MiB), 0.5), (at(60 * MiB, 0.0), 0.0)],
)
def test_chase_is_the_share_of_the_rest_that_fits(progress: Progress, share: float) -> None:
    assert convergence_progress(progress, LIMIT) == pytest.approx(share)


def test_pages_that_go_as_differences_count_as_the_bytes_that_are_sent_of_them() -> None:
    """What is left takes as long as the pages of the last pass took."""
    plain = dataclasses.replace(at(300 * MiB, 10.0 * MiB, dirty_rate=500.0 * MiB), queued=MiB)
    encoded = dataclasses.replace(plain, memory_per_byte=100.0)
    assert expected_downtime(plain) == pytest.approx(30.1)
    assert expected_downtime(encoded) == pytest.approx(0.4)
    found = explain(encoded, LIMIT)
    assert (decide(plain, LIMIT), decide(encoded, LIMIT)) == (ITERATE, ITERATE)
    assert decide(dataclasses.replace(encoded, queued=0), LIMIT) is SWITCH
    assert "500 MiB/s are dirtied and 1000 MiB/s can be sent" in found.reason
    assert found.converging


def test_advice_of_a_bandwidth_counts_the_bytes_that_are_sent() -> None:
    """A bandwidth of 11 MiB/s is enough for 1,000 MiB/s of pages that go as a hundredth."""
    bounds = Bounds(downtime_limit=0.3, max_bandwidth=10 * MiB)
    encoded = dataclasses.replace(at(900 * MiB, 10.0 * MiB, dirty_rate=1000.0 * MiB), memory_per_byte=100.0)
    assert "raise max-bandwidth (10 MiB/s), to more than 11 MiB/s" in explain(encoded, bounds).advice
