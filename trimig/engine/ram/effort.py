"""What encoding costs: the time of a processor, and the time that passes meanwhile."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(slots=True)
class Effort:
    """What the calls of one encoder took.

    Attributes:
        processor: seconds of processor time, of all threads.
        elapsed: the sum of the seconds that passed in these threads meanwhile.
    """

    processor: float = 0.0
    elapsed: float = 0.0

    def add(self, more: Effort) -> None:
        """Count *more*, too."""
        self.processor += more.processor
        self.elapsed += more.elapsed


def now() -> Effort:
    """The processor time of this thread, and the time."""
    return Effort(time.thread_time(), time.perf_counter())


def timed(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> tuple[T, Effort]:
    """The result of *function*, which is called in this thread, and what it took."""
    before = now()
    result = function(*args, **kwargs)
    after = now()
    return result, Effort(after.processor - before.processor, after.elapsed - before.elapsed)
