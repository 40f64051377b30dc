"""One postcopy migration over a virtual link, recovered over others, and every rule that must hold after it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable
from typing import Literal

import trio

import trimig
from tests.sweeps.migration import KEEPALIVE, ProbedStream, Watched, politely
from trimig.channel import closing
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.engine.source import migrate_stream
from trimig.errors import TransportFailed
from trimig.monitor.monitor import core_of
from trimig.status import TERMINAL, Status
from trimig.testing import (
    FailingGuest,
    FailingLazyGuest,
    FailingStream,
    FakeDevice,
    Fault,
    LazyScriptedGuest,
    OwnerReferee,
    Scenario,
    ScriptedGuest,
    SweepContext,
    VirtualLink,
)

HANDOVER_TIMEOUT = 2.0
TEARDOWN_GRACE = 1.0
STALL_TIMEOUT = 4.0
#: Virtual seconds for which both sides try to reconnect.
RECOVERY = 30.0

Outcome = tuple[str, str, str]


def make_config(*, recovery: bool = True, background: int = 0, preempt: bool = False) -> trimig.Config:
    """Postcopy, at a bandwidth at which the rest never fits the downtime limit."""
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True, postcopy_preempt=preempt),
        parameters=trimig.Parameters(max_bandwidth=0, downtime_limit=1, max_postcopy_bandwidth=background),
        peer=dataclasses.replace(trimig.PeerProfile(), suppress_vmdesc=True),
        handover_timeout=HANDOVER_TIMEOUT,
        teardown_grace=TEARDOWN_GRACE,
        stall_timeout=STALL_TIMEOUT,
        recovery_retry=recovery,
        recovery_timeout=RECOVERY if recovery else 1.0,
    )


class Meeting:
    """The meeting point of two sides whose link broke.

    Args:
        faults: of the links that are made here, one after the other; later links have none.
    """

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._free: list[tuple[trio.Event, list[AnyStream]]] = []
        self.links: list[VirtualLink] = []

    async def accept(self, _: str | None) -> AnyStream:
        """Wait until the source comes."""
        place: tuple[trio.Event, list[AnyStream]] = (trio.Event(), [])
        self._free.append(place)
        try:
            await place[0].wait()
        except trio.Cancelled:
            if place in self._free:
                self._free.remove(place)
            for stream in place[1]:
                await closing.close(stream)
            raise
        return place[1][0]

    async def connect(self, _: str | None) -> AnyStream:
        """Refused unless the destination waits."""
        await trio.lowlevel.checkpoint()
        if not self._free:
            raise TransportFailed("no destination waits there")
        event, streams = self._free.pop(0)
        link = VirtualLink(seed=7, window=8192, latency=0.001, rate=1e6)
        if self._faults:
            link.add_fault(self._faults.pop(0))
        self.links.append(link)
        streams.append(link.b)
        event.set()
        return link.a


class Backlog:
    """Second connections, which the source makes and the destination accepts or not.

    Args:
        faults: of the links that are made here, one after the other; later links have none.
    """

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._waiting: list[AnyStream] = []
        self._news = trio.Event()
        self.links: list[VirtualLink] = []

    async def connect(self) -> AnyStream:
        """One more connection, accepted later or never."""
        await trio.lowlevel.checkpoint()
        link = VirtualLink(seed=11, window=8192, latency=0.001, rate=1e6)
        if self._faults:
            link.add_fault(self._faults.pop(0))
        self.links.append(link)
        self._waiting.append(link.b)
        self._news.set()
        return link.a

    async def accept(self) -> AnyStream:
        """The oldest."""
        while not self._waiting:
            self._news = trio.Event()
            await self._news.wait()
        return self._waiting.pop(0)

    async def close(self) -> None:
        """Stop listening: connections that were not accepted are closed."""
        while self._waiting:
            await closing.close(self._waiting.pop())


async def postcopy_once(
    ctx: SweepContext,
    *,
    pages: int = 4,
    content: Literal["zero", "random", "mixed"] = "zero",
    polite: bool = False,
    recovery: bool = True,
    again: tuple[Fault, ...] = (),
    run_state: str = "running",
    preempt: bool = False,
    beside: tuple[Fault, ...] = (),
    background: int = 0,
    seen: Callable[[Backlog], None] = lambda _: None,
) -> Outcome:
    """Migrate by postcopy under any injection of the context, and check the rules."""
    source = ScriptedGuest(
        blocks={"ram": pages}, content=content, seed=ctx.seed, run_state=run_state,
        devices=[FakeDevice("clock", size=8, seed=ctx.seed)],
    )  # fmt: skip
    target = LazyScriptedGuest(
        blocks={"ram": pages}, content="random", seed=ctx.seed + 99, run_state="inmigrate",
        devices=[FakeDevice("clock", size=8)], touches=[pages - 1, 0, 2],
    )  # fmt: skip
    first = source.digest()
    referee = OwnerReferee(source=source, destination=target)
    config = make_config(recovery=recovery, preempt=preempt, background=background)
    meeting, backlog = Meeting(list(again)), Backlog(list(beside))
    sender, taker = Watched(ctx.link), trimig.Monitor()
    living = trio.lowlevel.current_statistics().tasks_living

    def soon(event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == "setup":
            sender.start_postcopy()

    sender.add_listener(soon)

    async def send() -> trimig.Summary:
        stream = FailingStream(ctx.link.a, ctx.calls, label="a")
        try:
            ways = Connections(first=given(stream), again=meeting.connect, beside=backlog.connect)
            return await migrate_stream(FailingGuest(source, ctx.calls, label="source"), ways, config, core_of(sender))
        finally:
            await closing.close(stream)

    async def accept_again(uri: str | None) -> AnyStream:
        await backlog.close()
        return await meeting.accept(uri)

    async def take() -> trimig.Summary:
        stream = ProbedStream(FailingStream(ctx.link.b, ctx.calls, label="b"), ctx.calls)
        try:
            ways = Connections(first=given(stream), again=accept_again, beside=backlog.accept)
            return await receive_stream(
                FailingLazyGuest(target, ctx.calls, label="destination"), ways, config, core_of(taker)
            )
        finally:
            await closing.close(stream)
            await backlog.close()

    if polite:
        ends = await ctx.run(
            source=functools.partial(politely, sender, send), destination=functools.partial(politely, taker, take)
        )
    else:
        ends = await ctx.run(source=send, destination=take)
    assert trio.lowlevel.current_statistics().tasks_living == living
    assert ctx.link.closed
    await backlog.close()
    seen(backlog)
    assert all(link.closed for link in meeting.links + backlog.links), "a later link was left open"
    referee.check()
    here, there = ends["source"], ends["destination"]
    assert not target.misuse, target.misuse
    assert not target.overwritten, f"placed twice: {target.overwritten}"
    assert target.memory is None, "its memory was left open"
    for guest, monitor, end in ((source, sender, here), (target, taker, there)):
        assert not guest.claimed
        assert not guest.tracking
        assert monitor.status in TERMINAL or monitor.status is Status.NONE, monitor.status
        if end.error is not None:
            assert not isinstance(end.error, trimig.InternalError | trimig.StateError), repr(end.error)
    if there.kind == "returned":
        assert taker.status is Status.COMPLETED
        assert target.digest() == source.digest() == first, "it arrived other than it was"
        assert target.run_state == run_state
        assert not target.touches, "the guest still waits"
    if here.kind == "returned":
        assert there.kind == "returned", f"the source says that it is done, the destination says {there}"
    if isinstance(here.error, trimig.HandoverUncertain):
        assert sender.owner is trimig.Ownership.UNKNOWN
        assert not source.running
        arrived = taker.owner is trimig.Ownership.DESTINATION
        await here.error.settle(trimig.Ownership.DESTINATION if arrived else trimig.Ownership.SOURCE)
        assert source.running is (not arrived and run_state == "running")
    elif sender.owner is trimig.Ownership.SOURCE:
        assert not target.executed, f"{here}, and yet the destination has had it"
        assert taker.owner is trimig.Ownership.SOURCE
        assert source.run_state == run_state
    else:
        assert taker.owner is trimig.Ownership.DESTINATION, f"{here}, {there}: no side has it"
        assert not source.running
    if taker.status is Status.POSTCOPY_LOST:
        assert not target.running
        if there.error is not None:
            assert isinstance(there.error, trimig.PostcopyLost), repr(there.error)
            gone = sum(int(block.gone.sum()) for block in target.ram)
            assert gone == sum(end - begin for runs in there.error.missing.values() for begin, end in runs)
    return str(here), str(there), "+".join(referee.running()) or "none runs"


def given(stream: AnyStream) -> Callable[[], Awaitable[AnyStream]]:
    """An opener of the link."""

    async def opener() -> AnyStream:
        await trio.lowlevel.checkpoint()
        return stream

    return opener


def scenario(**options: object) -> Scenario[Outcome]:
    """The scenario over a link with some latency, a small window and pieces of random size."""
    return Scenario(
        body=functools.partial(postcopy_once, **options),  # type: ignore[arg-type]  # passed through as they are
        link=functools.partial(VirtualLink, window=8192, latency=0.001, chunk=(1, 4096), rate=1e6, keepalive=KEEPALIVE),
        limit=600.0,
    )
