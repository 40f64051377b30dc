"""Functions that are called at each event of a migration, and that cannot break it.

An error of a listener is logged, and the listener is removed. This is the only place that catches every exception of a
caller's function.
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
        """Call *listener* at each event from now on. Returns a function that removes it, which may be called more than
        once.
        """
        key = object()
        self._listeners[key] = listener

        def remove() -> None:
            self._listeners.pop(key, None)

        return remove

    def tell(self, event: Event) -> None:
        """Call all listeners, in the order in which they were added.

        A listener may cause another event (for example by a cancel). The listeners are called for it after all of them were
        called for *event*, so that all see the same order.
        """
        self._waiting.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._waiting:
                event = self._waiting.popleft()
                for key, listener in tuple(self._listeners.items()):
                    if key in self._listeners:  # another listener may have removed it meanwhile
                        self._call(key, listener, event)
        finally:
            self._telling = False

    def _call(self, key: object, listener: Listener, event: Event) -> None:
        try:
            listener(event)
        except Exception:
            log.exception("a listener failed at the event %s and is called no more", event.name)
            self._listeners.pop(key, None)
