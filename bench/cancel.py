"""``python -m bench cancel``: the time from a cancel until the guest runs again.

One guest in this process is migrated to another process over loopback TCP, and cancelled by its cancel scope, again
and again, at random points. Half of the points lie anywhere in the time of an undisturbed migration. The other
half lie after the stop of the guest, where there is something to undo. Two times are measured, both from the call of
``CancelScope.cancel``:

- *guest runs again*: until ``resume`` of the guest has returned; 0 if the guest was never stopped, because it never
  ceased to run;
- *call returned*: until ``trimig.migrate`` has returned, with everything closed and restored.

A cancel after the commit was sent is too late by design. Such attempts are counted and not timed, and another point is
drawn instead.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

import trimig
from bench.child import JsonChild, start_python_child
from bench.errors import BenchError
from bench.figures import format_table
from bench.measure import percentile
from bench.memory import fill_in_fork
from bench.trimig_side import add_machine, make_config
from trimig.errors import Owner

#: The most migrations for one timed point: a very short switchover leaves little room for a cancel.
MAX_ATTEMPTS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One cancelled migration."""

    #: Seconds from the start to the cancel.
    at_s: float
    #: The guest was stopped, or about to be stopped.
    paused: bool
    running_s: float
    returned_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table, in milliseconds."""

    what: str
    count: int
    median_ms: float
    p99_ms: float
    max_ms: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The results of all points."""

    points: Sequence[Point]
    #: Attempts in which the cancel came too late: the migration completed.
    too_late: int
    #: Length of an undisturbed migration, and the time from which its guest was stopped.
    total_s: float
    stopped_after_s: float


class WatchedGuest(trimig.AppGuest):
    """An :class:`trimig.AppGuest` that records when it is stopped and when it runs again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.forget()

    def forget(self) -> None:
        """Forget the records, before the next attempt."""
        self.stopping = trio.Event()
        self.stopped_at: float | None = None
        self.resumed_at: float | None = None

    async def take_back(self) -> None:
        """Own and run the guest again after a completed migration; the destination throws its guest away."""
        if self.owner is not Owner.HERE:
            self._owner.set(Owner.HERE)
        await self.resume()

    async def pause(self) -> None:
        self.stopped_at = time.perf_counter()
        self.stopping.set()
        await super().pause()

    async def resume(self) -> None:
        stopped = self.run_state != "running"
        await super().resume()
        if stopped:
            self.resumed_at = time.perf_counter()


def summarise(points: Sequence[Point]) -> list[Line]:
    """Median, 99th percentile and maximum over the points; lines without a point are left out."""
    groups = [
        ("guest runs again", [point.running_s for point in points]),
        ("guest runs again, was paused", [point.running_s for point in points if point.paused]),
        ("call returned", [point.returned_s for point in points]),
    ]
    return [
        Line(
            what=what,
            count=len(times),
            median_ms=statistics.median(times) * 1000,
            p99_ms=percentile(times, 99) * 1000,
            max_ms=max(times) * 1000,
        )
        for what, times in groups
        if times
    ]


def cancel_table(lines: Sequence[Line]) -> str:
    """The lines as text."""
    body = [
        [line.what, str(line.count), f"{line.median_ms:.2f}", f"{line.p99_ms:.2f}", f"{line.max_ms:.2f}"]
        for line in lines
    ]
    return format_table([["from cancel to", "points", "median ms", "p99 ms", "max ms"], *body], left=1)


def prepare_guest(size: int) -> WatchedGuest:
    """The source's guest, full of random pages. Call this before the event loop starts, because it forks."""
    guest = WatchedGuest("none")
    fill_in_fork(add_machine(guest, size), "random")
    return guest


