"""How the engine gets its connections: the first one, the second one of postcopy-preempt, and new ones for a recovery."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from ..errors import ConfigError
from .channel import AnyStream, OpenStream
from .lobby import Entrance

if TYPE_CHECKING:
    from ..config.config import Config

#: Listens at the given address; None stands for the previous address.
OpenEntrance: TypeAlias = Callable[[str | None], Awaitable[Entrance]]
#: Opens a stream to the given address, or accepts a stream there; None stands for the previous address.
Reopen: TypeAlias = Callable[[str | None], Awaitable[AnyStream]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """The functions by which one side opens or accepts its connections."""

    #: Opens the first connection.
    first: OpenStream
    #: Opens a new connection after the last one was lost in postcopy. None if the transport cannot do that: then the
    #: caller must give a stream for the recovery.
    again: Reopen | None = None
    #: Opens a second connection to the same peer (postcopy-preempt); None if the transport has only one connection.
    beside: OpenStream | None = None
    #: Opens the listener of a destination to which several peers may connect. If it is given, the other three fields are
    #: not used.
    entrance: OpenEntrance | None = None

    def for_preempt(self, config: Config) -> OpenStream | None:
        """The function that opens the second connection; None without postcopy-preempt, and None with an entrance.

        Raises:
            ConfigError: the capability is on, and the transport has only one connection.
        """
        if not config.capabilities.postcopy_preempt or self.entrance is not None:
            return None
        if self.beside is None:
            raise ConfigError(
                "postcopy-preempt needs two connections, and there is only one of this kind: use tcp:, unix: or ws:",
                name="postcopy-preempt",
            )
        return self.beside
