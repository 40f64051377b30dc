"""The sweeps on a made-up protocol: they find a deliberate ownership bug, and pass when it is mended."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from trimig.errors import GuestFailed, HandoverUncertain, TransportFailed, TrimigError
from trimig.guest import Guest
from trimig.testing import (
    CallSweep,
    CancelAt,
    CancelSweep,
    DeadlineSweep,
    EdgeKind,
    ExpireAt,
    FailCall,
    FailingGuest,
    FailingStream,
    Fault,
    FaultSweep,
    LeapAt,
    OwnerReferee,
    Point,
    Run,
    Scenario,
    ScriptedGuest,
    SweepContext,
    SweepFailure,
    TimeLeap,
    VirtualLink,
    replay,
    run_cancel_sweep,
    run_sweep,
)

Stream = trio.abc.HalfCloseableStream
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
ANSWER_WITHIN = 30.0
GRACE = 5.0


class LinkLost(TransportFailed):
    """The toy's own transport error."""


async def exactly(stream: Stream, n: int) -> bytes:
    data = b""
    while len(data) < n:
        chunk = await stream.receive_some(n - len(data))
        if not chunk:
            raise LinkLost("the stream ended early")
        data += chunk
    return data


@dataclasses.dataclass
class Toy:
    """A handover in four messages: state, Ready, Commit, Started. *careful* selects the correct or the wrong version.

    The careless version takes the answer for the commit: an interruption between Commit and Started lets the source
    resume a guest that the other side has just started.
    """

    careful: bool

    async def give(self, guest: Guest, stream: Stream) -> str:
        decided = answered = False
        try:
            await guest.pause()
            with trio.fail_after(ANSWER_WITHIN):
                await stream.send_all(bytes(guest.ram[0].pages[:, 0]))
                assert await exactly(stream, 1) == b"R"
            with trio.CancelScope(shield=self.careful) as window:
                window.deadline = trio.current_time() + ANSWER_WITHIN
                decided = self.careful
                await stream.send_all(b"C")
                answered = await exactly(stream, 1) == b"S"
        except (*BROKEN, trio.TooSlowError) as exc:
            if not decided:
                raise LinkLost("no answer") from exc
        except LinkLost:
            if not decided:
                raise
        finally:
            with trio.move_on_after(GRACE, shield=True):
                if not (decided or answered):
                    await guest.resume()
            with trio.CancelScope(shield=True):
                await close(stream)
        if not answered:
            raise HandoverUncertain("no answer to the commit")
        return "given"

    async def take(self, guest: Guest, stream: Stream) -> str:
        started = False
        try:
            with trio.fail_after(2 * ANSWER_WITHIN):
                guest.ram[0].pages[:, 0] = list(await exactly(stream, len(guest.ram[0].pages)))
                await guest.load_devices([])
                await stream.send_all(b"R")
                assert await exactly(stream, 1) == b"C"
                await guest.activate("running")
                started = True
                await stream.send_all(b"S")
        except (*BROKEN, trio.TooSlowError) as exc:
            if not started:
                raise LinkLost("the source went away") from exc
        finally:
            with trio.CancelScope(shield=True):
                await close(stream)
        return "taken"


async def close(stream: Stream) -> None:
    with contextlib.suppress(*BROKEN):
        await trio.aclose_forcefully(stream)


Outcome = tuple[str, str, tuple[str, ...]]


async def hand_over(ctx: SweepContext, *, toy: Toy) -> Outcome:
    source = ScriptedGuest(blocks={"ram": 3}, seed=ctx.seed)
    target = ScriptedGuest(blocks={"ram": 3}, content="zero", run_state="prelaunch")
    referee = OwnerReferee(source=source, destination=target)
    ends = await ctx.run(
        source=lambda: toy.give(
            FailingGuest(source, ctx.calls, label="source"), FailingStream(ctx.link.a, ctx.calls, label="a")
        ),
        destination=lambda: toy.take(
            FailingGuest(target, ctx.calls, label="destination"), FailingStream(ctx.link.b, ctx.calls, label="b")
        ),
    )
    referee.check()
    assert ctx.link.closed
    return str(ends["source"]), str(ends["destination"]), referee.running()


