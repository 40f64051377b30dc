"""Auto-converge, disturbed at every point: the throttle is ended, whatever happens."""

from __future__ import annotations

import dataclasses
import functools

import pytest

import trimig
from tests import tiers
from tests.sweeps.migration import (
    HANDOVER_TIMEOUT,
    KEEPALIVE,
    TEARDOWN_GRACE,
    Life,
    Outcome,
    ProbedStream,
    Watched,
    judge_ends,
    judge_owner,
    make_config,
    settle,
)
from tests.sweeps.sampled import SEEDS, sweep
from trimig.testing import (
    CallSweep,
    CancelSweep,
    DeadlineSweep,
    FailingGuest,
    FailingStream,
    FakeDevice,
    FaultSweep,
    OwnerReferee,
    Scenario,
    ScriptedGuest,
    SweepContext,
    VirtualLink,
)

pytestmark = pytest.mark.timeout(600)

PAGES = 4
#: Bytes per second: a pass takes two thirds of a second, and each page is written again in it.
RATE = 25_000


#: Drawn points of a sweep in the ordinary run, and interleavings of those that need no other. A run has seconds of virtual
#: time in many small steps.
SAMPLE = 8
SEED = SEEDS if tiers.everything() else SEEDS[:1]


def throttled_config() -> trimig.Config:
    """One step is enough: behind it next to nothing is written."""
    return dataclasses.replace(
        make_config(),
        capabilities=trimig.Capabilities(auto_converge=True),
        parameters=trimig.Parameters(max_bandwidth=0, downtime_limit=100, cpu_throttle_initial=99),
        max_iterations=12,
        on_bound="fail",
    )


async def migrate_throttled(ctx: SweepContext) -> Outcome:
    """Migrate a guest that has to be throttled, under any injection of the context, and check the rules."""
    source = ScriptedGuest(
        blocks={"ram": PAGES}, seed=ctx.seed, rate=50, devices=[FakeDevice("clock", size=8, seed=ctx.seed)]
    )
    target = ScriptedGuest(
        blocks={"ram": PAGES}, seed=ctx.seed + 99, devices=[FakeDevice("clock", size=8)], run_state="inmigrate"
    )
    referee, life = OwnerReferee(source=source, destination=target), Life(source)
    sender, taker = Watched(ctx.link), trimig.Monitor()
    answering = ProbedStream(FailingStream(ctx.link.b, ctx.calls, label="b"), ctx.calls)

    async def send() -> trimig.Summary:
        guest = FailingGuest(source, ctx.calls, label="source")
        stream = FailingStream(ctx.link.a, ctx.calls, label="a")
        return await trimig.migrate(guest, stream, throttled_config(), monitor=sender)

    async def take() -> trimig.Summary:
        guest = FailingGuest(target, ctx.calls, label="destination")
        return await trimig.receive(guest, answering, make_config(), monitor=taker)

    ends = await ctx.run(source=send, destination=take)
    assert ctx.link.closed
    referee.check()
    judge_ends(ends, {"source": sender, "destination": taker}, source, target)
    judge_owner(ends, sender, source, target, life, confirmed=True)
    judge_throttle(ctx, sender, source)
    outcome = (str(ends["source"]), str(ends["destination"]), "+".join(referee.running()) or "none runs")
    if isinstance(ends["source"].error, trimig.HandoverUncertain):
        await settle(ends["source"].error, source, target)
    return outcome


def judge_throttle(ctx: SweepContext, monitor: trimig.Monitor, source: ScriptedGuest) -> None:
    """There is no throttle any more, unless the call that ends it was the one that failed."""
    steps = [entry.detail for entry in source.journal if entry.event == "throttle"]
    assert set(steps) <= {"99", "0"}
    assert "cpu-throttle-percentage" not in monitor.info()
    assert monitor.statistics().throttle == 0
    failed = ctx.calls.fired and ctx.calls.names[(ctx.calls.fail_at or 1) - 1] == "source.throttle"
    assert steps[-1:] in ([], ["0"]) or failed, f"the guest is still throttled: {steps}"


def scenario() -> Scenario[Outcome]:
    """The scenario over a slow link."""
    return Scenario(
        body=migrate_throttled,
        link=functools.partial(VirtualLink, window=4096, latency=0.001, rate=RATE, keepalive=KEEPALIVE),
        exit_within=HANDOVER_TIMEOUT + 2 * TEARDOWN_GRACE + 1.0,
        limit=600.0,
    )


def test_baseline_is_throttled_once_and_arrives() -> None:
    report = sweep(scenario(), CallSweep(errors=(OSError,), only=lambda name: name == "source.throttle"), seeds=(0,))
    assert ("returned", "returned", "destination") in report.outcomes
    assert report.runs > 2


@pytest.mark.parametrize("victims", [("source",), pytest.param(("destination",), marks=pytest.mark.full)], ids="+".join)
def test_cancel_at_every_edge(victims: tuple[str, ...]) -> None:
    """L10, F10: before, in and after each call of the throttle."""
    report = sweep(scenario(), CancelSweep(victims=victims), every=3, size=SAMPLE)
    assert ("returned", "returned", "destination") in report.outcomes


def test_cut_at_every_byte() -> None:
    """L9, L10."""
    sweep(scenario(), FaultSweep(kinds=("eof", "reset", "blackhole")), every=997, size=SAMPLE, seeds=SEED)


@pytest.mark.parametrize(
    "error",
    [OSError, pytest.param(trimig.GuestFailed, marks=pytest.mark.full), None],
    ids=["OSError", "GuestFailed", "hang"],
)
def test_each_call_of_the_source_fails(error: type[Exception] | None) -> None:
    """T5, L10: the throttle itself, and each other call while it is in force."""
    sweep(
        scenario(),
        CallSweep(errors=(error,), only=lambda name: name.startswith("source")),
        every=2,
        size=SAMPLE,
        seeds=SEED,
    )


@pytest.mark.full
def test_deadlines_around_every_event() -> None:
    """T3, L10."""
    sweep(scenario(), DeadlineSweep(), every=5)
