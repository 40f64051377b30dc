"""A QMP client on trio, for a QEMU or a ``trimig run``.

Several commands may be in flight; the id of an answer says which caller it belongs to. A cancelled caller leaves the
connection usable: the client drops the answer when it comes.
"""

from __future__ import annotations

import array
import collections
import itertools
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, Final

import trio

from ..channel import closing
from ..config.config import Config
from ..errors import ConfigError, TransportFailed
from ..transport import tcp, unix
from .interface import CommandFailed
from .messages import Malformed, MessageReader, encode

#: Events kept for a reader that is not reading; the client drops the oldest first.
EVENT_BACKLOG: Final = 1024
#: The schema of a QEMU is some hundred KiB.
_MAX_MESSAGE: Final = 64 << 20
_READ_BYTES: Final = 1 << 16
_MISSING: Final = "does a QEMU or a trimig run with this QMP address?"

Message = dict[str, Any]


class Client:
    """One connection, made by :func:`connect`.

    Attributes:
        greeting: the first message of the server.
        dropped: events that a reader missed because it was more than EVENT_BACKLOG behind.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.greeting: Mapping[str, Any] = MappingProxyType({})
        self.dropped = 0
        self._stream = stream
        self._reader = MessageReader(max_message=_MAX_MESSAGE)
        self._ids = itertools.count(1)
        self._asked: dict[int, _Answer] = {}
        self._events: collections.deque[Message] = collections.deque(maxlen=EVENT_BACKLOG)
        self._event_count = 0
        self._news = trio.Event()
        self._sending = trio.Lock()
        self._poisoned = False
        self._greeted = False
        self._lost: str | None = None

    @property
    def version(self) -> Mapping[str, Any]:
        """The ``version`` member of the greeting."""
        found = self.greeting.get("version")
        return found if isinstance(found, Mapping) else {}

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, fds: Sequence[int] = ()
    ) -> Any:
        """Run *command* and return the ``return`` member of its answer.

        Args:
            arguments: in QMP spelling.
            fds: descriptors that travel with the command (unix sockets only); the caller still owns them.

        Raises:
            CommandFailed: the server refused.
            ConfigError: *fds* cannot be passed: the socket is no unix socket, or a descriptor is not open. Nothing was
                sent.
            TransportFailed: the connection is lost; the command may have been executed.

        **Cancellation:** the command may have been executed. The connection stays usable, unless the command was
        cut in the middle of being sent.
        """
        ident = next(self._ids)
        answer = self._asked[ident] = _Answer()
        request: Message = {"execute": command, "id": ident}
        if arguments:
            request["arguments"] = dict(arguments)
        try:
            await self._send(encode(request), fds)
            while answer.message is None:
                self._check()
                await answer.came.wait()
        finally:
            del self._asked[ident]
        if "error" in answer.message:
            error = answer.message["error"]
            raise CommandFailed(str(error.get("desc", "refused")), error_class=str(error.get("class", "GenericError")))
        return answer.message.get("return")

    async def getfd(self, name: str, fd: int) -> None:
        """Give the server *fd* under *name*; the caller's descriptor stays open.

        Raises and **Cancellation:** as :meth:`execute`.
        """
        await self.execute("getfd", {"fdname": name}, fds=[fd])

    def events(self) -> AsyncIterator[Message]:
        """All events from now on, at most EVENT_BACKLOG behind.

        Raises:
            TransportFailed: the connection is lost, and every event before that was read.

        **Cancellation:** nothing is lost; the iterator may be used again.
        """
        return _EventFeed(self)

    async def wait_event(self, *names: str) -> Message:
        """The next event from now on whose name is one of *names*.

        Raises:
            TransportFailed: the connection is lost.

        **Cancellation:** no effect.
        """
        feed = self.events()
        while (event := await anext(feed)).get("event") not in names:
            pass
        return event

    async def _event(self, number: int) -> tuple[Message, int]:
        """Event *number*, or the oldest one that was kept, and the number of the event after it."""
        while number >= self._event_count:
            self._check()
            await self._news.wait()
        oldest = self._event_count - len(self._events)
        self.dropped += max(0, oldest - number)
        number = max(number, oldest)
        return self._events[number - oldest], number + 1

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        async with self._sending:
            self._check()
            if self._poisoned:
                raise TransportFailed("a command was cut in the middle: the connection cannot be used any more")
            if fds:
                self._check_fds(fds)
            await trio.lowlevel.checkpoint_if_cancelled()  # up to here, nothing has been sent for certain
            self._poisoned = True
            try:
                if fds:
                    data = data[await self._send_fds(data, fds) :]
                await self._stream.send_all(data)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._lose(f"the QMP connection broke: {error}")
                self._check(error)
            self._poisoned = False

    def _check(self, cause: Exception | None = None) -> None:
        """Raise if the connection is lost; a new error each time, because several tasks may raise it."""
        if self._lost is not None:
            raise TransportFailed(self._lost) from cause

    def _check_fds(self, fds: Sequence[int]) -> None:
        if not isinstance(self._stream, trio.SocketStream) or self._stream.socket.family != socket.AF_UNIX:
            raise ConfigError("descriptors can be passed over a unix socket only")
        for fd in fds:
            try:
                os.fstat(fd)
            except OSError as error:
                raise ConfigError(f"the descriptor {fd} cannot be passed: {error.strerror}") from error

    async def _send_fds(self, data: bytes, fds: Sequence[int]) -> int:
        stream = self._stream
        assert isinstance(stream, trio.SocketStream)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
        return await stream.socket.sendmsg([data], rights)

    # -- the reading task ------------------------------------------------------------------------------------------

    async def _first(self) -> None:
        """Read up to the greeting."""
        while not self._greeted:
            await self._read_some()
            self._check()

    async def _run(self) -> None:
        while self._lost is None:
            await self._read_some()

    async def _read_some(self) -> None:
        try:
            data = await self._stream.receive_some(_READ_BYTES)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._lose(f"the QMP connection broke: {error}")
            return
        if not data:
            self._lose("the other side closed the QMP connection")
            return
        self._reader.feed(data)
        while (message := self._reader.next_message()) is not None:
            if isinstance(message, Malformed):
                self._lose(f"this is no QMP: {message.desc}")
                return
            self._take(message[0])

    def _take(self, message: Any) -> None:
        if not isinstance(message, dict):
            self._lose(f"this is no QMP: {str(message)[:80]!r}")
        elif isinstance(greeting := message.get("QMP"), dict):
            self.greeting = MappingProxyType(greeting)
            self._greeted = True
        elif "event" in message:
            self._events.append(message)
            self._event_count += 1
            self._wake()
        elif "return" not in message and not isinstance(message.get("error"), dict):
            self._lose(f"this is no QMP: {str(message)[:80]!r}")
        elif not self._greeted:
            refusal = message.get("error", {})
            self._lose(f"the other side refused the connection: {refusal.get('desc', 'without a reason')}")
        elif type(ident := message.get("id")) is int and (answer := self._asked.get(ident)) is not None:
            answer.take(message)

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why
            for answer in self._asked.values():
                answer.came.set()
            self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()


class _Answer:
    def __init__(self) -> None:
        self.came = trio.Event()
        self.message: Message | None = None

    def take(self, message: Message) -> None:
        self.message = message
        self.came.set()


class _EventFeed:
    """See :meth:`Client.events`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._next = client._event_count

    def __aiter__(self) -> _EventFeed:
        return self

    async def __anext__(self) -> Message:
        await trio.lowlevel.checkpoint()
        event, self._next = await self._client._event(self._next)
        return event


