"""Where the engine gets its connections from: one to begin with, one beside it, and others when they are lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from ..errors import ConfigError
from .channel import AnyStream, OpenStream
from .lobby import Entrance

if TYPE_CHECKING:
    from ..config.config import Config

#: Begins to listen at that address, or for None at the one before.
OpenEntrance: TypeAlias = Callable[[str | None], Awaitable[Entrance]]
#: Makes a stream to (or accepts one at) that address, or for None the one before.
Reopen: TypeAlias = Callable[[str | None], Awaitable[AnyStream]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """How one end connects to the other, or is connected to."""

    #: The first one.
    first: OpenStream
    #: Another when one was lost in postcopy; None where that cannot be, so that only a caller can help.
    again: Reopen | None = None
    #: One more to the same peer while the last one is there (postcopy-preempt); None where the transport has only one.
    beside: OpenStream | None = None
    #: For a destination that several may connect to: then none of the others is used.
    entrance: OpenEntrance | None = None

    def for_preempt(self, config: Config) -> OpenStream | None:
        """What opens the second connection of postcopy-preempt; None without that capability, or with an entrance.

        Raises:
            ConfigError: the capability is on, and there is no way to have two.
        """
        if not config.capabilities.postcopy_preempt or self.entrance is not None:
            return None
        if self.beside is None:
            raise ConfigError(
                "postcopy-preempt needs two connections, and there is only one of this kind: use tcp:, unix: or ws:",
                name="postcopy-preempt",
            )
        return self.beside
