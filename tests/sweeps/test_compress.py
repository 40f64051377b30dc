"""Compression, and the choice between it and XBZRLE, disturbed at every point. The virtual clock stands for the threads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio

import trimig
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
from tests.sweeps.sampled import sweep
from trimig.engine.ram import compress, inflate, xbzrle
from trimig.engine.ram.effort import Effort
from trimig.testing import (
    CallSweep,
    CancelSweep,
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

PAGES = 12
#: Virtual seconds of a piece in a thread.
SECONDS = 0.01
DONE = ("returned", "returned", "destination")


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Stands for a thread: once begun it cannot be cancelled."""
    await trio.lowlevel.checkpoint()
    with trio.CancelScope(shield=True):
        await trio.sleep(SECONDS)
    return function(*arguments)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages are a piece, so that a few pages need several threads."""
    for module in (compress, xbzrle):
        monkeypatch.setattr(module, "timed", timed)
    for module in (compress, inflate):
        monkeypatch.setattr(module, "offload", in_thread)
        monkeypatch.setattr(module, "INLINE_PAGES", 1)
    monkeypatch.setattr(compress, "PIECE_PAGES", 2)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Effort]:
    """Each call takes the same time: the processor's clock would make each run another one."""
    return function(*arguments), Effort(1e-3, 1e-3)


async def migrate_compressed(ctx: SweepContext, *, wait: bool = True, auto: bool = False) -> Outcome:
    """Migrate a guest with pages of text, under any injection of the context, and check the rules.

    Args:
        auto: choose the encoding of each batch.
    """
    source = ScriptedGuest(
        blocks={"ram": PAGES}, content="zero", seed=ctx.seed, dirty_per_sync=2,
        devices=[FakeDevice("clock", size=8, seed=ctx.seed)],
    )  # fmt: skip
    source.ram[0].pages[: PAGES - 2] = np.resize(np.frombuffer(b"some text\n", np.uint8), 4096)
    target = ScriptedGuest(
        blocks={"ram": PAGES}, seed=ctx.seed + 99, devices=[FakeDevice("clock", size=8)], run_state="inmigrate"
    )
    referee, life = OwnerReferee(source=source, destination=target), Life(source)
    sender, taker = Watched(ctx.link), trimig.Monitor()
    answering = ProbedStream(FailingStream(ctx.link.b, ctx.calls, label="b"), ctx.calls)
    parameters = trimig.Parameters(max_bandwidth=0, compress_threads=3, compress_wait_thread=wait)
    able = trimig.Capabilities(compress=True, xbzrle=auto)
    config = dataclasses.replace(make_config(), capabilities=able, parameters=parameters)
    if auto:  # three passes, so that there are differences
        parameters = parameters.replace(downtime_limit=1)
        config = dataclasses.replace(
            config, parameters=parameters, encoding="auto", max_iterations=3, on_bound="switchover"
        )

    async def send() -> trimig.Summary:
        stream = FailingStream(ctx.link.a, ctx.calls, label="a")
        return await trimig.migrate(FailingGuest(source, ctx.calls, label="source"), stream, config, monitor=sender)

    async def take() -> trimig.Summary:
        guest = FailingGuest(target, ctx.calls, label="destination")
        return await trimig.receive(guest, answering, make_config(), monitor=taker)

    ends = await ctx.run(source=send, destination=take)
    assert ctx.link.closed
    referee.check()
    judge_ends(ends, {"source": sender, "destination": taker}, source, target)
    judge_owner(ends, sender, source, target, life, confirmed=True)
    outcome = (str(ends["source"]), str(ends["destination"]), "+".join(referee.running()) or "none runs")
    if auto and outcome == DONE:
        assert {name for name, use in sender.counters.encodings.items() if use.pages} == {"plain", "compress", "xbzrle"}
    if isinstance(ends["source"].error, trimig.HandoverUncertain):
        await settle(ends["source"].error, source, target)
    return outcome


def scenario(*, wait: bool = True, auto: bool = False) -> Scenario[Outcome]:
    """The scenario over a link with some latency, a small window and pieces of random size."""
    return Scenario(
        body=functools.partial(migrate_compressed, wait=wait, auto=auto),
        link=functools.partial(VirtualLink, window=1024, latency=0.001, chunk=(1, 700), keepalive=KEEPALIVE),
        exit_within=HANDOVER_TIMEOUT + TEARDOWN_GRACE + SECONDS + 1e-6,
        limit=600.0,
    )


@pytest.mark.parametrize(
    "victims",
    [("source",), ("destination",), pytest.param(("source", "destination"), marks=pytest.mark.full)],
    ids="+".join,
)
def test_cancel_at_every_edge(victims: tuple[str, ...]) -> None:
    """F10, L14: before, while and after a thread works."""
    report = sweep(scenario(), CancelSweep(victims=victims), every=3, size=12)
    assert DONE in report.outcomes


@pytest.mark.full
def test_cancel_where_pages_do_not_wait() -> None:
    sweep(scenario(wait=False), CancelSweep(), CancelSweep(victims=("destination",)), every=3)


def test_cut_at_every_byte() -> None:
    """L9, T1."""
    report = sweep(scenario(), FaultSweep(kinds=("eof", "reset", "blackhole")), every=7, size=12)
    assert ("TransportFailed", "TransportFailed", "source") in report.outcomes


@pytest.mark.parametrize("error", [OSError, pytest.param(None, marks=pytest.mark.full)], ids=["OSError", "hang"])
def test_each_call_fails(error: type[Exception] | None) -> None:
    """T5."""
    sweep(scenario(), CallSweep(errors=(error,)), size=12)


@pytest.mark.parametrize(
    "victims", [("source",), pytest.param(("source", "destination"), marks=pytest.mark.full)], ids="+".join
)
def test_cancel_at_every_edge_where_the_encoding_is_chosen(victims: tuple[str, ...]) -> None:
    report = sweep(scenario(auto=True), CancelSweep(victims=victims), every=9, size=12)
    assert DONE in report.outcomes


def test_cut_at_every_byte_where_the_encoding_is_chosen() -> None:
    report = sweep(scenario(auto=True), FaultSweep(kinds=("eof", "reset", "blackhole")), every=28, size=12)
    assert ("TransportFailed", "TransportFailed", "source") in report.outcomes
