"""``python -m bench cancel``: the time from a cancel until the guest runs again, in every status and mode.

One guest in this process is migrated to another process over loopback TCP, and cancelled by its cancel scope, again
and again. A *mode* is an encoding, or postcopy, or a migration that is held in `pre-switchover`. Each point is aimed at
a status: the cancel comes a random time after the begin of the status, not longer than the status lasted in an
undisturbed migration. The point is counted in the status in which the cancel really came. Two times are measured, both
from the call of ``CancelScope.cancel``:

- *guest runs*: until ``resume`` of the guest has returned; 0 if the guest was never stopped here, because it never
  ceased to run. In postcopy the guest runs at the destination, so there is no such time;
- *call returned*: until ``trimig.migrate`` has returned or raised, with everything closed and restored. In
  `postcopy-active` a cancel is held off until all memory has been sent, so this is the rest of the migration.

A cancel after the commit was sent is too late by design. In precopy such attempts are counted and not timed, and
another point is drawn instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import trio

import trimig
from bench.child import JsonChild, start_python_child
from bench.errors import BenchError, first_error
from bench.figures import GIB
from bench.goals import Verdict, judge
from bench.load import LoadLog
from bench.measure import cpu_seconds, percentile
from bench.memory import fill_in_fork
from bench.table import format_table, number
from bench.trimig_side import add_machine, make_config
from bench.ways import ENCODINGS, Way
from trimig import Status

#: The most migrations for one point: a very short status is often missed.
MAX_ATTEMPTS: Final = 6
#: Seconds for which a migration is held in a status that does not end by itself.
_HELD: Final = 0.02
#: Seconds for the destination to end after an attempt.
_ENDING: Final = 20.0

_PRECOPY: Final = (Status.SETUP, Status.ACTIVE, Status.DEVICE)
_POSTCOPY: Final = (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How the migrations go, and the statuses in which they are cancelled."""

    name: str
    way: Way
    statuses: tuple[Status, ...] = _PRECOPY

    @property
    def postcopy(self) -> bool:
        """The guest is switched to postcopy in the first pass."""
        return "postcopy-ram" in self.way.capabilities


def _mode(name: str, *capabilities: str, statuses: tuple[Status, ...]) -> Mode:
    return Mode(name=name, way=Way(name=name, capabilities=capabilities), statuses=statuses)


