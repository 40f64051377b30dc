"""Two sides over a virtual link, and a source or a destination that is played by the test, byte for byte."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import trio

import trimig
from trimig.engine.source.announce import PING_OPENED
from trimig.engine.source.switchover import PING_PREPARE
from trimig.testing import FakeDevice, OwnerReferee, ScriptedGuest, VirtualLink
from trimig.wire import encoder as wire
from trimig.wire.return_path import Message, Pong, Shut, encode

Hook = Callable[[], Awaitable[Any]]
PREPARED = encode(Pong(value=PING_PREPARE))
ACCEPTED, REFUSED = encode(Shut(status=0)), encode(Shut(status=1))


def config(**options: Any) -> trimig.Config:
    """No bandwidth limit unless one is given; parameters and capabilities by name, beside the options."""
    capabilities = {name: options.pop(name) for name in ("return_path",) if name in options}
    parameters = {name: options.pop(name) for name in ("max_bandwidth", "downtime_limit") if name in options}
    parameters.setdefault("max_bandwidth", 0)
    return trimig.Config(
        capabilities=trimig.Capabilities(**capabilities), parameters=trimig.Parameters(**parameters), **options
    )


def running(*, pages: int = 4, **options: Any) -> ScriptedGuest:
    """A source's guest with one device."""
    options.setdefault("devices", [FakeDevice("clock", size=8, seed=1)])
    return ScriptedGuest(blocks={"ram": pages}, **options)


def waiting(*, pages: int = 4, **options: Any) -> ScriptedGuest:
    """What it is to become."""
    options.setdefault("devices", [FakeDevice("clock", size=8)])
    return ScriptedGuest(blocks={"ram": pages}, content="random", seed=99, run_state="inmigrate", **options)


class Pair:
    """Both sides of one migration."""

    def __init__(
        self,
        source: ScriptedGuest | None = None,
        target: ScriptedGuest | None = None,
        *,
        link: VirtualLink | None = None,
        config_here: trimig.Config | None = None,
        config_there: trimig.Config | None = None,
    ) -> None:
        self.source = source or running()
        self.target = target or waiting(pages=len(self.source.ram[0].pages))
        self.referee = OwnerReferee(source=self.source, destination=self.target)
        self.link = link or VirtualLink(latency=0.001, record=True)
        self.config_here = config_here or config()
        self.config_there = config_there or self.config_here
        self.here, self.there = trimig.Monitor(), trimig.Monitor()

    async def migrate(self, *, commit: Hook | None = None, fence: Hook | None = None) -> trimig.Summary:
        """The source."""
        return await trimig.migrate(
            self.source, self.link.a, self.config_here, monitor=self.here, commit=commit, fence=fence
        )

    async def receive(self) -> trimig.Summary:
        """The destination."""
        return await trimig.receive(self.target, self.link.b, self.config_there, monitor=self.there)

    async def both(self, **hooks: Hook | None) -> tuple[Any, Any]:
        """The summary or the error of each side."""
        ends: dict[str, Any] = {}

        async def one(name: str, side: Awaitable[trimig.Summary]) -> None:
            try:
                ends[name] = await side
            except trimig.TrimigError as error:
                ends[name] = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "there", self.receive())
            await one("here", self.migrate(**hooks))
        self.referee.check()
        assert self.link.closed
        assert not self.source.claimed
        assert not self.target.claimed
        assert not self.source.tracking
        return ends["here"], ends["there"]


class Destination:
    """The other end of a source under test; says what the test wants it to."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.read = bytearray()

    async def until(self, what: bytes) -> None:
        """Read until *what* has come."""
        while what not in self.read:
            data = await self.stream.receive_some(4096)
            assert data, f"the source closed before it sent {what!r}"
            self.read += data

    async def until_closed(self) -> None:
        """Read to the end."""
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await self.stream.receive_some(4096):
                self.read += data

    async def say(self, *messages: Message | bytes) -> None:
        """Send messages of the return path."""
        await self.stream.send_all(b"".join(m if isinstance(m, bytes) else encode(m) for m in messages))

    async def prepare(self) -> None:
        """Read up to the PING of the prepare step, and answer it; the first PING is answered before anything else."""
        await self.until(wire.ping(PING_OPENED))
        await self.say(Pong(value=PING_OPENED))
        await self.until(wire.ping(PING_PREPARE))
        await self.say(PREPARED)


@contextlib.asynccontextmanager
async def played(pair: Pair, script: Callable[[Destination], Awaitable[None]]) -> AsyncIterator[None]:
    """The destination is played by *script* while the block runs the source."""
    async with trio.open_nursery() as nursery:

        async def play() -> None:
            await script(Destination(pair.link.b))
            await pair.link.b.aclose()

        nursery.start_soon(play)
        yield


async def told(monitor: trimig.Monitor, into: list[tuple[str, Any]], *, leave_out: Sequence[str] = ()) -> None:
    """Collect (event, what it says) until the attempt has ended."""
    async for event in monitor.events():
        if event.name not in leave_out:
            into.append((event.name, event.data.get("status", event.data.get("pass", event.data.get("iteration")))))
