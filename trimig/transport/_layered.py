"""The base of TLS and websockets: a stream in both directions over another stream."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from ..channel import closing
from ..channel.streams import IntoBuffer
from ._one_task import OneTask

if TYPE_CHECKING:
    from ..channel.channel import AnyStream

#: Seconds for an opening handshake: a peer that speaks another protocol may send nothing.
HANDSHAKE_SECONDS: Final = 20.0
#: Bytes that are read at once, and at most returned by receive_some.
READ_BYTES: Final = 1 << 20


class Below:
    """The stream below a layer. Its bytes must not have a gap, so nothing is written after a write that was cut off.

    Attributes:
        stream: the stream, which the layer owns.
        socket: its kernel socket; None for a stream that is no socket.
        writing: a lock; a task holds it while it writes.
        cut: True after a write that was cut off, and during a write. Then nothing can be written.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self.writing = trio.Lock()
        self.cut = False
        self._into = stream.receive_into if isinstance(stream, IntoBuffer) else None

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of *data*; the caller holds :attr:`writing`.

        Raises:
            trio.BrokenResourceError: the stream is broken, or an earlier write was cut.

        **Cancellation:** a part may have been written; nothing more can be written.
        """
        if self.cut:
            raise trio.BrokenResourceError("an earlier write was cut")
        self.cut = True
        await self.stream.send_all(data)
        self.cut = False

    async def write_last(self, data: bytes | memoryview, seconds: float) -> None:
        """Write the announcement of the end if the socket takes it at once; without a socket, within *seconds*.

        The caller has checked that no task holds :attr:`writing`.

        **Cancellation:** on a socket the announcement is written all the same.
        """
        if self.cut:
            return
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            if self.socket is not None:
                # Without a checkpoint, because most streams are closed by a cancelled task. If the socket's buffer is so
                # full that not all of it fits, the rest is cut off, and that is an error at the peer.
                os.write(self.socket.fileno(), data)
                return
            with trio.move_on_after(seconds):
                await self.stream.send_all(data)

    async def read_into(self, room: memoryview) -> int:
        """Read into *room*; the number of bytes, 0 at the end.

        Raises:
            trio.BrokenResourceError: the stream is broken.

        **Cancellation:** nothing was taken.
        """
        if self.socket is not None:
            try:
                return await self.socket.recv_into(room)
            except OSError as error:
                raise trio.BrokenResourceError(f"socket connection broken: {error}") from error
        if self._into is not None:
            return await self._into(room)
        data = await self.stream.receive_some(len(room))
        room[: len(data)] = data
        return len(data)


class LayeredStream(trio.abc.Stream):
    """A stream over another one. A layer adds ``send_all``, ``receive_into`` and ``announce_end``.

    Args:
        transport: the stream below. This stream owns it and closes it.
        name: the name of the layer, for messages.
    """

    def __init__(self, transport: trio.abc.Stream, name: str) -> None:
        self._below = Below(transport)
        self._name = name
        self._sending = OneTask(f"sending on this {name}")
        self._receiving = OneTask(f"receiving on this {name}")
        self._closed = False
        self._failure: Exception | None = None  # the first one of either direction; its text is reported
        self._plain = bytearray()

    @property
    def transport(self) -> trio.abc.Stream:
        """The stream below; the caller must not use it directly."""
        return self._below.stream

    def _check_open(self, error: trio.BrokenResourceError | None = None) -> None:
        """Raise if the stream was closed, perhaps during the call, which then has failed with *error*."""
        if self._closed:
            raise trio.ClosedResourceError(f"this {self._name} is closed") from error

    def _check_whole(self) -> None:
        """Raise if the stream was closed, or has failed."""
        self._check_open()
        if self._failure is not None:
            self._fail(self._failure)

    def _fail(self, reason: Exception) -> NoReturn:
        """Raise the first reason of either direction; *reason* if there was none before."""
        if self._failure is None:
            self._failure = reason
        raise trio.BrokenResourceError(str(self._failure)) from self._failure

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the stream below accepts data.

        **Cancellation:** no effect.
        """
        with self._sending:
            self._check_whole()
            await self._below.stream.wait_send_all_might_not_block()

    @abc.abstractmethod
    async def receive_into(self, view: memoryview) -> int:
        """Like :meth:`receive_some`, into *view*; returns the number of bytes, 0 at the end.

        **Cancellation:** nothing was taken.
        """

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte, at most *max_bytes*; empty at the end that the peer announced.

        **Cancellation:** nothing was taken.
        """
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        size = min(max_bytes or READ_BYTES, READ_BYTES)
        if len(self._plain) < size:
            self._plain = bytearray(size)
        view = memoryview(self._plain)[:size]
        return bytes(view[: await self.receive_into(view)])

    @abc.abstractmethod
    async def announce_end(self) -> None:
        """Tell the peer that the stream ends here, in bounded time. :meth:`aclose` calls it once.

        **Cancellation:** the stream can only be closed.
        """

    async def aclose(self) -> None:
        """Announce the end to the peer, if that is possible at once or in a moment; and close.

        **Cancellation:** the stream is closed all the same.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            await self.announce_end()
        finally:
            await self._below.stream.aclose()


@contextlib.asynccontextmanager
async def closed_on_failure(stream: AnyStream) -> AsyncIterator[None]:
    """Close *stream* by force if the body raises. The peer must not take what it got for a whole stream.

    **Cancellation:** *stream* is closed.
    """
    try:
        yield
    except BaseException:
        await closing.close(stream)
        raise


def text_of(error: Exception) -> str:
    """The text of an error of a stream. If trio has wrapped an error of the system, the text of the system's error."""
    inner = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ else error
    return str(inner) or type(inner).__name__
