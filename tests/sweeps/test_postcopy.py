"""T1, T3, O5, O6, gaps G6, G7, G8: postcopy disturbed at every point.

At each the source owns the guest, or the destination owns it and is complete, or it can be recovered and is; never two,
and no page twice.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import pytest

import trimig
from tests import tiers
from tests.sweeps.combined import sweep_cancels_and_faults
from tests.sweeps.postcopy import Outcome, scenario
from tests.sweeps.sampled import SEEDS, some, sweep
from trimig.testing import (
    DIRECTIONS,
    FAULT_KINDS,
    CallSweep,
    CancelSweep,
    DeadlineSweep,
    Fault,
    FaultKind,
    FaultSweep,
    Point,
    Run,
    Scenario,
    Sweep,
    TimeLeap,
    replay,
)

SOURCE, DESTINATION = ("source",), ("destination",)
BOTH = SOURCE + DESTINATION

pytestmark = pytest.mark.timeout(600)
BREAKS: tuple[FaultKind, ...] = tuple(kind for kind in FAULT_KINDS if kind != "stall")
#: More than either side says on a second connection.
RECOVERY_BYTES = 76
#: Both sides are done, and the guest runs at the destination.
DONE = ("returned", "returned", "destination")


def swept(there: Scenario[Outcome], *sweeps: Sweep) -> set[Hashable]:
    """The points of this tier: of all, those of the first seed, and a third, each time others, of the rest. The ends."""
    first, *others = SEEDS
    reports = [sweep(there, *sweeps, seeds=(first,)), sweep(there, *sweeps, seeds=others, every=3)]
    return {outcome for report in reports for outcome in report.outcomes}


def kinds_of_end(outcomes: Iterable[object]) -> str:
    return " ".join(map(str, outcomes))


def test_every_fault_at_every_byte_is_recovered_or_undone() -> None:
    """O5, O6: before the package the source goes on, behind it both find each other again."""
    outcomes = swept(scenario(), FaultSweep(kinds=BREAKS))
    assert DONE in outcomes
    assert ("TransportFailed", "TransportFailed", "source") in outcomes
    ends = {
        DONE,
        ("TransportFailed", "TransportFailed", "source"),
        # The package is on its way, or the word that it has come is not.
        ("HandoverUncertain", "TransportFailed", "source"),
        ("HandoverUncertain", "returned", "destination"),
        # Everything has come, and the last word about it has not.
        ("PostcopyLost", "returned", "destination"),
    }
    assert outcomes <= ends
    if tiers.everything():
        assert outcomes == ends


@pytest.mark.parametrize("polite", [False, True], ids=["cancelled", "asked"])
@pytest.mark.parametrize("victims", [SOURCE, DESTINATION, BOTH], ids="+".join)
def test_cancel_at_every_edge(victims: tuple[str, ...], *, polite: bool) -> None:
    """Gaps G6, G7, G11: before the package it never happened; behind it a cancel destroys nothing."""
    outcomes = swept(scenario(polite=polite), CancelSweep(victims=victims))
    assert DONE in outcomes
    assert "PostcopyLost" not in kinds_of_end(outcomes)


def behind_the_switch(baseline: Run[Any]) -> Iterator[Fault]:
    """The connection is lost in the middle of the pages that follow, and just before the end."""
    last = baseline.sent["a->b"]
    yield Fault(direction="a->b", after=last - 30, kind="reset")
    yield Fault(direction="a->b", after=last - 1, kind="eof")


@pytest.mark.parametrize("polite", [False, True], ids=["cancelled", "asked"])
@pytest.mark.parametrize("victims", [SOURCE, DESTINATION], ids="+".join)
def test_cancel_at_every_edge_of_a_recovery(victims: tuple[str, ...], *, polite: bool) -> None:
    """Gap G8: a cancel strikes where the migration is paused, and is not lost and hangs nowhere."""
    runs = sweep_cancels_and_faults(scenario(polite=polite), behind_the_switch, victims=victims, every=5)
    assert runs > 40


@pytest.mark.parametrize("kind", BREAKS)
def test_a_second_fault_at_every_byte_of_the_recovery(kind: FaultKind) -> None:
    """O6, A.2: recovery itself fails half way, at any byte, and the next one succeeds."""
    outcomes: collections.Counter[Any] = collections.Counter()
    for seed in SEEDS:
        (first, *_) = behind_the_switch(replay(scenario(), Point(seed=seed)))
        for direction in DIRECTIONS:
            for after in some(range(RECOVERY_BYTES), 8, kind, seed, direction, always=(0, 1, -1)):
                there = scenario(again=(Fault(direction=direction, after=after, kind=kind),))
                outcomes[replay(there, Point(seed=seed, inject=(first,))).outcome] += 1
    # Everything has come, and the last word about it has not; nothing else stays open.
    assert set(outcomes) <= {DONE, ("PostcopyLost", "returned", "destination")}, outcomes


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [OSError, trimig.GuestFailed, None], ids=["OSError", "GuestFailed", "hang"])
def test_every_call_of_guest_and_transport_fails(error: type[Exception] | None, when: str) -> None:
    """O5, O6: each call of the guests and of the first connection fails, or hangs, once."""
    only = None if error is not trimig.GuestFailed else lambda name: name.startswith(BOTH)
    calls = CallSweep(errors=(error,), only=only, when="before" if when == "before" else "after")
    swept(scenario(), calls)


def test_deadlines_and_leaps() -> None:
    """T3: the caller's own time limit, and a clock that leaps."""
    swept(scenario(), DeadlineSweep(), DeadlineSweep(victims=DESTINATION), TimeLeap())


