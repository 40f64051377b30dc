"""Waiting for another connection while a postcopy migration is paused, on either side."""

from __future__ import annotations

import logging
import math
from typing import Final

import trio

from ..config import Config
from ..errors import PostcopyLost, TransportFailed, TrimigError
from ..monitor import Monitor
from . import teardown
from .boundary import leaves
from .channel import AnyStream
from .connections import Reopen

log = logging.getLogger("trimig.recovery")

#: Seconds before the first try again and the longest between two; each time it is twice as long.
FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 5.0


async def wait_for_connection(monitor: Monitor, config: Config, reopen: Reopen | None, since: float) -> AnyStream:
    """Another stream to the same peer: when :meth:`Monitor.recover` says where, or at intervals by itself.

    Args:
        reopen: None where no address is known; then only a caller who knows one can help.
        since: when the wait began, on trio's clock.

    Raises:
        PostcopyLost: nobody wants to wait any longer.

    **Cancellation:** there is no stream.
    """
    delay = FIRST_DELAY
    limit = since + config.recovery_timeout
    with trio.move_on_at(limit):
        while True:
            retry = trio.current_time() + delay if config.recovery_retry and reopen is not None else math.inf
            with trio.move_on_at(retry):
                while (uri := monitor.take_recovery()) is None and monitor.given_up is None:
                    await monitor.wait_changed()
            if (reason := monitor.given_up) is not None:
                raise PostcopyLost(f"the paused migration was given up: {reason}")
            delay = min(2 * delay, LONGEST_DELAY)
            try:
                if reopen is None:
                    raise TransportFailed("this migration was given a stream, so no other can be opened")
                if (stream := await _unless_told_otherwise(monitor, reopen, uri)) is not None:
                    return stream
            except TrimigError as error:
                log.info("no new connection: %s", error)
                monitor.counters.error = str(error)
                monitor.emit("RECOVERY_FAILED", reason=str(error))
    raise PostcopyLost(f"no new connection came within {config.recovery_timeout:g} s")


async def _unless_told_otherwise(monitor: Monitor, reopen: Reopen, uri: str | None) -> AnyStream | None:
    """A connection; None if meanwhile somebody has said where else to look, or has given up.

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
            await teardown.close(stream)
        if len(errors) != 1:
            raise
        raise errors[0] from None
    return stream
