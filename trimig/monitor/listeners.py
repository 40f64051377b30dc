"""Functions that are called at each event of a migration, and that cannot hurt it.

What a listener raises is its own affair: it is logged, and the listener is removed. This is the only place that catches
whatever a stranger's function may raise.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import TypeAlias

from .statistics import Event

log = logging.getLogger("trimig.monitor.monitor")

Listener: TypeAlias = Callable[[Event], object]


class Listeners:
    """The listeners of one monitor."""

    def __init__(self) -> None:
        self._listeners: dict[object, Listener] = {}
        self._waiting: collections.deque[Event] = collections.deque()
        self._telling = False

    def add(self, listener: Listener) -> Callable[[], None]:
        """Call *listener* at each event from now on; returns what ends it, which may be called more than once."""
        key = object()
        self._listeners[key] = listener

        def remove() -> None:
            self._listeners.pop(key, None)

        return remove

    def tell(self, event: Event) -> None:
        """Call all listeners, in the order in which they were added.

        What a listener does may cause the next event (a cancel does); that is told when all have heard of this one, so
        that everybody hears the same order.
        """
        self._waiting.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._waiting:
                event = self._waiting.popleft()
                for key, listener in tuple(self._listeners.items()):
                    if key in self._listeners:  # another one may have removed it meanwhile
                        self._call(key, listener, event)
        finally:
            self._telling = False

    def _call(self, key: object, listener: Listener, event: Event) -> None:
        try:
            listener(event)
        except Exception:
            log.exception("a listener failed at the event %s and is called no more", event.name)
            self._listeners.pop(key, None)
