"""One scenario, run once: two sides over a virtual link, with an event injected at one point.

A :class:`Scenario` says how to run and which rules must hold; a :class:`Point` says which event comes at which instant
of which schedule. :func:`replay` puts the two together, in one ``trio.run`` on a virtual clock and a fixed schedule,
and either returns a :class:`Run` or raises :class:`SweepFailure`, which names the point. The sweeps in
:mod:`trimig.testing.sweep` are loops around :func:`replay`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import trio
from trio.testing import MockClock

from ..errors import InternalError, TrimigError
from .determinism import deterministic_schedule
from .edges import EdgeInstrument, EdgeKind, InstrumentErrors, StuckInstrument
from .failing import Calls
from .link import VirtualLink
from .pipe import DIRECTIONS, Direction, Fault
from .referee import BrokenRule, OwnerReferee, made

T = TypeVar("T")

Side = Callable[[], Awaitable[object]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CancelAt:
    """Cancel the scopes of *victims* at edge *n*, counted over the tasks of all sides."""

    #: The kind of the edge.
    kind: EdgeKind
    #: The number of the edge, from 1.
    n: int
    victims: tuple[str, ...] = ("source",)
    #: The task of that edge; for reports only.
    task: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeapAt:
    """Let *seconds* pass at once at edge *n*, as after a suspend of the host: every timer expires together."""

    #: The kind of the edge.
    kind: EdgeKind
    #: The number of the edge, from 1.
    n: int
    seconds: float = 3600.0
    #: The task of that edge; for reports only.
    task: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpireAt:
    """Give the scopes of *victims* this deadline."""

    #: Virtual seconds; a run starts at 0.
    time: float
    victims: tuple[str, ...] = ("source",)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FailCall:
    """Let counted call *n* raise *error*; None lets it hang."""

    #: The number of the call, from 1.
    n: int
    error: type[Exception] | None = OSError
    #: Fail before the effect of the call, or after it.
    when: Literal["before", "after"] = "before"
    #: The name of the call; for reports only.
    name: str = ""


Injection = CancelAt | LeapAt | ExpireAt | FailCall | Fault


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Everything needed to repeat one run."""

    #: The number that fixes the schedule.
    seed: int
    #: The injected events, one or several.
    inject: tuple[Injection, ...] = ()


class SweepFailure(AssertionError):
    """A run broke a rule. The message gives the reason and the point. ``__cause__`` is the error that shows where; None
    where the message says all.

    Attributes:
        point: for :func:`replay`.
    """

    def __init__(self, point: Point, reason: str) -> None:
        super().__init__(f"{reason}\nto repeat: replay(scenario, {point!r})")
        self.point = point


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How one side ended."""

    #: By a return, an error or a cancellation.
    kind: Literal["returned", "raised", "cancelled"]
    #: What a side that returned has returned.
    value: Any = None
    #: The error of a side that raised.
    error: Exception | None = None
    #: Virtual seconds.
    at: float = 0.0

    def __str__(self) -> str:
        """``returned``, ``cancelled`` or the name of the error's class."""
        return self.kind if self.error is None else type(self.error).__name__


class LinkMaker(Protocol):
    """Makes a link: :class:`VirtualLink`, or a :func:`functools.partial` of it."""

    def __call__(self, *, seed: int) -> VirtualLink:
        """A new link."""


