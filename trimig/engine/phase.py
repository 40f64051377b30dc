"""Phases of a migration. The begin of each phase is an event, and so is its end, with its duration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from ..monitor.core import MonitorCore


class Phase:
    """One phase.

    Attributes:
        seconds: the duration of the phase; 0 until its end.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = trio.current_time()

    def end(self) -> None:
        """Take the time of the end."""
        self.seconds = trio.current_time() - self._began


@contextlib.contextmanager
def phase(monitor: MonitorCore, name: str) -> Iterator[Phase]:
    """Run the block as the phase *name*. A phase that fails has no end event: the status shows how the attempt ends."""
    found = Phase()
    monitor.emit("PHASE", phase=name, step="begin")
    yield found
    found.end()
    monitor.emit("PHASE", phase=name, step="end", seconds=found.seconds)
