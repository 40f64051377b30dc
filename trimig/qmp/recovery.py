"""Makes a destination with a paused postcopy listen for its source again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ..errors import TransportFailed

if TYPE_CHECKING:
    from ..monitor.monitor import Monitor
    from ..monitor.statistics import Event

#: Seconds until the destination listens again or reports why not.
_LISTEN_SECONDS: Final = 5.0


async def listen_again(monitor: Monitor, uri: str) -> None:
    """Listen at *uri* for the source of a paused postcopy; returns when the source can connect there.

    Raises:
        StateError: no migration is paused, or the destination listens again already.
        TrimigError: *uri* cannot be listened on.

    **Cancellation:** the destination goes on listening in the background.
    """
    events: list[Event] = []
    answered = trio.Event()

    def on_event(event: Event) -> None:
        if event.name in ("LISTENING", "RECOVERY_FAILED"):
            events.append(event)
            answered.set()

    forget = monitor.add_listener(on_event)
    try:
        monitor.recover(uri)
        with trio.move_on_after(_LISTEN_SECONDS):
            await answered.wait()
    finally:
        forget()
    if events and events[0].name == "RECOVERY_FAILED":
        raise TransportFailed(str(events[0].data["reason"]))
