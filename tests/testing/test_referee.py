"""The referee watches any guest: one that reports its starts, and one that has nothing but a run state."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import trimig
from trimig.testing import CancelSweep, OwnerReferee, Scenario, ScriptedGuest, SweepContext, run_sweep


class Ledger(trimig.AppGuest):
    """A guest of a user."""

    def __init__(self, *, running: bool) -> None:
        super().__init__("ledger", running=running)
        self.add_ram("table", 8 * 4096).view[:] = bytes([running]) * 8 * 4096


class Eager(Ledger):
    """It runs for one step of a task as soon as its devices have come, although its source has not decided yet."""

    async def load_devices(self, sections: object) -> None:
        was, self._run_state = self._run_state, "running"
        await trio.lowlevel.cancel_shielded_checkpoint()
        self._run_state = was


async def moved(source: trimig.Guest, target: trimig.Guest) -> None:
    here, there = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trimig.migrate, source, here)
        await trimig.receive(target, there)


async def test_a_hand_over_of_a_guest_of_a_user_is_no_violation(autojump_clock: trio.testing.MockClock) -> None:
    with Ledger(running=True) as source, Ledger(running=False) as target:
        referee = OwnerReferee(source=source, destination=target)
        assert referee.running() == ("source",)
        await moved(source, target)
        referee.check()
        assert referee.running() == ("destination",)
        assert [(label, event) for _, label, event in referee.history] == [("source", "stop"), ("destination", "start")]


async def test_two_that_run_for_one_step_are_a_violation(autojump_clock: trio.testing.MockClock) -> None:
    with Ledger(running=True) as source, Eager(running=False) as target:
        referee = OwnerReferee(source=source, destination=target)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.load_devices, ())
        assert referee.running() == ("source",)
    with pytest.raises(AssertionError, match="both-run"):
        referee.check()
    assert [violation.kind for violation in referee.violations] == ["both-run"]


def test_two_that_run_from_the_beginning_are_found_without_trio() -> None:
    with Ledger(running=True) as a, Ledger(running=True) as b:
        referee = OwnerReferee(a=a, b=b)
    with pytest.raises(AssertionError, match="both-run"):
        referee.check()


async def test_guests_of_both_kinds(autojump_clock: trio.testing.MockClock) -> None:
    source = ScriptedGuest(name="ledger", blocks={"table": 8})
    with Ledger(running=False) as target:
        referee = OwnerReferee(source=source, destination=target)
        await moved(source, target)
        referee.check()
        await source.activate("running")
    with pytest.raises(AssertionError, match="both-run"):
        referee.check()


def test_what_is_no_guest_is_refused() -> None:
    with pytest.raises(TypeError, match=r"source must be a trimig\.Guest"):
        OwnerReferee(source="ledger")  # type: ignore[arg-type]


def test_a_sweep_with_guests_of_a_user() -> None:
    async def move(ctx: SweepContext) -> tuple[str, ...]:
        with Ledger(running=True) as source, Ledger(running=False) as target:
            referee = OwnerReferee(source=source, destination=target)
            await ctx.run(
                source=lambda: trimig.migrate(source, ctx.link.a),
                destination=lambda: trimig.receive(target, ctx.link.b),
            )
            referee.check()
            return referee.running()

    report = run_sweep(Scenario(body=move), CancelSweep(victims=("source", "destination")), seeds=(0,), every=10)
    assert set(report.outcomes) <= {("source",), ("destination",), ()}
    assert {("source",), ("destination",)} <= set(report.outcomes)
