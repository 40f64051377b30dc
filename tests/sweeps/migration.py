"""One small migration between two scripted guests, and everything that must hold after it, whatever was done to it."""

from __future__ import annotations

import contextlib
import functools
from typing import Literal

import trio

import trimig
from trimig.testing import (
    End,
    FailingGuest,
    FailingStream,
    FakeDevice,
    OwnerReferee,
    Scenario,
    ScriptedGuest,
    SweepContext,
    VirtualLink,
)

# Short, so that few windows of the limiter pass while a run waits for a peer that will not answer.
HANDOVER_TIMEOUT = 2.0
TEARDOWN_GRACE = 1.0
STALL_TIMEOUT = 4.0

Outcome = tuple[str, str, str]


def make_config(*, return_path: bool = True) -> trimig.Config:
    """Limits that virtual time makes short; no bandwidth limit."""
    return trimig.Config(
        capabilities=trimig.Capabilities(return_path=return_path),
        parameters=trimig.Parameters(max_bandwidth=0),
        handover_timeout=HANDOVER_TIMEOUT,
        teardown_grace=TEARDOWN_GRACE,
        stall_timeout=STALL_TIMEOUT,
        max_iterations=8,
        on_bound="switchover",
    )


def make_guests(
    seed: int, *, pages: int, content: Literal["zero", "random", "mixed"], dirty: int, run_state: str
) -> tuple[ScriptedGuest, ScriptedGuest]:
    """A source and what is to become of it."""
    source = ScriptedGuest(
        blocks={"ram": pages},
        content=content,
        seed=seed,
        dirty_per_sync=dirty,
        working_set=1,
        devices=[FakeDevice("clock", size=8, seed=seed)],
        run_state=run_state,
    )
    target = ScriptedGuest(
        blocks={"ram": pages},
        content="random",
        seed=seed + 99,
        devices=[FakeDevice("clock", size=8)],
        run_state="inmigrate",
    )
    return source, target


async def migrate_once(
    ctx: SweepContext,
    *,
    pages: int = 3,
    content: Literal["zero", "random", "mixed"] = "zero",
    dirty: int = 1,
    run_state: str = "running",
    return_path: bool = True,
    polite: bool = False,
) -> Outcome:
    """Migrate under whatever the context injects, judge, and migrate again undisturbed."""
    source, target = make_guests(ctx.seed, pages=pages, content=content, dirty=dirty, run_state=run_state)
    referee = OwnerReferee(source=source, destination=target)
    config = make_config(return_path=return_path)
    monitors = {"source": trimig.Monitor(), "destination": trimig.Monitor()}
    living = trio.lowlevel.current_statistics().tasks_living

    async def send() -> trimig.Summary:
        guest = FailingGuest(source, ctx.calls, label="source")
        stream = FailingStream(ctx.link.a, ctx.calls, label="a")
        return await trimig.migrate(guest, stream, config, monitor=monitors["source"])

    async def take() -> trimig.Summary:
        guest = FailingGuest(target, ctx.calls, label="destination")
        stream = FailingStream(ctx.link.b, ctx.calls, label="b")
        return await trimig.receive(guest, stream, config, monitor=monitors["destination"])

    async def send_politely() -> trimig.Summary:
        """The sweep cancels this task; it passes that on as a call of Monitor.cancel(), and waits for the outcome."""
        result: list[trimig.Summary | trimig.MigrationError] = []
        done = trio.Event()

        async def run() -> None:
            with trio.CancelScope(shield=True):
                try:
                    result.append(await send())
                except trimig.MigrationError as error:
                    result.append(error)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            try:
                await done.wait()
            except trio.Cancelled:
                nursery.cancel_scope.shield = True
                with contextlib.suppress(trimig.StateError):  # too late, and said so
                    monitors["source"].cancel("the sweep")
                await done.wait()
        if isinstance(result[0], trimig.MigrationError):
            raise result[0]
        return result[0]

    ends = await ctx.run(source=send_politely if polite else send, destination=take)
    assert trio.lowlevel.current_statistics().tasks_living == living
    judge(ends, monitors, source, target, referee, run_state=run_state, confirmed=return_path)
    assert ctx.link.closed
    outcome = (str(ends["source"]), str(ends["destination"]), "+".join(referee.running()) or "nobody runs")
    if ends["source"].kind != "returned" and not isinstance(
        ends["source"].error, trimig.HandoverUncertain | trimig.GuestFailed
    ):
        await migrate_again(ctx, source, config)
    return outcome


