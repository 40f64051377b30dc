"""How the engine gets its connections: the first one, others beside it, and new ones for a recovery."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..errors import ConfigError
from .channel import AnyStream, OpenStream
from .lobby import Entrance

if TYPE_CHECKING:
    from .channels import Beside

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
    #: Opens another connection to the same peer; None if the transport has only one connection.
    beside: OpenStream | None = None
    #: Opens the listener of a destination to which several peers may connect. If it is given, the other three fields are
    #: not used.
    entrance: OpenEntrance | None = None

    def check_beside(self, wanted: Sequence[Beside]) -> None:
        """Check that connections beside the main one can be opened.

        Raises:
            ConfigError: a capability needs them, and the transport has only one connection.
        """
        if wanted and self.entrance is None and self.beside is None:
            name = wanted[0].capability
            raise ConfigError(
                f"{name} needs several connections, and there is only one of this kind: use tcp:, unix: or ws:",
                name=name,
            )
