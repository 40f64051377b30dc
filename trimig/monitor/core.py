"""The state of a monitor, and the methods for the engine. Callers use :class:`trimig.Monitor`, which shows and steers
it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import AsyncIterator, Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import trio

from .. import status as _status
from ..config.config import Config
from ..errors import Owner, Ownership, StateError
from ..status import IDLE, TERMINAL, Role, Status
from . import blockers
from .listeners import Listener, Listeners
from .statistics import Counters, Event, Statistics, query_migrate

if TYPE_CHECKING:
    from ..config.capabilities import Capabilities
    from ..config.parameters import Parameters
    from ..guest import Guest

#: Events kept for a slow reader; the oldest are dropped first, so that a reader cannot stall a migration.
EVENT_BACKLOG = 1024


class MonitorCore:
    """The state of one monitor: the engine changes it, :class:`trimig.Monitor` shows it to callers and steers it."""

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
        self._postcopy_wanted = False
        self._interrupt: Callable[[str], None] | None = None
        self._cut: Callable[[], bool] | None = None
        self._recover_at: str | None = None
        self._given_up: str | None = None
        self._addresses: tuple[str, ...] = ()
        self._migrating: Guest | None = None
        self._listeners = Listeners()
        self._guest: Guest | None = None

    def __repr__(self) -> str:
        role = f" {self._role.value}" if self._role else ""
        return f"<trimig.Monitor{role} {self._status.value}>"

    # -- watching --------------------------------------------------------------------------------------------------

    @property
    def guest(self) -> Guest | None:
        """See :meth:`trimig.Monitor.guest`."""
        return self._guest

    @property
    def status(self) -> Status:
        """See :meth:`trimig.Monitor.status`."""
        return self._status

    @property
    def role(self) -> Role | None:
        """See :meth:`trimig.Monitor.role`."""
        return self._role

    @property
    def owner(self) -> Ownership:
        """See :meth:`trimig.Monitor.owner`."""
        return _status.owner(self._role or Role.SOURCE, self._status)

    @property
    def config(self) -> Config:
        """See :meth:`trimig.Monitor.config`."""
        return self._config

    @property
    def addresses(self) -> tuple[str, ...]:
        """See :meth:`trimig.Monitor.addresses`."""
        return self._addresses

    def statistics(self) -> Statistics:
        """See :meth:`trimig.Monitor.statistics`."""
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
            first_copy=c.first_copy,
            convergence_progress=c.convergence_progress,
            convergence=c.convergence,
            encoded_pages=c.encoded,
            encoded_bytes=c.encoded_bytes,
            encodings=tuple(c.encodings.values()),
            data_channels=c.data_channels,
            multifd_bytes=c.multifd_bytes,
            throttle=c.throttle,
        )

    def info(self) -> dict[str, Any]:
        """See :meth:`trimig.Monitor.info`."""
        return query_migrate(
            self._counters,
            role=self._role,
            status=self._status,
            owner=self.owner,
            addresses=self._addresses,
            blocked=blockers.reasons(self._guest) if self._guest is not None else (),
            downtime_limit=self._config.parameters.downtime_limit,
            now=trio.current_time() if self._status is not Status.NONE else 0.0,
        )

    def watch(self, every: float = 1.0) -> AsyncIterator[Statistics]:
        """See :meth:`trimig.Monitor.watch`."""
        return _StatusWatch(self, every)

    async def wait_status(self, *statuses: Status) -> Status:
        """See :meth:`trimig.Monitor.wait_status`. **Cancellation:** no effect."""
        while self._status not in statuses and self._status not in TERMINAL:
            await self.wait_changed()
        await trio.lowlevel.checkpoint()
        return self._status

    async def wait_changed(self) -> None:
        """See :meth:`trimig.Monitor.wait_changed`. **Cancellation:** no effect."""
        await self._changed.wait()

    def events(self) -> AsyncIterator[Event]:
        """See :meth:`trimig.Monitor.events`."""
        return _EventWatch(self)

    def add_listener(self, listener: Listener) -> Callable[[], None]:
        """See :meth:`trimig.Monitor.add_listener`."""
        return self._listeners.add(listener)

    def set_guest(self, guest: Guest | None) -> None:
        """See :meth:`trimig.Monitor.guest`."""
        self._guest = guest

    # -- steering --------------------------------------------------------------------------------------------------

    def cancel(self, reason: str = "no reason was given") -> None:
        """See :meth:`trimig.Monitor.cancel`."""
        if self._status in _status.CANCEL_IGNORED:
            return
        if self._status not in _status.CANCELLABLE:
            why = (
                "the guest runs at the destination, and its memory is needed there"
                if self._status in _status.IN_POSTCOPY
                else "the decision to hand the guest over has been sent"
            )
            raise StateError(f"too late to cancel: {why}", status=self._status.value)
        self._cancel_reason = reason
        self.advance(Status.CANCELLING)
        if self._cancel is not None:
            self._cancel(reason)

    def resume(self) -> None:
        """See :meth:`trimig.Monitor.resume`."""
        if self._status is not Status.PRE_SWITCHOVER:
            raise StateError(
                f"there is no pause before the switchover to go on from: the status is {self._status.value}",
                status=self._status.value,
            )
        self.advance(Status.DEVICE)

    def start_postcopy(self) -> None:
        """See :meth:`trimig.Monitor.start_postcopy`."""
        if self._status is Status.NONE or self._role is Role.DESTINATION:
            raise StateError("there is no outgoing migration to switch to postcopy", status=self._status.value)
        if not self._config.capabilities.postcopy_ram:
            raise StateError("the capability postcopy-ram must be on before the migration begins")
        if not self._postcopy_wanted and self._status not in IDLE:
            self._postcopy_wanted = True
            self.emit("POSTCOPY_WANTED")

    def pause(self, reason: str = "it was paused") -> None:
        """See :meth:`trimig.Monitor.pause`."""
        if self._status not in _status.PAUSABLE or self._interrupt is None:
            raise StateError(
                f"only a migration in postcopy can be paused; the status is {self._status.value}",
                status=self._status.value,
            )
        self._interrupt(reason)

    def yank(self) -> None:
        """See :meth:`trimig.Monitor.yank`."""
        if self._cut is not None and not self._cut():
            raise StateError("this kind of connection cannot be broken from here", status=self._status.value)

    def recover(self, uri: str) -> None:
        """See :meth:`trimig.Monitor.recover`."""
        if self._status not in _status.RECOVERABLE or self._recover_at is not None:
            raise StateError(
                f"there is no paused postcopy migration to recover; the status is {self._status.value}",
                status=self._status.value,
            )
        self._recover_at = uri
        self.emit("RECOVER", uri=uri)

    def abandon(self, reason: str = "no reason was given") -> None:
        """See :meth:`trimig.Monitor.abandon`."""
        if self._status not in _status.RECOVERABLE:
            raise StateError(
                f"there is no paused postcopy migration to give up; the status is {self._status.value}",
                status=self._status.value,
            )
        if self._given_up is None:
            self._given_up = reason
            self.emit("ABANDON", reason=reason)

    def set_parameters(self, **changes: Any) -> Parameters:
        """See :meth:`trimig.Monitor.set_parameters`."""
        before = self._config.parameters.warnings()
        parameters = self._config.parameters.replace(**changes)
        for text in parameters.warnings():
            if text not in before and self._status not in IDLE:
                self.warn(text)
        self._config = dataclasses.replace(self._config, parameters=parameters)
        if self._retuned is not None:
            self._retuned()
        return parameters

    def reconfigure(self, *, capabilities: Capabilities | None = None, autostart: bool | None = None) -> None:
        """See :meth:`trimig.Monitor.reconfigure`."""
        if self._role is not Role.DESTINATION or self._status in IDLE:
            return
        if self._status is not Status.SETUP and (capabilities is not None or self._status is not Status.ACTIVE):
            raise StateError("the incoming migration has gone too far to change that", status=self._status.value)
        changes: dict[str, Any] = {"capabilities": capabilities, "autostart": autostart}
        changes = {name: value for name, value in changes.items() if value is not None}
        self._config = dataclasses.replace(self._config, **changes)

    # -- the engine's side -----------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """The counters."""
        return self._counters

    @property
    def cancel_reason(self) -> str | None:
        """The reason given to :meth:`cancel` in this attempt."""
        return self._cancel_reason

    @property
    def postcopy_wanted(self) -> bool:
        """Whether :meth:`start_postcopy` was called in this attempt."""
        return self._postcopy_wanted

    @property
    def given_up(self) -> str | None:
        """The reason given to :meth:`abandon` in this attempt."""
        return self._given_up

    @property
    def recovery_wanted(self) -> bool:
        """Whether :meth:`recover` was called, and the call was not taken yet."""
        return self._recover_at is not None

    def take_recovery(self) -> str | None:
        """Take the URI of the last call of :meth:`recover`; None if there was no call since the last take."""
        uri, self._recover_at = self._recover_at, None
        return uri

    def interrupt(self, function: Callable[[str], None] | None) -> None:
        """Set the function that :meth:`pause` calls."""
        self._interrupt = function

    def begin(self, role: Role, config: Config, guest: Guest | None = None) -> Counters:
        """Begin a new attempt: all counters are zero, no old error is left.

        Raises:
            StateError: an attempt is under way, or its outcome is not settled.
        """
        if self._status not in IDLE:
            raise StateError(f"a migration is in progress ({self._status.value})", status=self._status.value)
        self._role = role
        self._config = config
        if guest is not None:
            self._guest = guest
        self._counters = Counters(started=trio.current_time())
        self._cancel_reason = None
        self._postcopy_wanted = False
        self._recover_at = self._given_up = None
        self._addresses = ()
        self._migrating = guest
        self.advance(Status.SETUP)
        for text in config.parameters.warnings():
            self.warn(text)
        return self._counters

    def count(self, moved: Callable[[], int]) -> None:
        """Set the function that tells the bytes of this attempt so far, over all connections."""
        self._counters.count_bytes = moved

    def control(
        self,
        cancel: Callable[[str], None] | None,
        retuned: Callable[[], None] | None,
        cut: Callable[[], bool] | None = None,
    ) -> None:
        """Set the functions that a cancel and changed parameters call, and the function that breaks the connections."""
        self._cancel, self._retuned, self._cut = cancel, retuned, cut

    def listening(self, *addresses: str) -> None:
        """Store the addresses that the receiver listens on."""
        self._addresses = addresses
        if addresses:
            self.emit("LISTENING", addresses=list(addresses))

    def advance(self, new: Status) -> None:
        """Change the status, and the guest's owner with it. Synchronous: checked, stored and told in one step.

        Raises:
            StateError: *new* cannot follow the present status.
            GuestFailed: the guest is to be handed over, and it runs.
        """
        assert self._role is not None
        _status.check(self._role, self._status, new)
        if self._migrating is not None:
            owner = _status.guest_owner(self._role, new)
            handed_over = owner is Owner.ELSEWHERE and self._role is Role.SOURCE
            self._migrating.set_owner(owner, handed_over=handed_over)
        self._status = new
        if new in TERMINAL:
            self._counters.finished = trio.current_time()
        self.emit("MIGRATION", status=new.value, owner=self.owner.value)

    def emit(self, name: str, **data: Any) -> None:
        """Tell all listeners and waiting tasks of an event."""
        event = Event(name=name, data=MappingProxyType(data), time=trio.current_time())
        self._events.append(event)
        self._event_count += 1
        self._changed.set()
        self._changed = trio.Event()
        self._listeners.tell(event)

    def warn(self, text: str) -> None:
        """Add a warning to the summary."""
        self._counters.warnings.append(text)
        self.emit("WARNING", text=text)


class _StatusWatch:
    """See :meth:`Monitor.watch`. An object instead of a generator, because it can be dropped at any point."""

    def __init__(self, monitor: MonitorCore, every: float) -> None:
        self._monitor = monitor
        self._every = every
        self._due = -math.inf
        self._seen: Status | None = None
        self._ended = False

    def __aiter__(self) -> _StatusWatch:
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


class _EventWatch:
    """See :meth:`Monitor.events`."""

    def __init__(self, monitor: MonitorCore) -> None:
        self._monitor = monitor
        self._next = monitor._event_count

    def __aiter__(self) -> _EventWatch:
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
