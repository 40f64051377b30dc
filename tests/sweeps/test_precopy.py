"""T1, T3, T5, T7: a migration disturbed at any point never leaves two guests, no guest, or any resource behind.

:mod:`tests.sweeps.migration` checks each run, settles the owner if it is in doubt, and runs a second
migration of the same guest if the source still has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import trio

import trimig
from tests.sweeps.combined import around_the_decision, sweep_cancels_and_faults
from tests.sweeps.migration import scenario
from tests.sweeps.sampled import SEEDS, sweep
from trimig.testing import (
    FAULT_KINDS,
    CallSweep,
    CancelSweep,
    DeadlineSweep,
    FaultKind,
    FaultSweep,
    TimeLeap,
)

#: All faults that end a connection or its use; a stall only delays it.
BREAKS: tuple[FaultKind, ...] = tuple(kind for kind in FAULT_KINDS if kind != "stall")
SOURCE, DESTINATION = ("source",), ("destination",)
BOTH = SOURCE + DESTINATION

pytestmark = pytest.mark.timeout(600)


def kinds_of_end(outcomes: Iterable[object]) -> str:
    return " ".join(map(str, outcomes))


@pytest.mark.parametrize("victims", [SOURCE, DESTINATION, BOTH], ids="+".join)
def test_cancel_at_every_edge(victims: tuple[str, ...]) -> None:
    """F10, K11, L12, L14: a cancelled migration leaves no trace; after the commit the migration has happened."""
    report = sweep(scenario(pages=2), CancelSweep(victims=victims))
    assert report.runs > 60
    assert "cancelled" in kinds_of_end(report.outcomes)
    assert ("returned", "returned", "destination") in report.outcomes


@pytest.mark.parametrize("victims", [SOURCE, DESTINATION, BOTH], ids="+".join)
def test_polite_cancel_at_every_edge(victims: tuple[str, ...]) -> None:
    """F10, gaps G2 and G4: Monitor.cancel() has the same outcomes, and is refused once the commit is under way."""
    report = sweep(scenario(pages=2, polite=True), CancelSweep(victims=victims))
    assert "MigrationCancelled" in kinds_of_end(report.outcomes)
    assert "'cancelled'" not in kinds_of_end(report.outcomes)


def test_cancel_of_a_paused_guest_at_every_edge() -> None:
    """L12, M2, M3, gap G19: a guest that was paused stays paused, and can be migrated again."""
    report = sweep(scenario(pages=2, run_state="paused"), CancelSweep())
    assert all("none runs" in str(outcome) for outcome in report.outcomes)


def test_cancel_without_a_return_path() -> None:
    """Gap G3: no peer can answer, but a cancel is as exact as ever."""
    sweeps = CancelSweep(), CancelSweep(victims=DESTINATION)
    sweep(scenario(pages=2, return_path=False), *sweeps)


def test_cut_without_a_return_path() -> None:
    """Gap G3: after the commit has left, the source never reports that it owns the guest."""
    faults = FaultSweep(kinds=BREAKS)
    sweep(scenario(pages=2, dirty=0, return_path=False, description=False), faults, every=5)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_fault_at_every_byte(seed: int) -> None:
    """T1, T3, F11, K10, L9, gaps G1 and G12: end of file, reset, half close, black hole, one silent direction."""
    faults = FaultSweep(kinds=BREAKS)
    report = sweep(scenario(pages=2, dirty=0, description=False), faults, seeds=(seed,))
    assert "HandoverUncertain" in kinds_of_end(report.outcomes)
    assert ("TransportFailed", "TransportFailed", "source") in report.outcomes


def test_cut_at_every_byte_with_the_description() -> None:
    """T1, T2: after the commit comes the description of the devices; a cut inside it does not undo the commit."""
    sweep(scenario(pages=2, dirty=0), FaultSweep(kinds=("eof", "reset")), every=9)


def test_faults_while_pages_move() -> None:
    """L9: the same with data pages and a guest that writes; sampled, because most bytes are inside a page."""
    sweep(scenario(pages=3, content="random", dirty=1), FaultSweep(kinds=BREAKS), every=997)


def test_a_stall_is_no_failure() -> None:
    """T3: a second of silence, less than any limit, changes only the duration."""
    faults = FaultSweep(kinds=("stall",), seconds=1.0)
    report = sweep(scenario(pages=2, dirty=0, description=False), faults, every=3)
    assert set(report.outcomes) == {("returned", "returned", "destination")}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "error",
    [OSError, trio.BrokenResourceError, MemoryError, trimig.GuestFailed, None],
    ids=lambda error: "hang" if error is None else error.__name__,
)
def test_every_call_of_guest_and_transport_fails(error: type[Exception] | None, when: str) -> None:
    """P4, T5: each call of the guest and of the stream, on both sides, fails or hangs once."""
    only = None if error is not trimig.GuestFailed else lambda name: name.startswith(BOTH)
    calls = CallSweep(errors=(error,), only=only, when="before" if when == "before" else "after")
    sweep(scenario(pages=2), calls)


def test_time_leaps_at_every_edge() -> None:
    """T3: all timers expire at once, as after a suspended host."""
    sweep(scenario(pages=2), TimeLeap())


@pytest.mark.parametrize("victims", [SOURCE, DESTINATION, BOTH], ids="+".join)
def test_deadlines_around_every_event(victims: tuple[str, ...]) -> None:
    """T3: the caller's own time limit, which takes another path through the run loop than a cancel."""
    sweep(scenario(pages=2), DeadlineSweep(victims=victims))


