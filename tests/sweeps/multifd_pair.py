"""One small migration with three data channels, disturbed on one of its four connections, and the rules that hold after it."""

from __future__ import annotations

import dataclasses
import functools

import trio

import trimig
from tests.sweeps.migration import (
    HANDOVER_TIMEOUT,
    KEEPALIVE,
    TEARDOWN_GRACE,
    Life,
    Outcome,
    judge_ends,
    judge_owner,
    make_config,
    make_guests,
    settle,
)
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.config.peer import PEERS
from trimig.engine.destination import receive_stream
from trimig.engine.source import migrate_stream
from trimig.errors import TransportFailed
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.testing import OwnerReferee, Scenario, ScriptedGuest, SweepContext, VirtualLink

CHANNELS = 3


class Street:
    """The way between both sides: an address at which several connections come in.

    Args:
        disturbed: the number of the connection that is the link under test; 0 is the main one.
        taker: the destination's; it waits for another source if it has seen only data channels of this one.
    """

    def __init__(self, ctx: SweepContext, disturbed: int | None, taker: MonitorCore) -> None:
        self._ctx = ctx
        self._taker = taker
        self._disturbed = disturbed
        self._send, self._taken = trio.open_memory_channel[AnyStream](100)
        self.links: list[VirtualLink] = []

    def outgoing(self) -> Connections:
        """For the source."""
        return Connections(first=self._connect, beside=self._connect)

    def incoming(self) -> Connections:
        """For the destination."""
        return Connections(first=self.meet, entrance=self._open)

    async def _connect(self) -> AnyStream:
        await trio.lowlevel.checkpoint()
        link = self._ctx.link if len(self.links) == self._disturbed else self._ctx.new_link()
        self.links.append(link)
        self._send.send_nowait(link.b)
        return link.a

    async def _open(self, _uri: str | None) -> Street:
        await trio.lowlevel.checkpoint()
        return self

    async def meet(self) -> AnyStream:
        """The next connection. **Cancellation:** nothing was accepted."""
        try:
            return await self._taken.receive()
        except trio.EndOfChannel:
            await trio.sleep(KEEPALIVE)
            if self._taker.status is Status.SETUP:
                self._taker.cancel("the operator sees that no source comes")
            raise TransportFailed("the source has ended") from None

    def end(self) -> None:
        """No connection comes any more: the source has ended, and a destination would wait for another one."""
        self._send.close()

    async def admit(self, stream: AnyStream) -> AnyStream:
        """No handshake. **Cancellation:** not possible."""
        return stream

    def close(self) -> None:
        """Nothing more is accepted: what waits is closed, as the kernel does."""
        while True:
            try:
                stream = self._taken.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                return
            for link in self.links:
                if link.b is stream:
                    link.b.close()


def config(profile: str, compression: str) -> trimig.Config:
    """With three data channels."""
    base = make_config(description=False)
    return dataclasses.replace(
        base,
        capabilities=dataclasses.replace(base.capabilities, multifd=True),
        parameters=base.parameters.replace(multifd_channels=CHANNELS, multifd_compression=compression),
        peer=dataclasses.replace(PEERS[profile], suppress_vmdesc=True),
    )


async def migrate_once(
    ctx: SweepContext, *, disturbed: int = 0, profile: str = "qemu-7.2", compression: str = "none", pages: int = 2
) -> Outcome:
    """Migrate under any injection of the context, check the rules, settle the owner, and migrate again undisturbed.

    There are few pages, so that a destination that has no main connection still sees the end of each data channel.
    """
    source, target = make_guests(ctx.seed, pages=pages, content="random", dirty=1, run_state="running")
    referee, life = OwnerReferee(source=source, destination=target), Life(source)
    sender, taker = MonitorCore(), MonitorCore()
    settings, street = config(profile, compression), Street(ctx, disturbed, taker)
    living = trio.lowlevel.current_statistics().tasks_living

    async def send() -> trimig.Summary:
        try:
            return await migrate_stream(source, street.outgoing(), settings, sender)
        finally:
            street.end()

    ends = await ctx.run(
        source=send,
        destination=lambda: receive_stream(target, street.incoming(), settings, taker),
    )
    street.close()
    if len(street.links) <= disturbed:
        await ctx.link.a.aclose()
        await ctx.link.b.aclose()
    assert trio.lowlevel.current_statistics().tasks_living == living
    assert all(link.closed for link in street.links), "a connection was left open"
    referee.check()
    judge_ends(ends, {"source": sender, "destination": taker}, source, target)  # type: ignore[dict-item]  # as a Monitor
    judge_owner(ends, sender, source, target, life, confirmed=True)  # type: ignore[arg-type]  # as a Monitor
    if isinstance(ends["source"].error, trimig.HandoverUncertain):
        await settle(ends["source"].error, source, target)
        assert sender.status is (Status.COMPLETED if target.executed else Status.FAILED)
    outcome = (str(ends["source"]), str(ends["destination"]), "+".join(referee.running()) or "none runs")
    if sender.owner is trimig.Ownership.SOURCE:
        await again(ctx, settings, sender, taker, source, target)
        referee.check()
    return outcome


async def again(
    ctx: SweepContext,
    settings: trimig.Config,
    sender: MonitorCore,
    taker: MonitorCore,
    source: ScriptedGuest,
    target: ScriptedGuest,
) -> None:
    """After an attempt that has failed or was cancelled, the next one succeeds with the same guests and monitors."""
    street = Street(ctx, None, taker)
    ends = await ctx.run_undisturbed(
        source=lambda: migrate_stream(source, street.outgoing(), settings, sender),
        destination=lambda: receive_stream(target, street.incoming(), settings, taker),
    )
    assert [str(end) for end in ends.values()] == ["returned", "returned"], f"the second attempt: {ends}"
    assert target.digest() == source.digest()


def scenario(**options: object) -> Scenario[Outcome]:
    """The scenario over links with some latency, small windows and pieces of random size."""
    return Scenario(
        body=functools.partial(migrate_once, **options),  # type: ignore[arg-type]  # passed through as they are
        link=functools.partial(VirtualLink, window=8192, latency=0.001, chunk=(1, 4096), keepalive=KEEPALIVE),
        exit_within=HANDOVER_TIMEOUT + TEARDOWN_GRACE + 1e-6,
        limit=600.0,
    )
