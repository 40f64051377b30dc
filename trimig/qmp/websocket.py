"""QMP over a websocket: JSON in text frames, msgpack in binary frames, one message to a frame.

An answer has the kind of frame of its command; events have the kind of the client's first command. The greeting comes
before any command and is text. Only the types of JSON are allowed in msgpack: no binary strings, no extensions, no NaN.
Browsers are refused: a page on any site could otherwise talk to a server on this machine.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgpack
import trio
from wsproto.events import Request

from ..config.config import Config
from ..errors import ConfigError
from ..transport import tcp
from ..transport._messages import ConnectionGone, MessageStream
from ..transport._opening import NotUnderstood, from_a_page, welcome
from .messages import MAX_DEPTH, MAX_MESSAGE, Malformed, MessageReader, unique_members
from .server import accept
from .session import Conversation, Outbox

if TYPE_CHECKING:
    from .interface import Dispatcher

log: Final = logging.getLogger("trimig.qmp")

#: Clients at once. A further client is refused at the handshake.
MAX_CLIENTS: Final = 128
#: Connections at once, including those in the opening handshake. A further connection is closed.
_MAX_CONNECTIONS: Final = 2 * MAX_CLIENTS
_HANDSHAKE_SECONDS: Final = 10.0
#: Members of one msgpack array or map. The decoder allocates room for all of them before it reads the first.
_MAX_MEMBERS: Final = 4096
#: Seconds for the last answers, and for the closing handshake.
_CLOSING_SECONDS: Final = 1.0


def parse(address: str) -> tuple[str, int, str]:
    """Host, port and path of ``ws://HOST:PORT[/PATH]``.

    Raises:
        ConfigError: *address* is not of that form.
    """
    problem = ConfigError(f"{address!r} is no address to control from: ws://HOST:PORT[/PATH]", name="control")
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise problem from None
    if parts.scheme != "ws" or port is None or parts.query or parts.fragment or parts.username:
        raise problem
    return parts.hostname or "127.0.0.1", port, parts.path or "/"


async def serve_websocket(
    dispatcher: Dispatcher,
    address: str,
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled. The task status is the address, with its real port.

    Raises:
        ConfigError: the address cannot be understood.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** all connections are closed.
    """
    host, port, path = parse(address)
    shown = f"[{host}]" if ":" in host else host
    listener = await tcp.listen(f"{shown}:{port}", Config())
    with ExitStack() as cleanup:
        cleanup.callback(listener.close)
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            server = _Server(dispatcher, path)
            task_status.started(f"ws://{shown}:{listener.uri.rpartition(':')[2]}{path}")
            while True:
                stream = await accept(listener)
                if len(nursery.child_tasks) < _MAX_CONNECTIONS:
                    nursery.start_soon(server.welcome, stream)
                else:
                    stream.socket.close()


class _Server:
    """The state that the connections of one address share.

    Attributes:
        clients: the number of present conversations.
    """

    def __init__(self, dispatcher: Dispatcher, path: str) -> None:
        self._dispatcher = dispatcher
        self._path = path
        self.clients = 0

    async def welcome(self, stream: trio.SocketStream) -> None:
        """One connection, from its opening handshake to its end."""
        with ExitStack() as cleanup:
            cleanup.callback(stream.socket.close)
            early: bytes | None = None
            with trio.move_on_after(_HANDSHAKE_SECONDS):
                try:
                    early = await welcome(stream, self._judge)
                except (NotUnderstood, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    log.info("a connection to the control websocket was refused: %s", error)
                    return
            if early is None:
                return
            self.clients += 1
            cleanup.callback(self._left)
            connection = MessageStream(stream, early=early, max_message=MAX_MESSAGE)
            await _client(self._dispatcher, connection)
            await connection.goodbye(_CLOSING_SECONDS)

    def _left(self) -> None:
        self.clients -= 1

    def _judge(self, request: Request) -> tuple[int, str] | None:
        if from_a_page(request):
            return 403, "it comes from a page in a browser"
        if request.target != self._path:
            return 404, f"it asks for {request.target[:200]!r}, and here is {self._path!r}"
        return (503, "too many clients") if self.clients >= MAX_CLIENTS else None


async def _client(dispatcher: Dispatcher, connection: MessageStream) -> None:
    outbox = Outbox()
    first = binary = False

    def say(message: dict[str, Any]) -> None:
        packed = first if "event" in message else binary
        frame: str | bytes = msgpack.packb(message) if packed else json.dumps(message)
        outbox.put(frame, len(frame))

    conversation = Conversation(dispatcher, say)
    conversation.greet()
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            nursery.start_soon(_write, connection, outbox, nursery)
            nursery.start_soon(_watch, outbox, nursery)
            frames, read = trio.open_memory_channel[str | bytes](1)
            nursery.start_soon(_read, connection, frames)
            known = False
            async for frame in read:
                binary = isinstance(frame, bytes)
                first, known = (first if known else binary), True
                await outbox.wait_room()
                await _answer(conversation, frame, outbox)
            nursery.cancel_scope.cancel("the client has gone")
    finally:
        outbox.close()
        conversation.close()


async def _answer(conversation: Conversation, frame: str | bytes, outbox: Outbox) -> None:
    for message in _messages(frame):
        for call in await conversation.hear(message):
            outbox.put(call, 0)


async def _read(connection: MessageStream, frames: trio.MemorySendChannel[str | bytes]) -> None:
    """Read frames, in a task of its own, so that pings and the client's close are handled during a command."""
    with frames, suppress(ConnectionGone):
        while True:
            await frames.send(await connection.receive())


async def _write(connection: MessageStream, outbox: Outbox, nursery: trio.Nursery) -> None:
    try:
        while True:
            item = await outbox.get()
            if callable(item):
                item()
            else:
                await connection.send(item)
    except ConnectionGone:
        pass
    nursery.cancel_scope.cancel("the client has gone")


async def _watch(outbox: Outbox, nursery: trio.Nursery) -> None:
    await outbox.wait_overflow()
    log.warning("a client on the websocket was dropped: it did not read")
    nursery.cancel_scope.cancel("the client does not read")


def _messages(frame: str | bytes) -> list[tuple[Any] | Malformed]:
    """The messages in one frame; a binary one has one."""
    if isinstance(frame, bytes):
        try:
            message = msgpack.unpackb(
                frame, max_array_len=_MAX_MEMBERS, max_map_len=_MAX_MEMBERS, object_pairs_hook=unique_members
            )
            _check(message)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            return [Malformed(f"msgpack error, {type(error).__name__}: {error}")]
        return [(message,)]
    reader = MessageReader()
    reader.feed(frame.encode() + b"\n")
    found: list[tuple[Any] | Malformed] = []
    while (message := reader.next_message()) is not None:
        found.append(message)
    if reader.partial or not found:
        found.append(Malformed("JSON parse error, the frame ends within a message"))
    return found


def _check(message: Any) -> None:
    """Raise ValueError for a value that JSON does not have: answers and other clients' events may be written in
    JSON."""
    level = [message]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, list):
                deeper += value
            elif isinstance(value, dict):
                deeper += value
                deeper += value.values()
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{value} is not JSON")
            elif not (value is None or isinstance(value, str | int | float)):
                raise ValueError(f"{type(value).__name__} is not JSON")
        if not deeper:
            return
        level = deeper
    raise ValueError(f"more than {MAX_DEPTH} levels")
