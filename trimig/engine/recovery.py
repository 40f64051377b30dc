"""Waiting for another connection while a postcopy migration is paused, on either side."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import trio

from .. import formats
from ..channel import closing
from ..errors import PostcopyLost, TransportFailed, TrimigError
from .outcome import leaves

if TYPE_CHECKING:
    from ..channel.channel import AnyStream
    from ..channel.connections import Reopen
    from ..config.config import Config
    from ..monitor.core import MonitorCore

log = logging.getLogger("trimig.recovery")

#: Seconds before the first try again and the longest between two; each time it is twice as long.
FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 5.0


class Search:
    """Other connections to the same peer, one after the other, until one has brought the migration forward.

    The time for it begins with the pause, and the delays between two attempts grow. A connection on which nothing was
    gained changes neither: a peer that accepts and closes is no better than one that refuses.

    Args:
        reopen: None where no address is known; then only a caller who knows one can help.
        listens: this side is connected to. It listens again at once when a connection has brought nothing, so that the
            right one does not come in between.
    """

    def __init__(self, monitor: MonitorCore, config: Config, reopen: Reopen | None, *, listens: bool) -> None:
        self._monitor = monitor
        self._config = config
        self._reopen = reopen
        self._listens = listens
        self._since: float | None = None
        self._why = "it was paused"
        self._delay = FIRST_DELAY
        self._most = config.recovery_timeout

    def paused(self, why: str) -> None:
        """The connection is lost, and *why*. If nothing was gained since the last loss, that one counts."""
        if self._since is None:
            self._since = trio.current_time()
            self._why = why

    def gained(self) -> None:
        """The migration has got further than it ever was: the next loss begins a new search."""
        self._since = None
        self._delay = FIRST_DELAY

    @property
    def deadline(self) -> float:
        """When it is given up, on trio's clock."""
        return math.inf if self._since is None else self._since + self._most

    @property
    def tries(self) -> bool:
        """It looks for connections without being told to."""
        return self._config.recovery_retry and self._reopen is not None

    def shorten(self, seconds: float) -> None:
        """Search for no longer than *seconds* from now on: nothing is missing but the last word."""
        self._since = trio.current_time()
        self._most = min(self._most, seconds)

    async def connection(self) -> AnyStream:
        """Another stream: when :meth:`trimig.Monitor.recover` says where, or at intervals by itself.

        Raises:
            PostcopyLost: the time is over, or the migration was given up.

        **Cancellation:** there is no stream.
        """
        with trio.move_on_at(self.deadline):
            return await self._connection()
        raise PostcopyLost(
            f"no connection on which the migration could go on came within {formats.duration(self._most)} after the last was "
            f"lost ({self._why})"
        )

    async def _connection(self) -> AnyStream:
        monitor, reopen = self._monitor, self._reopen
        while True:
            retry = trio.current_time() + self._delay if self.tries else math.inf
            with trio.move_on_at(retry):
                while (uri := monitor.take_recovery()) is None and monitor.given_up is None:
                    await monitor.wait_changed()
            if (reason := monitor.given_up) is not None:
                raise PostcopyLost(f"the paused migration was given up: {reason}")
            before, self._delay = self._delay, min(2 * self._delay, LONGEST_DELAY)
            try:
                if reopen is None:
                    raise TransportFailed("this migration was given a stream, so no other can be opened")
                if (stream := await _unless_told_otherwise(monitor, reopen, uri)) is not None:
                    if self._listens:
                        self._delay = before
                    return stream
            except TrimigError as error:
                log.info("no new connection: %s", error)
                monitor.counters.error = str(error)
                monitor.emit("RECOVERY_FAILED", reason=str(error))


async def _unless_told_otherwise(monitor: MonitorCore, reopen: Reopen, uri: str | None) -> AnyStream | None:
    """A connection; None if meanwhile another address was given, or the recovery was given up.

    **Cancellation:** there is no stream.
    """
    stream: AnyStream | None = None

    async def look() -> None:
        nonlocal stream
        stream = await reopen(uri)
        nursery.cancel_scope.cancel("connected")

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            while not monitor.recovery_wanted and monitor.given_up is None:
                await monitor.wait_changed()
            nursery.cancel_scope.cancel("told otherwise")
    except BaseExceptionGroup as group:
        errors = [leaf for leaf in leaves(group) if isinstance(leaf, TrimigError)]
        if stream is not None:
            await closing.close(stream)
        if len(errors) != 1:
            raise
        raise errors[0] from None
    return stream
