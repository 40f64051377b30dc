"""The connections that a destination accepts: the first one, others beside it, and those of a recovery.

A URI on which trimig listens can get several connections; a :class:`.lobby.Lobby` tells them apart. A stream of the
caller, a command, a descriptor or a file is the only connection; it is taken without a check of its first bytes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from .. import formats
from ..errors import TransportFailed
from .channel import AnyStream, Channel, OpenStream
from .lobby import Chosen, Judge, Lobby, Verdict

if TYPE_CHECKING:
    from ..config.config import Config
    from ..monitor.core import MonitorCore
    from .channels import Beside, ChannelKind
    from .connections import Connections

log = logging.getLogger("trimig.destination")

#: Seconds of silence after which the attempt ends, if a dropped connection shows that the source has other settings
#: (such as multifd). Such a source waits for connections that this destination never accepts.
_SUSPICION_SECONDS: Final = 5.0


class Reception:
    """The connections of one incoming migration.

    Attributes:
        lobby: the lobby in which connections wait; None if there can be no further connection.
        beside: the connections that are wanted beside the main one.
    """

    def __init__(
        self, connections: Connections, config: Config, monitor: MonitorCore, beside: Sequence[Beside]
    ) -> None:
        self._connections = connections
        self._config = config
        self._monitor = monitor
        self.beside = tuple(beside)
        self._lacking = {wanted.kind for wanted in beside}
        self.lobby: Lobby | None = None
        self._chosen: Chosen | None = None
        self._look = trio.Event()  # set when a connection that is not the main one has sent bytes
        self._suspicion = trio.CancelScope()

    async def first(self, nursery: trio.Nursery, judge: Judge, others: Judge) -> Channel:
        """The main connection of the migration.

        Args:
            nursery: of the attempt; the tasks that read the other connections run in it.
            judge: recognizes the main connection by its first bytes.
            others: examines the first bytes of each other connection.

        Raises:
            ConfigError: a capability needs several connections, and the transport has only one.
            TransportFailed: no connection came, and none can come any more.

        **Cancellation:** nothing is left open, as after an error.
        """
        self._connections.check_beside(self.beside)
        if self._connections.entrance is None:
            return self.channel(await self._connections.first())
        channel = self.channel(await self._meet(nursery, None, judge))
        assert self.lobby is not None
        self._suspicion = trio.CancelScope()
        nursery.start_soon(self._suspect, self._suspicion, name="trimig.suspicion")
        self.lobby.watch(self.watching(others))
        return channel

    def watching(self, judge: Judge) -> Judge:
        """*judge* for connections that come once there is a main one. They may show that the source has other settings."""
        return functools.partial(self._others, judge)

    def _others(self, judge: Judge, data: bytes) -> Verdict:
        try:
            return judge(data)
        finally:
            self._look.set()

    async def _suspect(self, scope: trio.CancelScope) -> None:
        """End the attempt if the source has other settings and is silent.

        Such a source may wait for a connection that this destination does not accept. No other timeout ends that soon.

        Raises:
            TransportFailed: a dropped connection of the same origin shows other settings, and all connections are
                silent for ``_SUSPICION_SECONDS``.
        """
        with scope:
            while True:
                # At first for the connections that came before the main one.
                while self.hint() is not None:
                    before = self._monitor.counters.transferred
                    await trio.sleep(_SUSPICION_SECONDS)
                    if self._monitor.counters.transferred == before:
                        raise TransportFailed(f"the source sent nothing for {formats.duration(_SUSPICION_SECONDS)}")
                await self._look.wait()
                self._look = trio.Event()

    async def again(self, nursery: trio.Nursery, uri: str | None, judge: Judge) -> AnyStream:
        """A new main connection at *uri*, or with None at the previous address; :meth:`channel` makes a channel of it.

        Raises:
            TransportFailed: as :meth:`first`.

        **Cancellation:** as for an error.
        """
        self.close()
        if self._connections.entrance is not None:
            return await self._meet(nursery, uri, judge)
        assert self._connections.again is not None
        return await self._connections.again(uri)

    @property
    def can_come_again(self) -> bool:
        """True if :meth:`again` can be called: the transport can accept a new connection."""
        return self._connections.entrance is not None or self._connections.again is not None

    async def _meet(self, nursery: trio.Nursery, uri: str | None, judge: Judge) -> AnyStream:
        assert self._connections.entrance is not None
        count = sum(wanted.count for wanted in self.beside)
        lobby = self.lobby = Lobby(nursery, await self._connections.entrance(uri), self._told, wanted=count)
        if self._chosen is not None:
            lobby.prefer(self._chosen.origins)
        lobby.open()
        done = False
        try:
            self._chosen = await lobby.choose(judge)
            done = True
        finally:
            if not done:
                lobby.close()
        lobby.prefer(self._chosen.origins)
        return self._chosen.stream

    def channel(self, stream: AnyStream) -> Channel:
        """A channel over *stream*. The bytes that the lobby has read from it come first."""
        known = self._chosen is not None and self._chosen.stream is stream
        first = self._chosen.first if known and self._chosen is not None else b""
        return Channel(stream, stall_timeout=self._config.stall_timeout, first=first)

    def expect_beside(self, nursery: trio.Nursery) -> None:
        """Accept the connections beside the main one, if any are wanted and they do not come through the entrance."""
        accept = self._connections.beside
        if self.beside and self._connections.entrance is None and accept is not None:
            count = sum(wanted.count for wanted in self.beside)
            self.lobby = Lobby(nursery, _Beside(accept, count), self._told)
            self.lobby.open()

    def complete(self, kind: ChannelKind) -> None:
        """All connections of *kind* have come."""
        self._lacking.discard(kind)

    def settle(self) -> None:
        """The source sends pages, so it has the same settings: stop suspecting it.

        If no connection is lacking beside the main one, no further connection is accepted.
        """
        self._suspicion.cancel("pages come")
        if not self._lacking:
            self.close()

    def close(self) -> None:
        """Accept no further connection. Idempotent."""
        self._suspicion.cancel("nothing more is expected")
        if self.lobby is not None:
            self.lobby.close()

    def hint(self) -> str | None:
        """A reason for the failed migration that the dropped connections show; None if they show none.

        Once a main connection was chosen, only dropped connections of the same origin count.
        """
        if self.lobby is None:
            return None
        return self.lobby.hint(self._chosen.origins if self._chosen is not None else None)

    def _told(self, address: str, reason: str) -> None:
        log.warning("a connection from %s was dropped: %s", address, reason)
        self._monitor.emit("CONNECTION_DROPPED", address=address, reason=reason)


class _Beside:
    """An entrance that yields *count* connections."""

    def __init__(self, accept: OpenStream, count: int) -> None:
        self._accept = accept
        self._left = count

    async def meet(self) -> AnyStream:
        """The next connection. After the last one a call waits for ever.

        **Cancellation:** the connection can still come.
        """
        if not self._left:
            await trio.sleep_forever()
        stream = await self._accept()
        self._left -= 1
        return stream

    async def admit(self, stream: AnyStream) -> AnyStream:
        """*stream* itself, because its handshakes are over.

        **Cancellation:** no effect.
        """
        return stream

    def close(self) -> None:
        """Do nothing: no listener was opened."""