class SweepContext:
    """The context that a scenario gets for one run.

    Attributes:
        seed: the number that fixes the schedule, the link, and anything else that the scenario varies.
        link: the link under test; the point's faults are on it.
        calls: for :class:`~trimig.testing.FailingGuest` and :class:`~trimig.testing.FailingStream`.
        clock: virtual time; starts at 0.
    """

    def __init__(
        self,
        point: Point,
        *,
        make_link: LinkMaker,
        expected: tuple[type[Exception], ...],
    ) -> None:
        self.seed = point.seed
        self.clock = MockClock(autojump_threshold=0)
        self.link = make_link(seed=point.seed)
        self.calls = _calls_of(point)
        self._make_link = make_link
        self._expected = expected
        self._scopes: dict[str, trio.CancelScope] = {}
        self._expiries: list[ExpireAt] = []
        actions: dict[tuple[EdgeKind, int], Callable[[], None]] = {}
        for injection in point.inject:
            match injection:
                case Fault():
                    self.link.add_fault(injection)
                case ExpireAt():
                    self._expiries.append(injection)
                case CancelAt():
                    actions[injection.kind, injection.n] = functools.partial(self._cancel, injection)
                case LeapAt():
                    actions[injection.kind, injection.n] = functools.partial(self.clock.jump, injection.seconds)
        #: The instrument that counts the edges.
        self.edges = EdgeInstrument(actions)
        #: How each side ended; sides that have not ended are missing.
        self.ends: dict[str, End] = {}
        #: The number of edges at the end of each side.
        self.exits: dict[str, dict[EdgeKind, int]] = {}
        #: The number of deadlines that have expired.
        self.expired = 0
        #: The referees that the scenario has made.
        self.referees: list[OwnerReferee] = []
        #: As in :class:`Run`; None before the end.
        self.unmoved: str | None = None
        self._beside: list[Callable[[], Awaitable[object]]] = []

    def new_link(self) -> VirtualLink:
        """A link like :attr:`link` without faults, for a second attempt."""
        return self._make_link(seed=self.seed)

    def beside(self, work: Callable[[], Awaitable[object]]) -> None:
        """Let *work* run in a task of its own during :meth:`run`: the program of a guest, that writes its memory.

        The task is cancelled when all sides have ended. Expected errors, such as NotOwner, end it, too. *work* must
        wait for time to pass (``trio.sleep``) in each turn of a loop: virtual time stands while any task can run.
        """
        self._beside.append(work)

    async def run(self, **sides: Side) -> dict[str, End]:
        """Run the sides at once, each under a scope of its own, until all have ended. Call it once in a scenario.

        This is the part under test: the sweep counts its edges and calls, and cancels its scopes. Errors of the
        expected classes become part of the result; all others propagate, and fail the run.

        **Cancellation:** cancels all sides.
        """
        if self._scopes:
            raise RuntimeError("only one part of a scenario is under test; use run_undisturbed() for the others")
        self._scopes = {name: trio.CancelScope() for name in sides}
        for expiry in self._expiries:
            for scope in self._victims(expiry.victims):
                scope.deadline = expiry.time
        try:
            if self._beside:
                async with trio.open_nursery() as around:
                    for work in self._beside:
                        around.start_soon(self._end_of, work, trio.CancelScope())
                    await self._run_sides(sides)
                    around.cancel_scope.cancel()
            else:
                await self._run_sides(sides)
        finally:
            self.edges.close()
            self.calls.stop_counting()
        self.expired = sum(scope.cancel_called for scope in self._scopes.values()) if self._expiries else 0
        ends = {name: self.ends[name] for name in sides}
        await self._judge(ends)
        return ends

    async def _run_sides(self, sides: Mapping[str, Side]) -> None:
        async with trio.open_nursery() as nursery:
            self.edges.open(nursery)
            self.calls.start_counting()
            for name, side in sides.items():
                nursery.start_soon(self._watched, name, side, name=name)

    async def _judge(self, ends: Mapping[str, End]) -> None:
        """Check what must hold in every scenario, and keep what must hold in an undisturbed run."""
        _check_internal(ends, self._expected)
        for referee in self.referees:
            await referee.probe()
            referee.check()
        failed = [f"{name} {_ended(end)}" for name, end in ends.items() if end.kind != "returned"]
        unmoved = [text for referee in self.referees if (text := referee.unmoved()) is not None]
        self.unmoved = "; ".join(failed or unmoved) or None

    async def run_undisturbed(self, **sides: Side) -> dict[str, End]:
        """As :meth:`run` without any injection, for the time before or after the part under test.

        **Cancellation:** cancels all sides.
        """
        ends: dict[str, End] = {}

        async def one(name: str, side: Side) -> None:
            ends[name] = await self._end_of(side, trio.CancelScope())

        async with trio.open_nursery() as nursery:
            for name, side in sides.items():
                nursery.start_soon(one, name, side, name=name)
        _check_internal(ends, self._expected)
        return {name: ends[name] for name in sides}

    async def _watched(self, name: str, side: Side) -> None:
        self.ends[name] = await self._end_of(side, self._scopes[name])
        self.exits[name] = self.edges.position()

    async def _end_of(self, side: Side, scope: trio.CancelScope) -> End:
        value: object = None
        error: Exception | None = None
        with scope:
            try:
                value = await side()
            except self._expected as exc:
                error = exc
        now = trio.current_time()
        if error is not None:
            return End(kind="raised", error=error, at=now)
        if scope.cancelled_caught:
            return End(kind="cancelled", at=now)
        return End(kind="returned", value=value, at=now)

    def _cancel(self, at: CancelAt) -> None:
        for scope in self._victims(at.victims):
            scope.cancel(f"sweep: {at.kind} edge {at.n}")

    def _victims(self, names: tuple[str, ...]) -> list[trio.CancelScope]:
        missing = set(names) - set(self._scopes)
        if missing:
            raise ValueError(f"no such side: {sorted(missing)}; there are {sorted(self._scopes)}")
        return [self._scopes[name] for name in names]


