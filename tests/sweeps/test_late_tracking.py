"""Pages are protected just before they are sent, and the source is cancelled, or the link cut, at every point of that."""

from __future__ import annotations

import dataclasses
import functools

import pytest

import trimig
from tests.engine.test_late_tracking import PAGES, LateGuest
from tests.sweeps.migration import (
    HANDOVER_TIMEOUT,
    KEEPALIVE,
    TEARDOWN_GRACE,
    Life,
    Outcome,
    Watched,
    judge_ends,
    judge_owner,
    make_config,
    settle,
)
from tests.sweeps.sampled import sweep
from trimig.testing import (
    CancelSweep,
    FakeDevice,
    FaultSweep,
    OwnerReferee,
    Scenario,
    ScriptedGuest,
    SweepContext,
    VirtualLink,
)

pytestmark = pytest.mark.timeout(600)


async def migrate_late(ctx: SweepContext) -> Outcome:
    """Migrate a guest that writes around each step of the protection, and check the rules."""
    source = LateGuest(ctx.seed, holes=True)
    target = ScriptedGuest(
        blocks={"ram": PAGES}, seed=ctx.seed + 99, devices=[FakeDevice("clock", size=8)], run_state="inmigrate"
    )
    referee, life = OwnerReferee(source=source, destination=target), Life(source)
    sender, taker = Watched(ctx.link), trimig.Monitor()
    parameters = trimig.Parameters(max_bandwidth=1_000_000, downtime_limit=60)
    config = dataclasses.replace(make_config(), parameters=parameters)

    async def send() -> trimig.Summary:
        return await trimig.migrate(source, ctx.link.a, config, monitor=sender)

    async def take() -> trimig.Summary:
        return await trimig.receive(target, ctx.link.b, make_config(), monitor=taker)

    ends = await ctx.run(source=send, destination=take)
    assert ctx.link.closed
    assert not source.tracking
    referee.check()
    judge_ends(ends, {"source": sender, "destination": taker}, source, target)
    judge_owner(ends, sender, source, target, life, confirmed=True)
    outcome = (str(ends["source"]), str(ends["destination"]), "+".join(referee.running()) or "none runs")
    if isinstance(ends["source"].error, trimig.HandoverUncertain):
        await settle(ends["source"].error, source, target)
    return outcome


def scenario() -> Scenario[Outcome]:
    """Over a link with some latency."""
    return Scenario(
        body=migrate_late,
        link=functools.partial(VirtualLink, latency=0.001, keepalive=KEEPALIVE),
        exit_within=HANDOVER_TIMEOUT + TEARDOWN_GRACE + 1e-6,
        limit=600.0,
    )


def test_cancel_at_every_edge() -> None:
    """F10, L14."""
    report = sweep(scenario(), CancelSweep(victims=("source",)), every=3, size=12)
    assert ("returned", "returned", "destination") in report.outcomes


def test_cut_at_every_byte() -> None:
    """L9, T1."""
    report = sweep(scenario(), FaultSweep(kinds=("eof", "reset")), every=997, size=12)
    assert ("TransportFailed", "TransportFailed", "source") in report.outcomes
