"""A TCP relay between two migration peers that can delay, hold back, drop and cut at exact bytes.

The relay connects two real processes, which a virtual link cannot: ``async with Relay("tcp:127.0.0.1:4444") as relay``
and then migrate to ``relay.uri``. *forward* is the direction of the migration stream, *back* the return path.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio

#: The most bytes that a direction keeps beyond those it holds back; then the sender feels back-pressure.
_WINDOW: Final = 1 << 18
_CHUNK: Final = 1 << 16


class Direction:
    """One direction of a relay, and its faults. All offsets count from its first byte.

    The faults are attributes; set them before the connection or during it (then call :meth:`changed`).

    Attributes:
        hold_last: hold that many of the newest bytes back, at every moment, until :meth:`release`.
        hold_from: hold everything from that offset on back, until :meth:`release`.
        drop_from: read but never pass on anything from that offset on; nor the end of the stream.
        cut_at: pass on exactly that many bytes, then close both connections.
        delay: seconds before each chunk (of at most 64 KiB) is passed on.
        received: bytes that the relay has received.
        delivered: bytes that were handed to the other side's socket.
        ended: the sender has closed this direction.
        read: all received bytes, if :attr:`keep` is set.
        keep: whether :attr:`read` is filled.
    """

    def __init__(self) -> None:
        self.hold_last = 0
        self.hold_from: int | None = None
        self.drop_from: int | None = None
        self.cut_at: int | None = None
        self.delay = 0.0
        self.received = 0
        self.delivered = 0
        self.ended = False
        self.read = bytearray()
        self.keep = False
        self._passed = 0  # delivered or dropped
        self._buffer = bytearray()
        self._news = trio.lowlevel.ParkingLot()

    @property
    def held(self) -> int:
        """Received bytes that are neither delivered nor dropped yet."""
        return len(self._buffer)

    def release(self) -> None:
        """Pass on the held bytes, and hold nothing back any more."""
        self.hold_last = 0
        self.hold_from = None
        self.changed()

    def changed(self) -> None:
        """Make a running relay read the attributes again."""
        self._news.unpark_all()

    async def wait_until(self, predicate: Callable[[Direction], bool]) -> None:
        """Wait until *predicate* holds for this direction (checked whenever bytes move)."""
        await trio.lowlevel.checkpoint()
        while not predicate(self):
            await self._news.park()

    async def _receive(self, source: trio.SocketStream) -> None:
        while not self.ended:
            await self.wait_until(lambda d: len(d._buffer) < d.hold_last + _WINDOW)
            chunk = await source.receive_some(_CHUNK)
            self.received += len(chunk)
            self._buffer += chunk
            if self.keep:
                self.read += chunk
            self.ended = not chunk
            self.changed()

    def _due(self) -> int:
        """How many bytes of the buffer may be passed on now."""
        due = len(self._buffer) - self.hold_last
        if self.hold_from is not None:
            due = min(due, self.hold_from - self._passed)
        if self.cut_at is not None:
            due = min(due, self.cut_at - self._passed)
        return max(0, min(due, _CHUNK))

    async def _send(self, target: trio.SocketStream) -> bool:
        """Pass bytes on; False when the cut is due, True at the end of the stream."""
        while True:
            await self.wait_until(lambda d: d._due() > 0 or d._at_cut() or (d.ended and not d._buffer))
            if self._at_cut():
                return False
            if not self._due():
                break
            await trio.sleep(self.delay)
            data = bytes(self._buffer[: self._due()])
            del self._buffer[: len(data)]
            kept = data if self.drop_from is None else data[: max(0, self.drop_from - self._passed)]
            self._passed += len(data)
            if kept:
                await target.send_all(kept)
                self.delivered += len(kept)
            self.changed()
        if self.drop_from is None:
            await target.send_eof()
        return True

    def _at_cut(self) -> bool:
        return self.cut_at is not None and self._passed >= self.cut_at

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream) -> bool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, source)
            result = await self._send(target)
            nursery.cancel_scope.cancel("this direction is over")
        return result


class Relay:
    """Listens on a loopback port and passes one connection after the other on to *target* (``tcp:host:port``).

    A connection that breaks on one side is closed on the other. The counts of :attr:`forward` and :attr:`back` include
    all connections, so use one relay per attempt if offsets matter.

    Attributes:
        forward: from the client to the target.
        back: the other direction.
        port: the port at which the relay listens.
        uri: the same as ``tcp:127.0.0.1:port``.
        connections: how many were accepted.
        connected: set when both sides of the first connection are connected.
    """

    def __init__(self, target: str) -> None:
        scheme, host, port = target.split(":")
        if scheme != "tcp":
            raise ValueError(f"a relay needs tcp:host:port, not {target}")
        self._target = (host, int(port))
        self.forward = Direction()
        self.back = Direction()
        self.port = 0
        self.connections = 0
        self.connected = trio.Event()
        self._reset = False
        self._scope: trio.CancelScope | None = None
        self._stack = contextlib.AsyncExitStack()

    @property
    def uri(self) -> str:
        return f"tcp:127.0.0.1:{self.port}"

    def cut(self, *, reset: bool = False) -> None:
        """Close both ends of the present connection now; with *reset* by RST, which may lose delivered bytes.

        Without a connection this has no effect.
        """
        self._reset = reset
        if self._scope is not None:
            self._scope.cancel("cut")

    async def __aenter__(self) -> Self:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        self._nursery_manager = trio.open_nursery()
        nursery = await self._nursery_manager.__aenter__()
        self._nursery = nursery
        nursery.start_soon(self._serve, listener)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._nursery.cancel_scope.cancel("the relay is over")
        try:
            return await self._nursery_manager.__aexit__(kind, exc, traceback)
        except BaseExceptionGroup as group:
            # The nursery is internal: a test that fails inside the block must show its own exception.
            if exc is not None and list(group.exceptions) == [exc]:
                return False
            raise

    async def _serve(self, listener: trio.SocketListener) -> None:
        async with listener:
            while True:
                client = await listener.accept()
                self.connections += 1
                async with client:
                    await self._relay(client)

    async def _relay(self, client: trio.SocketStream) -> None:
        self._reset = False
        # A closing peer is no failure of the relay: the relay closes the other side.
        with contextlib.suppress(OSError, trio.BrokenResourceError), trio.CancelScope() as self._scope:
            async with await trio.open_tcp_stream(*self._target) as server:
                self.connected.set()
                try:
                    await self._both_ways(client, server)
                finally:
                    if self._reset:
                        for stream in (client, server):
                            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _both_ways(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        async def one(direction: Direction, source: trio.SocketStream, target: trio.SocketStream) -> None:
            try:
                finished = await direction._pump(source, target)
            except* trio.BrokenResourceError:
                finished = False
            if not finished:
                nursery.cancel_scope.cancel("cut")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, self.forward, client, server)
            nursery.start_soon(one, self.back, server, client)


#: A command that passes a stream on to a unix socket, both ways, as ``socat - UNIX:PATH`` does. It ends when the other
#: side has closed, which for a migration is after the last message.
_RELAY = """
import os, socket, sys, threading
sock = socket.socket(socket.AF_UNIX)
if sys.argv[1] == "listen":
    sock.bind(sys.argv[2] + ".part")
    sock.listen()
    os.rename(sys.argv[2] + ".part", sys.argv[2])
    sock = sock.accept()[0]
else:
    sock.connect(sys.argv[2])
def out():
    while data := os.read(0, 1 << 16):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
threading.Thread(target=out, daemon=True).start()
while data := sock.recv(1 << 16):
    os.write(1, data)
"""


def exec_relay(role: str, path: Path) -> str:
    """The ``exec:`` URI of a command that passes a stream on to (``connect``) or from (``listen``) a unix socket."""
    return f"exec:{shlex.join([sys.executable, '-c', _RELAY, role, str(path)])}"