def one_owner(outcome: Outcome) -> None:
    source, _, running = outcome
    if source in ("cancelled", "LinkLost", "GuestFailed"):
        assert running == ("source",)
    elif source == "returned":
        assert running == ("destination",)
    else:
        assert source == "HandoverUncertain"
        assert "source" not in running


def scenario(*, careful: bool = True, **changes: Any) -> Scenario[Outcome]:
    made = Scenario(
        body=functools.partial(hand_over, toy=Toy(careful=careful)),
        check=one_owner,
        link=functools.partial(VirtualLink, latency=0.25, chunk=(1, 2)),
        exit_within=ANSWER_WITHIN + GRACE,
    )
    return dataclasses.replace(made, **changes)


def test_a_cancel_of_the_source_anywhere_leaves_one_owner() -> None:
    """T1, T3."""
    report = run_cancel_sweep(scenario()).show()
    assert report.fired == report.points == report.runs - 3
    cancelled, given = ("cancelled", "LinkLost", ("source",)), ("returned", "returned", ("destination",))
    assert set(report.outcomes) == {cancelled, given}
    assert report.points > 100


@pytest.mark.parametrize("kind", ["before", "after"])
def test_cancels_that_came_too_late_form_one_block_at_the_end(kind: EdgeKind) -> None:
    baseline = replay(scenario(), Point(seed=0))
    edges = baseline.exits["source"][kind]
    given = [
        replay(scenario(), Point(seed=0, inject=(CancelAt(kind=kind, n=n),))).outcome == baseline.outcome
        for n in range(1, edges + 1)
    ]
    assert given == sorted(given)
    assert {*given} == {False, True}


@pytest.mark.parametrize("victims", [("source",), ("source", "destination")])
def test_the_careless_source_is_found_and_its_point_replays(victims: tuple[str, ...]) -> None:
    broken = scenario(careful=False)
    with pytest.raises(SweepFailure, match="both-run") as caught:
        run_cancel_sweep(broken, victims=victims)
    point = caught.value.point
    (cancel,) = point.inject
    assert isinstance(cancel, CancelAt)
    assert cancel.task in ("source", "destination")
    assert repr(point) in str(caught.value)
    for _ in range(2):
        with pytest.raises(SweepFailure, match="both-run") as again:
            replay(broken, point)
        assert again.value.point == point
    assert replay(scenario(), point).outcome[0] in ("cancelled", "returned", "HandoverUncertain")


def test_every_kind_of_sweep_passes_on_the_careful_protocol() -> None:
    """T1, T3: after every injection there is one owner or a reported uncertainty, and an end in bounded time."""
    report = run_sweep(
        scenario(expected=(TrimigError,)),
        CancelSweep(victims=("destination",)),
        CancelSweep(victims=("source", "destination")),
        DeadlineSweep(),
        TimeLeap(),
        FaultSweep(kinds=("eof", "reset", "half-close", "blackhole", "silence", "stall")),
        CallSweep(errors=(OSError, trio.BrokenResourceError, None), only=lambda name: name[:2] in ("a.", "b.")),
        CallSweep(errors=(GuestFailed,), only=lambda name: name in ("source.pause", "destination.activate")),
        seeds=(0, 1),
    ).show()
    assert "('HandoverUncertain', 'returned', ('destination',))" in str(report)
    assert report.points > 500
    assert report.points - report.fired < report.points / 20, "only deadlines may come too late"


@pytest.mark.parametrize(
    "sweep",
    [
        FaultSweep(),
        CallSweep(errors=(None,), only=lambda name: name == "a.receive_some"),
        CallSweep(errors=(trio.BrokenResourceError,)),
        TimeLeap(),
    ],
    ids=["cut", "hang", "error", "leap"],
)
def test_other_sweeps_find_the_careless_source_too(sweep: FaultSweep | CallSweep | TimeLeap) -> None:
    with pytest.raises(SweepFailure, match=r"both-run|refused|assert"):
        run_sweep(scenario(careful=False, limit=1000), sweep)


