"""A small QMP client for tests, on trio.

The client has no background task: a task that waits reads the stream, and wakes the other waiting tasks. So there is no
nursery around the caller's code, and a failing test shows its own exception rather than a group.
The disadvantage: events are collected only while a task waits; until then QEMU keeps them.
"""

from __future__ import annotations

import array
import itertools
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

import trio

Message = dict[str, Any]


class QmpError(Exception):
    """QEMU answered a command with an error object.

    Attributes:
        command: the command that was refused.
        error_class: QEMU's class, mostly ``"GenericError"``.
        desc: QEMU's sentence.
    """

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {desc} ({error_class})")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class QmpClosed(Exception):
    """The monitor's connection ended, usually because QEMU exited."""


class QmpClient:
    """One QMP connection. Several tasks may wait in it at once.

    Attributes:
        greeting: QEMU's first message; set by :meth:`negotiate`.
        events: every event seen so far, oldest first.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.greeting: Message = {}
        self.events: list[Message] = []
        self._stream = stream
        self._buffer = bytearray()
        self._ids = itertools.count(1)
        self._answers: dict[int, Message] = {}
        self._sending = trio.Lock()
        self._reading = False
        self._closed = False
        self._news = trio.lowlevel.ParkingLot()

    async def negotiate(self) -> None:
        """Read the greeting and leave negotiation mode. Raises QmpClosed."""
        await self._until(lambda: bool(self.greeting), "the greeting")
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, fd: int | None = None) -> Any:
        """Run *command* (arguments in QMP spelling) and return its ``return`` member.

        A copy of the descriptor *fd* goes with it (``getfd``, ``add-fd``); that needs a connection over a unix socket.

        Raises:
            QmpError: QEMU refused.
            QmpClosed: the connection ended before the answer.

        **Cancellation:** the command may or may not have been run; the connection is unusable if it was half sent.
        """
        ident = next(self._ids)
        request: Message = {"execute": command, "id": ident}
        if arguments:
            request["arguments"] = dict(arguments)
        try:
            async with self._sending:
                data = json.dumps(request).encode() + b"\n"
                if fd is not None:  # it travels with the first byte
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                    data = data[await self._stream.socket.sendmsg([data], rights) :]
                await self._stream.send_all(data)
        except trio.BrokenResourceError as exc:
            raise QmpClosed(f"{command} could not be sent") from exc
        await self._until(lambda: ident in self._answers, command)
        answer = self._answers.pop(ident)
        if "error" in answer:
            raise QmpError(command, answer["error"]["class"], answer["error"]["desc"])
        return answer["return"]

    async def wait_event(
        self, name: str, predicate: Callable[[Message], bool] | None = None, *, since: int = 0
    ) -> Message:
        """The first event called *name* whose ``data`` satisfies *predicate*.

        Looks from position *since* of :attr:`events` on (``since=len(qmp.events)``: only at new ones), then waits.

        Raises:
            QmpClosed: the connection ended and no such event was seen.

        **Cancellation:** nothing is lost; the events seen meanwhile are in :attr:`events`.
        """
        found: list[Message] = []
        position = since

        def look() -> bool:
            nonlocal position
            while position < len(self.events) and not found:
                event = self.events[position]
                position += 1
                if event["event"] == name and (predicate is None or predicate(event.get("data", {}))):
                    found.append(event)
            return bool(found)

        await self._until(look, f"event {name}")
        return found[0]

    async def aclose(self) -> None:
        """Close the connection. Never blocks."""
        await trio.aclose_forcefully(self._stream)

    async def _until(self, ready: Callable[[], bool], what: str) -> None:
        """Return when *ready*; meanwhile read, or let another task read. A cancel leaves no partial message."""
        await trio.lowlevel.checkpoint()
        while not ready():
            if self._closed:
                raise QmpClosed(f"the QMP connection ended while waiting for {what}")
            if self._reading:
                await self._news.park()
                continue
            self._reading = True
            try:
                chunk = await self._stream.receive_some(65536)
                self._feed(bytes(chunk))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._closed = True
            finally:
                self._reading = False
                # Also after a cancel, because another waiting task has to continue the reading.
                self._news.unpark_all()

    def _feed(self, chunk: bytes) -> None:
        if not chunk:
            self._closed = True
            return
        self._buffer += chunk
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        for line in lines:
            message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            elif "QMP" in message:
                self.greeting = message["QMP"]
            else:
                self._answers[message["id"]] = message