MODES: Final = {
    mode.name: mode
    for mode in (
        *(Mode(name=way.name, way=way) for way in ENCODINGS.values()),
        _mode("held", "pause-before-switchover", statuses=(Status.PRE_SWITCHOVER,)),
        _mode("postcopy", "postcopy-ram", statuses=_POSTCOPY),
        _mode("postcopy-preempt", "postcopy-ram", "postcopy-preempt", statuses=_POSTCOPY),
    )
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One cancelled migration."""

    mode: str
    #: The status when the cancel came.
    status: Status
    #: Seconds from the start to the cancel.
    at_s: float
    #: None in postcopy.
    running_s: float | None
    returned_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """A migration that was not cancelled."""

    total_s: float
    #: Seconds that each status lasted.
    lasted: dict[Status, float]
    #: Processor seconds of this process and of the destination.
    cpu: tuple[float, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The results of one mode."""

    mode: str
    size: int
    points: Sequence[Point]
    undisturbed: Undisturbed
    #: Attempts in which the cancel came too late: the migration completed.
    too_late: int
    #: The highest load average.
    load: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table, in milliseconds."""

    mode: str
    status: str
    count: int
    running_median_ms: float | None
    running_p99_ms: float | None
    running_max_ms: float | None
    returned_median_ms: float
    returned_p99_ms: float
    returned_max_ms: float
    #: Of the mode's undisturbed migration.
    cpu_source_s_per_gib: float
    cpu_destination_s_per_gib: float
    load: float


class WatchedGuest(trimig.AppGuest):
    """An :class:`trimig.AppGuest` that records when it runs again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.resumed_at: float | None = None

    async def take_back(self) -> None:
        """Be the owner again after a migration that completed, and run; for the next attempt."""
        self.set_owner(trimig.Owner.HERE)
        await self.resume()
        self.resumed_at = None

    async def resume(self) -> None:
        stopped = self.run_state != "running"
        await super().resume()
        if stopped:
            self.resumed_at = time.perf_counter()


def summarise(found: Sequence[Cancelled]) -> list[Line]:
    """Median, 99th percentile and maximum of each mode and status."""
    lines = []
    for one in found:
        for status in dict.fromkeys(point.status for point in one.points):
            points = [point for point in one.points if point.status is status]
            running = [point.running_s * 1000 for point in points if point.running_s is not None]
            returned = [point.returned_s * 1000 for point in points]
            source, destination = (seconds * GIB / one.size for seconds in one.undisturbed.cpu)
            lines.append(
                Line(
                    mode=one.mode,
                    status=status.value,
                    count=len(points),
                    running_median_ms=statistics.median(running) if running else None,
                    running_p99_ms=percentile(running, 99) if running else None,
                    running_max_ms=max(running, default=None),
                    returned_median_ms=statistics.median(returned),
                    returned_p99_ms=percentile(returned, 99),
                    returned_max_ms=max(returned),
                    cpu_source_s_per_gib=source,
                    cpu_destination_s_per_gib=destination,
                    load=one.load,
                )
            )
    return lines


def cancel_table(lines: Sequence[Line]) -> str:
    """The lines as text. Times are in ms, processor time in seconds for each GiB of an undisturbed migration."""
    head = ["mode", "status", "points", "guest runs: median", "99 %", "max", "returned: median", "99 %", "max"]
    head += ["CPU src", "CPU dst", "load"]
    body = [
        [
            line.mode,
            line.status,
            str(line.count),
            number(line.running_median_ms, 2),
            number(line.running_p99_ms, 2),
            number(line.running_max_ms, 2),
            number(line.returned_median_ms, 2),
            number(line.returned_p99_ms, 2),
            number(line.returned_max_ms, 2),
            f"{line.cpu_source_s_per_gib:.2f}",
            f"{line.cpu_destination_s_per_gib:.2f}",
            f"{line.load:.1f}",
        ]
        for line in lines
    ]
    return format_table([head, *body], left=2)


def verdicts(lines: Sequence[Line]) -> list[Verdict]:
    """The worst status of all modes."""
    known = [(line.running_p99_ms, line) for line in lines if line.running_p99_ms is not None]
    if not known:
        return []
    value, line = max(known, key=lambda pair: pair[0])
    return [judge("cancel", value, f"{line.mode} {line.status}")]


def prepare_guest(size: int) -> WatchedGuest:
    """The source's guest, full of random pages. Call this before the event loop starts, because it forks."""
    guest = WatchedGuest("none")
    fill_in_fork(add_machine(guest, size), "random")
    return guest


async def run(
    guest: WatchedGuest,
    size: int,
    modes: Sequence[str],
    points: int,
    seed: int,
    progress: Callable[[str], None],
    loads: LoadLog,
) -> list[Cancelled]:
    """In each mode, migrate undisturbed once, then cancel *points* migrations in each status.

    Raises:
        BenchError: an undisturbed migration did not complete, or a cancelled one ended in a wrong way.

    **Cancellation:** the destination process is killed.
    """
    found = []
    for name in modes:
        mode = MODES[name]
        if refusal := mode.way.refusal():
            progress(f"{name}: {refusal}")
            continue
        found.append(await _Run(guest, size, mode, random.Random(seed), progress, loads).cancelled(points))
    return found


@dataclasses.dataclass(slots=True, kw_only=True)
class _Attempt:
    """What a listener and the cancelling task record about one attempt."""

    began: float
    #: When each status began.
    begins: dict[Status, float] = dataclasses.field(default_factory=dict)
    cancelled_at: float | None = None
    status: Status = Status.NONE


class _Run:
    """The migrations of one mode."""

    def __init__(
        self,
        guest: WatchedGuest,
        size: int,
        mode: Mode,
        chooser: random.Random,
        progress: Callable[[str], None],
        loads: LoadLog,
    ) -> None:
        self._guest = guest
        self._size = size
        self._mode = mode
        self._chooser = chooser
        self._progress = progress
        self._loads = loads
        options = mode.way.parameter_options()
        # The first pass takes a quarter of a second, and the rest a second, so that a cancel comes before its end. A
        # downtime limit would let the rest of a small guest go before the switch.
        options += [f"max-postcopy-bandwidth={size}", f"max-bandwidth={4 * size}"] if mode.postcopy else []
        options += ["downtime-limit=0"] if mode.postcopy else []
        self._how = {"capabilities": mode.way.capabilities, "parameters": options, "choose": mode.way.choose}
        self._config = make_config(capabilities=mode.way.capabilities, parameters=options, choose=mode.way.choose)
        self._child: JsonChild | None = None

    async def cancelled(self, points: int) -> Cancelled:
        """All points."""
        if self._mode.postcopy:
            return await self._cancelled(points)
        async with self._destination() as self._child:
            return await self._cancelled(points)

    async def _cancelled(self, points: int) -> Cancelled:
        load = self._loads.read()
        undisturbed = await self._undisturbed()
        done: list[Point] = []
        too_late = 0
        for aim in self._mode.statuses:
            longest = _HELD if aim in (Status.PRE_SWITCHOVER, *_POSTCOPY) else undisturbed.lasted.get(aim, 0.0)
            attempts = 0
            while sum(point.status is aim for point in done) < points and attempts < MAX_ATTEMPTS * points:
                attempts += 1
                point = await self._point(aim, self._chooser.uniform(0, longest))
                if point is None:
                    too_late += 1
                else:
                    done.append(point)
            load = max(load, self._loads.read())
            count = sum(point.status is aim for point in done)
            self._progress(f"{self._mode.name}: {count} of {points} points in {aim.value}, {attempts} migrations")
        return Cancelled(
            mode=self._mode.name,
            size=self._size,
            points=done,
            undisturbed=undisturbed,
            too_late=too_late,
            load=load,
        )

    async def _undisturbed(self) -> Undisturbed:
        monitor = trimig.Monitor()
        attempt = _Attempt(began=time.perf_counter())
        async with self._listening() as (child, uri):
            before = time.process_time(), cpu_seconds(child.pid)
            attempt.began = time.perf_counter()
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(self._steer, monitor, Status.NONE)
                monitor.add_listener(_recorder(attempt))
                await self._migrate(monitor, uri)
                nursery.cancel_scope.cancel()
            await child.answer("finished")
            total = time.perf_counter() - attempt.began
            cpu = time.process_time() - before[0], cpu_seconds(child.pid) - before[1]
        await self._guest.take_back()
        return Undisturbed(total_s=total, lasted=_lasted(attempt), cpu=cpu)

    async def _point(self, aim: Status, delay: float) -> Point | None:
        """One migration, cancelled *delay* seconds after the begin of the status *aim*; None if it completed.

        Raises:
            BenchError: the migration ended in any other way.
        """
        monitor = trimig.Monitor()
        attempt = _Attempt(began=math.inf)
        completed = False
        async with self._listening() as (child, uri):
            attempt.began = time.perf_counter()
            monitor.add_listener(_recorder(attempt))
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(self._steer, monitor, aim)
                with trio.CancelScope() as scope:
                    nursery.start_soon(_cancel_later, monitor, attempt, scope, aim, delay)
                    completed = await self._migrate(monitor, uri)
                returned_at = time.perf_counter()
                nursery.cancel_scope.cancel()
            if not self._mode.postcopy:
                await _destination_over(child)
        return await self._judge(attempt, completed=completed, returned_at=returned_at)

    async def _judge(self, attempt: _Attempt, *, completed: bool, returned_at: float) -> Point | None:
        guest, cancelled_at = self._guest, attempt.cancelled_at
        resumed_at, guest.resumed_at = guest.resumed_at, None
        elsewhere = guest.owner is not trimig.Owner.HERE
        if elsewhere:
            await guest.take_back()
        if cancelled_at is None or (completed and not self._mode.postcopy):
            return None
        if guest.run_state != "running":
            raise BenchError(f"after the cancel the guest is {guest.run_state}, where it should be running")
        running: float | None = max(0.0, resumed_at - cancelled_at) if resumed_at is not None else 0.0
        return Point(
            mode=self._mode.name,
            status=attempt.status,
            at_s=cancelled_at - attempt.began,
            running_s=None if elsewhere else running,
            returned_s=returned_at - cancelled_at,
        )

    async def _migrate(self, monitor: trimig.Monitor, uri: str) -> bool:
        """True if the migration completed; False if it was given up in postcopy, on purpose."""
        try:
            await trimig.migrate(self._guest, uri, self._config, monitor=monitor)
        except trimig.PostcopyLost:
            return False
        except trimig.TrimigError as exc:
            raise BenchError(f"{self._mode.name}: a migration ended with {type(exc).__name__}: {exc}") from exc
        return True

    async def _steer(self, monitor: trimig.Monitor, aim: Status) -> None:
        """Bring the migration to the statuses that need a request: postcopy, and the loss of its connection. Without an
        aim, let a held migration go on.
        """
        if self._mode.postcopy:
            await monitor.wait_status(Status.ACTIVE)
            monitor.start_postcopy()
            await monitor.wait_status(Status.POSTCOPY_ACTIVE)
            if aim is Status.POSTCOPY_PAUSED:
                await trio.sleep(_HELD)
                with contextlib.suppress(trimig.StateError):  # everything has been sent
                    monitor.pause("the benchmark has cut the connection")
        elif aim is Status.NONE and "pause-before-switchover" in self._mode.way.capabilities:
            await monitor.wait_status(Status.PRE_SWITCHOVER)
            monitor.resume()

    @contextlib.asynccontextmanager
    async def _destination(self) -> AsyncIterator[JsonChild]:
        """A destination in a process of its own; it is killed at the end of the block."""
        role, memory = ("lazy", "memfd-cold") if self._mode.postcopy else ("destination", "memfd-populated")
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                arguments = [role, str(self._size), memory, "random"]
                child = await start_python_child(nursery, f"trimig {role}", "bench.trimig_side", arguments)
                await child.answer("ready")
                yield child
                nursery.cancel_scope.cancel()
        except* BenchError as group:
            raise first_error(group) from None

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[tuple[JsonChild, str]]:
        """A destination that listens, and its URI. In precopy it is the same process each time. After postcopy it is
        killed, because it may have kept a part of a guest.
        """
        async with contextlib.AsyncExitStack() as stack:
            child = self._child
            if child is None:
                child = await stack.enter_async_context(self._destination())
            await child.send({"do": "listen", "at": "tcp:127.0.0.1:0", **self._how})
            yield child, str(await child.answer("listening"))


def _recorder(attempt: _Attempt) -> Callable[[trimig.Event], None]:
    def record(event: trimig.Event) -> None:
        if event.name == "MIGRATION":
            attempt.begins.setdefault(Status(event.data["status"]), time.perf_counter())

    return record


def _lasted(attempt: _Attempt) -> dict[Status, float]:
    """Seconds that each status lasted, the last one excepted."""
    moments = sorted(attempt.begins.items(), key=lambda item: item[1])
    return {status: later - at for (status, at), (_, later) in itertools.pairwise(moments)}


async def _cancel_later(
    monitor: trimig.Monitor, attempt: _Attempt, scope: trio.CancelScope, aim: Status, delay: float
) -> None:
    """Cancel *delay* seconds after the begin of *aim*; do nothing if the attempt ends before."""
    if await monitor.wait_status(aim) is not aim:
        return
    await trio.sleep(delay)
    attempt.status = monitor.status
    attempt.cancelled_at = time.perf_counter()
    scope.cancel()


async def _destination_over(child: JsonChild) -> None:
    """Wait until the destination has ended its attempt; after a cancel before the connection it still waits, and is
    told to stop.
    """
    with trio.move_on_after(0.5):
        await child.receive()
        return
    await child.send({"do": "stop"})
    with trio.move_on_after(_ENDING) as limit:
        await child.receive()
    if limit.cancelled_caught:
        raise BenchError(f"the destination did not end within {_ENDING:g} s after a cancel")
