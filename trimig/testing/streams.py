"""A stream around a stream, and a listener without sockets.

:class:`DribbleStream` finds readers that take one chunk for one message. :class:`VirtualListener` lets servers run on
virtual links.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import final

import trio

from .link import VirtualLink, VirtualStream


@final
class DribbleStream(trio.abc.HalfCloseableStream):
    """Passes all bytes on in small pieces, one byte by default, in both directions.

    Args:
        stream: the wrapped stream, which is owned from now on.
        send: bytes per inner ``send_all``.
        receive: bytes per ``receive_some`` at most.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, *, send: int = 1, receive: int = 1) -> None:
        if send < 1 or receive < 1:
            raise ValueError("a stream cannot move less than one byte at a time")
        self._stream = stream
        self._send = send
        self._receive = receive

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send byte by byte; raises the errors of the wrapped stream.

        **Cancellation:** any part of *data* may have been sent.
        """
        rest = memoryview(data).cast("B")
        while True:
            await self._stream.send_all(rest[: self._send])
            rest = rest[self._send :]
            if not rest:
                return

    async def wait_send_all_might_not_block(self) -> None:
        """As the wrapped stream. **Cancellation:** has no effect."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """As the wrapped stream, the **Cancellation** too."""
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """At most one byte; raises the errors of the wrapped stream. **Cancellation:** nothing was taken."""
        limit = self._receive if max_bytes is None else min(max_bytes, self._receive)
        return await self._stream.receive_some(limit)

    async def aclose(self) -> None:
        """Close the wrapped stream. **Cancellation:** it is closed nevertheless."""
        await self._stream.aclose()


@final
class VirtualListener(trio.abc.Listener[VirtualStream]):
    """Accepts connections made with :meth:`connect`.

    Args:
        make_link: called for each connection, for links with limits or faults.
    """

    def __init__(self, make_link: Callable[[], VirtualLink] = VirtualLink) -> None:
        self._make_link = make_link
        self._pending: collections.deque[VirtualStream] = collections.deque()
        self._waiting = trio.lowlevel.ParkingLot()
        self._closed = False
        #: Every link ever made, in order.
        self.links: list[VirtualLink] = []

    async def connect(self) -> VirtualStream:
        """The client's end (``a``) of a new link; the server need not have accepted it yet.

        Raises:
            ConnectionRefusedError: the listener is closed.

        **Cancellation:** no connection was made.
        """
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise ConnectionRefusedError("the virtual listener is closed")
        link = self._make_link()
        self.links.append(link)
        self._pending.append(link.b)
        self._waiting.unpark()
        return link.a

    async def accept(self) -> VirtualStream:
        """The server's end (``b``) of the next connection.

        Raises:
            trio.ClosedResourceError: the listener was closed, perhaps while waiting.

        **Cancellation:** no connection was taken.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError("the virtual listener is closed")
            if self._pending:
                return self._pending.popleft()
            await self._waiting.park()

    async def aclose(self) -> None:
        """Close, and close the connections that were never accepted. **Cancellation:** it is closed nevertheless."""
        self._closed = True
        while self._pending:
            self._pending.popleft().close()
        self._waiting.unpark_all()
        await trio.lowlevel.checkpoint()