def _check_internal(ends: Mapping[str, End], expected: tuple[type[Exception], ...]) -> None:
    """Raise BrokenRule at an InternalError of a side, unless the scenario has named that class itself."""
    if InternalError in expected:
        return
    for name, end in ends.items():
        others = end.error.others if isinstance(end.error, TrimigError) else ()
        for error in (end.error, *others):
            if isinstance(error, InternalError):
                raise BrokenRule(f"{name} ended with InternalError: {error}") from error.__cause__


def _ended(end: End) -> str:
    return end.kind if end.error is None else f"raised {type(end.error).__name__}: {end.error}"


def _calls_of(point: Point) -> Calls:
    """The calls of one run, not counted yet, and the one that *point* lets fail."""
    found = next((injection for injection in reversed(point.inject) if isinstance(injection, FailCall)), None)
    if found is None:
        calls = Calls()
    else:
        calls = Calls(fail_at=found.n, error=found.error or OSError, hang=found.error is None, when=found.when)
    calls.stop_counting()
    return calls


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scenario(Generic[T]):
    """How to run once, and which rules must hold afterwards, whatever was injected."""

    #: The coroutine function; makes its guests, calls :meth:`SweepContext.run` once, returns the outcome.
    body: Callable[[SweepContext], Awaitable[T]]
    #: Checks each outcome, also the baseline's: raises, or returns False, if a rule is broken.
    check: Callable[[T], object] | None = None
    #: Makes links; called with ``seed=``.
    link: LinkMaker = VirtualLink
    #: Errors that a side may end with. Any other error fails the run; so does an InternalError, unless that class itself
    #: is here.
    expected: tuple[type[Exception], ...] = (TrimigError,)
    #: Virtual seconds that a whole run may take (not counting a leap).
    limit: float = 86400.0
    #: Virtual seconds from a cancel or an expired deadline until its victims have ended.
    exit_within: float = math.inf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run(Generic[T]):
    """The observations of one run."""

    #: What was repeated or injected.
    point: Point
    #: What the scenario returned.
    outcome: T
    #: How each side ended.
    ends: Mapping[str, End]
    #: All planned events were injected.
    fired: bool
    #: Names of the tasks at each edge of each kind.
    traces: Mapping[EdgeKind, tuple[str, ...]]
    #: Number of edges of each kind until each side ended.
    exits: Mapping[str, Mapping[EdgeKind, int]]
    #: Instants of virtual time at which there was an edge.
    times: tuple[float, ...]
    #: Bytes sent over the link under test.
    sent: Mapping[Direction, int]
    #: Names of the calls counted.
    calls: tuple[str, ...]
    #: Virtual seconds.
    elapsed: float
    #: The link under test.
    link: VirtualLink
    #: Why the run did not end with the guest at the destination, in a sentence; None if it did.
    unmoved: str | None = None


_NOTHING: Final = object()


