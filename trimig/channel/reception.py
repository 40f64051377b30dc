"""Which connections a destination takes: the first one, one beside it, and others when they are lost.

Where several can come (a URI that is listened on), a :class:`.lobby.Lobby` tells them apart. A stream that was given, a
command, a descriptor or a file is the one connection that there is: it is taken as it comes.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Final

import trio

from .. import formats
from ..errors import TransportFailed
from .channel import AnyStream, Channel, OpenStream
from .lobby import Chosen, Judge, Lobby, Verdict

if TYPE_CHECKING:
    from ..config.config import Config
    from ..monitor.core import MonitorCore
    from .connections import Connections

log = logging.getLogger("trimig.destination")

#: Seconds of silence after which a source is given up that another connection has told to be set up in another way.
_SUSPICION_SECONDS: Final = 5.0


class Reception:
    """The connections of one incoming migration.

    Attributes:
        lobby: where a second connection waits; None where there can be none.
    """

    def __init__(self, connections: Connections, config: Config, monitor: MonitorCore) -> None:
        self._connections = connections
        self._config = config
        self._monitor = monitor
        #: There is to be a second one.
        self.wants_second = config.capabilities.postcopy_preempt
        self.lobby: Lobby | None = None
        self._chosen: Chosen | None = None
        self._look = trio.Event()  # a connection that is of no use has said something
        self._suspicion = trio.CancelScope()

    async def first(self, nursery: trio.Nursery, judge: Judge, others: Judge) -> Channel:
        """The main connection of the migration.

        Args:
            nursery: of the attempt; the other connections are judged in it.
            judge: says which connection that is.
            others: says of any other what it is.

        Raises:
            ConfigError: there is to be a second one, and there cannot be.
            TransportFailed: there is none, and there will be none.

        **Cancellation:** as for an error; nothing is left open.
        """
        self._connections.for_preempt(self._config)
        if self._connections.entrance is None:
            return self.channel(await self._connections.first())
        channel = self.channel(await self._meet(nursery, None, judge))
        assert self.lobby is not None
        self._suspicion = trio.CancelScope()
        nursery.start_soon(self._suspect, channel, self._suspicion, name="trimig.suspicion")
        self.lobby.watch(functools.partial(self._others, others))
        return channel

    def _others(self, judge: Judge, data: bytes) -> Verdict:
        try:
            return judge(data)
        finally:
            self._look.set()

    async def _suspect(self, channel: Channel, scope: trio.CancelScope) -> None:
        """A source that is set up in another way may wait for what it will never get. Nothing else would end that soon.

        Raises:
            TransportFailed: a connection from where the main one came has told so, and the main one is silent.
        """
        with scope:
            while True:
                await self._look.wait()
                self._look = trio.Event()
                while self.hint() is not None:
                    before = channel.received
                    await trio.sleep(_SUSPICION_SECONDS)
                    if channel.received == before:
                        raise TransportFailed(f"the source sent nothing for {formats.duration(_SUSPICION_SECONDS)}")

    async def again(self, nursery: trio.Nursery, uri: str | None, judge: Judge) -> AnyStream:
        """Another main connection, at *uri* or where the last one was; :meth:`channel` makes it usable.

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
        """Where another connection would come from is known."""
        return self._connections.entrance is not None or self._connections.again is not None

    async def _meet(self, nursery: trio.Nursery, uri: str | None, judge: Judge) -> AnyStream:
        assert self._connections.entrance is not None
        lobby = self.lobby = Lobby(nursery, await self._connections.entrance(uri), self._told)
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
        """*stream*, with what was read of it standing in front."""
        known = self._chosen is not None and self._chosen.stream is stream
        first = self._chosen.first if known and self._chosen is not None else b""
        return Channel(stream, stall_timeout=self._config.stall_timeout, first=first)

    def expect_second(self, nursery: trio.Nursery) -> None:
        """The main connection is there, and another one is to come."""
        beside = self._connections.beside
        if self.wants_second and self._connections.entrance is None and beside is not None:
            self.lobby = Lobby(nursery, _Beside(beside), self._told)
            self.lobby.open()

    def settle(self) -> None:
        """Pages come on the main connection, as they should: without a second one, all connections are there."""
        self._suspicion.cancel("pages come")
        if not self.wants_second:
            self.close()

    def close(self) -> None:
        """Nothing more is expected. Idempotent."""
        self._suspicion.cancel("nothing more is expected")
        if self.lobby is not None:
            self.lobby.close()

    def hint(self) -> str | None:
        """What connections that were dropped say about why the migration failed; None if they say nothing.

        Once there is a main connection, only those from where it came from count.
        """
        if self.lobby is None:
            return None
        return self.lobby.hint(self._chosen.origins if self._chosen is not None else None)

    def _told(self, address: str, reason: str) -> None:
        log.warning("a connection from %s was dropped: %s", address, reason)
        self._monitor.emit("CONNECTION_DROPPED", address=address, reason=reason)


class _Beside:
    """An entrance through which one connection comes."""

    def __init__(self, accept: OpenStream) -> None:
        self._accept: OpenStream | None = accept

    async def meet(self) -> AnyStream:
        """The one; from then on none.

        **Cancellation:** it can still come.
        """
        if self._accept is None:
            await trio.sleep_forever()
        assert self._accept is not None
        stream = await self._accept()
        self._accept = None
        return stream

    async def admit(self, stream: AnyStream) -> AnyStream:
        """It has no handshake.

        **Cancellation:** no effect.
        """
        return stream

    def close(self) -> None:
        """There is nothing to close."""
