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

#: Seconds before the first new attempt, and the longest delay between two attempts. Each delay is twice the previous one.
FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 5.0


class Search:
    """Opens new connections to the same peer, until the migration makes progress on one of them.

    ``recovery_timeout`` begins with the pause, and the delay between two attempts grows. A connection without progress
    resets neither of the two: a peer that accepts and closes is treated as a peer that refuses.

    Args:
        reopen: opens a connection. None if no address is known: then a caller must give one by
            :meth:`trimig.Monitor.recover`.
        listens: True on a side that accepts connections. After a connection without progress it listens again at once.
            With a delay the connection of the real peer might come in between and be refused.
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
        """Record that the connection was lost, with the reason. Without progress since an earlier loss, that loss counts."""
        if self._since is None:
            self._since = trio.current_time()
            self._why = why

    def gained(self) -> None:
        """Record progress: fewer pages are missing than ever before. The next loss begins a new search."""
        self._since = None
        self._delay = FIRST_DELAY

    @property
    def deadline(self) -> float:
        """When the search is given up, on trio's clock; infinity without a pause."""
        return math.inf if self._since is None else self._since + self._most

    @property
    def tries(self) -> bool:
        """True if the search opens connections by itself, without a call of :meth:`trimig.Monitor.recover`."""
        return self._config.recovery_retry and self._reopen is not None

    def shorten(self, seconds: float) -> None:
        """Search for at most *seconds* from now on, because no page is missing; only the last message of the peer is."""
        self._since = trio.current_time()
        self._most = min(self._most, seconds)

    async def connection(self) -> AnyStream:
        """A new stream: to the address of :meth:`trimig.Monitor.recover`, or at intervals to the previous address.

        Raises:
            PostcopyLost: the time for the search is over, or the migration was given up.

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
    """A new connection; None if a caller gave another address during the wait, or gave the migration up.

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