@pytest.mark.parametrize("polite", [False, True], ids=["cancelled", "asked"])
@pytest.mark.parametrize("victims", [SOURCE, DESTINATION], ids="+".join)
def test_cancel_while_the_link_breaks(victims: tuple[str, ...], polite: bool) -> None:
    """T1, F11, gaps G1 and G2: both disturbances at once, above all around the commit."""
    runs = sweep_cancels_and_faults(
        scenario(pages=2, dirty=0, description=False, polite=polite),
        functools.partial(around_the_decision, kinds=BREAKS),
        victims=victims,
        every=47,
    )
    assert runs > 60


# -- held before the switchover ------------------------------------------------------------------------------------


@pytest.mark.parametrize("polite", [False, True], ids=["cancelled", "asked"])
@pytest.mark.parametrize("victims", [SOURCE, DESTINATION], ids="+".join)
def test_cancel_of_a_held_migration_at_every_edge(victims: tuple[str, ...], polite: bool) -> None:
    """N3, N4, N5, F10, gaps G4-G6 and G11: before, at, in and after pre-switchover; no byte is sent in it."""
    report = sweep(scenario(pages=2, hold=True, polite=polite), CancelSweep(victims=victims))
    assert ("returned", "returned", "destination") in report.outcomes


def test_deadlines_and_leaps_around_a_held_migration() -> None:
    """N4: the caller's own time limit, and a clock that leaps."""
    sweep(scenario(pages=2, hold=True), DeadlineSweep(), TimeLeap())


def test_faults_around_a_held_migration() -> None:
    """T3, N3: the connection breaks before, in or behind the pause."""
    faults = FaultSweep(kinds=("eof", "reset", "half-close"))
    report = sweep(scenario(pages=2, dirty=0, hold=True, description=False), faults, every=3)
    assert "HandoverUncertain" in kinds_of_end(report.outcomes)


@pytest.mark.parametrize("error", [OSError, None], ids=["OSError", "hang"])
def test_calls_that_fail_around_a_held_migration(error: type[Exception] | None) -> None:
    """T5: each call of guest and stream."""
    sweep(scenario(pages=2, hold=True), CallSweep(errors=(error,)))


# -- streams that report more, or less ---------------------------------------------------------------------------------


def test_cancel_where_delivery_is_waited_for() -> None:
    """Gap G3: the commit and the wait for its delivery are one step, and shielded."""
    report = sweep(
        scenario(pages=2, return_path=False, stream="delivering"),
        CancelSweep(),
        CancelSweep(victims=DESTINATION),
    )
    assert ("returned", "returned", "destination") in report.outcomes


def test_cut_where_delivery_is_waited_for() -> None:
    """Gap G3: a commit that was not delivered is uncertain, not completed."""
    faults = FaultSweep(kinds=("reset", "blackhole"))
    there = scenario(pages=2, dirty=0, return_path=False, description=False, stream="delivering")
    report = sweep(there, faults, every=3)
    assert "HandoverUncertain" in kinds_of_end(report.outcomes)


def test_cancel_and_cut_where_perhaps_no_peer_answers() -> None:
    """K1, T1: if the peer does answer, the same rules hold as for any other stream."""
    there = scenario(pages=2, dirty=0, description=False, stream="perhaps silent")
    sweep(there, CancelSweep(), FaultSweep(kinds=("eof", "reset")), every=5)


# -- XBZRLE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("polite", [False, True], ids=["cancelled", "asked"])
@pytest.mark.parametrize("victims", [SOURCE, DESTINATION], ids="+".join)
def test_cancel_among_differences_at_every_edge(victims: tuple[str, ...], polite: bool) -> None:
    """F10, L12, S1: the next attempt begins with nothing of the cache of this one."""
    there = scenario(pages=3, content="random", dirty=2, xbzrle=True, polite=polite)
    report = sweep(there, CancelSweep(victims=victims))
    assert ("returned", "returned", "destination") in report.outcomes


@pytest.mark.parametrize("seed", SEEDS)
def test_every_fault_at_every_byte_among_differences(seed: int) -> None:
    """T1, T3, S1: a zero page becomes one of eight bytes, which is sent as a difference of a few."""
    there = scenario(pages=2, content="zero", dirty=1, xbzrle=True, description=False)
    report = sweep(there, FaultSweep(kinds=("eof", "reset", "half-close")), seeds=(seed,))
    assert "HandoverUncertain" in kinds_of_end(report.outcomes)
    assert ("TransportFailed", "TransportFailed", "source") in report.outcomes


@pytest.mark.parametrize("error", [OSError, MemoryError, None], ids=["OSError", "MemoryError", "hang"])
def test_calls_that_fail_among_differences(error: type[Exception] | None) -> None:
    """T5, S1: each call of guest and stream."""
    sweep(scenario(pages=3, content="mixed", dirty=2, xbzrle=True), CallSweep(errors=(error,)))
