"""Progress on stderr: a live table on a terminal, plain lines elsewhere, JSON lines for machines.

What is shown comes from :meth:`trimig.Monitor.watch` and :meth:`trimig.Monitor.events` and from nowhere else. Nothing
in it runs backwards: the first copy of all memory, which has a percentage, and the chase after what the guest writes
meanwhile, which has none, are told apart. A stderr that breaks ends the display and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import trio

import trimig
from trimig import formats
from trimig.status import TERMINAL

from .common import alongside
from .output import say, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

T = TypeVar("T")

#: The guest is at the destination, and memory is not.
FOLLOWING: Final = frozenset({"postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-uncertain"})
#: Seconds between two pictures of a running migration.
EVERY: Final = 0.2
#: Seconds between two plain lines.
LINE_EVERY: Final = 1.0
#: Passes that stay on the screen.
_ROWS: Final = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A moment of a migration; sizes in bytes, times in seconds, rates per second."""

    role: str
    status: str
    #: The pass that this is about, from 1 on; 0 before the first, and always on a destination.
    iteration: int
    #: The pass is over, and the figures are its outcome.
    passed: bool
    total: int
    #: Of the first copy of all memory.
    copied: int
    sent: int
    remaining: int
    bandwidth: float
    dirty_rate: float
    #: None while it cannot be told.
    expected_downtime: float | None
    #: What the expected downtime must come down to.
    downtime_limit: float
    elapsed: float

    @property
    def phase(self) -> str:
        """What is going on: ``connecting``, ``first copy``, ``chase``, ``switchover`` or how it ended."""
        if self.status in ("none", "setup"):
            return "connecting"
        if self.status == "active":
            if self.role == "destination":
                return "receiving"
            return "first copy" if self.iteration <= 1 and not self.passed else "chase"
        if self.status in ("pre-switchover", "device", "handover"):
            return "switchover"
        return self.status

    @property
    def sentence(self) -> str:
        """One plain line."""
        if self.role == "destination":
            return f"{self.phase}: {formats.size(self.sent)} received"
        if self.status in FOLLOWING:
            return f"{self.phase}: the guest runs there, {formats.size(self.remaining)} of its memory remain here"
        if self.phase == "first copy":
            done = self.copied * 100 // self.total if self.total else 0
            return f"first copy: {formats.percent(done / 100)}, {formats.size(self.sent)} sent at {formats.rate(self.bandwidth)}"
        if self.phase == "chase":
            expected = "unknown" if self.expected_downtime is None else formats.duration(self.expected_downtime)
            return (
                f"chase, pass {self.iteration}: {formats.size(self.remaining)} remain, dirtied at "
                f"{formats.rate(self.dirty_rate)}, expected downtime {expected}"
            )
        return self.phase

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"phase": self.phase, **dataclasses.asdict(self)}


