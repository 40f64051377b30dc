"""The interface between the conversation (server, websocket) and the execution of commands (the machine).

The conversation knows connections, JSON and ids, and no command but ``qmp_capabilities``. The machine knows
commands and events, and no socket. They meet in :class:`Dispatcher` and :class:`Session`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class CommandFailed(Exception):
    """A command was refused; nothing was changed.

    Attributes:
        desc: the sentence for users, the ``desc`` of QMP's error object.
        error_class: the ``class`` of QMP's error object: ``GenericError``, ``CommandNotFound``, ``DeviceNotFound``, ….
    """

    def __init__(self, desc: str, *, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


class Session(Protocol):
    """One client's connection, as a command sees it."""

    def take_fd(self) -> int | None:
        """The oldest untaken descriptor that came with the client's data; the caller owns it. None: there
        is none, or the connection cannot carry descriptors."""

    def when_answered(self, call: Callable[[], None]) -> None:
        """Call *call* when the answer to the present command has been written."""


class Dispatcher(Protocol):
    """Executes commands, and emits events."""

    @property
    def commands(self) -> Sequence[str]:
        """The names of all commands but ``qmp_capabilities`` and ``query-commands``, which the session answers."""

    @property
    def version(self) -> Mapping[str, Any]:
        """The ``version`` member of the greeting, and the answer to ``query-version``."""

    async def execute(self, name: str, arguments: Mapping[str, Any], session: Session) -> Any:
        """Run one command. The result is the ``return`` member of the answer, and can be written as JSON.

        Commands that take long (a migration) return at once and go on in a nursery of the dispatcher, so that
        the client's connection may end meanwhile.

        Raises:
            CommandFailed: unknown command, wrong arguments, or refused.

        **Cancellation:** the command has been executed or not, never half.
        """

    def subscribe(self, listener: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
        """From now on, call *listener* with each event, synchronously and in order; returns the function that ends this.

        An event is a whole QMP message: ``{"event": "STOP", "timestamp": {"seconds": …, "microseconds": …}}``, with
        ``data`` if the event has any. *listener* must not block and must not raise.
        """
