"""Sweeps: run one scenario again and again, with one event injected at point 1, then 2, then 3, to the last point.

Each kind of sweep is a small frozen object that lists the points of one seed, given the baseline (the run without
injection). :func:`run_sweep` runs them all and compares each run with the baseline up to its point. If the
schedules differ there, the sweep does not cover what it claims, and fails.

The functions here are synchronous: they call ``trio.run`` for each point. So do not call them from async tests.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from .edges import EDGE_KINDS, EdgeKind, first_difference
from .pipe import DIRECTIONS, Direction, Fault, FaultKind
from .scenario import CancelAt, ExpireAt, FailCall, LeapAt, Point, Run, Scenario, SweepFailure, replay

T = TypeVar("T")


class Sweep(Protocol):
    """A set of points. Write another class for combinations: a point may inject several events."""

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """All points for the seed of *baseline*, the innermost loop over time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CancelSweep:
    """Cancel *victims* at every edge of any side, until the last victim has ended.

    ``victims=("source",)``, ``("destination",)`` or both; the names are those given to ``SweepContext.run``.
    """

    victims: tuple[str, ...] = ("source",)
    #: The kinds of edges.
    kinds: Sequence[EdgeKind] = EDGE_KINDS

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """A point for each edge of each kind."""
        for kind, n, task in _edges(baseline, self.kinds, self.victims):
            yield _point(baseline, CancelAt(kind=kind, n=n, victims=self.victims, task=task))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TimeLeap:
    """Let *seconds* pass at once at every edge: all timers, deadlines and grace periods expire together."""

    seconds: float = 3600.0
    #: The kinds of edges.
    kinds: Sequence[EdgeKind] = EDGE_KINDS

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """A point for each edge of each kind."""
        for kind, n, task in _edges(baseline, self.kinds, tuple(baseline.exits)):
            yield _point(baseline, LeapAt(kind=kind, n=n, seconds=self.seconds, task=task))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineSweep:
    """Let a deadline of *victims* expire just before, at and just after every instant with an edge.

    An expired deadline takes another path through the run loop than a cancel. Use it only if time passes: give
    the link a latency.
    """

    victims: tuple[str, ...] = ("source",)
    #: Virtual seconds by which "just before" and "just after" differ from the instant.
    epsilon: float = 1e-6

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """Three points for each instant: just before it, at it, and just after it."""
        last = max(baseline.ends[victim].at for victim in _known(baseline, self.victims))
        for offset in (-self.epsilon, 0.0, self.epsilon):
            for time in baseline.times:
                if time + offset < last:
                    yield _point(baseline, ExpireAt(time=time + offset, victims=self.victims))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FaultSweep:
    """Break the link at every byte of every direction, with every kind of fault."""

    #: The kinds of faults.
    kinds: Sequence[FaultKind] = ("eof", "reset", "blackhole")
    #: The directions that break.
    directions: Sequence[Direction] = DIRECTIONS
    #: The length of a ``"stall"``, in virtual seconds.
    seconds: float = 60.0

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """All combinations of kind, direction and byte, from before the first byte to behind the last."""
        for direction, kind in itertools.product(self.directions, self.kinds):
            seconds = self.seconds if kind == "stall" else 0.0
            for after in range(baseline.sent[direction] + 1):
                yield _point(baseline, Fault(direction=direction, after=after, kind=kind, seconds=seconds))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallSweep:
    """Let every counted call fail once with each of *errors*; None among them makes the call hang."""

    errors: Sequence[type[Exception] | None] = (OSError,)
    #: Fail before the effect of the call, or after it.
    when: Literal["before", "after"] = "before"
    #: The names of the calls (``"source.pause"``); None for all.
    only: Callable[[str], bool] | None = None

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """A point for each call and each error."""
        for error in self.errors:
            for n, name in enumerate(baseline.calls, 1):
                if self.only is None or self.only(name):
                    yield _point(baseline, FailCall(n=n, error=error, when=self.when, name=name))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """The result of a sweep. ``str()`` of it is one paragraph for the test's output."""

    #: The sweeps that were run.
    sweeps: tuple[Sweep, ...]
    #: The seeds of their schedules.
    seeds: tuple[int, ...]
    #: Number of all runs, including the baselines.
    runs: int
    #: Number of runs with an injection.
    points: int
    #: Number of runs in which the event happened: all (or the sweep fails), except for deadlines that came too late.
    fired: int
    #: How often each outcome came, including those of the baselines.
    outcomes: Mapping[Hashable, int]
    #: The first point of each outcome, for :func:`replay`.
    samples: Mapping[Hashable, Point]

    def show(self) -> SweepReport:
        """Write the report to standard output, which pytest shows with ``-s`` or ``-rP``; returns the report."""
        sys.stdout.write(f"{self}\n")
        return self

    def __str__(self) -> str:
        names = ", ".join(type(sweep).__name__ for sweep in self.sweeps)
        lines = [f"{names}: {self.runs} runs, {len(self.seeds)} seeds, {self.fired} of {self.points} points fired"]
        ranked = sorted(self.outcomes.items(), key=lambda item: -item[1])
        return "\n".join(lines + [f"  {count:6} x {outcome}" for outcome, count in ranked])


