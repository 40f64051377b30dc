"""What the kit finds by itself in guests of a user's own class: each fault here fails the smallest sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import trio

import trimig
from trimig.guest import DirtyTracker, PageBitmap
from trimig.guests import GuestBase
from trimig.memory import MemfdBlock, choose_tracker
from trimig.testing import (
    CallSweep,
    CancelSweep,
    FailingGuest,
    FaultSweep,
    OwnerReferee,
    Point,
    Scenario,
    ScriptedGuest,
    SweepContext,
    SweepFailure,
    VirtualLink,
    replay,
    run_sweep,
)
from trimig.testing.content import content_of, differences


class Beat(trimig.Device):
    """One number."""

    vmstate = trimig.VMState("beat", version=1, fields=[trimig.Field("n", "uint32")])

    def __init__(self) -> None:
        self.n = 0


class Counter(GuestBase):
    """A correct guest that writes two of its pages at each look of its tracker."""

    def __init__(self, *, running: bool) -> None:
        super().__init__("counter", run_state="running" if running else "inmigrate")
        self.block = MemfdBlock("ram", 8 * 4096)
        self.beat = Beat()
        self._ram.append(self.block)
        self.add_device(self.beat)

    def count(self) -> None:
        if self.run_state == "running":
            self.block.pages[[0, 3], 0] += 1
            self.beat.n += 1

    def seen(self, found: Mapping[str, PageBitmap]) -> Mapping[str, PageBitmap]:
        return found

    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._run_state == "running":
            self._run_state = "paused"

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        with self._owner.starting():
            self._run_state = "running"

    def dirty_tracker(self) -> DirtyTracker:
        return Counting(self)


class Counting:
    def __init__(self, guest: Counter) -> None:
        self._guest = guest
        self._tracker = choose_tracker(guest.ram, prefer="compare")

    @property
    def method(self) -> str:
        return self._tracker.method

    async def start(self) -> None:
        await self._tracker.start()

    async def sync(self) -> Mapping[str, PageBitmap]:
        self._guest.count()
        return self._guest.seen(await self._tracker.sync())

    def stop(self) -> None:
        self._tracker.stop()


class Forgetful(Counter):
    """Its tracker loses page 3."""

    def seen(self, found: Mapping[str, PageBitmap]) -> Mapping[str, PageBitmap]:
        found["ram"][3] = False
        return found


class Deaf(Counter):
    """Its device takes no state."""

    async def load_devices(self, sections: object) -> None:
        await trio.lowlevel.checkpoint()


class Unguarded(Counter):
    """It resumes also where it is not the owner."""

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        self._run_state = "running"


class Refusing(Counter):
    """Its refusal is another error than the one that callers know."""

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.owner is not trimig.Owner.HERE:
            raise trimig.GuestFailed("not now")
        self._run_state = "running"


class Hanging(Counter):
    """It waits for its owner to come back."""

    async def resume(self) -> None:
        if self.owner is not trimig.Owner.HERE:
            await trio.sleep_forever()
        await super().resume()


class Misspelt(Counter):
    def dirty_tracker(self) -> DirtyTracker:
        return self.trackr()  # type: ignore[attr-defined,no-any-return]


class Failing(Counter):
    async def pause(self) -> None:
        raise trimig.GuestFailed("it never stops")


def scenario(
    kind: type[Counter], *, compare: bool = True, receiver: type[Counter] | None = None
) -> Scenario[tuple[str, ...]]:
    async def move(ctx: SweepContext) -> tuple[str, ...]:
        here, there = kind(running=True), (receiver or kind)(running=False)
        referee = OwnerReferee(compare=compare, here=here, there=there)
        try:
            await ctx.run(
                source=lambda: trimig.migrate(FailingGuest(here, ctx.calls), ctx.link.a),
                destination=lambda: trimig.receive(there, ctx.link.b),
            )
            return referee.running()
        finally:
            here.block.close()
            there.block.close()

    return Scenario(body=move)


def failure(kind: type[Counter]) -> SweepFailure:
    with pytest.raises(SweepFailure) as caught:
        run_sweep(scenario(kind), CallSweep(), seeds=(0,))
    return caught.value


def test_a_correct_guest_passes() -> None:
    run_sweep(scenario(Counter), CallSweep(), CancelSweep(), seeds=(0,), every=10)
    report = run_sweep(scenario(Counter), FaultSweep(), seeds=(0,), every=2000)
    assert ("there",) in report.outcomes


def test_a_lost_page_is_found_without_code_of_the_scenario() -> None:
    text = str(failure(Forgetful))
    assert "other-content: there, here: 1 pages of RAM block 'ram'" in text
    assert "first page 3" in text
    run_sweep(scenario(Forgetful, compare=False), CallSweep(), seeds=(0,))


def test_a_device_that_did_not_take_its_state_is_found() -> None:
    with pytest.raises(SweepFailure, match=r"device 'beat' 0 was 0000000\d and is 00000000"):
        run_sweep(scenario(Counter, receiver=Deaf), CallSweep(), seeds=(0,))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Unguarded, "resume() returned"),
        (Refusing, "resume() raised GuestFailed: not now"),
        (Hanging, "resume() did not return within 60 s"),
    ],
)
def test_a_resume_that_does_not_raise_not_owner_is_found(kind: type[Counter], words: str) -> None:
    text = str(failure(kind))
    assert words in text
    assert "its owner is ELSEWHERE" in text
    assert "self._owner.starting()" in text
    assert "own_guest" in text


def test_a_resume_while_the_owner_is_unknown_is_found() -> None:
    class Eager(Counter):
        async def resume(self) -> None:
            await trio.lowlevel.checkpoint()
            if self.owner is trimig.Owner.ELSEWHERE:
                raise trimig.NotOwner("not here")
            self._run_state = "running"

    with pytest.raises(SweepFailure, match="its owner is UNKNOWN, and resume") as caught:
        run_sweep(scenario(Eager), FaultSweep(kinds=("reset",), directions=("b->a",)), seeds=(0,))
    assert caught.value.point.inject


def test_an_undisturbed_run_with_an_internal_error_fails_and_shows_the_line_of_the_guest() -> None:
    found = failure(Misspelt)
    assert "source ended with InternalError: AttributeError: 'Misspelt' object has no attribute 'trackr'" in str(found)
    assert found.point == Point(seed=0)
    assert isinstance(found.__cause__, AttributeError)


def test_an_undisturbed_run_that_fails_is_no_baseline() -> None:
    text = str(failure(Failing))
    assert text.startswith(
        "the undisturbed run must end with the guest at the destination, but source raised GuestFailed"
    )
    assert "it never stops" in text
    run = replay(scenario(Failing), Point(seed=0))
    assert run.outcome == ("here",)
    assert "it never stops" in (run.unmoved or "")


def test_an_undisturbed_run_that_moves_nothing_is_no_baseline() -> None:
    async def body(ctx: SweepContext) -> None:
        here, there = ScriptedGuest(), ScriptedGuest(run_state="inmigrate")
        OwnerReferee(here=here, there=there)
        await ctx.run(source=trio.lowlevel.checkpoint)

    with pytest.raises(SweepFailure, match="here is still the owner, and no other guest was started"):
        run_sweep(Scenario(body=body), CancelSweep(), seeds=(0,))


def test_an_internal_error_fails_every_run_unless_it_is_named() -> None:
    async def side() -> None:
        await trio.lowlevel.checkpoint()
        error = trimig.TransportFailed("closed")
        error.complete(trimig.InternalError("a fault"))
        raise error

    async def body(ctx: SweepContext) -> str:
        ends = await ctx.run(source=trio.lowlevel.checkpoint)
        ends |= await ctx.run_undisturbed(again=side)
        return str(ends["again"])

    with pytest.raises(SweepFailure, match="again ended with InternalError: a fault"):
        replay(Scenario(body=body), Point(seed=0))
    named = Scenario(body=body, expected=(trimig.TrimigError, trimig.InternalError))
    assert replay(named, Point(seed=0)).outcome == "TransportFailed"


def test_a_rule_that_is_broken_is_printed_as_lines_without_a_chain() -> None:
    found = failure(Unguarded)
    assert found.__cause__ is None
    assert found.__suppress_context__
    lines = str(found).splitlines()
    assert lines[0] == "the guests broke a rule:"
    assert "before that:" in lines
    assert "at 0 ms, here: stop" in lines
    assert lines[-1].startswith("to repeat: replay(scenario, Point(")


def test_a_program_beside_the_sides_writes_while_the_guest_moves() -> None:
    """The writer ends with the sides, also where the guest was handed over."""

    async def body(ctx: SweepContext) -> tuple[int, int]:
        with trimig.AppGuest("ledger") as here, trimig.AppGuest("ledger", running=False) as there:
            blocks = [guest.add_ram("table", 8 * 4096) for guest in (here, there)]
            blocks[0].pages[:] = 7

            async def write() -> None:
                while True:
                    await trio.sleep(0.001)
                    async with here.running():
                        blocks[0].pages[:, 0] += 1

            ctx.beside(write)
            OwnerReferee(here=here, there=there)
            await ctx.run(
                source=lambda: trimig.migrate(here, ctx.link.a), destination=lambda: trimig.receive(there, ctx.link.b)
            )
            return int(blocks[0].pages[5, 0]), int(blocks[1].pages[5, 0])

    def link(*, seed: int) -> VirtualLink:
        return VirtualLink(seed=seed, latency=0.01)

    written, arrived = replay(Scenario(body=body, link=link), Point(seed=0)).outcome
    assert written == arrived > 7
    run_sweep(Scenario(body=body, link=link), CancelSweep(), seeds=(0,), every=20)


def test_content_is_compared_by_name() -> None:
    one = ScriptedGuest(blocks={"ram": 4, "only here": 1}, seed=1)
    other = ScriptedGuest(blocks={"ram": 4, "only there": 1}, seed=1)
    assert differences(content_of(one), content_of(other)) == []
    other.write("ram", 2, 9)
    (clause,) = differences(content_of(one), content_of(other))
    assert "first page 2" in clause


def test_a_device_that_cannot_be_saved_again_is_named() -> None:
    class Once(Beat):
        def pre_save(self) -> None:
            raise RuntimeError("it was saved already")

    guest, other = ScriptedGuest(devices=[Beat()]), ScriptedGuest(devices=[Once()])
    (clause,) = differences(content_of(guest), content_of(other))
    assert "device 'beat' 0 was 00000000 and is saving it once more" in clause
    assert "it was saved already" in clause


class Untracked(Counter):
    def dirty_tracker(self) -> DirtyTracker:
        return None  # type: ignore[return-value]


class Unstopped(Counter):
    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Untracked, r"Untracked\.dirty_tracker\(\) returned None"),
        (Unstopped, r"pause\(\) has returned and run_state is still 'running'"),
        (Misspelt, "a fault of trimig, or of the guest's code"),
    ],
)
def test_a_mistake_of_an_own_guest_is_named(kind: type[Counter], words: str, wrapped: bool) -> None:
    async def body(ctx: SweepContext) -> None:
        here, there = kind(running=True), Counter(running=False)
        guest = FailingGuest(here, ctx.calls) if wrapped else here
        ends = await ctx.run(
            source=lambda: trimig.migrate(guest, ctx.link.a), destination=lambda: trimig.receive(there, ctx.link.b)
        )
        assert isinstance(ends["source"].error, trimig.MigrationError)
        assert re.search(words, str(ends["source"].error))
        here.block.close()
        there.block.close()

    replay(Scenario(body=body, expected=(trimig.TrimigError, trimig.InternalError)), Point(seed=0))
