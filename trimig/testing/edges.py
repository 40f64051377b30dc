"""The instrument behind the sweeps: it counts *edges* and performs an action at one of them.

An edge is the instant just before or just after the run loop runs one step of one task. *Before*: the task has been
woken with its result and meets a cancel one checkpoint later (the call succeeded, and then the task was cancelled).
*After*: the task is parked, and a cancel takes the task out of its wait. Both kinds are needed: they find different
mistakes.

Cancelling a scope and jumping the clock are safe in these two hooks, because trio has set a current task. They are not
safe in ``before_io_wait``, where trio has computed the timeout of the wait already.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Final, Literal, Self, get_args

import outcome  # trio's dependency: trio.lowlevel.reschedule takes its types
import trio

EdgeKind = Literal["before", "after"]
EDGE_KINDS: Final[tuple[EdgeKind, ...]] = get_args(EdgeKind)

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def belongs_to(task: trio.lowlevel.Task, root: trio.Nursery) -> bool:
    """Whether *task* was started in *root*, or in a nursery anywhere below it."""
    nursery = task.parent_nursery
    while nursery is not None:
        if nursery is root:
            return True
        nursery = nursery.parent_task.parent_nursery
    return False


class EdgeInstrument(trio.abc.Instrument):
    """Records the edges of all tasks below one nursery, and performs an action at given ones.

    Edges count from :meth:`open` to :meth:`close`, from 1, separately for each kind.

    Args:
        actions: by (kind, number of the edge).
    """

    def __init__(self, actions: Mapping[tuple[EdgeKind, int], Callable[[], None]]) -> None:
        self._actions = dict(actions)
        self._root: trio.Nursery | None = None
        self._known: dict[trio.lowlevel.Task, bool] = {}
        #: Names of the tasks at each edge. Two runs with the same seed have equal names up to the action.
        self.traces: dict[EdgeKind, list[str]] = {"before": [], "after": []}
        #: Every instant of virtual time at which there was an edge, ascending.
        self.times: list[float] = []
        #: When each action happened, in virtual seconds.
        self.fired: list[float] = []

    def open(self, root: trio.Nursery) -> None:
        """Count the edges of the tasks below *root* from now on."""
        self._root = root

    def close(self) -> None:
        """Count no more."""
        self._root = None
        self._known.clear()

    def position(self) -> dict[EdgeKind, int]:
        """How many edges of each kind there have been."""
        return {kind: len(trace) for kind, trace in self.traces.items()}

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count an edge of the kind "before"."""
        self._edge("before", task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count an edge of the kind "after"."""
        self._edge("after", task)

    def _edge(self, kind: EdgeKind, task: trio.lowlevel.Task) -> None:
        if self._root is None:
            return
        ours = self._known.get(task)
        if ours is None:
            ours = self._known[task] = belongs_to(task, self._root)
        if not ours:
            return
        now = trio.current_time()
        if not self.times or self.times[-1] != now:
            self.times.append(now)
        trace = self.traces[kind]
        trace.append(task.name)
        action = self._actions.get((kind, len(trace)))
        if action is not None:
            self.fired.append(now)
            action()


class Stuck(AssertionError):
    """The run is stuck: every task waits, and no timer is set."""


class StuckInstrument(trio.abc.Instrument):
    """Breaks a run that would hang for ever, which a time limit cannot do if a shield holds the cancellation off.

    With every task parked and no deadline left, a run on an autojump clock goes round its I/O wait without a step.
    After many such rounds the tasks at the leaves are woken with :class:`Stuck`, wherever they wait. That breaks the
    contract of the primitive they wait for, so only the error of that run is valid. A wait for a real socket or thread
    looks the same as a hang; sweeps have none.
    """

    _ROUNDS = 2000

    def __init__(self) -> None:
        self._main: trio.lowlevel.Task | None = None
        self._rounds = 0

    def watch(self, main: trio.lowlevel.Task) -> None:
        """Watch *main* and the tasks below it."""
        self._main = main

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Begin to count idle rounds again, because a task runs."""
        self._rounds = 0

    def before_io_wait(self, timeout: float) -> None:
        """Count a round of the run loop; after many rounds without a task step, break the run."""
        self._rounds += 1
        if self._rounds >= self._ROUNDS and self._main is not None:
            self._rounds = 0
            stuck = list(_leaves(self._main))
            names = ", ".join(task.name for task in stuck)
            for task in stuck:
                trio.lowlevel.reschedule(task, outcome.Error(Stuck(f"stuck for ever: {names}")))


def _leaves(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    if not children:
        yield task
    for child in sorted(children, key=lambda child: child.name):
        yield from _leaves(child)


class InstrumentErrors(logging.Handler):
    """Collects the errors of all instruments while the block runs; trio would only log them."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self._logger = logging.getLogger("trio.abc.Instrument")

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message and the exception."""
        cause = record.exc_info[1] if record.exc_info else None
        self.errors.append(f"{record.getMessage()} ({cause!r})")

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._logger.removeHandler(self)


def first_difference(expected: Sequence[str], found: Sequence[str]) -> int | None:
    """The first place (from 1) at which two traces differ, apart from addresses in names; None if they are equal."""
    if expected == found:
        return None
    for place, (left, right) in enumerate(zip(expected, found, strict=False), 1):
        if left != right and _ADDRESS.sub("0x", left) != _ADDRESS.sub("0x", right):
            return place
    return None if len(expected) == len(found) else min(len(expected), len(found)) + 1
