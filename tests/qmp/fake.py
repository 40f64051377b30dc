"""A dispatcher with commands for tests, and a client that sends given bytes."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from trimig.qmp import CommandFailed, Session, serve
from trimig.qmp.messages import Malformed, MessageReader

#: Seconds for a whole test; it takes far less, and nothing is asserted about it.
LIMIT: Final = 30
VERSION: Final = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "fake"}
NEGOTIATE: Final = b'{"execute":"qmp_capabilities"}\n'


class Bug(Exception):
    """An error that no dispatcher should raise."""


class Fake:
    """Implements :class:`trimig.qmp.Dispatcher`.

    Attributes:
        executed: name and arguments of each command, in order.
        fds: descriptors that were taken; closed by :meth:`close`.
        subscribers: the receivers of events.
        hold: ``wait`` ends when it is set.
        waiting: ``wait`` has begun.
        ended: set when ``quit`` has been answered.
        on_quit: called then.
    """

    commands: Sequence[str] = ("bug", "echo", "fail", "getfd", "quit", "query-status", "query-version", "stop", "wait")
    version: Mapping[str, Any] = VERSION

    def __init__(self) -> None:
        self.executed: list[tuple[str, Mapping[str, Any]]] = []
        self.fds: list[int] = []
        self.subscribers: list[Callable[[Mapping[str, Any]], None]] = []
        self.hold = trio.Event()
        self.waiting = trio.Event()
        self.ended = trio.Event()
        self.on_quit: Callable[[], None] = self.ended.set

    async def execute(self, name: str, arguments: Mapping[str, Any], session: Session) -> Any:
        await trio.lowlevel.checkpoint()
        self.executed.append((name, arguments))
        match name:
            case "echo":
                return dict(arguments)
            case "fail":
                raise CommandFailed("it is refused", error_class="DeviceNotFound")
            case "getfd":
                if (fd := session.take_fd()) is None:
                    raise CommandFailed("No file descriptor supplied via SCM_RIGHTS")
                self.fds.append(fd)
            case "quit":
                session.when_answered(self.on_quit)
            case "query-status":
                return {"status": "running", "singlestep": False, "running": True}
            case "query-version":
                return VERSION
            case "stop":
                self.tell("STOP")
            case "wait":
                self.waiting.set()
                await self.hold.wait()
            case "bug":
                raise Bug("of the dispatcher")
            case _:
                raise CommandFailed(f"The command {name} has not been found", error_class="CommandNotFound")
        return {}

    def subscribe(self, listener: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
        self.subscribers.append(listener)
        return lambda: self.subscribers.remove(listener)

    def tell(self, name: str, **data: Any) -> None:
        """Send an event to all subscribers."""
        event: dict[str, Any] = {"event": name, "timestamp": {"seconds": 1, "microseconds": 2}}
        if data:
            event["data"] = data
        for listener in tuple(self.subscribers):
            listener(event)

    def close(self) -> None:
        """Close the descriptors that were taken."""
        while self.fds:
            os.close(self.fds.pop())


class Raw:
    """A client that sends any bytes, right or wrong."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._reader = MessageReader()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def send_with(self, data: bytes, fds: Sequence[int]) -> None:
        """Send with descriptors beside the first byte."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
        assert await self.stream.socket.sendmsg([data], rights) == len(data)

    async def read(self) -> Any:
        """The next message; None if the server has closed."""
        while (message := self._reader.next_message()) is None:
            try:
                data = await self.stream.receive_some(1 << 16)
            except trio.BrokenResourceError:
                return None
            if not data:
                assert not self._reader.partial
                return None
            self._reader.feed(data)
        assert not isinstance(message, Malformed), message
        return message[0]

    async def ask(self, data: bytes) -> Any:
        """Send, and read one message."""
        await self.send(data)
        return await self.read()

    async def negotiate(self) -> None:
        assert set(await self.read()) == {"QMP"}
        assert await self.ask(NEGOTIATE) == {"return": {}}


async def dial(address: str) -> Raw:
    """A client of a server at that address, before the greeting."""
    kind, _, rest = address.partition(":")
    if kind == "unix":
        return Raw(await trio.open_unix_socket(rest))
    host, _, port = rest.rpartition(":")
    return Raw(await trio.open_tcp_stream(host, int(port)))


@asynccontextmanager
async def talking(address: str) -> AsyncIterator[Raw]:
    """A client that has negotiated."""
    raw = await dial(address)
    async with raw.stream:
        await raw.negotiate()
        yield raw


@asynccontextmanager
async def serving(where: str | Path, **options: Any) -> AsyncIterator[tuple[Fake, str]]:
    """A server around a fake dispatcher; *where* is an address, or a directory for a unix socket."""
    address = f"unix:{where}/qmp" if isinstance(where, Path) else where
    fake = Fake()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            try:
                yield (
                    fake,
                    await nursery.start(lambda task_status: serve(fake, address, task_status=task_status, **options)),
                )
            finally:
                fake.close()
                nursery.cancel_scope.cancel("the test is over")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition without notification; the test has a time limit."""
    while not condition():  # noqa: ASYNC110  # there is no event to wait for
        await trio.sleep(0.005)