@pytest.mark.parametrize(
    "point",
    [
        Point(seed=1, inject=(CancelAt(kind="before", n=1),)),
        Point(seed=1, inject=(ExpireAt(time=0.0),)),
        Point(seed=1, inject=(LeapAt(kind="after", n=9, seconds=0.1), CancelAt(kind="after", n=20))),
        Point(seed=1, inject=(Fault(direction="a->b", after=4, kind="blackhole"), CancelAt(kind="before", n=30))),
        Point(seed=1, inject=(FailCall(n=9), CancelAt(kind="after", n=12, victims=("destination",)))),
    ],
)
def test_points_written_by_hand_may_combine_injections(point: Point) -> None:
    first, second = replay(scenario(), point), replay(scenario(), point)
    assert first.fired, first
    assert (first.outcome, first.traces, first.elapsed) == (second.outcome, second.traces, second.elapsed)


def test_a_cancel_before_the_call_never_pauses_the_guest() -> None:
    async def body(ctx: SweepContext) -> list[str]:
        guest = ScriptedGuest()
        await ctx.run(source=guest.pause)
        return guest.events()

    assert replay(Scenario(body=body), Point(seed=0, inject=(CancelAt(kind="before", n=1),))).outcome == []
    assert replay(Scenario(body=body), Point(seed=0)).outcome == ["pause"]


def test_a_second_attempt_is_not_disturbed_and_works() -> None:
    async def body(ctx: SweepContext) -> str:
        source = ScriptedGuest(blocks={"ram": 3})
        target = ScriptedGuest(blocks={"ram": 3}, run_state="prelaunch")
        toy, link = Toy(careful=True), ctx.new_link()
        first = await ctx.run(
            source=lambda: toy.give(source, ctx.link.a), destination=lambda: toy.take(target, ctx.link.b)
        )
        if first["source"].kind == "returned":
            return "first"
        ends = await ctx.run_undisturbed(
            source=lambda: toy.give(source, link.a), destination=lambda: toy.take(target, link.b)
        )
        assert {end.kind for end in ends.values()} == {"returned"}
        return "second"

    report = run_sweep(Scenario(body=body), CancelSweep(), FaultSweep(kinds=("reset",), directions=("b->a",)), every=2)
    assert set(report.outcomes) == {"first", "second"}
    assert report.samples["first"].inject == ()


