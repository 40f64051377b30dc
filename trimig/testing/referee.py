"""Checks the promise "exactly one owner" at every start, stop and load of a guest, and not only afterwards.

The referee watches the guests themselves and knows neither the engine nor its statuses, on purpose.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal

import trio

if TYPE_CHECKING:
    from .fakes import ScriptedGuest


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

    Args:
        guests: by their labels in reports, such as ``source=…, destination=…``.
    """

    def __init__(self, **guests: ScriptedGuest) -> None:
        #: Every breach, in order.
        self.violations: list[Violation] = []
        #: Every start, stop and load: (time, label, event).
        self.history: list[tuple[float, str, str]] = []
        self._guests = guests
        self._started: dict[str, int] = {}
        self._fresh: dict[str, int] = {}
        for label, guest in guests.items():
            if guest.running:
                self._started[label] = self._fresh[label] = 0
            guest.on_event(functools.partial(self._see, label))
        self._check_both()

    def running(self) -> tuple[str, ...]:
        """The labels of the guests that run now."""
        return tuple(label for label, guest in self._guests.items() if guest.running)

    def check(self) -> None:
        """Raise AssertionError, with the history, if there was any violation or misuse of a guest."""
        misuse = [f"{label}: {text}" for label, guest in self._guests.items() for text in guest.misuse]
        if self.violations or misuse:
            raise AssertionError(f"{self.violations} {misuse}; history: {self.history}")

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


def _now() -> float:
    return trio.current_time() if trio.lowlevel.in_trio_run() else 0.0