def run_sweep(scenario: Scenario[T], *sweeps: Sweep, seeds: Sequence[int] = (0, 1, 2), every: int = 1) -> SweepReport:
    """Run every point of every sweep under every seed, and stop at the first that breaks a rule.

    Args:
        scenario: how to run and which rules must hold.
        sweeps: the events to inject.
        seeds: each is another interleaving of the same program.
        every: take only each *every*-th point of a sweep, another set of them for each seed; 1 takes all.

    Returns:
        The report; print it, so that the number of runs is visible.

    Raises:
        SweepFailure: at a point (``.point``; the baseline's injects nothing). Also if the baseline does not end with the
            guest at the destination (a side did not return, or no other guest was started), if a schedule differs from the
            baseline's before its point, or a point is not reached.
        ValueError: there are no points.
    """
    if not sweeps or not seeds or every < 1:
        raise ValueError("a sweep needs at least one kind, one seed, and a stride of at least 1")
    with _quiet_log():
        return _run_all(scenario, sweeps, seeds, every)


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Keep Python from printing warnings of the engine to standard error: they do not say which run they are from.
    Handlers of the program, such as those of pytest, still get them.
    """
    handler, logger = logging.NullHandler(), logging.getLogger("trimig")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _run_all(scenario: Scenario[T], sweeps: tuple[Sweep, ...], seeds: Sequence[int], every: int) -> SweepReport:
    outcomes: collections.Counter[Hashable] = collections.Counter()
    samples: dict[Hashable, Point] = {}
    runs = points = fired = 0
    for seed in seeds:
        baseline = replay(scenario, Point(seed=seed))
        if baseline.unmoved is not None:
            raise SweepFailure(
                baseline.point,
                f"the undisturbed run must end with the guest at the destination, but {baseline.unmoved}",
            )
        _count(baseline, outcomes, samples)
        runs += 1
        for sweep in sweeps:
            for point in itertools.islice(sweep.points(baseline), seed % every, None, every):
                run = replay(scenario, point)
                _compare(baseline, run)
                _count(run, outcomes, samples)
                runs += 1
                points += 1
                fired += run.fired
    if not points:
        raise ValueError("no point to inject anything at: the baseline has no edges, bytes or calls of that kind")
    return SweepReport(
        sweeps=sweeps,
        seeds=tuple(seeds),
        runs=runs,
        points=points,
        fired=fired,
        outcomes=outcomes,
        samples=samples,
    )


def run_cancel_sweep(
    scenario: Scenario[T],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    kinds: Sequence[EdgeKind] = EDGE_KINDS,
    victims: tuple[str, ...] = ("source",),
    every: int = 1,
) -> SweepReport:
    """:func:`run_sweep` with one :class:`CancelSweep`."""
    return run_sweep(scenario, CancelSweep(victims=victims, kinds=kinds), seeds=seeds, every=every)


def _point(baseline: Run[Any], injection: CancelAt | LeapAt | ExpireAt | FailCall | Fault) -> Point:
    return Point(seed=baseline.point.seed, inject=(injection,))


def _known(baseline: Run[Any], victims: tuple[str, ...]) -> tuple[str, ...]:
    missing = set(victims) - set(baseline.exits)
    if missing or not victims:
        raise ValueError(f"no such side: {sorted(missing)}; there are {sorted(baseline.exits)}")
    return victims


def _edges(
    baseline: Run[Any], kinds: Sequence[EdgeKind], victims: tuple[str, ...]
) -> Iterator[tuple[EdgeKind, int, str]]:
    for kind in kinds:
        last = max(baseline.exits[victim][kind] for victim in _known(baseline, victims))
        for n, task in enumerate(baseline.traces[kind][:last], 1):
            yield kind, n, task


def _count(run: Run[Any], outcomes: collections.Counter[Hashable], samples: dict[Hashable, Point]) -> None:
    label = run.outcome if isinstance(run.outcome, Hashable) else repr(run.outcome)
    outcomes[label] += 1
    samples.setdefault(label, run.point)


def _compare(baseline: Run[Any], run: Run[Any]) -> None:
    """Check that the run repeated the baseline up to its point, and that the point was reached."""
    for injection in run.point.inject:
        match injection:
            case CancelAt() | LeapAt():
                expected = baseline.traces[injection.kind][: injection.n]
                found = run.traces[injection.kind][: injection.n]
            case FailCall():
                expected, found = baseline.calls[: injection.n], run.calls[: injection.n]
            case _:
                continue
        place = first_difference(expected, found)
        if place is not None:
            raise SweepFailure(
                run.point,
                f"the schedule is not repeatable: it differs from the baseline at {place}, before the point: "
                f"{expected[place - 1 : place]} became {found[place - 1 : place]}",
            )
    if not run.fired and not any(isinstance(i, ExpireAt) for i in run.point.inject):
        raise SweepFailure(run.point, "the point was not reached")
