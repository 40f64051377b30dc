"""Ends a connection in bounded time, whatever the peer does: a last message, then the close.

An attempt calls these after its guest has been brought back. Every await is inside a shield, because the attempt may be
ending by cancellation. Every shield has a time limit.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from .. import formats
from ..errors import TrimigError

if TYPE_CHECKING:
    from .channel import Channel

log = logging.getLogger("trimig.teardown")

T = TypeVar("T")

#: The errors of a connection that is being closed. They are logged at most, as the migration has ended before.
CLOSING_ERRORS: Final[tuple[type[Exception], ...]] = (
    TrimigError,
    OSError,
    MemoryError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.BusyResourceError,
)

#: How long a destination that has refused keeps reading, so that the peer gets the refusal and not a reset.
DRAIN_SECONDS = 0.5


async def farewell(channel: Channel, message: bytes, grace: float) -> bool:
    """Send the last message, and give the peer time to read it; False if the message could not be sent.

    If a cancelled write was cut off in an element and the rest is known, the rest is sent first
    (:meth:`.channel.Channel.mend`).

    **Cancellation:** held off, for at most *grace* seconds.
    """
    if (rest := channel.mend()) is None:
        return False
    said = False
    with trio.move_on_after(grace, shield=True):
        try:
            await channel.send(rest + message)
            said = True
            # Closing with unread input makes TCP send a reset, which can overtake the message just sent. So the
            # sending side is closed first, and what still comes in is read for a moment.
            if isinstance(channel.stream, trio.abc.HalfCloseableStream):
                await channel.stream.send_eof()
            sink = memoryview(bytearray(1 << 16))
            with trio.move_on_after(min(DRAIN_SECONDS, grace)):
                while await channel.receive_into(sink):
                    pass
        except CLOSING_ERRORS:
            pass  # the peer has closed the connection: it needs no message
    return said


async def close(resource: trio.abc.AsyncResource, grace: float = 0.0) -> None:
    """Close *resource*. An error is only logged, because the result of the migration is known before.

    Args:
        grace: seconds for an orderly close, in which TLS sends close_notify and a websocket its close frame. After
            them, or with 0 at once, the resource is closed by force.

    **Cancellation:** held off, for at most *grace* seconds. The shield around a close by force is unbounded in form,
    but the inner call does not wait: its own scope is cancelled from the start.
    """
    try:
        if grace > 0:
            # An aclose() that is cancelled closes by force: trio's interface demands that.
            with trio.move_on_after(grace, shield=True) as limit:
                await resource.aclose()
            if limit.cancelled_caught:
                log.warning("the connection could not be closed in order within %s", formats.duration(grace))
            return
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(resource)
    except CLOSING_ERRORS as error:
        log.warning("the connection could not be closed in order: %s", error)


async def bounded(call: Callable[[], Awaitable[T]], seconds: float, otherwise: T) -> T:
    """The result of *call*, or *otherwise* if it takes longer than *seconds*.

    **Cancellation:** held off, for at most *seconds*.
    """
    with trio.move_on_after(seconds, shield=True):
        return await call()
    return otherwise
