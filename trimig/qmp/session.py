"""The conversation between one client and the server, independent of the carrier.

Negotiation, commands and events are the same on a socket and on a websocket, so they are here. The carrier
brings decoded messages and takes answers out of the :class:`Outbox`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any, Final

import trio

from .interface import CommandFailed, Dispatcher
from .messages import Malformed

#: Bytes that may wait for a client that does not read; beyond this the client is dropped.
MAX_WAITING: Final = 1 << 20

Message = dict[str, Any]


class Outbox:
    """Encoded messages for one client. Putting never blocks; a client that reads too slowly is dropped.

    An item is a message, or a call without arguments that is made when everything before it was written.
    """

    def __init__(self, *, limit: int = MAX_WAITING) -> None:
        self._limit = limit
        self._waiting: collections.deque[Any] = collections.deque()
        self._bytes = 0
        self._changed = trio.Event()
        self._in_hand = False
        self.overflowed = False

    def put(self, item: Any, size: int) -> None:
        """Add *item* of *size* bytes. Beyond the limit the outbox overflows for good, and keeps no message any more."""
        if self.overflowed and not callable(item):
            return
        self._waiting.append((item, size))
        self._bytes += size
        if self._bytes > self._limit:
            self.overflowed = True
            self._waiting = collections.deque((item, 0) for item, _ in self._waiting if callable(item))
            self._bytes = 0
        self._wake()

    async def get(self) -> Any:
        """The oldest item. The next call tells the outbox that this item has been written.

        **Cancellation:** nothing is lost.
        """
        self._in_hand = False
        self._wake()
        while not self._waiting:
            await self._changed.wait()
        item, size = self._waiting.popleft()
        self._bytes -= size
        self._in_hand = True
        return item

    async def wait_room(self) -> None:
        """Wait until at most half of the limit is used. So a client that sends much and reads little delays only itself.

        **Cancellation:** no effect.
        """
        while self._bytes > self._limit // 2 and not self.overflowed:
            await self._changed.wait()

    async def wait_empty(self) -> None:
        """Wait until everything was written.

        **Cancellation:** no effect.
        """
        while (self._waiting or self._in_hand) and not self.overflowed:
            await self._changed.wait()

    async def wait_overflow(self) -> None:
        """Wait until more bytes wait for the client than the limit. The task that writes cannot notice this: it waits.

        **Cancellation:** no effect.
        """
        while not self.overflowed:
            await self._changed.wait()

    def close(self) -> None:
        """Make the waiting calls: the client is gone, so no answer has to be written before them."""
        waiting, self._waiting = self._waiting, collections.deque()
        for item, _ in waiting:
            if callable(item):
                item()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Conversation:
    """One client: negotiation, commands in order, events once it has negotiated.

    Args:
        dispatcher: executes the commands.
        say: takes a message for the client; never blocks.
        take_fd: returns the oldest descriptor that came with the client's data.
    """

    def __init__(
        self, dispatcher: Dispatcher, say: Callable[[Message], None], take_fd: Callable[[], int | None] = lambda: None
    ) -> None:
        self._dispatcher = dispatcher
        self._say = say
        self._take_fd = take_fd
        self._negotiated = False
        self._unsubscribe: Callable[[], None] | None = None
        self._afterwards: list[Callable[[], None]] = []

    def greet(self) -> None:
        """Send the first message, the greeting."""
        self._say({"QMP": {"version": dict(self._dispatcher.version), "capabilities": []}})

    def close(self) -> None:
        """Send no more events. Idempotent."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def take_fd(self) -> int | None:
        """See :class:`trimig.qmp.Session`."""
        return self._take_fd()

    def when_answered(self, call: Callable[[], None]) -> None:
        """See :class:`trimig.qmp.Session`."""
        self._afterwards.append(call)

    async def hear(self, message: tuple[Any] | Malformed) -> list[Callable[[], None]]:
        """Answer one message. Returns the functions to call when the answer has been written.

        **Cancellation:** as :meth:`Dispatcher.execute`.
        """
        await trio.lowlevel.checkpoint()
        if isinstance(message, Malformed):
            self._refuse({}, message.desc)
            return []
        ident: Message = {}
        if isinstance(message[0], dict) and "id" in message[0]:
            ident = {"id": message[0]["id"]}
        try:
            name, arguments = _command(message[0])
            result = await self._execute(name, arguments)
        except CommandFailed as error:
            self._refuse(ident, error.desc, error.error_class)
        else:
            self._say({"return": result, **ident})
        calls, self._afterwards = self._afterwards, []
        return calls

    def _refuse(self, ident: Message, desc: str, error_class: str = "GenericError") -> None:
        self._say({"error": {"class": error_class, "desc": desc}, **ident})

    async def _execute(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if name == "qmp_capabilities":
            return self._negotiate(arguments)
        if not self._negotiated:
            raise CommandFailed(
                "Expecting capabilities negotiation with 'qmp_capabilities'", error_class="CommandNotFound"
            )
        if name == "query-commands":
            _no_arguments(arguments)
            return [{"name": command} for command in ("qmp_capabilities", "query-commands", *self._dispatcher.commands)]
        return await self._dispatcher.execute(name, arguments, self)

    def _negotiate(self, arguments: Mapping[str, Any]) -> Message:
        if self._negotiated:
            raise CommandFailed(
                "Capabilities negotiation is already complete, command ignored", error_class="CommandNotFound"
            )
        wanted = arguments.get("enable", [])
        _no_arguments({name: value for name, value in arguments.items() if name != "enable"})
        if not isinstance(wanted, list):
            raise CommandFailed("Invalid parameter type for 'enable', expected: array")
        for index, name in enumerate(wanted):
            if not isinstance(name, str):
                raise CommandFailed(f"Invalid parameter type for 'enable[{index}]', expected: string")
        if wanted:
            unknown = [name for name in wanted if name != "oob"]
            raise CommandFailed(
                f"Parameter 'enable' does not accept value '{unknown[0]}'"
                if unknown
                else "Capability oob not available"
            )
        self._negotiated = True
        self._unsubscribe = self._dispatcher.subscribe(lambda event: self._say(dict(event)))
        return {}


def _no_arguments(arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        raise CommandFailed(f"Parameter '{name}' is unexpected")


def _command(message: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of a request; anything else is refused in QEMU's words."""
    if not isinstance(message, dict):
        raise CommandFailed("QMP input must be a JSON object")
    for member in message:
        # The greeting does not offer out-of-band execution, so a request for it is an error, as in QEMU.
        if member not in ("execute", "arguments", "id"):
            raise CommandFailed(f"QMP input member '{member}' is unexpected")
    if "execute" not in message:
        raise CommandFailed("QMP input lacks member 'execute'")
    name, arguments = message["execute"], message.get("arguments", {})
    if not isinstance(name, str):
        raise CommandFailed("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise CommandFailed("QMP input member 'arguments' must be an object")
    return name, arguments
