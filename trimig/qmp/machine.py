"""One guest as QMP sees it: its run state, its migrations in the background, its events.

The machine owns only what the commands share: the configuration of the next migration, the named descriptors, and one
monitor for each direction. The commands themselves are functions of a machine, in
:mod:`.commands.general`, :mod:`.migration` and :mod:`.settings`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import trio

from .. import api
from ..config.config import Config
from ..config.types import near
from ..errors import HandoverUncertain, Ownership, PostcopyLost, StateError, TrimigError
from ..monitor import blockers
from ..monitor.monitor import Monitor
from ..status import (
    ARRIVED,
    FINISH_MIGRATE,
    IDLE,
    QMP_SILENT_INCOMING,
    REVOCABLE,
    SWITCHING,
    UNSETTLED,
    Status,
)
from . import arguments as args
from .death import DeathWatch
from .interface import CommandFailed, Session
from .jobs import IncomingState, Job, Jobs, abandon_paused, log_not_arrived
from .measuring import Measurer

if TYPE_CHECKING:
    from ..guest import Guest
    from ..monitor.statistics import Event, Summary
    from .command import QmpCommand

log: Final = logging.getLogger("trimig.qmp")


#: QEMU's UUID of a machine without a configured one.
NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
#: Commands that begin something. The machine refuses them while it ends.
_BEGINNINGS: Final = frozenset(
    {"cont", "migrate", "migrate-continue", "migrate-incoming", "migrate-recover", "x-trimig-settle"}
)
#: Seconds for which the machine's end waits for the answer to ``quit``.
_REPLY_SECONDS: Final = 1.0


class Machine:
    """Implements :class:`trimig.qmp.Dispatcher` for one guest.

    Args:
        guest: the guest. The caller creates it and closes it.
        nursery: migrations run there while the clients come and go.
        config: the configuration of the first migration; QMP changes a copy.
        name: answer to ``query-name``.
        uuid: answer to ``query-uuid``.
        waiting: the guest waits for an incoming migration (``inmigrate``) instead of running or being paused.
        commit: called with the address before the source sends the commit to that address.
    """

    def __init__(
        self,
        guest: Guest,
        nursery: trio.Nursery,
        config: Config | None = None,
        *,
        name: str = "",
        uuid: str | None = None,
        waiting: bool = False,
        version: str = "",
        commit: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        from .commands import COMMANDS  # the table needs the commands, and they the machine

        self._commands: Mapping[str, QmpCommand] = COMMANDS
        self.guest = guest
        self.config = config or Config()
        self.name = name
        self.uuid = uuid or NO_UUID
        self.outgoing = Monitor()
        self.incoming = Monitor()
        self.incoming_state = IncomingState.DEFERRED if waiting else IncomingState.NONE
        #: Why the last ``migrate`` failed before the migration began; None if the migration began.
        self.start_error: str | None = None
        self.uncertain: HandoverUncertain | None = None
        #: The same for an incoming migration: the guest came from a QEMU that may have taken it back.
        self.uncertain_incoming: HandoverUncertain | None = None
        self.summary: Summary | None = None
        #: Measurements of the dirty rate.
        self.measurer = Measurer(nursery)
        self.descriptors: dict[str, int] = {}
        #: Set by ``quit`` when the machine is to end.
        self.ended = trio.Event()
        self._nursery = nursery
        self._version = version
        self._commit = commit
        self._subscribers: dict[object, Callable[[Mapping[str, Any]], None]] = {}
        self._last_status: str | None = None
        self._resumed = False  # an arrived guest runs, and the clients have no RESUME event yet
        self._jobs = Jobs(nursery)
        self._outgoing_started = False
        self._resuming = 0
        self._shutting_down = False
        self._death = DeathWatch(guest, nursery, functools.partial(self.emit, "STOP"))
        self.outgoing.add_listener(self._guard_switchover)
        self.outgoing.add_listener(functools.partial(self._migration_event, self.outgoing))
        self.incoming.add_listener(functools.partial(self._migration_event, self.incoming))

    # -- Dispatcher ------------------------------------------------------------------------------------------------

    @property
    def commands(self) -> Sequence[str]:
        """The names of all commands."""
        return tuple(self._commands)

    @property
    def version(self) -> Mapping[str, Any]:
        """The version of QEMU whose commands these are; the package is trimig's version."""
        package = f"trimig {self._version}".strip()
        return {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": package}

    async def execute(self, name: str, arguments: Mapping[str, Any], session: Session) -> Any:
        """See :class:`trimig.qmp.Dispatcher`."""
        command = self._commands.get(name)
        if command is None:
            raise CommandFailed(
                f"The command {name} has not been found{near(name, self._commands)}", error_class="CommandNotFound"
            )
        if command.signature is not None:
            args.check(arguments, command.signature)
        if self.ended.is_set() and name in _BEGINNINGS:
            raise CommandFailed("the machine is ending")
        try:
            return await command.handler(self, arguments, session)
        except TrimigError as error:
            raise CommandFailed(str(error)) from error

    def subscribe(self, listener: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
        """See :class:`trimig.qmp.Dispatcher`."""
        key = object()
        self._subscribers[key] = listener

        def remove() -> None:
            self._subscribers.pop(key, None)

        return remove

    def configure(self, **changes: Any) -> None:
        """Change fields of the configuration, for the next migration."""
        self.config = dataclasses.replace(self.config, **changes)

    # -- events ----------------------------------------------------------------------------------------------------

    def emit(self, name: str, **data: Any) -> None:
        """Tell all clients."""
        now = time.time_ns() // 1000
        event: dict[str, Any] = {"event": name}
        if data:
            event["data"] = data
        event["timestamp"] = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        for listener in tuple(self._subscribers.values()):
            listener(event)

    def _migration_event(self, monitor: Monitor, event: Event) -> None:
        # The last status goes to every client, because none can ask for it any more.
        wanted = self.config.capabilities.events or self._shutting_down
        match event.name:
            case "RESUME" if monitor is self.incoming:
                self._resumed = True  # emitted with the next status, in QEMU's order
            case "STOP" | "RESUME":
                self.emit(event.name)
            case "MIGRATION_PASS" if wanted:
                self.emit(event.name, **event.data)
            case "MIGRATION":
                # QMP has fewer statuses than trimig; the machine emits no status twice in a row.
                status = Status(event.data["status"]).qmp
                resumed, self._resumed = self._resumed, False
                if resumed and status != Status.POSTCOPY_ACTIVE.qmp:
                    self.emit("RESUME")
                if wanted and status != self._last_status and not self._is_suppressed(monitor, status):
                    self.emit("MIGRATION", status=status)
                if resumed and status == Status.POSTCOPY_ACTIVE.qmp:
                    self.emit("RESUME")
                self._last_status = status

    def _is_suppressed(self, monitor: Monitor, status: str) -> bool:
        """Whether a QEMU 7.2 omits the event for that status."""
        if monitor is self.incoming:
            return status in QMP_SILENT_INCOMING
        # Only a precopy source emits `device`, after `pre-switchover`.
        held = self._last_status == Status.PRE_SWITCHOVER.qmp
        return status == Status.DEVICE.qmp and (not held or monitor.counters.switched_to_postcopy)

    def announce_shutdown(self, reason: str) -> None:
        """Emit SHUTDOWN, once; :attr:`ended` says when the machine ends.

        Args:
            reason: QEMU's word for the reason: ``host-qmp-quit``, ``host-signal``.
        """
        if not self._shutting_down:
            self._shutting_down = True
            self.emit("SHUTDOWN", guest=False, reason=reason)

    def quit_after_reply(self) -> None:
        """End when the answer to the present command has been written, or after a second if the client does not
        read."""
        self._nursery.start_soon(self._quit_after_reply, name="trimig.qmp.quit")

    async def _quit_after_reply(self) -> None:
        with trio.move_on_after(_REPLY_SECONDS):
            await self.ended.wait()
        self.ended.set()

    # -- the run state ---------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """An outgoing migration is under way, or its outcome is not settled."""
        return self._outgoing_started or self.outgoing.status not in IDLE

    @property
    def waiting(self) -> bool:
        """The guest has not arrived yet."""
        return self.incoming_state is not IncomingState.NONE and self.incoming.status not in ARRIVED

    @property
    def handed_over(self) -> bool:
        """The guest was handed over: the destination owns it."""
        return self.outgoing.owner is Ownership.DESTINATION and self.guest.run_state != "running"

    @property
    def run_state(self) -> str:
        """QEMU's name of the guest's run state."""
        if self.ended.is_set():
            return "shutdown"
        if self.waiting:
            return "inmigrate"
        state = self.guest.run_state
        if state == "running":
            return state
        if self.outgoing.status in FINISH_MIGRATE:
            return "finish-migrate"
        if self.handed_over:
            return "postmigrate"
        return "prelaunch" if state == "inmigrate" else state

    def check_owned_here(self) -> None:
        """Refuse to let the guest run where it must not.

        Raises:
            StateError: the other side owns the guest or may own it, the guest is being handed over, or it lacks memory.
        """
        if self.outgoing.status in UNSETTLED:
            raise StateError(
                "it is not certain which side owns the guest: look at the destination, then say it with "
                "x-trimig-settle {'owner': 'source' or 'destination'}"
            )
        if self.incoming.status in UNSETTLED:
            raise StateError(
                "it is not certain which side owns the guest: look at the source, then say it with "
                "x-trimig-settle {'owner': 'source' or 'destination'}"
            )
        if self.outgoing.status in SWITCHING:
            raise StateError("Migration is not finalized yet")
        if self.incoming.status is Status.POSTCOPY_LOST:
            raise StateError("the rest of the guest's memory never came (postcopy was lost), so it must not run")
        if self.handed_over:
            raise StateError("the guest was handed over: it is the destination's, and must not run here too")

    async def pause(self) -> None:
        """``stop``: a guest that has not arrived yet will not be started when it arrives.

        Raises:
            StateError: the guest is being handed over, in one direction or the other.
            GuestFailed: the guest could not be paused, and runs.

        **Cancellation:** the guest may or may not be paused.
        """
        if self.waiting:
            self._start_on_arrival(False)
        elif self.outgoing.status in FINISH_MIGRATE:
            raise StateError(
                "Migration is not finalized yet: the migration has paused the guest, which stays paused if it succeeds"
            )
        else:
            await self._pause()

    async def _pause(self) -> None:
        blockers.check_alive(self.guest)
        if self.guest.run_state == "running":
            await self.guest.pause()
            self.emit("STOP")

    async def resume(self) -> None:
        """``cont``: a guest that has not arrived yet will be started when it arrives.

        Raises:
            StateError: this side does not own the guest, or not certainly.
            GuestFailed: the guest could not be resumed.

        **Cancellation:** the guest may or may not run.
        """
        if self.waiting:
            self._start_on_arrival(True)
            return
        self.check_owned_here()
        blockers.check_alive(self.guest)
        if self.guest.run_state == "running":
            return
        self._resuming += 1
        try:
            await self.guest.resume()
        finally:
            self._resuming -= 1
        self.emit("RESUME")

    def _start_on_arrival(self, start: bool) -> None:
        if self.incoming.status is Status.HANDOVER:
            raise StateError("Migration is not finalized yet: the guest is arriving in this moment")
        self.configure(autostart=start)
        self.incoming.reconfigure(autostart=start)

    def _guard_switchover(self, event: Event) -> None:
        """Cancel a switchover while ``cont`` resumes the guest: the guest would run on both sides."""
        switching = event.name == "MIGRATION" and self.outgoing.status in REVOCABLE
        if switching and self._resuming:
            self.outgoing.cancel("the guest was resumed in the moment of the switchover")

    # -- migrations ------------------------------------------------------------------------------------------------

    def record_failed_start(self, reason: str) -> None:
        """Record a ``migrate`` that failed before the migration started; like QEMU, emit MIGRATION setup, then failed.

        Args:
            reason: for ``error-desc``; empty for none.
        """
        self.start_error = reason
        self.summary = None
        self._last_status = Status.FAILED.qmp
        if self.config.capabilities.events:
            self.emit("MIGRATION", status=Status.SETUP.qmp)
            self.emit("MIGRATION", status=Status.FAILED.qmp)

    async def start_outgoing(self, uri: str, on_done: Callable[[], None] = lambda: None) -> None:
        """Migrate to *uri* in the background; returns when the migration has begun. *on_done* is always called at its
        end.

        Raises:
            TrimigError: the migration could not begin; nothing was changed.

        **Cancellation:** the migration goes on in the background.
        """
        self._outgoing_started = True  # set before the first await, so that no other migration begins meanwhile
        await self.measurer.end()
        await self._jobs.start(functools.partial(self._run_outgoing, uri, on_done), "trimig.qmp.migrate")

    async def _run_outgoing(self, uri: str, on_done: Callable[[], None], job: Job) -> None:
        def on_event(event: Event) -> None:
            if event.name == "MIGRATION" and not job.begun:
                self.start_error = self.uncertain = self.summary = None
                job.begin()

        forget = self.outgoing.add_listener(on_event)
        try:
            commit = None if self._commit is None else functools.partial(self._commit, uri)
            self.summary = await api.migrate(self.guest, uri, self.config, monitor=self.outgoing, commit=commit)
        except HandoverUncertain as error:
            self.uncertain = error
            log.error("%s", error)
        except TrimigError as error:
            if job.begun and self.outgoing.status is Status.CANCELLED:
                log.info("the migration to %s was cancelled: %s", uri, error)
            elif job.begun:
                log.warning("the migration to %s failed: %s", uri, error)
            else:
                job.refuse(error)
        finally:
            forget()
            on_done()
            self._outgoing_started = False

    async def start_incoming(self, uri: str, on_done: Callable[[], None] = lambda: None) -> None:
        """Wait at *uri* for the guest. Returns when a source can connect there. *on_done* is always called at the end.

        Raises:
            TrimigError: *uri* cannot be listened on, or the first bytes were no migration stream.

        **Cancellation:** the incoming migration goes on in the background.
        """
        self.incoming_state = IncomingState.ACTIVE
        await self._jobs.start(functools.partial(self._run_incoming, uri, on_done), "trimig.qmp.receive")

    async def _run_incoming(self, uri: str, on_done: Callable[[], None], job: Job) -> None:
        def on_event(event: Event) -> None:
            if event.name == "LISTENING":
                job.begin()

        forget = self.incoming.add_listener(on_event)
        try:
            self.summary = await api.receive(self.guest, uri, self.config, monitor=self.incoming)
        except HandoverUncertain as error:
            self.incoming_state = IncomingState.NONE  # the guest has arrived, and its source may own it too
            self.uncertain_incoming = error
            log.error("%s", error)
        except PostcopyLost as error:
            self.incoming_state = IncomingState.NONE  # the guest has arrived, and stays paused
            log.error("%s", error)
        except TrimigError as error:
            self.incoming_state = IncomingState.FAILED
            if job.begun:
                log_not_arrived(self.incoming.status, error, ends=self._shutting_down)
            else:
                job.refuse(error)
        else:
            self.incoming_state = IncomingState.NONE
        finally:
            forget()
            on_done()

    def announce_incoming(self) -> None:
        """Emit MIGRATION setup: like QEMU, for a good or a bad address, and also with the capability ``events`` off."""
        self._last_status = Status.SETUP.qmp
        self.emit("MIGRATION", status=Status.SETUP.qmp)

    async def shutdown(self, reason: str) -> None:
        """Cancel the migrations if possible, wait for those that cannot be cancelled, and leave the guest paused.

        Each wait is bounded: by ``teardown_grace``, or by ``handover_timeout``.

        Raises:
            GuestFailed: the guest could not be paused, or is lost.

        **Cancellation:** the migrations go on, and the guest may run.
        """
        for monitor in (self.outgoing, self.incoming):
            # The machine waits for a postcopy that still receives memory, and abandons one that lost its connection.
            monitor.add_listener(functools.partial(abandon_paused, monitor, reason))
            abandon_paused(monitor, reason)
            try:
                monitor.cancel(reason)
            except StateError as error:
                log.warning("%s; waiting for its end", error)
        await self._jobs.wait()
        await self._pause()

    async def settle(self, owner: Ownership) -> None:
        """Set the owner of the guest after an uncertain handover.

        Raises:
            StateError: nothing is uncertain.
            GuestFailed: the guest could not be resumed.

        **Cancellation:** as :meth:`trimig.HandoverUncertain.settle`.
        """
        for monitor in (self.outgoing, self.incoming):
            if monitor.status is Status.POSTCOPY_UNCERTAIN:
                monitor.abandon("it was settled who owns the guest")
                await self._jobs.wait()
        if self.uncertain is not None and self.outgoing.status is Status.UNCERTAIN:
            await self.uncertain.settle(owner)
        elif self.uncertain_incoming is not None and self.incoming.status is Status.UNCERTAIN:
            await self.uncertain_incoming.settle(owner)
        else:
            raise StateError("nothing is to be settled: it is certain which side owns the guest")

    def info(self) -> dict[str, Any]:
        """The answer to ``query-migrate``: the members of the outgoing migration replace those of the incoming one."""
        info = dict(self.incoming.info())
        if self.incoming.status is Status.SETUP:
            del info["status"]  # a listening QEMU reports its addresses and no status
        if self.start_error is not None:
            info.update(status=Status.FAILED.qmp, owner=Ownership.SOURCE.value)
            if self.start_error:
                info["error-desc"] = self.start_error
        else:
            info.update(self.outgoing.info())
        if reasons := blockers.reasons(self.guest):
            info["blocked-reasons"] = list(reasons)
        return info

    def close(self) -> None:
        """Close the descriptors that no command has used, and watch the guest no more."""
        self._death.close()
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()
