"""The QMP server: any number of clients on a unix or TCP socket.

Each client has one task that reads and one that writes. Commands of one client are executed in order. A client that
does not read its answers and events is dropped; until then other clients are not disturbed.
"""

from __future__ import annotations

import array
import collections
import functools
import logging
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import trio

from ..channel.lobby import accept_pause
from ..config.config import Config
from ..errors import ConfigError
from ..transport import tcp, unix
from .messages import Malformed, MessageReader, encode
from .session import Conversation, Outbox

if TYPE_CHECKING:
    from ..transport._interface import Listener
    from .interface import Dispatcher

log: Final = logging.getLogger("trimig.qmp")

#: Clients at once. The server tells a further client so and closes its connection.
MAX_CLIENTS: Final = 128
#: Descriptors that may wait for their ``getfd``; the server closes further ones.
MAX_FDS: Final = 16
#: Clients that may wait for being accepted.
_BACKLOG: Final = 128
_READ_BYTES: Final = 1 << 16
#: Seconds for the last answers to a client that is dismissed, or that sends nothing more.
_CLOSING_SECONDS: Final = 1.0


async def listen(address: str) -> Listener:
    """Listen on ``unix:PATH`` (mode 0600) or ``tcp:HOST:PORT`` (loopback where HOST is empty).

    Raises:
        ConfigError: the address cannot be understood.
        TransportFailed: the address cannot be listened on; a live socket of another process is never removed.

    **Cancellation:** the server listens nowhere.
    """
    kind, colon, rest = address.partition(":")
    if colon and kind == "unix":
        return await unix.listen(rest, Config(), backlog=_BACKLOG)
    if colon and kind == "tcp":
        return await tcp.listen(f"localhost{rest}" if rest.startswith(":") else rest, Config())
    raise ConfigError(f"{address!r} is no address of a QMP socket: unix:PATH or tcp:HOST:PORT", name="qmp")


async def serve(
    dispatcher: Dispatcher,
    address: str,
    *,
    max_clients: int = MAX_CLIENTS,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve QMP until cancelled. The task status is the address, with its real port.

    Raises:
        ConfigError: the address cannot be understood.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** all connections are closed, their commands end, and the socket is removed.
    """
    listener = await listen(address)
    with ExitStack() as cleanup:
        cleanup.callback(listener.close)
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            task_status.started(listener.uri)
            while True:
                stream = await accept(listener)
                crowded = len(nursery.child_tasks) >= max_clients
                nursery.start_soon(_refuse if crowded else functools.partial(_client, dispatcher), stream)


async def accept(listener: Listener) -> trio.SocketStream:
    """The next connection. A lack of descriptors does not end the server: its present clients stay."""
    while True:
        try:
            stream = await listener.accept()
        except OSError as error:
            if (pause := accept_pause(error)) is None:
                raise
            log.warning("a QMP client cannot be accepted: %s", error.strerror)
            await trio.sleep(pause)
            continue
        assert isinstance(stream, trio.SocketStream)
        return stream


async def _refuse(stream: trio.SocketStream) -> None:
    error = {"error": {"class": "GenericError", "desc": "too many clients"}}
    async with stream:
        with trio.move_on_after(_CLOSING_SECONDS):
            try:
                await stream.send_all(encode(error))
            except trio.BrokenResourceError:
                return


async def _client(dispatcher: Dispatcher, stream: trio.SocketStream) -> None:
    """One client, from the greeting to the end of its connection."""
    outbox = Outbox()
    descriptors = _Descriptors()

    def say(message: dict[str, Any]) -> None:
        data = encode(message)
        outbox.put(data, len(data))

    conversation = Conversation(dispatcher, say, descriptors.take)
    with ExitStack() as cleanup:
        cleanup.callback(stream.socket.close)
        cleanup.callback(descriptors.close)
        cleanup.callback(conversation.close)
        cleanup.callback(outbox.close)
        conversation.greet()
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            nursery.start_soon(_write, stream, outbox, nursery)
            nursery.start_soon(_watch, outbox, nursery)
            await _read(stream, conversation, outbox, descriptors)
            nursery.cancel_scope.cancel("the client has ended")


async def _write(stream: trio.SocketStream, outbox: Outbox, nursery: trio.Nursery) -> None:
    try:
        while True:
            item = await outbox.get()
            if callable(item):
                item()
            else:
                await stream.send_all(item)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the client has gone and does not want the rest
    nursery.cancel_scope.cancel("the client has gone")


async def _watch(outbox: Outbox, nursery: trio.Nursery) -> None:
    await outbox.wait_overflow()
    log.warning("a QMP client was dropped: it did not read")
    nursery.cancel_scope.cancel("the client does not read")


async def _read(
    stream: trio.SocketStream, conversation: Conversation, outbox: Outbox, descriptors: _Descriptors
) -> None:
    reader = MessageReader()
    while True:
        while (message := reader.next_message()) is not None:
            await outbox.wait_room()
            for call in await conversation.hear(message):
                outbox.put(call, 0)
            if isinstance(message, Malformed) and message.fatal:
                log.warning("a QMP client was sent away: %s", message.desc)
                with trio.move_on_after(_CLOSING_SECONDS):
                    await outbox.wait_empty()
                return
        try:
            data = await descriptors.receive(stream.socket)
        except OSError:
            return
        if not data:
            # The client may have closed its sending side only: the server still answers its commands.
            with trio.move_on_after(_CLOSING_SECONDS):
                await outbox.wait_empty()
            return
        reader.feed(data)


class _Descriptors:
    """Descriptors that came with a client's data (SCM_RIGHTS) and wait for ``getfd``."""

    def __init__(self) -> None:
        self._waiting: collections.deque[int] = collections.deque()

    async def receive(self, sock: trio.socket.SocketType) -> bytes:
        """Receive data and keep the descriptors that come with it. Raises OSError.

        **Cancellation:** nothing was received.
        """
        if sock.family != socket.AF_UNIX:
            return bytes(await sock.recv(_READ_BYTES))
        space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        data, ancillary, _, _ = await sock.recvmsg(_READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._waiting.extend(numbers)
        while len(self._waiting) > MAX_FDS:
            os.close(self._waiting.pop())
        return bytes(data)

    def take(self) -> int | None:
        """The oldest descriptor; the caller owns it from now on."""
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Close the descriptors that no command has taken."""
        while self._waiting:
            os.close(self._waiting.popleft())