# -- with a second connection (postcopy-preempt) -----------------------------------------------------------------------

#: What the second connection carries where the background has a limit: two zero pages that were asked for, and the end word.
BESIDE_BYTES = 30
#: Bytes per second for pages that nobody asked for.
BACKGROUND = 64 << 10


#: The second connection did not come, before the switch.
NOT_BEGUN = ("TransportFailed", "TransportFailed", "source")


def second(**options: object) -> Any:
    return scenario(preempt=True, background=BACKGROUND, **options)


def test_the_second_connection_carries_what_was_asked_for() -> None:
    """Row 36; and :data:`BESIDE_BYTES` is what the sweeps below go through."""
    sent: list[int] = []
    watched = second(seen=lambda backlog: sent.extend(link.sent("a->b") for link in backlog.links))
    for seed in SEEDS:
        assert replay(watched, Point(seed=seed)).outcome == DONE
    assert sent == [BESIDE_BYTES] * len(SEEDS)


@pytest.mark.parametrize("kind", BREAKS)
def test_every_fault_at_every_byte_of_the_second_connection(kind: FaultKind) -> None:
    """Row 37, O6: the first time, and the time after that; each time both are made again.

    One that is gone before the destination has seen it is none: then the source keeps its guest.
    """
    outcomes: collections.Counter[Any] = collections.Counter()
    for seed in SEEDS:
        for after in some(range(BESIDE_BYTES + 1), 6, kind, seed, always=(0, 1, -2, -1)):
            fault = Fault(direction="a->b", after=after, kind=kind)
            for beside in ((fault,), (Fault(direction="a->b", after=5, kind="reset"), fault)):
                outcomes[(replay(second(beside=beside), Point(seed=seed)).outcome, after > 0)] += 1
    assert set(outcomes) <= {(DONE, True), (DONE, False), (NOT_BEGUN, False)}, outcomes
    assert outcomes[DONE, True]


def test_faults_of_the_first_connection_with_a_second_beside_it() -> None:
    """O5, O6: the same ends as with one connection."""
    report = sweep(second(), FaultSweep(kinds=BREAKS), every=7)
    assert set(report.outcomes) <= {
        DONE,
        ("TransportFailed", "TransportFailed", "source"),
        ("HandoverUncertain", "TransportFailed", "source"),
        ("HandoverUncertain", "returned", "destination"),
        ("PostcopyLost", "returned", "destination"),
    }


@pytest.mark.parametrize("victims", [SOURCE, DESTINATION], ids="+".join)
def test_cancel_at_every_edge_with_a_second_connection(victims: tuple[str, ...]) -> None:
    """Gaps G6 and G7: the task that sends urgent pages, the one that reads them and the one that accepts end with the rest."""
    outcomes = swept(second(), CancelSweep(victims=victims))
    assert DONE in outcomes
    assert "PostcopyLost" not in kinds_of_end(outcomes)