@asynccontextmanager
async def connect(address: str | trio.abc.Stream) -> AsyncIterator[Client]:
    """Connect to a QMP socket, ``unix:PATH`` or ``tcp:HOST:PORT``, and negotiate the capabilities.

    Errors of the block propagate as they are, not in a group.

    Raises:
        ConfigError: the address cannot be understood.
        TransportFailed: no server listens there, or the server does not speak QMP.

    **Cancellation:** the connection is closed.
    """
    stream = await _open(address) if isinstance(address, str) else address
    failure: BaseException | None = None
    client = Client(stream)
    try:
        await client._first()
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(client._run)
                await client.execute("qmp_capabilities")
                yield client
                nursery.cancel_scope.cancel("the block has ended")
        except BaseExceptionGroup as group:
            failure = _only(group)
        if failure is not None:
            raise failure
    finally:
        await closing.close(stream)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception in nested groups of one; the reading task raises none of its own."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _open(address: str) -> trio.abc.Stream:
    kind, colon, rest = address.partition(":")
    if colon and kind == "unix":
        return await unix.connect(rest, Config(), missing=_MISSING)
    if colon and kind == "tcp":
        return await tcp.connect(rest, Config(), missing=_MISSING)
    raise ConfigError(f"{address!r} is no address of a QMP socket: unix:PATH or tcp:HOST:PORT", name="qmp")