def test_a_stride_takes_other_points_under_other_seeds() -> None:
    whole = run_cancel_sweep(scenario(), seeds=(0,))
    parts = [run_cancel_sweep(scenario(), seeds=(seed,), every=5) for seed in (0, 1)]
    assert all(part.points in range(whole.points // 5 - 3, whole.points // 5 + 4) for part in parts)


def test_report_shows_the_number_of_runs_and_each_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_cancel_sweep(scenario(), seeds=(4,), kinds=("after",)).show()
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"CancelSweep: {report.runs} runs, 1 seeds, {report.points} of {report.points} points fired"
    assert len(others) == len(report.outcomes) == 2


# Errors that must make a sweep fail


def failing(body: Any, **settings: Any) -> str:
    with pytest.raises(SweepFailure) as caught:
        run_cancel_sweep(Scenario(body=body, **settings), victims=("only",), seeds=(0,))
    return str(caught.value)


def test_a_schedule_that_does_not_repeat_fails_the_sweep() -> None:
    numbers = itertools.count()

    async def body(ctx: SweepContext) -> None:
        async def steps() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, 1, name=f"helper {next(numbers)}")

        await ctx.run(only=steps)

    assert "not repeatable" in failing(body)


def test_an_undeclared_error_of_a_side_fails_the_sweep() -> None:
    async def body(ctx: SweepContext) -> None:
        async def side() -> None:
            try:
                await trio.sleep(1)
            except trio.Cancelled as exc:
                raise KeyError("lost") from exc

        await ctx.run(only=side)

    assert "ExceptionGroup" in failing(body)


def test_a_side_that_never_ends_fails_the_sweep() -> None:
    async def body(ctx: SweepContext) -> None:
        async def side() -> None:
            try:
                await trio.sleep(1)
            finally:
                with trio.CancelScope(shield=True, deadline=5000):
                    await trio.sleep_forever()

        await ctx.run(only=side)

    assert "not over after 100.0 virtual seconds" in failing(body, limit=100.0)


def test_a_side_that_hangs_in_a_shield_without_deadline_fails_the_sweep() -> None:
    async def body(ctx: SweepContext) -> None:
        async def side() -> None:
            try:
                await trio.sleep(1)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.Event().wait()

        async def other() -> None:
            await trio.sleep(3)

        await ctx.run(only=side, other=other)

    with pytest.raises(SweepFailure) as caught:
        run_cancel_sweep(Scenario(body=body), victims=("only",))
    assert "stuck for ever: only" in str(caught.value)


def test_a_side_that_takes_too_long_to_unwind_fails_the_sweep() -> None:
    async def body(ctx: SweepContext) -> None:
        async def side() -> None:
            try:
                await trio.sleep(1)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(20)

        await ctx.run(only=side)

    assert "the bound is 10.0" in failing(body, exit_within=10.0)
    run_cancel_sweep(Scenario(body=body, exit_within=21.0), victims=("only",))


def test_a_task_left_behind_fails_the_sweep() -> None:
    async def body(ctx: SweepContext) -> None:
        async def side() -> None:
            trio.lowlevel.spawn_system_task(trio.sleep_forever)
            await trio.lowlevel.checkpoint()

        await ctx.run(only=side)

    assert "1 tasks were left behind" in failing(body)


def test_an_error_inside_an_instrument_fails_the_sweep() -> None:
    class Fragile(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            raise ZeroDivisionError

    async def body(ctx: SweepContext) -> None:
        trio.lowlevel.add_instrument(Fragile())
        await ctx.run(only=trio.lowlevel.checkpoint)

    assert "an instrument failed" in failing(body)
    with pytest.raises(SweepFailure, match="no such side"):
        replay(scenario(), Point(seed=0, inject=(CancelAt(kind="after", n=3, victims=("absent",)),)))


def test_a_check_that_refuses_fails_the_sweep() -> None:
    async def body(ctx: SweepContext) -> str:
        await ctx.run(only=trio.lowlevel.checkpoint)
        return "odd"

    assert "refused the outcome 'odd'" in failing(body, check=lambda outcome: outcome != "odd")
    looked = replay(Scenario(body=body, check=lambda outcome: False), Point(seed=0), check=False)
    assert looked.outcome == "odd"


def test_a_point_that_is_never_reached_fails_the_sweep() -> None:
    class Beyond:
        def points(self, baseline: Run[Any]) -> Iterator[Point]:
            yield Point(seed=0, inject=(Fault(direction="a->b", after=10**6, kind="eof"),))

    with pytest.raises(SweepFailure, match="not reached"):
        run_sweep(scenario(), Beyond(), seeds=(0,))


def test_nothing_to_sweep_is_refused() -> None:
    with pytest.raises(ValueError, match="no point"):
        run_sweep(scenario(), CallSweep(only=lambda name: False))
    with pytest.raises(ValueError, match="at least one"):
        run_sweep(scenario())
    with pytest.raises(ValueError, match="absent"):
        run_cancel_sweep(scenario(), victims=("absent",))


def test_a_scenario_tests_one_part_only() -> None:
    async def body(ctx: SweepContext) -> None:
        await ctx.run(only=trio.lowlevel.checkpoint)
        await ctx.run(only=trio.lowlevel.checkpoint)

    with pytest.raises(SweepFailure, match="only one part"):
        replay(Scenario(body=body), Point(seed=0))


def test_warnings_of_the_engine_are_not_printed_in_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python prints warnings where a program has no handlers; those of pytest are taken away here."""
    log = logging.getLogger("trimig.destination")

    async def body(ctx: SweepContext) -> tuple[str, ...]:
        log.warning("the source could not be told")
        return tuple(map(str, (await ctx.run(one=trio.lowlevel.checkpoint)).values()))

    monkeypatch.setattr(logging.root, "handlers", [])
    before = list(logging.getLogger("trimig").handlers)
    run_sweep(Scenario(body=body), CancelSweep(victims=("one",)), seeds=(0,))
    assert capsys.readouterr().err == ""
    assert logging.getLogger("trimig").handlers == before
    log.warning("outside of a sweep")
    assert capsys.readouterr().err == "outside of a sweep\n"