def replay(scenario: Scenario[T], point: Point, *, check: bool = True) -> Run[T]:
    """Run *scenario* once with the injections of *point*.

    Args:
        scenario: how to run and which rules must hold.
        point: from :attr:`SweepFailure.point`, from :attr:`SweepReport.samples`, or written by hand.
        check: False leaves out the scenario's own check, to look at a bad outcome.

    Raises:
        SweepFailure: the scenario raised, hung or took longer than its limit, left a task, broke its bound on the exit
            or its check; a side ended with an InternalError; a referee of the scenario found a violation; or an
            instrument failed.
    """
    try:
        run = _execute(scenario, point)
        if check and scenario.check is not None and scenario.check(run.outcome) is False:
            raise BrokenRule(f"the check refused the outcome {run.outcome!r}")
    except BrokenRule as exc:
        # The traceback of the rule shows the kit only; that of its cause shows the guest's code.
        raise SweepFailure(point, str(exc)) from exc.__cause__
    except Exception as exc:
        raise SweepFailure(point, _reason(exc)) from exc
    return run


def _reason(exc: BaseException) -> str:
    """One line for an exception; for a group, its leaves."""
    if isinstance(exc, BaseExceptionGroup):
        return f"{type(exc).__name__} of " + "; ".join(_reason(leaf) for leaf in exc.exceptions)
    return f"{type(exc).__name__}: {exc}"


def _execute(scenario: Scenario[T], point: Point) -> Run[T]:
    context = SweepContext(point, make_link=scenario.link, expected=scenario.expected)
    limit = scenario.limit + sum(i.seconds for i in point.inject if isinstance(i, LeapAt))

    watchdog = StuckInstrument()

    async def main() -> tuple[T | object, float]:
        watchdog.watch(trio.lowlevel.current_task())
        living = trio.lowlevel.current_statistics().tasks_living
        outcome: T | object = _NOTHING
        made.set(context.referees)
        with trio.move_on_after(limit):
            outcome = await scenario.body(context)
        left = trio.lowlevel.current_statistics().tasks_living - living
        if left:
            raise BrokenRule(f"{left} tasks were left behind")
        return outcome, trio.current_time()

    with InstrumentErrors() as log, deterministic_schedule(point.seed):
        outcome, elapsed = trio.run(
            main, clock=context.clock, instruments=[context.edges, watchdog], strict_exception_groups=True
        )
    if log.errors:
        raise BrokenRule(f"an instrument failed: {log.errors}")
    if outcome is _NOTHING:
        ended = {name: str(end) for name, end in context.ends.items()}
        raise BrokenRule(f"not over after {limit} virtual seconds; ended were {ended}")
    _check_exits(context, point, scenario.exit_within)
    return Run(
        point=point,
        outcome=outcome,  # type: ignore[arg-type]  # not the sentinel here
        ends=dict(context.ends),
        fired=_fired(context, point),
        traces={kind: tuple(trace) for kind, trace in context.edges.traces.items()},
        exits=dict(context.exits),
        times=tuple(context.edges.times),
        sent={direction: context.link.sent(direction) for direction in DIRECTIONS},
        calls=tuple(context.calls.names),
        elapsed=elapsed,
        link=context.link,
        unmoved=context.unmoved,
    )


def _fired(context: SweepContext, point: Point) -> bool:
    """Whether everything was injected: each kind of injection leaves a trace of its own."""
    edges = sum(isinstance(i, CancelAt | LeapAt) for i in point.inject)
    faults = {i for i in point.inject if isinstance(i, Fault)}
    expected = sum(len(i.victims) for i in point.inject if isinstance(i, ExpireAt))
    calls = any(isinstance(i, FailCall) for i in point.inject)
    return (
        len(context.edges.fired) == edges
        and faults <= set(context.link.struck)
        and context.expired == expected
        and context.calls.fired == calls
    )


def _check_exits(context: SweepContext, point: Point, bound: float) -> None:
    if bound == math.inf or any(isinstance(i, LeapAt) for i in point.inject):
        return
    for injection in point.inject:
        match injection:
            case CancelAt() if context.edges.fired:
                start = context.edges.fired[0]
            case ExpireAt():
                start = max(0.0, injection.time)
            case _:
                continue
        for victim in injection.victims:
            took = context.ends[victim].at - start
            if took > bound:
                raise BrokenRule(f"{victim} ended {took} virtual seconds after its cancel; the bound is {bound}")
