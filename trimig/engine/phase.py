"""Phases of a migration: listeners are told of the begin of each, and of its end with its seconds."""

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
        seconds: how long it took; 0 until its end.
    """

    def __init__(self) -> None:
        self.seconds = 0.0


@contextlib.contextmanager
def phase(monitor: MonitorCore, name: str) -> Iterator[Phase]:
    """What the block does is the phase *name*. A phase that fails has no end: the status says how the attempt ends."""
    found, began = Phase(), trio.current_time()
    monitor.emit("PHASE", phase=name, step="begin")
    yield found
    found.seconds = trio.current_time() - began
    monitor.emit("PHASE", phase=name, step="end", seconds=found.seconds)
