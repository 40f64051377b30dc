"""T1, T3, T5, T6, T7: a migration disturbed at every point never leaves two guests, no guest, or anything behind."""

from __future__ import annotations

import pytest
import trio

import trimig
from tests.sweeps.migration import scenario
from trimig.testing import CallSweep, CancelSweep, DeadlineSweep, FaultSweep, TimeLeap, run_sweep

SEEDS = (0, 1, 2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victims", [("source",), ("destination",), ("source", "destination")], ids="+".join)
def test_cancel_at_every_edge(victims: tuple[str, ...]) -> None:
    """F10, K11, L12, L14, M: a cancelled migration never happened; after the decision it has happened."""
    report = run_sweep(scenario(pages=2), CancelSweep(victims=victims), seeds=SEEDS).show()
    assert report.runs > 200


@pytest.mark.timeout(600)
def test_polite_cancel_at_every_edge() -> None:
    """F10, G2, G4 of states.md: Monitor.cancel() ends the same way, and is refused once the decision is on its way."""
    report = run_sweep(scenario(pages=2, polite=True), CancelSweep(), seeds=SEEDS).show()
    assert any("MigrationCancelled" in str(outcome) for outcome in report.outcomes)


@pytest.mark.timeout(600)
def test_cancel_of_a_paused_guest_at_every_edge() -> None:
    """L12, G19 of states.md: a guest that was paused stays paused, and can be migrated again."""
    run_sweep(scenario(pages=2, run_state="paused"), CancelSweep(), seeds=(0,)).show()


@pytest.mark.timeout(600)
def test_cancel_without_a_return_path() -> None:
    run_sweep(
        scenario(pages=2, return_path=False), CancelSweep(), CancelSweep(victims=("destination",)), seeds=(0,)
    ).show()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_cut_at_every_byte(seed: int) -> None:
    """T1, T2, G1 of states.md: end of file and reset at every byte of both directions."""
    sweep = FaultSweep(kinds=("eof", "reset"))
    report = run_sweep(scenario(pages=2, dirty=0), sweep, seeds=(seed,)).show()
    assert any("HandoverUncertain" in str(outcome) for outcome in report.outcomes)


@pytest.mark.timeout(900)
def test_silence_at_every_byte() -> None:
    """F11, T3, G12 of states.md: a black hole, a half close or a silent direction ends in bounded time."""
    sweep = FaultSweep(kinds=("blackhole", "half-close", "silence"))
    run_sweep(scenario(pages=2, dirty=0), sweep, seeds=(0,), every=5).show()


@pytest.mark.timeout(900)
def test_faults_while_pages_move() -> None:
    """L9: the same with data pages and a guest that writes; sampled, since most bytes are inside a page."""
    run_sweep(scenario(pages=3, content="random", dirty=1), FaultSweep(), seeds=SEEDS, every=397).show()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "error",
    [OSError, trio.BrokenResourceError, MemoryError, trimig.GuestFailed, None],
    ids=lambda error: "hang" if error is None else error.__name__,
)
def test_every_call_of_guest_and_transport_fails(error: type[Exception] | None) -> None:
    """M10, P4, T5: each call of the guest and of the stream, on both sides, fails or hangs once."""
    calls_of_guests = (
        None if error is not trimig.GuestFailed else lambda name: name.startswith(("source", "destination"))
    )
    run_sweep(scenario(pages=2), CallSweep(errors=(error,), only=calls_of_guests), seeds=(0, 1)).show()


@pytest.mark.timeout(600)
def test_time_leaps_at_every_edge() -> None:
    """All timers expire at once, as after a suspended host."""
    run_sweep(scenario(pages=2), TimeLeap(), seeds=(0, 1)).show()


@pytest.mark.timeout(600)
def test_deadlines_around_every_event() -> None:
    run_sweep(scenario(pages=2), DeadlineSweep(), seeds=(0, 1)).show()