def judge(
    ends: dict[str, End],
    monitors: dict[str, trimig.Monitor],
    source: ScriptedGuest,
    target: ScriptedGuest,
    referee: OwnerReferee,
    *,
    run_state: str,
    confirmed: bool,
) -> None:
    """The promise: at most one runs; what each side says is true; nothing is left behind."""
    referee.check()
    here, there = ends["source"], ends["destination"]
    for guest in (source, target):
        assert not guest.claimed, f"{guest} is still claimed"
        assert not guest.tracking, f"{guest} is still tracked"
    for name, end in ends.items():
        assert monitors[name].status in trimig.Status.__members__.values()
        if end.error is not None:
            assert isinstance(end.error, trimig.MigrationError)
            # A transport that runs out of memory is nobody's fault that an error class could name.
            internal = isinstance(end.error, trimig.InternalError) and not isinstance(end.error.__cause__, MemoryError)
            assert not internal, f"{end.error!r}"
    arrived = there.kind == "returned"
    if arrived:
        assert target.run_state == run_state
        assert monitors["destination"].owner is trimig.Ownership.DESTINATION
    else:
        assert not target.running
    if here.kind == "returned":
        assert not source.running
        assert monitors["source"].status is trimig.Status.COMPLETED
        if confirmed:
            assert arrived, f"the source says it is done, the destination says {there}"
    elif isinstance(here.error, trimig.HandoverUncertain):
        assert here.error.owner is trimig.Ownership.UNKNOWN
        assert monitors["source"].status is trimig.Status.UNCERTAIN
        assert not source.running
    elif isinstance(here.error, trimig.GuestFailed) and source.run_state != run_state:
        # It could not be resumed, and says so; the owner is still this side, and the other one has nothing.
        assert here.error.owner is trimig.Ownership.SOURCE
        assert not arrived
    else:
        if isinstance(here.error, trimig.MigrationError):
            assert here.error.owner is trimig.Ownership.SOURCE
        assert source.run_state == run_state, f"{here} left the guest {source.run_state}"
        assert not arrived, f"{here}, and yet the destination has it"
    if arrived:
        assert target.digest() == source.digest(), "the guest arrived other than it was"


async def migrate_again(ctx: SweepContext, source: ScriptedGuest, config: trimig.Config) -> None:
    """T7: after a failed or cancelled attempt the next one succeeds, without anybody's help."""
    link = ctx.new_link()
    target = ScriptedGuest(
        blocks={b.name: len(b.pages) for b in source.ram},
        content="random",
        devices=[FakeDevice("clock", size=8)],
        run_state="inmigrate",
    )
    before = source.run_state
    ends = await ctx.calm(
        source=lambda: trimig.migrate(source, link.a, config),
        destination=lambda: trimig.receive(target, link.b, config),
    )
    assert [str(end) for end in ends.values()] == ["returned", "returned"]
    assert target.run_state == before
    assert target.digest() == source.digest()


def scenario(**options: object) -> Scenario[Outcome]:
    """The scenario over a link with some latency, a small window and pieces of random size."""
    return Scenario(
        body=functools.partial(migrate_once, **options),  # type: ignore[arg-type]  # passed through as they are
        link=functools.partial(VirtualLink, window=8192, latency=0.001, chunk=(1, 4096)),
        exit_within=HANDOVER_TIMEOUT + 2 * TEARDOWN_GRACE + 1,
        limit=600.0,
    )
