"""A snapshot of a migration for the displays, and its source: a monitor in this process."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from trimig import formats
from trimig.policy import eta
from trimig.status import BEFORE_MEMORY, QMP_IN_POSTCOPY, SWITCHOVER, TERMINAL, Role, Status

from .encodings import encoding_records, encoding_words
from .tasks import alongside

if TYPE_CHECKING:
    from trimig.monitor import Event, Monitor

    from .display import View

T = TypeVar("T")

_BEFORE_MEMORY: Final = frozenset(status.value for status in BEFORE_MEMORY)
_SWITCHOVER: Final = frozenset(status.value for status in SWITCHOVER)
#: Seconds between two pictures of a running migration.
EVERY: Final = 0.2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A snapshot of a migration; sizes in bytes, times in seconds, rates in bytes per second."""

    role: str
    status: str
    #: The pass of these figures, from 1 on; 0 before the first, and always on a destination.
    iteration: int
    #: The pass is over, and the figures are its outcome.
    passed: bool
    total: int
    #: Of the first copy of all memory.
    copied: int
    sent: int
    remaining: int
    bandwidth: float
    #: None in postcopy: this side does not measure the guest's writes at the destination.
    dirty_rate: float | None
    #: The bandwidth limit; 0 for no limit.
    max_bandwidth: int
    #: None while it is unknown.
    expected_downtime: float | None
    #: The passes end when the expected downtime is at most this.
    downtime_limit: float
    elapsed: float
    #: In postcopy, if known: pages for which the guest had to wait.
    requests: int | None = None
    #: None if unknown, infinite if no end is in sight.
    eta: float | None = None
    #: A lower bound of the time that is left.
    eta_at_least: bool = False
    #: Memory that was sent in another encoding (xbzrle), and the bytes that were sent of it.
    encoded: int = 0
    encoded_sent: int = 0
    #: What ``encoding = "auto"`` has chosen, as in JSON; empty if it is off.
    encodings: tuple[dict[str, Any], ...] = ()
    #: Whether the passes converge, the reason, and the advice; None before the end of the first pass.
    converging: bool | None = None
    reason: str = ""
    advice: tuple[str, ...] = ()
    #: Open connections for pages beside the main one (multifd).
    data_channels: int = 0
    #: Bytes of :attr:`sent` that went over them.
    multifd: int = 0
    #: The share of its running time that auto-converge takes from the guest, in percent; 0 for none.
    throttle: int = 0

    @property
    def phase(self) -> str:
        """The phase: ``connecting``, ``first copy``, ``later passes``, ``switchover`` or the outcome."""
        if self.status in _BEFORE_MEMORY:
            return "connecting"
        if self.status == Status.ACTIVE.value:
            if self.role == "destination":
                return "receiving"
            return "first copy" if self.iteration <= 1 and not self.passed else "later passes"
        if self.status in _SWITCHOVER:
            return "switchover"
        return self.status

    @property
    def limit(self) -> str:
        """The bytes sent in a second, and the limit."""
        speed = f"{formats.rate(self.bandwidth)} sent" if self.bandwidth else "no rate measured yet"
        over = f" over {formats.counted(self.data_channels, 'data channel')}" if self.data_channels else ""
        return f"{speed}{over} ({formats.bandwidth_limit(self.max_bandwidth)})"

    @property
    def throttled(self) -> str:
        """What auto-converge does to the guest; empty if the guest is not throttled."""
        return f"the guest is throttled by {formats.percent(self.throttle / 100)}" if self.throttle else ""

    @property
    def encoding(self) -> str:
        """How much memory went in another encoding, and as how many bytes, or what was chosen; empty if none did."""
        if chosen := encoding_words(self.encodings):
            return f"encoding chosen: {chosen}"
        if not self.encoded:
            return ""
        return f"{formats.size(self.encoded)} of memory sent as {formats.size(self.encoded_sent)} (encoded)"

    @property
    def time_left(self) -> str:
        """The remaining time in words."""
        return formats.remaining_time(self.eta, at_least=self.eta_at_least)

    @property
    def state(self) -> tuple[object, ...]:
        """What a log has a line for: the phase, the pass, and the tenth of the memory that has been sent or is left."""
        moved = self.sent if self.role == "destination" else self.copied - self.remaining
        tenth = 10 * (self.copied if self.phase == "first copy" else moved) // self.total if self.total else 0
        return self.phase, self.iteration, tenth, self.throttle

    @property
    def sentence(self) -> str:
        """One plain line."""
        if self.role == "destination":
            if self.phase == "connecting" and not self.sent:
                return "waiting for a source"
            speed = f" at {formats.rate(self.bandwidth)}" if self.bandwidth and self.phase == "receiving" else ""
            return f"{self.phase}: {formats.size(self.sent)} received{speed}"
        if self.status in QMP_IN_POSTCOPY:
            text = (
                f"{self.phase}: the guest is at the destination, {formats.size(self.remaining)} of its memory are here"
            )
            if self.status != Status.POSTCOPY_ACTIVE.value:
                return text
            asked = "" if self.requests is None else f", {formats.counted(self.requests, 'page')} asked for"
            return f"{text}, {self.limit}{asked}, time left: {self.time_left}"
        if self.phase == "first copy":
            share = self.copied / self.total if self.total else 0.0
            text = f"first copy: {formats.percent(share)}, {self.limit}, time left: {self.time_left}"
            return f"{text}, {self.encoding}" if self.encoding else text
        if self.phase == "later passes":
            return self._later_pass
        return self.phase

    @property
    def _later_pass(self) -> str:
        expected = "not known yet" if self.expected_downtime is None else formats.duration(self.expected_downtime)
        text = (
            f"later passes (pass {self.iteration}): {formats.size(self.remaining)} left, {formats.rate(self.dirty_rate or 0)} "
            f"dirtied, {self.limit}, expected downtime {expected} (limit {formats.duration(self.downtime_limit)}), time "
            f"left: {self.time_left}"
        )
        if self.encoding:
            text += f", {self.encoding}"
        if self.throttle:
            text += f"; {self.throttled}"
        if self.converging is False:
            text += "; it does not converge"
        if self.converging is False and self.advice:
            text += f", what would help: {' or '.join(self.advice)}"
        return text

    def record(self) -> dict[str, Any]:
        """The members for JSON, with units in their names. ``eta_ms`` is null while it is unknown, and if no end is in
        sight (then ``converging`` is false)."""
        return {
            "phase": self.phase,
            "role": self.role,
            "status": self.status,
            "iteration": self.iteration,
            "passed": self.passed,
            "total_bytes": self.total,
            "copied_bytes": self.copied,
            "sent_bytes": self.sent,
            "remaining_bytes": self.remaining,
            "bandwidth_bytes_per_s": round(self.bandwidth),
            "max_bandwidth_bytes_per_s": self.max_bandwidth,
            "dirty_rate_bytes_per_s": None if self.dirty_rate is None else round(self.dirty_rate),
            "expected_downtime_ms": _finite_ms(self.expected_downtime),
            "downtime_limit_ms": formats.ms(self.downtime_limit),
            "elapsed_ms": formats.ms(self.elapsed),
            "eta_ms": _finite_ms(self.eta),
            "eta_at_least": self.eta_at_least,
            "page_requests": self.requests,
            "encoded_bytes": self.encoded,
            "encoded_sent_bytes": self.encoded_sent,
            "encodings": list(self.encodings),
            "converging": self.converging,
            "reason": self.reason,
            "advice": list(self.advice),
            "data_channels": self.data_channels,
            "multifd_bytes": self.multifd,
            "throttle_percent": self.throttle,
        }

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Picture:
        """Make a picture from the JSON form of :func:`dataclasses.asdict`."""
        return cls(**{**fields, "advice": tuple(fields["advice"]), "encodings": tuple(fields["encodings"])})