def picture(monitor: trimig.Monitor) -> Picture:
    """Now."""
    s = monitor.statistics()
    role = monitor.role or trimig.Role.SOURCE
    moved = (s.normal_pages + s.zero_pages) * 4096
    copied = min(moved, s.total) if s.iteration <= 1 else s.total
    return Picture(
        role=role.value,
        status=s.status.value,
        iteration=s.iteration,
        passed=False,
        total=s.total,
        copied=copied,
        sent=s.transferred,
        remaining=s.total - copied if s.iteration <= 1 and s.status.value not in FOLLOWING else s.remaining,
        bandwidth=s.bandwidth,
        dirty_rate=s.dirty_rate,
        expected_downtime=_finite(s.expected_downtime),
        downtime_limit=monitor.config.parameters.downtime_limit / 1000,
        elapsed=s.elapsed,
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


async def follow(monitor: trimig.Monitor, tell: Callable[[Picture], Awaitable[None]]) -> None:
    """Tell a picture every so often, at each change of status, and for each pass that is over; ends with the attempt.

    **Cancellation:** ends it.
    """

    told = 0  # the last pass whose end has been told

    async def passes() -> None:
        nonlocal told
        async for event in monitor.events():
            if event.name == "PASS":
                told = event.data["iteration"]
                await tell(_passed(picture(monitor), event))

    last: Picture | None = None
    async with trio.open_nursery(strict_exception_groups=True) as nursery:
        nursery.start_soon(passes)
        async for _ in monitor.watch(every=EVERY):
            last = picture(monitor)
            # Not before the end of the pass before it has been told: what is shown never steps back.
            due = last.iteration - 1 if monitor.status is trimig.Status.ACTIVE else last.iteration
            if told >= due and monitor.status not in TERMINAL:
                await tell(last)
    if last is not None:
        await tell(last)


def _passed(now: Picture, event: trimig.Event) -> Picture:
    """The outcome of a pass; at *now* the next one may have begun."""
    data = event.data
    return dataclasses.replace(
        now,
        status="active",
        passed=True,
        iteration=data["iteration"],
        copied=now.total,
        sent=data["sent"],
        remaining=data["remaining"],
        dirty_rate=data["dirty_rate"],
        bandwidth=data["bandwidth"],
        expected_downtime=_finite(data["expected_downtime"]),
    )


async def watched(call: Callable[[], Awaitable[T]], monitor: trimig.Monitor, view: View) -> T:
    """The result of *call*, a migration with a *monitor* that has not been used before, with *view* showing it.

    An error of *call* leaves as itself.

    **Cancellation:** as for *call*.
    """

    async def tell(now: Picture) -> None:
        view.show(now)
        await trio.lowlevel.checkpoint()

    return await alongside(call, functools.partial(follow, monitor, tell))


# -- views -------------------------------------------------------------------------------------------------------------


class View(Protocol):
    """Where progress is shown. No method fails or waits."""

    def note(self, text: str, **data: Any) -> None:
        """One line that stays; *data* is for machines."""

    def begin(self, title: str, **data: Any) -> None:
        """A migration begins."""

    def show(self, now: Picture) -> None:
        """How it stands."""

    def end(self, text: str, **data: Any) -> None:
        """It is over, and *text* says how."""


@contextlib.contextmanager
def open_view(*, as_json: bool) -> Iterator[View]:
    """The view that fits: JSON lines if asked for, a live table on a terminal, plain lines elsewhere."""
    if as_json:
        yield JsonView()
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        view = LiveView()
        try:
            yield view
        finally:
            view.close()
    else:
        yield LineView()


class JsonView:
    """One JSON object on each line of stderr; ``event`` is ``note``, ``begin``, ``progress`` or ``end``."""

    def note(self, text: str, **data: Any) -> None:
        write_json({"event": "note", "text": text, **data}, err=True)

    def begin(self, title: str, **data: Any) -> None:
        write_json({"event": "begin", "text": title, **data}, err=True)

    def show(self, now: Picture) -> None:
        write_json({"event": "progress", **now.record()}, err=True)

    def end(self, text: str, **data: Any) -> None:
        write_json({"event": "end", "text": text, **data}, err=True)


class LineView:
    """Lines on stderr, for logs."""

    def __init__(self) -> None:
        self._next = 0.0

    def note(self, text: str, **data: Any) -> None:
        say(text)

    def begin(self, title: str, **data: Any) -> None:
        say(title)
        self._next = time.monotonic() + LINE_EVERY

    def show(self, now: Picture) -> None:
        if time.monotonic() >= self._next and not now.passed:
            self._next = time.monotonic() + LINE_EVERY
            say(now.sentence)

    def end(self, text: str, **data: Any) -> None:
        say(text)


class LiveView:
    """A table of passes that is drawn anew at each picture; what is over scrolls up as one line."""

    def __init__(self) -> None:
        # Loading it takes a while, and only a terminal needs it.
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True, highlight=False)
        # Drawn when there is something new, by us: its own refreshing would need a thread.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._rows: dict[int, Picture] = {}
        self._title = ""

    def begin(self, title: str, **data: Any) -> None:
        self._rows.clear()
        self._title = title
        with self._guarded():
            self._live.start()
            self._live.update(title, refresh=True)

    def show(self, now: Picture) -> None:
        known = self._rows.get(now.iteration)
        if now.iteration and (known is None or now.passed or not known.passed):
            self._rows[now.iteration] = now
        with self._guarded():
            self._live.update(self._draw(now), refresh=True)

    def note(self, text: str, **data: Any) -> None:
        with self._guarded():
            self._console.print(text, markup=False, soft_wrap=True)

    def end(self, text: str, **data: Any) -> None:
        self.close()
        self.note(text)

    def close(self) -> None:
        """Give the terminal back."""
        with self._guarded():
            self._live.stop()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """A terminal that has gone away must not take the migration with it."""
        with contextlib.suppress(OSError):
            yield

    def _draw(self, now: Picture) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        head = Table.grid(padding=(0, 1))
        state = now.phase
        if now.role == "destination":
            head.add_row(self._title, f"{state}, {formats.size(now.sent)} received")
            return head
        if state == "first copy":
            percent = now.copied * 100 // now.total if now.total else 0
            head.add_row(
                self._title,
                "first copy",
                ProgressBar(total=100, completed=percent, width=24),
                formats.percent(percent / 100),
            )
        elif state == "chase":
            head.add_row(
                self._title, f"chase: {formats.size(now.remaining)} left after {formats.duration(now.elapsed)}"
            )
        elif now.status in FOLLOWING:
            head.add_row(self._title, f"{state}: {formats.size(now.remaining)} of its memory remain here")
        else:
            head.add_row(self._title, state)
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("iteration", "sent", "remaining", "dirty rate", "bandwidth", "expected downtime"):
            table.add_column(column, justify="right", no_wrap=True)
        for number in sorted(self._rows)[-_ROWS:]:
            row = self._rows[number]
            table.add_row(
                str(number),
                formats.size(row.sent),
                formats.size(row.remaining),
                f"{formats.rate(row.dirty_rate)}" if row.dirty_rate or row.passed else "",
                f"{formats.rate(row.bandwidth)}" if row.bandwidth else "",
                "" if row.expected_downtime is None else formats.duration(row.expected_downtime),
            )
        parts: list[RenderableType] = [head, table]
        slow = now.expected_downtime is not None and now.expected_downtime > now.downtime_limit
        if state == "chase" and now.iteration > _ROWS and slow:
            parts.append(
                f"It does not converge: the guest writes too fast for a downtime of {formats.duration(now.downtime_limit)}. "
                "Allow more downtime or bandwidth; Ctrl-C cancels."
            )
        return Group(*parts)
