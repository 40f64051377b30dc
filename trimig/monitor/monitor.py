""":class:`Monitor`, by which a caller watches and steers a migration, and the records that it returns.

A monitor is a plain object without tasks of its own. The caller makes it and passes it to :func:`trimig.migrate` or
:func:`trimig.receive`; it may be used for one attempt after another, never for two at once. Everything here happens in
the trio thread; nothing blocks except the methods that say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, cast

from ..expected import expect
from ..guest import Guest
from ..status import Status
from .core import EVENT_BACKLOG, MonitorCore
from .statistics import Convergence, Counters, Downtime, Event, Statistics, Summary

if TYPE_CHECKING:
    from ..config.capabilities import Capabilities
    from ..config.config import Config
    from ..config.parameters import Parameters
    from ..errors import Ownership
    from ..status import Role
    from .listeners import Listener

__all__ = (
    "EVENT_BACKLOG",
    "Convergence",
    "Counters",
    "Downtime",
    "Event",
    "Monitor",
    "Statistics",
    "Summary",
)


#: The type of callables, for a check at run time.
_Function: type[Any] = cast("type[Any]", Callable)


class Monitor:
    """Watches and steers one migration at a time."""

    def __init__(self) -> None:
        self._core = MonitorCore()

    def __repr__(self) -> str:
        return repr(self._core)

    # -- watching --------------------------------------------------------------------------------------------------

    @property
    def guest(self) -> Guest | None:
        """The guest whose blockers :meth:`info` lists. Each attempt sets it; a caller may set it before the first
        attempt.
        """
        return self._core.guest

    @guest.setter
    def guest(self, guest: Guest | None) -> None:
        expect("guest", guest, (Guest, type(None)), "a trimig.Guest such as a trimig.AppGuest, or None")
        self._core.set_guest(guest)

    @property
    def counters(self) -> Counters:
        """A copy of the counters so far; changing it has no effect."""
        return dataclasses.replace(self._core.counters)

    @property
    def status(self) -> Status:
        """The status of the present or the last attempt."""
        return self._core.status

    @property
    def role(self) -> Role | None:
        """The side of this process in the present or the last attempt; None before the first."""
        return self._core.role

    @property
    def owner(self) -> Ownership:
        """Which side may run the guest, as far as this side can tell."""
        return self._core.owner

    @property
    def config(self) -> Config:
        """The configuration in force, live parameter changes included."""
        return self._core.config

    @property
    def addresses(self) -> tuple[str, ...]:
        """The URIs that a receiver listens on, port 0 resolved; empty once the peer has connected."""
        return self._core.addresses

    def statistics(self) -> Statistics:
        """The present figures."""
        return self._core.statistics()

    def info(self) -> dict[str, Any]:
        """The members of QEMU's ``query-migrate``, present as in its table per status (config.md part 6.1).

        Times are in ms, sizes in bytes. Four members are trimig's own: ``owner`` (``source``, ``destination`` or
        ``unknown``) if there has been a migration, ``warnings`` (a list of sentences) if there are any,
        ``dirty-tracking`` on the source, and on a running source ``convergence`` with ``converging``, ``reason`` and
        ``advice`` (a list).
        """
        return self._core.info()

    def watch(self, every: float = 1.0) -> AsyncIterator[Statistics]:
        """Statistics every *every* seconds and at each change of status, until the attempt ends.

        **Cancellation:** nothing is lost; the iterator may be used again.
        """
        expect("every", every, (int, float), "a number of seconds")
        return self._core.watch(every)

    async def wait_status(self, *statuses: Status) -> Status:
        """Wait until the status is one of *statuses*, or the attempt has ended; returns the status then.

        **Cancellation:** no effect.
        """
        for status in statuses:
            expect("statuses", status, Status, "of trimig.Status")
        return await self._core.wait_status(*statuses)

    async def wait_changed(self) -> None:
        """Wait for the next event of any kind.

        **Cancellation:** no effect.
        """
        await self._core.wait_changed()

    def events(self) -> AsyncIterator[Event]:
        """All events from now on, until the attempt ends. A reader that is too slow loses all but the last EVENT_BACKLOG.

        **Cancellation:** nothing is lost; the iterator may be used again.
        """
        return self._core.events()

    def add_listener(self, listener: Listener) -> Callable[[], None]:
        """Call *listener* with each :class:`Event`, at once. Returns a function that removes it.

        The engine's task calls the listener synchronously: it must not wait, and should be quick. It may steer the
        migration (:meth:`cancel`, :meth:`resume`). If it raises, the error is logged and the listener is removed.
        """
        expect("listener", listener, _Function, "a function")
        return self._core.add_listener(listener)

    # -- steering --------------------------------------------------------------------------------------------------

    def cancel(self, reason: str = "no reason was given") -> None:
        """Cancel the migration; it ends with :class:`trimig.MigrationCancelled`.

        Without a migration under way this does nothing, as in QEMU.

        Raises:
            StateError: the decision to hand over has been sent and cannot be taken back.
        """
        expect("reason", reason, str, "a str")
        self._core.cancel(reason)

    def resume(self) -> None:
        """Go on with the switchover of a migration that is held in ``pre-switchover``.

        Raises:
            StateError: the status is not ``pre-switchover``. Nothing was done, and a later ``pre-switchover`` waits again.
        """
        self._core.resume()

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as possible: the guest runs at the destination, and the rest of its memory follows.

        During `setup` the wish is kept for the first pass. After the end of an attempt the call does nothing, as in
        QEMU.

        Raises:
            StateError: no migration has begun, the migration is an incoming one, or the capability ``postcopy-ram`` is
                off.
        """
        self._core.start_postcopy()

    def pause(self, reason: str = "it was paused") -> None:
        """Close the connection in postcopy, to go on later over a new one (:meth:`recover`).

        Raises:
            StateError: the status is not `postcopy-active` or `postcopy-recover`, or everything has been sent.
        """
        expect("reason", reason, str, "a str")
        self._core.pause(reason)

    def yank(self) -> None:
        """Break the connection at once, like a network failure. Before the switch to postcopy the migration fails (if
        the decision is under way, the owner may become unknown). After the switch the migration is paused. Without a
        connection the call does nothing.

        Raises:
            StateError: this kind of connection (``exec:``, ``file:``, a stream of the caller's own) cannot be broken.
        """
        self._core.yank()

    def recover(self, uri: str) -> None:
        """Recover a paused postcopy migration: a source connects to *uri*, a destination listens there.

        Call it on the destination first. If the recovery fails, the status is `postcopy-paused` again, and another try
        is allowed.

        Raises:
            StateError: the migration is not paused in postcopy, or a recovery was already requested.
        """
        expect("uri", uri, str, "a URI (a str such as 'tcp:host:4444')")
        self._core.recover(uri)

    def abandon(self, reason: str = "no reason was given") -> None:
        """Give up a paused postcopy migration; it ends with :class:`trimig.PostcopyLost`. A second call has no effect.

        Raises:
            StateError: the migration is not paused in postcopy.
        """
        expect("reason", reason, str, "a str")
        self._core.abandon(reason)

    def set_parameters(self, **changes: Any) -> Parameters:
        """Change parameters, all or none, also while a migration runs. The bandwidth limit applies at once, the
        downtime limit at the next decision.

        Raises:
            ConfigError: a name or a value is wrong. Nothing was changed.
        """
        return self._core.set_parameters(**changes)

    def reconfigure(self, *, capabilities: Capabilities | None = None, autostart: bool | None = None) -> None:
        """Change settings of a destination before they are used: capabilities until a source has connected, and whether
        the guest is started, until the guest has arrived. None keeps a setting. Without an attempt, and on a source,
        the call has no effect.

        Raises:
            StateError: it is too late for the change.
            ConfigError: the capabilities do not go together with the parameters.
        """
        self._core.reconfigure(capabilities=capabilities, autostart=autostart)


def core_of(monitor: Monitor) -> MonitorCore:
    """The state behind *monitor*; for the engine."""
    return monitor._core