def _finite_ms(seconds: float | None) -> float | None:
    return None if seconds is None or math.isinf(seconds) else formats.ms(seconds)


def with_estimate(now: Picture, remaining_time: eta.RemainingTime) -> Picture:
    """*now* with the time that is left."""
    if now.role != "source":
        return now
    stage, left = now.phase, now.total - now.copied
    if now.status == Status.POSTCOPY_ACTIVE.value:
        stage, left = "following", now.remaining
    elif stage not in ("first copy", "later passes"):
        return now
    estimate = remaining_time.estimate(now.elapsed, stage, left)
    return dataclasses.replace(now, eta=estimate.seconds, eta_at_least=estimate.at_least)


class Pictures:
    """Takes pictures of the migration of a new monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._remaining_time = eta.RemainingTime()
        self._received = _Rate()

    def now(self) -> Picture:
        """A picture of the present moment."""
        return with_estimate(self._taken(), self._remaining_time)

    def _taken(self) -> Picture:
        monitor = self._monitor
        s, parameters = monitor.statistics(), monitor.config.parameters
        role = monitor.role or Role.SOURCE
        following = s.status.value in QMP_IN_POSTCOPY
        moved = (s.normal_pages + s.zero_pages + s.encoded_pages) * 4096
        copied = min(moved, s.total) if s.iteration <= 1 else s.total
        if following or role is Role.DESTINATION:
            bandwidth = self._received.of(s.elapsed, s.transferred)
        else:
            bandwidth = s.bandwidth
        why = s.convergence
        return Picture(
            role=role.value,
            status=s.status.value,
            iteration=s.iteration,
            passed=False,
            total=s.total,
            copied=copied,
            sent=s.transferred,
            remaining=s.total - copied if s.iteration <= 1 and not following else s.remaining,
            bandwidth=bandwidth,
            dirty_rate=None if following else s.dirty_rate,
            max_bandwidth=parameters.max_postcopy_bandwidth if following else parameters.max_bandwidth,
            expected_downtime=s.expected_downtime,
            downtime_limit=parameters.downtime_limit / 1000,
            elapsed=s.elapsed,
            encoded=s.encoded_pages * 4096,
            encoded_sent=s.encoded_bytes,
            encodings=tuple(encoding_records(s.encodings)),
            requests=monitor.counters.page_requests if following and role is Role.SOURCE else None,
            converging=None if why is None or following else why.converging,
            reason="" if why is None or following else why.reason,
            advice=() if why is None or following else why.advice,
            data_channels=0 if following else s.data_channels,
            multifd=s.multifd_bytes,
            throttle=s.throttle,
        )

    def passed(self, event: Event) -> Picture:
        """The outcome of the pass of a PASS event; the next pass may have begun already."""
        now, data = self._taken(), event.data
        seconds = math.inf
        if now.converging is not False:
            seconds = eta.later_passes_seconds(
                ahead=data["remaining"] / data["memory_per_byte"],
                bandwidth=data["bandwidth"],
                dirty_rate=data["dirty_rate"] / data["memory_per_byte"],
                downtime_limit=now.downtime_limit,
            )
        self._remaining_time.passed(now.elapsed, seconds)
        over = dataclasses.replace(
            now,
            status=Status.ACTIVE.value,
            passed=True,
            iteration=data["iteration"],
            copied=now.total,
            sent=data["sent"],
            remaining=data["remaining"],
            dirty_rate=data["dirty_rate"],
            bandwidth=data["bandwidth"],
            expected_downtime=data["expected_downtime"],
        )
        return with_estimate(over, self._remaining_time)


class _Rate:
    """The present growth rate of a counter."""

    def __init__(self) -> None:
        self._falling = eta.FallingQuantity()

    def of(self, now: float, count: int) -> float:
        """The rate per second at the value *count*; 0 with too little data."""
        # A shrinking count has an end, so its rate gives the time left; a count that never shrinks gives none.
        self._falling.record(now, -float(count))
        return self._falling.per_second or 0.0


async def follow(
    pictures: Pictures, monitor: Monitor, tell: Callable[[Picture], Awaitable[None]], warn: Callable[[str], None]
) -> None:
    """Pass a picture to *tell* at intervals, at each change of status, and at the end of each pass, and warnings at
    once; ends with the attempt.

    **Cancellation:** ends the task.
    """

    shown_pass = 0  # the last pass whose end has been shown

    async def happenings() -> None:
        nonlocal shown_pass
        async for event in monitor.events():
            if event.name == "PASS":
                shown_pass = event.data["iteration"]
                await tell(pictures.passed(event))
            elif event.name == "WARNING":
                warn(event.data["text"])

    last: Picture | None = None
    async with trio.open_nursery(strict_exception_groups=True) as nursery:
        nursery.start_soon(happenings)
        async for _ in monitor.watch(every=EVERY):
            last = pictures.now()
            # The end of the earlier pass is shown first: the display never steps back.
            due = last.iteration - 1 if monitor.status is Status.ACTIVE else last.iteration
            if shown_pass >= due and monitor.status not in TERMINAL:
                await tell(last)
    if last is not None:
        await tell(last)


async def watched(call: Callable[[], Awaitable[T]], monitor: Monitor, view: View) -> T:
    """The result of *call*, a migration with a new *monitor*, while *view* shows the progress.

    An error of *call* propagates as itself, not in a group.

    **Cancellation:** as for *call*.
    """

    async def tell(now: Picture) -> None:
        view.show(now)
        await trio.lowlevel.checkpoint()

    def warn(text: str) -> None:
        view.note(f"warning: {text}", warning=text)

    return await alongside(call, functools.partial(follow, Pictures(monitor), monitor, tell, warn))
