"""How long a thread has to wait for the interpreter lock, while a side of a migration works.

A thread sleeps 50 µs again and again. What a sleep takes longer is the wait for a processor, which the kernel counts in
``schedstat``, and the wait for the lock. So a call that holds the lock shows as one long wait, also on a busy machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self

from bench.measure import percentile

#: Seconds of one sleep.
_SLEEP: Final = 50e-6


class LockWait:
    """Samples the waits of this process inside of a ``with`` block.

    Args:
        when: only samples after which this is true count.
    """

    def __init__(self, when: Callable[[], bool]) -> None:
        self._when = when
        self._waits: list[float] = []
        self._over = False
        self._thread = threading.Thread(target=self._run, name="bench.lockwait", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._thread.join()

    def report(self) -> Mapping[str, float]:
        """Waits in ms: the median, 99 %, the longest, and how many were above 1 ms."""
        waits = [1000 * wait for wait in self._waits]
        if not waits:
            return {}
        return {
            "median_ms": percentile(waits, 50),
            "p99_ms": percentile(waits, 99),
            "max_ms": max(waits),
            "above_1_ms": sum(wait > 1 for wait in waits),
            "samples": len(waits),
        }

    def _run(self) -> None:
        with open(f"/proc/self/task/{threading.get_native_id()}/schedstat", "rb", buffering=0) as file:

            def queued() -> float:
                """Seconds for which this thread could run and had no processor."""
                file.seek(0)
                return int(file.read(100).split()[1]) / 1e9

            while not self._over:
                before, began = queued(), time.perf_counter()
                time.sleep(_SLEEP)
                took = time.perf_counter() - began
                if self._when():
                    self._waits.append(max(0.0, took - _SLEEP - (queued() - before)))
