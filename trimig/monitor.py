"""What a caller watches and steers a migration by: :class:`Monitor`, and the records it hands out.

A monitor is a plain object without tasks of its own. The caller makes it and passes it to :func:`trimig.migrate` or
:func:`trimig.receive`; it may be used for one attempt after another, never for two at once. Everything here happens in
the trio thread; nothing blocks except the methods that say so.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any

import trio

from . import status as _status
from .config import Config, Parameters
from .errors import Ownership, StateError
from .guest import PAGE_SIZE
from .status import IDLE, TERMINAL, Role, Status

#: Events kept for a reader that is not reading; the oldest are dropped first, so that nobody can stall a migration.
EVENT_BACKLOG = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. ``name`` and ``data`` are QMP's where QMP has such an event."""

    name: str
    data: Mapping[str, Any]
    #: trio's clock, seconds.
    time: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A picture of a migration; bytes, seconds, bytes per second."""

    status: Status
    owner: Ownership
    #: All RAM of the guest.
    total: int
    #: Sent over the transport so far (source), or received (destination), everything included.
    transferred: int
    #: RAM that is still to be sent, as of the last dirty sync.
    remaining: int
    normal_pages: int
    zero_pages: int
    #: Passes over the memory, the present one included.
    iteration: int
    bandwidth: float
    dirty_rate: float
    #: None until it can be told.
    expected_downtime: float | None
    elapsed: float
    #: How dirty pages are found: ``userfaultfd-wp``, ``compare``, ``marks``, ``none``; empty on a destination.
    dirty_tracking: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Downtime:
    """Where the time went while the guest ran nowhere, in seconds, as this side's clock saw it.

    A source fills all parts but ``resume``; a destination fills ``resume`` alone: what bringing the guest to life took.
    On the source that time is inside ``commit``.
    """

    pause: float = 0.0
    ram: float = 0.0
    devices: float = 0.0
    prepare: float = 0.0
    commit: float = 0.0
    resume: float = 0.0

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.pause + self.ram + self.devices + self.prepare + self.commit + self.resume


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a migration went. Returned only when the destination owns the guest."""

    role: Role
    #: The destination said so (source), or was told so (destination). False: there was no return path, and the
    #: transport took the last byte; nobody has confirmed that the guest arrived.
    confirmed: bool
    #: The destination proved that it had loaded everything before the decision was sent (needs a return path).
    prepared: bool
    total_time: float
    setup_time: float
    downtime: float
    downtime_parts: Downtime
    iterations: int
    bytes_transferred: int
    normal_pages: int
    zero_pages: int
    ram_bytes: int
    dirty_tracking: str
    #: What went other than it should have, without endangering the guest; one sentence each.
    warnings: tuple[str, ...] = ()

    @property
    def throughput(self) -> float:
        """Guest memory moved (every copy of a page counted) in bytes per second of the total time."""
        moved = (self.normal_pages + self.zero_pages) * PAGE_SIZE
        return moved / self.total_time if self.total_time > 0 else 0.0


@dataclasses.dataclass(slots=True)
class Counters:
    """What the engine counts as it goes. Bytes, seconds; times are trio's clock."""

    started: float = 0.0
    setup_done: float | None = None
    paused_at: float | None = None
    finished: float | None = None
    total: int = 0
    transferred: int = 0
    transferred_at_pause: int | None = None
    remaining: int = 0
    normal: int = 0
    duplicate: int = 0
    iteration: int = 0
    dirty_sync_count: int = 0
    bandwidth: float = 0.0
    pages_per_second: float = 0.0
    dirty_rate: float = 0.0
    expected_downtime: float | None = None
    downtime: float | None = None
    dirty_tracking: str = ""
    error: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)


