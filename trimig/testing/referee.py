"""Checks the promise "exactly one owner" at every start, stop and load of a guest, and not only afterwards.

The referee watches the guests themselves and knows neither the engine nor its statuses, on purpose.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import trio

from ..expected import expect
from ..guest import Guest


@runtime_checkable
class ReportingGuest(Protocol):
    """A guest that reports its starts, stops and loads at the moment in which they happen, as ``ScriptedGuest`` does."""

    @property
    def misuse(self) -> Sequence[str]:
        """Calls that no correct engine makes, in words."""

    def on_event(self, watcher: Callable[[str], None]) -> None:
        """Call *watcher* with ``"start"``, ``"stop"`` or ``"load"`` from now on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Violation:
    """A breach that :class:`OwnerReferee` found. ``kind`` is ``"both-run"`` or ``"stale-state"``."""

    #: Virtual seconds.
    time: float
    kind: Literal["both-run", "stale-state"]
    #: The guests; first the one that broke the promise.
    labels: tuple[str, ...]


class OwnerReferee:
    """Watches guests that are the same machine on several hosts, and notes each breach of "exactly one owner".

    * ``both-run``: two of them run at the same instant, even for a moment.
    * ``stale-state``: a guest continues from an old state although another one has been started since and this one was not
      loaded again. Then no two guests run at one instant, but the work of the other one is lost.

    Any guest can be watched. A :class:`ReportingGuest`, such as ``ScriptedGuest``, is watched at each moment. The run state of
    any other guest is read after each step of each task of the trio run in which the referee was made; for these guests
    only ``both-run`` is found, because their loads cannot be seen.

    Args:
        guests: by their labels in reports, such as ``source=…, destination=…``.

    Raises:
        TypeError: one of them is no guest.
    """

    def __init__(self, **guests: Guest) -> None:
        #: Every breach, in order.
        self.violations: list[Violation] = []
        #: Every start, stop and load: (time, label, event).
        self.history: list[tuple[float, str, str]] = []
        self._guests = guests
        self._started: dict[str, int] = {}
        self._fresh: dict[str, int] = {}
        #: The guests that report nothing, by label: whether each ran when it was last looked at.
        self._ran: dict[str, bool] = {}
        for label, guest in guests.items():
            expect(label, guest, Guest, "a trimig.Guest")
            if _runs(guest):
                self._started[label] = self._fresh[label] = 0
            if isinstance(guest, ReportingGuest):
                guest.on_event(functools.partial(self._see, label))
            else:
                self._ran[label] = _runs(guest)
        self._check_both()
        if self._ran and trio.lowlevel.in_trio_run():
            trio.lowlevel.add_instrument(_Steps(self._look))

    def running(self) -> tuple[str, ...]:
        """The labels of the guests that run now."""
        return tuple(label for label, guest in self._guests.items() if _runs(guest))

    def check(self) -> None:
        """Raise AssertionError, with the history, if there was any violation or misuse of a guest."""
        self._look()
        misuse = [
            f"{label}: {text}"
            for label, guest in self._guests.items()
            if isinstance(guest, ReportingGuest)
            for text in guest.misuse
        ]
        if self.violations or misuse:
            raise AssertionError(f"{self.violations} {misuse}; history: {self.history}")

    def _look(self) -> None:
        """Read the run states of the guests that report nothing."""
        for label, ran in self._ran.items():
            runs = _runs(self._guests[label])
            if runs is not ran:
                self._ran[label] = runs
                self.history.append((_now(), label, "start" if runs else "stop"))
                self._check_both()

    def _see(self, label: str, event: str) -> None:
        self.history.append((_now(), label, event))
        order = len(self.history)
        if event == "load":
            self._fresh[label] = order
        elif event == "start":
            self._check_both()
            last = self._fresh.get(label, -1)
            newer = tuple(other for other, at in self._started.items() if other != label and at > last >= 0)
            if newer:
                self.violations.append(Violation(_now(), "stale-state", (label, *newer)))
            self._started[label] = self._fresh[label] = order

    def _check_both(self) -> None:
        running = self.running()
        if len(running) > 1:
            self.violations.append(Violation(_now(), "both-run", running))


class _Steps(trio.abc.Instrument):
    """Calls a function after each step of each task."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Look."""
        self._look()


def _runs(guest: Guest) -> bool:
    return guest.run_state == "running"


def _now() -> float:
    return trio.current_time() if trio.lowlevel.in_trio_run() else 0.0