async def run_points(
    guest: WatchedGuest, size: int, points: int, seed: int, progress: Callable[[str], None]
) -> Cancelled:
    """Migrate undisturbed once, then cancel *points* migrations.

    Raises:
        BenchError: the undisturbed migration did not complete, or a cancelled one ended in a wrong way.

    **Cancellation:** the destination process is killed.
    """
    result: list[Cancelled] = []
    arguments = ["destination", str(size), "memfd-populated", "random"]
    try:
        async with trio.open_nursery() as nursery:
            child = await start_python_child(nursery, "trimig destination", "bench.trimig_side", arguments)
            await child.receive()
            result.append(await _run_points(guest, child, points, random.Random(seed), progress))
            nursery.cancel_scope.cancel()
    except* BenchError as group:
        raise group.exceptions[0] from None
    return result[0]


async def _run_points(
    guest: WatchedGuest, child: JsonChild, points: int, chooser: random.Random, progress: Callable[[str], None]
) -> Cancelled:
    began = time.perf_counter()
    if await _attempt(guest, child, never) is not None or guest.stopped_at is None:
        raise BenchError("the undisturbed migration did not complete")
    total, stopped_after = time.perf_counter() - began, guest.stopped_at - began
    await guest.take_back()
    done: list[Point] = []
    attempts = 0
    while len(done) < points and attempts < MAX_ATTEMPTS * points:
        if attempts % 2 == 0:
            moment = after(chooser.uniform(0, total))
        else:
            moment = after(chooser.uniform(0, total - stopped_after), guest)
        point = await _attempt(guest, child, moment)
        attempts += 1
        if point is None:
            await guest.take_back()
        else:
            done.append(point)
        progress(f"{len(done)}/{points} points: {describe(point)}")
    return Cancelled(points=done, too_late=attempts - len(done), total_s=total, stopped_after_s=stopped_after)


def describe(point: Point | None) -> str:
    """For the progress."""
    if point is None:
        return "too late, the guest is over there"
    where = "while the guest was stopped" if point.paused else "while the guest ran"
    return f"{point.at_s * 1000:.1f} ms in, {where}: over after {point.returned_s * 1000:.2f} ms"


Moment = Callable[[], Awaitable[None]]


async def never() -> None:
    """A point that never comes."""
    await trio.sleep_forever()


def after(delay: float, guest: WatchedGuest | None = None) -> Moment:
    """The point *delay* seconds after the start, or after the stop of *guest* began."""

    async def wait() -> None:
        if guest is not None:
            await guest.stopping.wait()
        await trio.sleep(delay)

    return wait


async def _attempt(guest: WatchedGuest, child: JsonChild, moment: Moment) -> Point | None:
    """One migration, cancelled at that point; None if it completed.

    Raises:
        BenchError: the migration ended in any other way.
    """
    guest.forget()
    await child.send({"do": "listen"})
    uri = str((await child.receive())["listening"])
    began = time.perf_counter()
    cancelled_at: float | None = None
    paused = False

    async def cancel_later() -> None:
        nonlocal cancelled_at, paused
        await moment()
        paused = guest.stopped_at is not None
        cancelled_at = time.perf_counter()
        scope.cancel()

    completed = False
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_later)
            try:
                await trimig.migrate(guest, uri, make_config())
            except trimig.TrimigError as exc:
                raise BenchError(f"a migration ended with {type(exc).__name__}: {exc}") from exc
            completed = True
        returned_at = time.perf_counter()
        nursery.cancel_scope.cancel()
    await _destination_over(child, uri)
    if completed:
        return None
    if cancelled_at is None or guest.run_state != "running":
        raise BenchError(f"after the cancel the guest is {guest.run_state}, where it should be running")
    return Point(
        at_s=cancelled_at - began,
        paused=paused,
        running_s=max(0.0, guest.resumed_at - cancelled_at) if guest.resumed_at is not None else 0.0,
        returned_s=returned_at - cancelled_at,
    )


async def _destination_over(child: JsonChild, uri: str) -> None:
    """Wait until the destination has ended its attempt; after a cancel before the connection it still waits."""
    with trio.move_on_after(0.5):
        await child.receive()
        return
    _, host, port = uri.split(":")
    try:
        stream = await trio.open_tcp_stream(host, int(port))
    except OSError:
        pass  # the destination has just ended by itself
    else:
        await stream.aclose()
    await child.receive()