class Monitor:
    """Watches and steers one migration at a time."""

    def __init__(self) -> None:
        self._role: Role | None = None
        self._status = Status.NONE
        self._config = Config()
        self._counters = Counters()
        self._changed = trio.Event()
        self._events: collections.deque[Event] = collections.deque(maxlen=EVENT_BACKLOG)
        self._event_count = 0
        self._cancel: Callable[[str], None] | None = None
        self._cancel_reason: str | None = None
        self._retuned: Callable[[], None] | None = None
        self._addresses: tuple[str, ...] = ()

    def __repr__(self) -> str:
        role = f" {self._role.value}" if self._role else ""
        return f"<trimig.Monitor{role} {self._status.value}>"

    # -- watching --------------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """The status of the present or the last attempt."""
        return self._status

    @property
    def role(self) -> Role | None:
        """The side that the present or the last attempt is; None before the first."""
        return self._role

    @property
    def owner(self) -> Ownership:
        """Which side may run the guest, as far as this side can tell."""
        return _status.owner(self._role or Role.SOURCE, self._status)

    @property
    def config(self) -> Config:
        """The configuration in force, live parameter changes included."""
        return self._config

    @property
    def addresses(self) -> tuple[str, ...]:
        """The URIs that a receiver listens on, port 0 resolved; empty once the peer has connected."""
        return self._addresses

    def statistics(self) -> Statistics:
        """A picture of now."""
        c = self._counters
        end = c.finished if c.finished is not None else trio.current_time()
        return Statistics(
            status=self._status,
            owner=self.owner,
            total=c.total,
            transferred=c.transferred,
            remaining=0 if self._status is Status.COMPLETED else c.remaining,
            normal_pages=c.normal,
            zero_pages=c.duplicate,
            iteration=c.iteration,
            bandwidth=c.bandwidth,
            dirty_rate=c.dirty_rate,
            expected_downtime=c.expected_downtime,
            elapsed=end - c.started if self._status is not Status.NONE else 0.0,
            dirty_tracking=c.dirty_tracking,
        )

    def info(self) -> dict[str, Any]:
        """The members of QEMU's ``query-migrate``, present as in its table per status (config.md part 6.1).

        Times are in ms, sizes in bytes. Two members are trimig's own, wherever there is a migration to speak of:
        ``owner`` (``source``, ``destination`` or ``unknown``) and, on the source, ``dirty-tracking``.
        """
        c, status = self._counters, self._status
        if status is Status.NONE:
            return {"socket-address": list(self._addresses)} if self._addresses else {}
        info: dict[str, Any] = {"status": status.qmp, "owner": self.owner.value}
        if status in (Status.FAILED, Status.UNCERTAIN) and c.error is not None:
            info["error-desc"] = c.error
        if self._role is Role.DESTINATION:
            if self._addresses:
                info["socket-address"] = list(self._addresses)
            return info
        if c.dirty_tracking:
            info["dirty-tracking"] = c.dirty_tracking
        running = status in (
            Status.ACTIVE, Status.CANCELLING, Status.PRE_SWITCHOVER, Status.DEVICE, Status.HANDOVER
        )  # fmt: skip
        if not running and status is not Status.COMPLETED:
            return info
        end = c.finished if c.finished is not None else trio.current_time()
        info["total-time"] = _ms(end - c.started)
        info["setup-time"] = _ms((c.setup_done or c.started) - c.started)
        if running:
            expected = c.expected_downtime
            limit = self._config.parameters.downtime_limit
            info["expected-downtime"] = limit if expected is None or math.isinf(expected) else _ms(expected)
        else:
            info["downtime"] = _ms(c.downtime or 0.0)
        info["ram"] = self._ram(c, end)
        return info

    def _ram(self, c: Counters, end: float) -> dict[str, Any]:
        completed = self._status is Status.COMPLETED
        at_pause = c.transferred if c.transferred_at_pause is None else c.transferred_at_pause
        duration = end - (c.setup_done or c.started)
        rate = c.transferred / duration if completed and duration > 0 else c.bandwidth
        return {
            "transferred": c.transferred,
            "remaining": 0 if completed else c.remaining,
            "total": c.total,
            "duplicate": c.duplicate,
            "skipped": 0,
            "normal": c.normal,
            "normal-bytes": c.normal * PAGE_SIZE,
            "dirty-pages-rate": 0 if completed else round(c.dirty_rate / PAGE_SIZE),
            "mbps": rate * 8 / 1e6,
            "dirty-sync-count": c.dirty_sync_count,
            "postcopy-requests": 0,
            "page-size": PAGE_SIZE,
            "multifd-bytes": 0,
            "pages-per-second": round(c.pages_per_second),
            "precopy-bytes": at_pause,
            "downtime-bytes": c.transferred - at_pause,
            "postcopy-bytes": 0,
            "dirty-sync-missed-zero-copy": 0,
        }

    def watch(self, every: float = 1.0) -> AsyncIterator[Statistics]:
        """Statistics every *every* seconds and at each change of status; ends by itself with the attempt.

        **Cancellation:** nothing is lost; the iterator may be used again.
        """
        return _Watch(self, every)

    async def wait_status(self, *statuses: Status) -> Status:
        """Wait until the status is one of *statuses*, or the attempt has ended; returns the status that it is.

        **Cancellation:** no effect.
        """
        while self._status not in statuses and self._status not in TERMINAL:
            await self.wait_changed()
        await trio.lowlevel.checkpoint()
        return self._status

    async def wait_changed(self) -> None:
        """Wait for the next event of any kind.

        **Cancellation:** no effect.
        """
        await self._changed.wait()

    def events(self) -> AsyncIterator[Event]:
        """All events from now on (at most EVENT_BACKLOG behind); ends by itself with the attempt.

        **Cancellation:** nothing is lost; the iterator may be used again.
        """
        return _Events(self)

    # -- steering --------------------------------------------------------------------------------------------------

    def cancel(self, reason: str = "no reason was given") -> None:
        """Ask for the migration to be undone; it ends with :class:`trimig.MigrationCancelled`.

        Without a migration under way this does nothing, as in QEMU.

        Raises:
            StateError: the decision to hand over has been sent and cannot be taken back.
        """
        if self._status in IDLE or self._status in (Status.CANCELLING, Status.UNCERTAIN):
            return
        if self._status not in _status.CANCELLABLE:
            raise StateError(
                "too late to cancel: the decision to hand the guest over has been sent", status=self._status.value
            )
        self._cancel_reason = reason
        self.advance(Status.CANCELLING)
        if self._cancel is not None:
            self._cancel(reason)

    def set_parameters(self, **changes: Any) -> Parameters:
        """Change parameters, all or none, also while a migration runs: the bandwidth limit applies at once, the downtime
        limit at the next decision.

        Raises:
            ConfigError: a name or a value is wrong; nothing was changed.
        """
        parameters = self._config.parameters.replace(**changes)
        self._config = dataclasses.replace(self._config, parameters=parameters)
        if self._retuned is not None:
            self._retuned()
        return parameters

    # -- the engine's side -----------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """For the engine: what it counts."""
        return self._counters

    @property
    def cancel_reason(self) -> str | None:
        """For the engine: the reason given to :meth:`cancel` in this attempt."""
        return self._cancel_reason

    def begin(self, role: Role, config: Config) -> Counters:
        """For the engine: a new attempt; all counters are zero, no old error is left.

        Raises:
            StateError: an attempt is under way, or its outcome is not settled.
        """
        if self._status not in IDLE:
            raise StateError(f"a migration is in progress ({self._status.value})", status=self._status.value)
        self._role = role
        self._config = config
        self._counters = Counters(started=trio.current_time())
        self._cancel_reason = None
        self._addresses = ()
        self.advance(Status.SETUP)
        return self._counters

    def control(self, cancel: Callable[[str], None] | None, retuned: Callable[[], None] | None) -> None:
        """For the engine: where cancellation and changed parameters go."""
        self._cancel, self._retuned = cancel, retuned

    def listening(self, *addresses: str) -> None:
        """For the engine: the receiver waits here."""
        self._addresses = addresses
        if addresses:
            self.emit("LISTENING", addresses=list(addresses))

    def advance(self, new: Status) -> None:
        """For the engine: the next status. Synchronous: checked, stored and told in one go."""
        assert self._role is not None
        _status.check(self._role, self._status, new)
        self._status = new
        if new in TERMINAL:
            self._counters.finished = trio.current_time()
        self.emit("MIGRATION", status=new.value, owner=self.owner.value)

    def emit(self, name: str, **data: Any) -> None:
        """For the engine: tell everybody who listens."""
        self._events.append(Event(name=name, data=MappingProxyType(data), time=trio.current_time()))
        self._event_count += 1
        self._changed.set()
        self._changed = trio.Event()

    def warn(self, text: str) -> None:
        """For the engine: something for the summary."""
        self._counters.warnings.append(text)
        self.emit("WARNING", text=text)


class _Watch:
    """See :meth:`Monitor.watch`. An object instead of a generator: it can be dropped anywhere."""

    def __init__(self, monitor: Monitor, every: float) -> None:
        self._monitor = monitor
        self._every = every
        self._due = -math.inf
        self._seen: Status | None = None
        self._ended = False

    def __aiter__(self) -> _Watch:
        return self

    async def __anext__(self) -> Statistics:
        await trio.lowlevel.checkpoint()
        if self._ended:
            raise StopAsyncIteration
        while trio.current_time() < self._due and self._monitor.status is self._seen:
            with trio.move_on_at(self._due):
                await self._monitor.wait_changed()
        self._due = trio.current_time() + self._every
        self._seen = self._monitor.status
        self._ended = self._seen in TERMINAL
        return self._monitor.statistics()


class _Events:
    """See :meth:`Monitor.events`."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._next = monitor._event_count

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        monitor = self._monitor
        while self._next >= monitor._event_count:
            if monitor.status in TERMINAL:
                raise StopAsyncIteration
            await monitor.wait_changed()
        oldest = monitor._event_count - len(monitor._events)
        self._next = max(self._next, oldest)
        event = monitor._events[self._next - oldest]
        self._next += 1
        return event


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
