"""The frame of an incoming migration: what is done around the reading, and how its end is judged.

:mod:`.destination` reads the stream and has the rules of the decision; :mod:`.postcopy` goes on behind the
switch to postcopy.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from ...channel import closing
from ...channel.channels import Channels
from ...errors import (
    GuestNotResumed,
    HandoverUncertain,
    MigrationCancelled,
    Owner,
    Ownership,
    PostcopyLost,
    RemoteProtocolError,
    TransportFailed,
    TrimigError,
)
from ...guest import DeviceSection, Guest, OpaqueGuest
from ...monitor import blockers
from ...monitor.statistics import Downtime, Summary
from ...owner import already_settled
from ...status import Role, Status, end_of
from ...wire.devices import globalstate
from ...wire.marks import reason_bytes
from ...wire.return_path import Reason, Shut, encode
from .. import guest_calls
from ..outcome import Outcome, add_to_message, bare, domain_error, lost_by_cancellation
from ..phase import phase
from ..ram.receiver import RamReceiver, never_received

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.connections import Connections
    from ...channel.reception import Reception
    from ...config.config import Config
    from ...monitor.core import MonitorCore
    from ...wire.postcopy import Runs
    from ..ram.preempt_receiver import PreemptReceiver
    from .arriving import Storing

log = logging.getLogger("trimig.destination")


class Incoming(abc.ABC):
    """One incoming migration, but for its reading."""

    def __init__(self, guest: Guest, connections: Connections, config: Config, monitor: MonitorCore) -> None:
        self.guest = guest
        self.connections = connections
        self.config = config
        self.monitor = monitor
        self.counters = monitor.counters
        self.channels = Channels()
        self.counters.count_bytes = lambda: self.channels.received
        self.channel: Channel | None = None
        self.reception: Reception | None = None
        self.urgent: PreemptReceiver | None = None
        self.return_path = False  # it was opened, and there is a way back
        self.opened = False  # the source has asked for answers
        self.marked = False  # the source is a trimig, and knows that this side is one
        self.attempt: bytes | None = None  # the id that the source has given this attempt
        self.confirmed = False
        self.settled = False  # the caller has said which side owns the guest
        self.stopped = False  # the guest ran here, and was stopped because perhaps its source runs it
        self.of_trimig = False  # the source has sent a PING that only a trimig sends
        self.prepared = False  # the source has asked for the proof that everything is loaded, and got it
        self.ram = RamReceiver(self.counters)
        self.ram_ended = False  # the section END of the RAM has come
        self.storing: Storing | None = None
        self.sections: list[DeviceSection] = []
        self.run_state = "running"
        self.resume_seconds = 0.0

    @abc.abstractmethod
    async def _phases(self, nursery: trio.Nursery) -> None:
        """Everything up to the guest's life here, in *nursery*.

        **Cancellation:** the frame unwinds.
        """

    async def _stand_still(self) -> dict[str, Runs]:
        """A guest whose memory will not follow any more is stopped; returns what it lacks.

        **Cancellation:** held off, for at most ``teardown_grace``.
        """
        return {}

    async def run(self) -> Summary:
        """The whole attempt, and the one place where its outcome is decided."""
        outcome = Outcome()
        with outcome.watch():
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                self.monitor.control(functools.partial(_cancel, nursery), None, self.channels.cut)
                if (reason := self.monitor.cancel_reason) is not None:
                    _cancel(nursery, reason)  # by a listener that was told of `setup`, before there was a nursery
                await self._phases(nursery)
                nursery.cancel_scope.cancel("the migration is over")
        self.monitor.control(None, None)
        missing = await self._stand_still()
        await self._unwind(outcome.failure)
        self._conclude(outcome.failure, missing)
        return self._summary()

    async def _unwind(self, failure: BaseException | None) -> None:
        monitor = self.monitor
        ended = monitor.status is not Status.COMPLETED
        if ended:
            cancelled = failure is None or domain_error(failure, monitor.owner) is None
            if (end := end_of(Role.DESTINATION, monitor.status, cancelled=cancelled)) is not None:
                monitor.advance(end)
        monitor.listening()
        channel = self.channel
        if self.urgent is not None:
            await self.urgent.close()
        if channel is None:
            return
        try:
            if self.return_path and monitor.status not in (Status.POSTCOPY_LOST, Status.UNCERTAIN):
                reason = self._reason(failure) if ended and self.marked else b""
                await self._answer(channel, Shut(status=1 if ended else 0), reason)
        finally:
            await self.channels.close(0.0 if ended else self.config.teardown_grace)

    def _reason(self, failure: BaseException | None) -> bytes:
        """The message that tells a trimig why it is refused."""
        error = domain_error(failure, self.monitor.owner) if failure is not None else None
        text = (
            str(error)
            if error is not None
            else f"it was cancelled: {self.monitor.cancel_reason or 'no reason was given'}"
        )
        return encode(Reason(payload=reason_bytes(text)))

    async def _answer(self, channel: Channel, answer: Shut, reason: bytes) -> None:
        said = await closing.farewell(channel, reason + encode(answer), self.config.teardown_grace)
        if answer.status == 0:
            self.confirmed = said
            if not said:
                self.monitor.warn("the source could not be told that the guest has arrived: it will report it unknown")

    def _conclude(self, failure: BaseException | None, missing: dict[str, Runs]) -> None:
        monitor = self.monitor
        if monitor.status is Status.COMPLETED:
            return  # a cancellation that came after the guest had arrived is too late
        error = domain_error(failure, monitor.owner) if failure is not None else None
        if monitor.status is Status.CANCELLING:
            monitor.advance(Status.CANCELLED)
            if error is None and monitor.cancel_reason is not None:
                error = MigrationCancelled(monitor.cancel_reason)
        hint = self.reception.hint() if self.reception is not None else None
        if hint is not None and isinstance(error, TransportFailed | RemoteProtocolError | MigrationCancelled):
            add_to_message(error, hint)
        if monitor.status in (Status.POSTCOPY_LOST, Status.UNCERTAIN):
            self.counters.missing = {
                name: [(first, end) for first, end in runs.tolist()] for name, runs in missing.items()
            }
            blockers.lacks(
                self.guest, sum(end - first for runs in self.counters.missing.values() for first, end in runs)
            )
        error = error or lost_by_cancellation(failure, monitor.status)
        if error is not None and monitor.status is Status.POSTCOPY_LOST:
            error = _lost(error, self.counters.missing)
        if monitor.status is Status.UNCERTAIN:
            error = self._uncertain(error)
        if error is not None:
            self.counters.error = str(error)
            raise error
        assert failure is not None
        raise bare(failure)

    def whole(self) -> bool:
        """All of the guest's memory is here, although the migration has not come to its end."""
        return False

    def _uncertain(self, error: TrimigError | None) -> HandoverUncertain:
        """The guest stands still here with its devices, and perhaps its source runs it."""
        uncertain = HandoverUncertain(
            f"the guest has come, but the connection was lost ({error or 'no other came'}) before the source is known to have "
            "read that it runs here: the source may run it, so it stands still here. Look at the source, then settle who "
            "owns the guest",
            settle=self._settle_by_error,
            here=Ownership.DESTINATION,
        )
        self.guest.set_owner(Owner.UNKNOWN, settle=self._settle_owner)
        uncertain.others = (error,) if error is not None else ()
        return uncertain

    async def _settle_by_error(self, owner: Owner) -> None:
        """What the error's own ``settle`` comes to: an old answer must not settle the question of a later attempt."""
        if self.settled:
            raise already_settled(self.guest.owner)
        await self.guest.settle(owner)

    async def _settle_owner(self, owner: Owner) -> None:
        """What :meth:`trimig.guest.Guest.settle` comes to. A guest without all of its memory stands still in any case."""
        self.settled = True
        if owner is Owner.ELSEWHERE:
            self.monitor.advance(Status.FAILED)
            return
        whole = self.whole()
        self.monitor.advance(Status.COMPLETED if whole else Status.POSTCOPY_LOST)
        if not whole or not self.stopped:
            return
        failure = await guest_calls.bring_back("resumed", self.guest.resume, self.config.teardown_grace)
        if failure is not None and self.guest.run_state != "running":
            raise GuestNotResumed(str(failure)) from failure.__cause__
        self.monitor.emit("RESUME")

    async def load(self) -> None:
        """Give the guest its devices. GuestFailed, RemoteProtocolError.

        **Cancellation:** the devices are undefined.
        """
        loading = functools.partial(self.guest.load_devices, self.sections)
        with phase(self.monitor, "devices"):
            await guest_calls.call("loading the devices", loading, self.config.handover_timeout)

    def check_complete(self, *, ram: bool = True) -> None:
        """What QEMU does not look at: that every page and every device has come (states.md part 14, G18).

        Args:
            ram: False where memory follows the devices.

        Raises:
            RemoteProtocolError: something is missing, and ``completeness`` says that it must not.
        """
        received = self.ram.received() if ram else {}
        problems = [never_received(name, here) for name, here in received.items() if not here.all()]
        have = {(s.idstr, s.instance_id) for s in self.sections}
        problems += [
            f"device {n!r} (instance {i}) was never received" for n, i in self.guest.devices or {} if (n, i) not in have
        ]
        self.problems(problems)

    def check_ended(self, at: int) -> None:
        """Whether the RAM has come to its end, at the element with the offset *at* that goes on without it.

        Raises:
            RemoteProtocolError: there is no list of RAM blocks, or no end of the RAM. No option accepts that: such a guest
                is made of nothing. (A background snapshot has no end of the RAM, and can only be kept.)
        """
        if not self.ram.opened:
            raise RemoteProtocolError("the guest has no RAM: no list of RAM blocks came before this", offset=at)
        if not self.ram_ended and not isinstance(self.guest, OpaqueGuest):
            raise RemoteProtocolError("the guest has no end of its RAM: the section END did not come", offset=at)

    def problems(self, problems: list[str]) -> None:
        """Something is missing. RemoteProtocolError, unless ``completeness`` says that it may."""
        for problem in problems:
            if self.config.completeness == "fail":
                raise RemoteProtocolError(f'{problem} (the option completeness = "warn" accepts that)')
            self.monitor.warn(problem)

    def take(self, section: DeviceSection, at: int = -1) -> None:
        """Keep a device section for :meth:`load`; the run state is one of them. RemoteProtocolError."""
        if section.idstr != globalstate.IDSTR:
            self.sections.append(section)
            return
        try:
            self.run_state = globalstate.decode(section.payload, section.version_id)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, offset=None if at < 0 else at, section=section.idstr) from None

    async def activate(
        self, then: Status = Status.COMPLETED, alive: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Bring the guest to life here. On return the owner is this side, and the status *then*.

        Args:
            alive: called when it lives, before a listener is told.

        Raises:
            GuestFailed: it does not live.

        **Cancellation:** held off, for at most ``handover_timeout``.
        """
        monitor, grace = self.monitor, self.config.handover_timeout
        await trio.lowlevel.checkpoint_if_cancelled()
        monitor.advance(Status.HANDOVER)
        state = self.run_state
        if state == "running" and not monitor.config.autostart:
            state = "paused"
        activating = functools.partial(self.guest.activate, state)
        with phase(monitor, "activate") as activated:
            failure = await guest_calls.bring_back("brought to life", activating, grace)
            if failure is not None and not (state == "running" == self.guest.run_state):
                raise failure
        if failure is not None:
            # Whatever the call said: a guest that runs must not be given back, or it would run twice.
            monitor.warn(f"{failure}; but it runs")
        self.resume_seconds = activated.seconds
        if state == "running" and not isinstance(self.guest, OpaqueGuest):
            monitor.emit("RESUME")  # an opaque guest is kept, it does not run here
        if alive is not None:
            await alive()
        monitor.advance(then)

    async def ram_received(self) -> None:
        """Tell an opaque guest that all of its RAM is there. GuestFailed.

        **Cancellation:** as for the guest's method.
        """
        assert isinstance(self.guest, OpaqueGuest)
        if self.storing is not None:
            await self.storing.end()
        with guest_calls.guarded("keeping the RAM"):
            await self.guest.ram_received()

    def check_kept(self, sections: Sequence[DeviceSection]) -> None:
        """What can be wrong with the devices of a guest that is only kept. RemoteProtocolError."""
        for section in sections:
            if section.idstr == globalstate.IDSTR:
                try:
                    self.run_state = globalstate.decode(section.payload, section.version_id)
                except RemoteProtocolError as error:
                    raise RemoteProtocolError(error.reason, section=section.idstr) from None

    async def keep(self, sections: Sequence[DeviceSection], description: bytes | None = None) -> None:
        """Let an opaque guest keep its devices. GuestFailed.

        **Cancellation:** as for :meth:`load`.
        """
        assert isinstance(self.guest, OpaqueGuest)
        self.check_kept(sections)
        keeping = functools.partial(self.guest.load_opaque, sections, description)
        with phase(self.monitor, "devices"):
            await guest_calls.call("keeping the devices", keeping, self.config.handover_timeout)

    def _summary(self) -> Summary:
        c = self.counters
        for text in c.warnings:
            log.warning("%s", text)
        assert c.finished is not None
        parts = dataclasses.replace(Downtime(), resume=self.resume_seconds)
        return Summary(
            role=Role.DESTINATION,
            confirmed=self.confirmed,
            prepared=self.prepared,
            total_time=c.finished - c.started,
            setup_time=(c.setup_done or c.started) - c.started,
            downtime=parts.total,
            downtime_parts=parts,
            iterations=0,
            bytes_transferred=c.transferred,
            normal_pages=c.normal,
            zero_pages=c.duplicate,
            ram_bytes=c.total,
            dirty_tracking="",
            warnings=tuple(c.warnings),
        )


def _lost(error: TrimigError, missing: Mapping[str, Sequence[tuple[int, int]]]) -> PostcopyLost:
    """The guest is here and will never be whole: say what it lacks."""
    pages = sum(end - first for runs in missing.values() for first, end in runs)
    lost = PostcopyLost(
        f"{error}; {pages} pages of the guest's memory never came, and it stands still", missing=missing
    )
    lost.others = (error, *error.others)
    return lost


def _cancel(nursery: trio.Nursery, reason: str) -> None:
    nursery.cancel_scope.cancel(reason)
