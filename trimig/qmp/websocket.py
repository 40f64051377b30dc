"""The same conversation over a websocket: JSON in text frames, msgpack in binary frames, one message to a frame.

An answer comes in the kind of frame that its command came in; events come in the kind of the client's first command.
The greeting, which nobody has asked for, is text. In msgpack there is only what JSON has: no binary strings, no
extensions, no NaN.
Browsers are kept out: a page on any site could otherwise talk to a server on this machine.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import msgpack
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest
from trio_websocket import serve_websocket as serve_connections

from ..errors import ConfigError, TransportFailed
from .interface import Dispatcher
from .messages import MAX_DEPTH, MAX_MESSAGE, Malformed, MessageReader
from .session import Conversation, Outbox

log: Final = logging.getLogger("trimig.qmp")

#: Clients at once. A further one is refused at the handshake.
MAX_CLIENTS: Final = 128
#: Members of one msgpack array or map. Room for all of them is made before the first one is looked at.
_MAX_MEMBERS: Final = 4096
#: How long the last answers may take, and the closing handshake.
_FAREWELL_SECONDS: Final = 1.0


def parse(address: str) -> tuple[str, int, str]:
    """Host, port and path of ``ws://HOST:PORT[/PATH]``.

    Raises:
        ConfigError: it is not of that form.
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
        TransportFailed: it cannot be listened on.

    **Cancellation:** all connections are closed.
    """
    host, port, path = parse(address)
    clients = 0

    async def accept(request: WebSocketRequest) -> None:
        nonlocal clients
        refusal = _refusal(request, path, clients)
        clients += refusal is None
        try:
            if refusal is not None:
                await request.reject(refusal)
            else:
                await _client(dispatcher, await request.accept())
        except ConnectionClosed:
            pass  # it went away in the middle of the handshake
        finally:
            clients -= refusal is None

    async with trio.open_nursery(strict_exception_groups=True) as nursery:
        try:
            server = await nursery.start(_serve, accept, host, port)
        except OSError as error:
            raise TransportFailed(f"cannot listen on {address}: {error.strerror or error}") from error
        shown = f"[{host}]" if ":" in host else host
        task_status.started(f"ws://{shown}:{server.port}{path}")


async def _serve(
    accept: Callable[[WebSocketRequest], Any], host: str, port: int, *, task_status: trio.TaskStatus[Any]
) -> None:
    await serve_connections(
        accept,
        host,
        port,
        None,
        max_message_size=MAX_MESSAGE,
        message_queue_size=1,
        connect_timeout=10,
        disconnect_timeout=_FAREWELL_SECONDS,
        task_status=task_status,
    )


def _refusal(request: WebSocketRequest, path: str, clients: int) -> int | None:
    """The HTTP status with which a handshake is refused; None if it is not."""
    if any(name.lower() == b"origin" for name, _ in request.headers):
        return 403
    if request.path != path:
        return 404
    return 503 if clients >= MAX_CLIENTS else None


async def _client(dispatcher: Dispatcher, connection: WebSocketConnection) -> None:
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
            heard = False
            while True:
                try:
                    frame = await connection.get_message()
                except ConnectionClosed:
                    break
                binary = isinstance(frame, bytes)
                first, heard = (first if heard else binary), True
                await outbox.wait_room()
                for message in _messages(frame):
                    for call in await conversation.hear(message):
                        outbox.put(call, 0)
            nursery.cancel_scope.cancel("the client has gone")
    finally:
        outbox.close()
        conversation.close()


async def _write(connection: WebSocketConnection, outbox: Outbox, nursery: trio.Nursery) -> None:
    try:
        while True:
            item = await outbox.get()
            if callable(item):
                item()
            else:
                await connection.send_message(item)
    except ConnectionClosed:
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
            message = msgpack.unpackb(frame, max_array_len=_MAX_MEMBERS, max_map_len=_MAX_MEMBERS)
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
    """Raise ValueError for what JSON does not have: the answer, or somebody else's, may have to be written in it."""
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
