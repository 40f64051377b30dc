"""Checks the promise "exactly one owner" at every start, stop and load of a guest, and not only afterwards; and that a
guest arrives as it was.

The referee watches the guests themselves and knows neither the engine nor its statuses, on purpose.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol, runtime_checkable

import trio

from .. import formats
from ..errors import NotOwner, Owner, TrimigError
from ..expected import expect
from ..guest import Guest, LazyGuest
from .content import Content, content_of, differences

#: Virtual seconds that ``resume`` of a guest may take to refuse.
_REFUSES_WITHIN: Final = 60.0

#: The referees that were made in this run of a scenario; None outside of a run.
made: Final[contextvars.ContextVar[list[OwnerReferee] | None]] = contextvars.ContextVar("made", default=None)


class BrokenRule(AssertionError):
    """A rule that the kit itself checks was broken. The message says all; the traceback shows lines of the kit only."""


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
    """A breach that :class:`OwnerReferee` found. It lists the kinds."""

    #: Virtual seconds.
    time: float
    #: See :class:`OwnerReferee`.
    kind: Literal["both-run", "stale-state", "other-content", "resumed"]
    #: The guests; first the one that broke the promise.
    labels: tuple[str, ...]
    #: What was found, if the kind does not say it all.
    text: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"at {formats.duration(self.time)}, {self.kind}: {', '.join(self.labels)}: {self.text or _SENTENCES[self.kind]}"


_SENTENCES: Final = {
    "both-run": "they run at the same time",
    "stale-state": "the first one was started from an old state after the other one had run",
}


class OwnerReferee:
    """Watches guests that are the same machine on several hosts, and notes each breach of "exactly one owner".

    * ``both-run``: two of them run at the same instant, even for a moment.
    * ``stale-state``: a guest continues from an old state although another one has been started since and this one was not
      loaded again. Then no two guests run at one instant, but the work of the other one is lost.
    * ``other-content``: a guest became the owner with other memory, or other bytes of a device, than the guest had that was
      handed over, at the moment of the decision.
    * ``resumed``: ``resume()`` of a guest that is not the owner did not raise NotOwner. :meth:`probe` finds this; the run
      of a scenario calls it.

    Any guest can be watched. A :class:`ReportingGuest`, such as ``ScriptedGuest``, is watched at each moment. The run state of
    any other guest is read after each step of each task of the trio run in which the referee was made; for these guests
    ``stale-state`` is not found, because their loads cannot be seen. The owner of each guest is read after each step, too.

    The content is copied when a guest is handed over, and compared when another one becomes the owner, before it runs. The
    devices are saved for that once more on each side. A :class:`trimig.guest.LazyGuest` is not compared: in postcopy its
    memory comes later.

    Args:
        compare: compare the content. False for a guest too large to be copied, or one whose devices may change when
            they are loaded, or that cannot be saved twice.
        guests: by their labels in reports, such as ``source=…, destination=…``.

    Raises:
        TypeError: one of them is no guest.
    """

    def __init__(self, *, compare: bool = True, **guests: Guest) -> None:
        #: Every breach, in order.
        self.violations: list[Violation] = []
        #: Every start, stop and load: (time, label, event).
        self.history: list[tuple[float, str, str]] = []
        self._guests = guests
        self._started: dict[str, int] = {}
        self._fresh: dict[str, int] = {}
        #: The guests that report nothing, by label: whether each ran when it was last looked at.
        self._ran: dict[str, bool] = {}
        self._compare = compare
        self._owners: dict[str, Owner] = {}
        #: The label of the guest that was handed over last, and its content then.
        self._handed_over: tuple[str, Content] | None = None
        for label, guest in guests.items():
            expect(label, guest, Guest, "a trimig.Guest")
            self._owners[label] = guest.owner
            if _runs(guest):
                self._started[label] = self._fresh[label] = 0
            if isinstance(guest, ReportingGuest):
                guest.on_event(functools.partial(self._see, label))
            else:
                self._ran[label] = _runs(guest)
        self._check_both()
        self._first = self.running()
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.add_instrument(_Steps(self._look))
        if (here := made.get()) is not None:
            here.append(self)

    def running(self) -> tuple[str, ...]:
        """The labels of the guests that run now."""
        return tuple(label for label, guest in self._guests.items() if _runs(guest))

    def unmoved(self) -> str | None:
        """Why the guest that ran when the referee was made is not at another side, in a sentence; None if it is there, or
        if no guest ran.
        """
        self._look()
        started = any(event == "start" and label not in self._first for _, label, event in self.history)
        here = [label for label in self._first if self._guests[label].owner is Owner.HERE]
        if started or not here:
            return None
        return f"{here[0]} is still the owner, and no other guest was started"

    async def probe(self) -> None:
        """Call ``resume()`` of each guest that is not the owner: it must raise NotOwner. Call it when no migration runs.

        **Cancellation:** some guests have been asked.
        """
        for label, guest in self._guests.items():
            if guest.owner is Owner.HERE:
                continue
            owner, found = guest.owner.name, f"did not return within {formats.duration(_REFUSES_WITHIN)}"
            with trio.move_on_after(_REFUSES_WITHIN):
                try:
                    await guest.resume()
                    found = "returned"
                except NotOwner:
                    continue
                except TrimigError as error:
                    found = f"raised {type(error).__name__}: {error}"
            self.violations.append(
                Violation(
                    _now(),
                    "resumed",
                    (label,),
                    f"its owner is {owner}, and resume() {found}; it must raise NotOwner: start the guest within "
                    "`with self._owner.starting():` (trimig docs own_guest)",
                )
            )

    def check(self) -> None:
        """Raise AssertionError, with the history, if there was any violation or misuse of a guest."""
        self._look()
        lines = [
            f"{label}: {text}"
            for label, guest in self._guests.items()
            if isinstance(guest, ReportingGuest)
            for text in guest.misuse
        ]
        lines = [*map(str, self.violations), *lines]
        if lines:
            history = [f"at {formats.duration(time)}, {label}: {event}" for time, label, event in self.history] or [
                "nothing"
            ]
            raise BrokenRule("\n".join(["the guests broke a rule:", *lines, "before that:", *history]))

    def _look(self) -> None:
        """Read the owners, and the run states of the guests that report nothing."""
        for label, before in self._owners.items():
            owner = self._guests[label].owner
            if owner is not before:
                self._owners[label] = owner
                self._change_owner(label, before, owner)
        for label, ran in self._ran.items():
            runs = _runs(self._guests[label])
            if runs is not ran:
                self._ran[label] = runs
                self.history.append((_now(), label, "start" if runs else "stop"))
                self._check_both()

    def _change_owner(self, label: str, before: Owner, owner: Owner) -> None:
        guest = self._guests[label]
        if not self._compare or isinstance(guest, LazyGuest):
            return
        if before is Owner.HERE and owner is Owner.UNKNOWN:
            self._handed_over = label, content_of(guest)
        elif before is Owner.ELSEWHERE and owner is Owner.HERE and self._handed_over is not None:
            giver, content = self._handed_over
            if giver != label and (found := differences(content, content_of(guest))):
                self.violations.append(Violation(_now(), "other-content", (label, giver), "; ".join(found)))

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
