"""Turns: how many attempts of one run of trio have their guests stopped at the same time.

A switchover takes about 15 turns of the run loop. If 200 attempts stop their guests in the same moment, each of these turns
has the steps of all of them, and each guest stands still for as long as all switchovers take together. So only a few at a
time stop their guests. The guests of the others run on, and the time of all migrations together stays the same.

An attempt whose peer does not answer keeps its turn for as long as it waits. So the others do not wait for ever: if no turn
was given back for a second, the first one that waits goes on.
"""

from __future__ import annotations

import collections
import math
from typing import Final

import trio

#: Attempts that may have their guests stopped. More than one, because a switchover waits for its peer several times.
MOST: Final = 4
#: Seconds without a turn given back after which the next attempt goes on all the same: many times the length of a
#: switchover on a busy host.
PATIENCE: Final = 1.0


class _Queue:
    """The attempts of one run of trio that have a turn, and those that wait for one, first come, first served."""

    def __init__(self) -> None:
        self._held = 0
        #: When the last turn began, on trio's clock.
        self._begun = -math.inf
        self._waiting: collections.deque[trio.Event] = collections.deque()

    async def take(self) -> bool:
        """See :meth:`Turn.take`."""
        if self._held < MOST and not self._waiting:
            self._begin()
            return False
        ready = trio.Event()
        self._waiting.append(ready)
        try:
            await self._wait(ready)
        except trio.Cancelled:
            if ready.is_set():
                self.give_back()
            else:
                self._waiting.remove(ready)
            raise
        return True

    def give_back(self) -> None:
        """End one turn, and pass it on."""
        self._held -= 1
        if self._waiting:
            self._next()

    async def _wait(self, ready: trio.Event) -> None:
        since = trio.current_time()
        while not ready.is_set():
            with trio.move_on_at(max(since, self._begun) + PATIENCE):
                await ready.wait()
            late = trio.current_time() >= max(since, self._begun) + PATIENCE
            # The first one in the queue waits for the longest time, so it is woken with those behind it, or before them.
            if late and self._waiting and self._waiting[0] is ready:
                self._next()

    def _next(self) -> None:
        self._begin()
        self._waiting.popleft().set()

    def _begin(self) -> None:
        self._held += 1
        self._begun = trio.current_time()


_queue: trio.lowlevel.RunVar[_Queue] = trio.lowlevel.RunVar("trimig.turns")


def _of_this_run() -> _Queue:
    try:
        return _queue.get()
    except LookupError:
        made = _Queue()
        _queue.set(made)
        return made


class Turn:
    """The turn of one attempt."""

    def __init__(self) -> None:
        self._queue: _Queue | None = None

    async def take(self) -> bool:
        """Wait for the turn. No effect if the attempt has it.

        Returns:
            True if it had to wait.

        **Cancellation:** the attempt has no turn.
        """
        if self._queue is not None:
            return False
        queue = _of_this_run()
        waited = await queue.take()
        self._queue = queue
        return waited

    def close(self) -> None:
        """Let another attempt have its turn. Idempotent; the turn may be taken again."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.give_back()
