"""A migration with three data channels into a destination, disturbed on one connection, and what must hold after it."""

from __future__ import annotations

import contextlib
import functools

import trio

import trimig
from tests.engine import multifd_source as played
from tests.sweeps.migration import KEEPALIVE
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.monitor.core import MonitorCore
from trimig.status import TERMINAL, Status
from trimig.testing import Scenario, SweepContext, VirtualLink

Outcome = tuple[str, str]

#: The first byte of each page when everything has come.
EXPECTED = [6, 2, 2, 0, 1, 7, 3, 0, 0, 0, 0, 7]


def make_config(*, compression: str) -> trimig.Config:
    """Limits that virtual time makes short."""
    return played.config(multifd_compression=compression, stall_timeout=4.0)


def script(*, new: bool, compression: str) -> tuple[bytes, list[bytes]]:
    """What the main connection and the data channels say: two passes, with pages that come again on another channel."""
    one, two, three = (played.Packets(number, new=new, compression=compression) for number in range(3))
    data = [
        one.hello + one.sync + one.pages(5, 4, fill=1) + one.sync + one.pages(0, fill=6) + 2 * one.sync,
        two.hello + two.sync + two.pages(1, 2, fill=2) + two.sync + two.pages(5, 11, fill=7) + 2 * two.sync,
        three.hello + three.sync + three.pages(6, fill=3, zero=(7, 8) if new else ()) + 3 * three.sync,
    ]
    first = played.zeros(3, 9, 10) if new else played.zeros(3, 7, 8, 9, 10)
    stream = played.HEAD + played.start(new=new) + played.part(first, new=new) + played.part(new=new)
    return stream + played.end(new=new), data


def said(*, under: int, new: bool = True, compression: str = "none") -> bytes:
    """What the connection *under* says; see :func:`receive_once`."""
    stream, data = script(new=new, compression=compression)
    return [stream, *data][under]


class Meeting:
    """The entrance at which the destination meets its connections."""

    def __init__(self) -> None:
        self._offers, self._taken = trio.open_memory_channel[AnyStream](10)
        self._closed = False

    async def open(self, _: str | None) -> Meeting:
        """This one. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()
        return self

    async def meet(self) -> AnyStream:
        """The next connection. **Cancellation:** none was taken."""
        return await self._taken.receive()

    async def admit(self, stream: AnyStream) -> AnyStream:
        """*stream*. **Cancellation:** it is closed."""
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    def close(self) -> None:
        """Nothing."""

    async def offer(self, stream: AnyStream) -> None:
        """A further connection. **Cancellation:** it is closed or may be met."""
        if self._closed:
            await trio.aclose_forcefully(stream)
        else:
            self._offers.send_nowait(stream)

    async def turn_away(self) -> None:
        """Close the connections that were not met, as a kernel does. **Cancellation:** they are closed nevertheless."""
        self._closed = True
        while True:
            try:
                await trio.aclose_forcefully(self._taken.receive_nowait())
            except trio.WouldBlock:
                return


class Source:
    """The source of one attempt: it says its bytes on all connections, and hears the main one to its end.

    A destination that has taken none of its connections for the main one goes on waiting for a source. So it is cancelled.
    """

    def __init__(self, monitor: MonitorCore, links: list[VirtualLink], stream: bytes, data: list[bytes]) -> None:
        self._monitor = monitor
        self._links = links
        self._said = [stream, *data]
        self.meeting = Meeting()

    async def _say(self, link: VirtualLink, data: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await link.a.send_all(data)

    async def run(self) -> None:
        """Play it. **Cancellation:** its connections are closed."""
        try:
            async with trio.open_nursery() as nursery:
                for link, data in zip(self._links, self._said, strict=True):
                    await self.meeting.offer(link.b)
                    nursery.start_soon(self._say, link, data)
                await played.Peer(self._links[0].a).hear()
                nursery.cancel_scope.cancel("the destination has closed the main connection")
            await trio.sleep(1)
            if self._monitor.status in (Status.NONE, Status.SETUP):
                self._monitor.cancel("its source is gone")
        finally:
            for link in self._links:
                await trio.aclose_forcefully(link.a)


async def receive_once(ctx: SweepContext, *, under: int, new: bool = True, compression: str = "none") -> Outcome:
    """Receive under any injection of the context, check the rules, and receive again undisturbed.

    Args:
        under: the connection on which the injected faults are: 0 for the main one, or a data channel by its number + 1.
    """
    target = played.guest()
    monitor = MonitorCore()
    config = make_config(compression=compression)
    links = [ctx.link if number == under else ctx.new_link() for number in range(4)]
    source = Source(monitor, links, *script(new=new, compression=compression))
    living = trio.lowlevel.current_statistics().tasks_living

    async def receive(source: Source) -> object:
        ways = Connections(first=source.meeting.meet, entrance=source.meeting.open)
        try:
            return await receive_stream(target, ways, config, monitor)
        finally:
            with trio.CancelScope(shield=True):
                await source.meeting.turn_away()

    ends = await ctx.run(source=source.run, destination=lambda: receive(source))
    assert trio.lowlevel.current_statistics().tasks_living == living
    assert all(link.closed for link in links)
    assert not target.claimed
    assert monitor.status in TERMINAL or monitor.status is Status.NONE
    end = ends["destination"]
    if end.kind == "returned":
        assert monitor.status is Status.COMPLETED
        assert [int(page[0]) for page in target.ram[0].pages] == EXPECTED
        assert target.executed
    else:
        assert not target.executed
        assert monitor.owner is trimig.Ownership.SOURCE
        assert not isinstance(end.error, trimig.InternalError | trimig.StateError), f"{end.error!r}"
        again = Source(monitor, [ctx.new_link() for _ in range(4)], *script(new=new, compression=compression))
        second = await ctx.run_undisturbed(source=again.run, destination=lambda: receive(again))
        assert str(second["destination"]) == "returned", f"the second attempt: {second}"
        assert [int(page[0]) for page in target.ram[0].pages] == EXPECTED
    return str(ends["source"]), str(end)


def scenario(**options: object) -> Scenario[Outcome]:
    """The scenario over links with some latency, a small window and pieces of random size."""
    return Scenario(
        body=functools.partial(receive_once, **options),  # type: ignore[arg-type]  # passed through as they are
        link=functools.partial(VirtualLink, window=8192, latency=0.001, chunk=(1, 4096), keepalive=KEEPALIVE),
        exit_within=4.0,
        limit=600.0,
    )
