"""The frame of an outgoing migration: what is done around its phases, and how its end is judged.

Whatever ends an attempt, the guest comes first: who owns it follows from the status alone. Where the answer to the
decision is missing nobody knows, and this is the place that says so, asks the caller's fence, and lets the question be
settled. :mod:`.source` has the phases.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ... import formats
from ...channel import closing
from ...channel.channel import Channel
from ...errors import (
    GuestFailed,
    GuestNotResumed,
    HandoverUncertain,
    LocalProtocolError,
    MigrationCancelled,
    Owner,
    Ownership,
    PeerFailed,
    TransportFailed,
    TrimigError,
)
from ...guest import CountingGuest
from ...monitor.statistics import Downtime, Summary
from ...owner import already_settled
from ...status import Role, Status
from ...wire import encoder as wire
from ...wire.marks import Mark, reason_bytes
from .. import guest_calls
from ..outcome import Outcome, add_to_message, bare, domain_error, judged, lost_by_cancellation
from ..shield import lift_shield, shield

if TYPE_CHECKING:
    from ...channel.connections import Connections
    from ...channel.limiter import Limiter
    from ...channel.return_path import ReturnPathReader
    from ...config.config import Config
    from ...guest import DirtyTracker, Guest
    from ...monitor.core import MonitorCore
    from ..ram.sender import RamSender

log = logging.getLogger("trimig.source")

#: Seconds in which the last words of a source must be sent; the guest has been resumed before.
_REASON_SECONDS: Final = 0.25

T = TypeVar("T")

#: Records the decision somewhere durable; a failure rolls back.
CommitHook = Callable[[], Awaitable[None]]
#: Finds out, or forces, who owns the guest when the answer did not come.
FenceHook = Callable[[], Awaitable[Ownership]]


#: What may be the matter with a destination that has connected and says nothing at all.
SILENT_PEER: Final = "with multifd on there it waits for further connections, so turn multifd off there"


class Outgoing(abc.ABC):
    """One outgoing migration, but for its phases."""

    def __init__(
        self,
        guest: Guest,
        connections: Connections,
        config: Config,
        monitor: MonitorCore,
        commit: CommitHook | None,
        fence: FenceHook | None,
    ) -> None:
        self.guest = guest
        self.config = config
        self.monitor = monitor
        self.counters = monitor.counters
        self.commit_hook = commit
        self.fence_hook = fence
        self.touched = False  # the guest was asked to pause: it must be resumed on the way out
        self.prepared = False
        self.answered = False
        self.confirmed = False  # answered, and by the destination itself
        self.settled = False  # somebody has said who owns the guest
        self.connections = connections
        self.channel: Channel | None = None
        #: The second connection of postcopy-preempt.
        self.urgent: Channel | None = None
        self.tracker: DirtyTracker | None = None
        self.limiter: Limiter | None = None
        self.reader: ReturnPathReader | None = None
        #: How often it had been started when it was stopped, if it counts that.
        self.starts = 0
        #: Writes the RAM of the first connection.
        self.records: RamSender | None = None
        #: The id of this attempt, once the destination has been told it.
        self.attempt: bytes | None = None
        #: The destination answers. A reader alone does not say that: perhaps there is nobody at the other end of it.
        self.two_way = False
        #: What the transport had taken before the byte that decides was given to it.
        self.undecided = -1
        self.in_postcopy = False  # the guest goes before its memory
        self.parts: dict[str, float] = {}

    @abc.abstractmethod
    async def _phases(self, nursery: trio.Nursery) -> None:
        """Everything up to the answer, in *nursery*.

        **Cancellation:** the frame unwinds.
        """

    async def run(self) -> Summary:
        """The whole attempt, and the one place where its outcome is decided."""
        outcome = Outcome()
        with outcome.watch():
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                self.monitor.control(functools.partial(_cancel, nursery), self._retuned, self._cut)
                if (reason := self.monitor.cancel_reason) is not None:
                    _cancel(nursery, reason)  # by a listener that was told of `setup`, before there was a nursery
                await self._phases(nursery)
                nursery.cancel_scope.cancel("the migration is over")
        self.monitor.control(None, None)
        # The answer may have come in the same moment as the end of the time for it: it is an answer.
        refusal = self.take_refusal()
        if outcome.failure is None:
            outcome.failure = refusal
        guest_failure = await self._unwind(outcome.failure)
        await self._conclude(outcome.failure, guest_failure)
        return self._summary()

    async def open_urgent(self) -> None:
        """Open the second connection of postcopy-preempt, if it is on and not there. TransportFailed, ConfigError.

        **Cancellation:** there is none.
        """
        beside = self.connections.for_preempt(self.config)
        if beside is not None and self.urgent is None:
            self.urgent = Channel(await beside(), stall_timeout=self.config.stall_timeout)

    async def close_urgent(self) -> None:
        """Close it, if there is one.

        **Cancellation:** held off.
        """
        urgent, self.urgent = self.urgent, None
        if urgent is not None:
            await closing.close(urgent.stream)

    async def hand_over_status(self, nursery: trio.Nursery, seconds: float) -> None:
        """The status `handover`, from which on a cancellation is held off for *seconds* at most.

        The shield is there before anything is told: a listener that cancels in this very moment comes too late.

        Raises:
            GuestFailed: the guest runs, or has run since it was stopped.

        **Cancellation:** the decision has not been made.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.count_starts() != self.starts:
            raise GuestFailed(
                "the guest was resumed while its last pages and devices were sent, and what it wrote since would be lost; "
                "do not resume it before the migration is over"
            )
        shield(nursery, seconds)
        try:
            self.monitor.advance(Status.HANDOVER)
        except TrimigError:
            lift_shield(nursery)
            raise

    def count_starts(self) -> int:
        """How often the guest has been started; 0 if it does not count that."""
        return self.guest.starts if isinstance(self.guest, CountingGuest) else 0

    def _cut(self) -> bool:
        """Break the connections there are; False if one of them cannot be."""
        return all(channel.cut() for channel in (self.channel, self.urgent) if channel is not None)

    def _retuned(self) -> None:
        if self.limiter is not None:
            self.limiter.set_rate(self.rate)

    @property
    def rate(self) -> int:
        """The bandwidth limit in force, in bytes per second; 0 for none."""
        parameters = self.monitor.config.parameters
        return parameters.max_postcopy_bandwidth if self.in_postcopy else parameters.max_bandwidth

    async def _unwind(self, failure: BaseException | None) -> GuestNotResumed | None:
        """Guest first, then the connection. Decides by the status who owns the guest, and settles the final status."""
        monitor = self.monitor
        if monitor.status is Status.HANDOVER and not self.answered:
            assert self.channel is not None
            monitor.advance(Status.FAILED if self.nothing_left(self.channel) else Status.UNCERTAIN)
        if (end := _UNFINISHED.get(monitor.status)) is not None:
            monitor.advance(end)
        if failure is not None and monitor.status not in _DECIDED:
            cancelled = domain_error(failure, monitor.owner) is None
            monitor.advance(Status.CANCELLING if cancelled and monitor.status is not Status.HANDOVER else Status.FAILED)
        guest_failure: GuestNotResumed | None = None
        try:
            self._stop_tracking()
            if monitor.owner is Ownership.SOURCE:
                guest_failure = await self._resume_here()
        finally:
            if self.channel is not None:
                await self._give_reason(self.channel, failure)
                self.counters.transferred = self.counters.earlier + self.channel.sent
                await self.close_urgent()
                in_order = monitor.status is Status.COMPLETED
                await closing.close(self.channel.stream, self.config.teardown_grace if in_order else 0.0)
        return guest_failure

    async def _give_reason(self, channel: Channel, failure: BaseException | None) -> None:
        """Tell a destination that is a trimig why nothing more will come, where the stream can be brought to a boundary."""
        reader, records = self.reader, self.records
        if self.monitor.owner is not Ownership.SOURCE or reader is None or not reader.marked or records is None:
            return
        error = domain_error(failure, self.monitor.owner) if failure is not None else None
        if isinstance(error, PeerFailed | TransportFailed) or (rest := channel.mend()) is None:
            return
        text = (
            str(error)
            if error is not None
            else f"it was cancelled: {self.monitor.cancel_reason or 'no reason was given'}"
        )
        last = rest + records.boundary + wire.command(Mark.REASON, reason_bytes(text))
        await closing.farewell(channel, last, min(_REASON_SECONDS, self.config.teardown_grace))

    def _stop_tracking(self) -> None:
        if self.tracker is None:
            return
        try:
            with guest_calls.guarded("ending the dirty tracking"):
                self.tracker.stop()
        except TrimigError as error:
            self.monitor.warn(str(error))  # the guest goes first, also where this fails

    async def _conclude(self, failure: BaseException | None, guest_failure: GuestNotResumed | None) -> None:
        """Raise what is to be raised; the final status is set on the way. Returns for a migration that succeeded."""
        monitor = self.monitor
        error = domain_error(failure, monitor.owner) if failure is not None else None
        if isinstance(error, TransportFailed) and self.two_way and self.reader is not None and not self.reader.heard:
            add_to_message(error, SILENT_PEER)
        if monitor.status is Status.COMPLETED and error is not None:
            monitor.warn(f"the guest was handed over; behind that: {error}")
            return
        if monitor.status is Status.UNCERTAIN:
            await self._uncertain(error)
            return
        if guest_failure is not None:
            guest_failure.others = (error,) if error is not None else ()
            if monitor.status is not Status.FAILED:
                monitor.advance(Status.FAILED)
            self.counters.error = str(guest_failure)
            raise guest_failure
        if monitor.status is Status.CANCELLING:
            monitor.advance(Status.CANCELLED)
            if error is None and monitor.cancel_reason is not None:
                error = MigrationCancelled(monitor.cancel_reason)
            elif error is not None:
                self.counters.error = str(error)
            if error is None:
                assert failure is not None
                raise bare(failure)
            raise error
        if error is None and failure is None and monitor.status is Status.FAILED:
            error = TransportFailed(
                f"the transport took nothing of the decision within {formats.duration(self.config.handover_timeout)}"
            )
        error = error or lost_by_cancellation(failure, monitor.status)
        if error is not None:
            error = judged(error, monitor.status)
            self.counters.error = str(error)
            raise error
        if failure is not None:
            raise bare(failure)

    async def _uncertain(self, error: TrimigError | None) -> None:
        """The answer is missing. Ask the caller's fence; without a definite word raise HandoverUncertain."""
        monitor = self.monitor
        why = str(error or (self.reader.lost if self.reader is not None else None) or self._no_answer())
        settled = Ownership.UNKNOWN
        others: list[BaseException] = [error] if error is not None else []
        try:
            settled = await self.fenced()
        except TrimigError as failed:
            why = f"{why}; {failed}"
            others.append(failed)
        if settled is Ownership.DESTINATION:
            self._complete()
            monitor.warn(f"the answer was lost ({why}); the fence found the guest at the destination")
            return
        if settled is Ownership.SOURCE:
            raise await self._given_back(why, others)
        uncertain = HandoverUncertain(
            f"the guest was handed over, but the answer is missing ({why}): the destination may be running it, so it "
            "stays paused here. Look at the destination, then settle who owns the guest",
            settle=self._settle_by_error,
        )
        self.guest.set_owner(Owner.UNKNOWN, settle=self._settle)
        uncertain.others = tuple(others)
        self.counters.error = str(uncertain)
        raise uncertain

    async def fenced(self) -> Ownership:
        """What the caller's fence finds out; UNKNOWN without one.

        Raises:
            TrimigError: it failed.

        **Cancellation:** held off, for at most ``handover_timeout``.
        """
        if self.fence_hook is None:
            return Ownership.UNKNOWN
        fence = functools.partial(self._call, "the fence hook", self.fence_hook)
        found: object = await closing.bounded(fence, self.config.handover_timeout, Ownership.UNKNOWN)
        if not isinstance(found, Ownership):
            raise LocalProtocolError(f"the fence hook must return a trimig.Ownership, not {found!r}")
        return found

    async def _given_back(self, why: str, others: Sequence[BaseException]) -> TrimigError:
        """The fence says that the destination does not have the guest: resume it here. Returns what is to be raised."""
        self.monitor.advance(Status.FAILED)  # the owner is certain now, also if the guest cannot be resumed
        failure: TrimigError | None = await self._resume_here()  # a GuestNotResumed
        if failure is None:
            how = "it runs here again" if self.touched else "it is as it was"
            failure = TransportFailed(f"the answer was lost ({why}); the fence gave the guest back, and {how}")
        failure.others = tuple(others)
        self.counters.error = str(failure)
        return failure

    def _no_answer(self) -> str:
        seconds = f"{formats.duration(self.config.handover_timeout)}"
        if self.two_way:
            return f"nothing came for {seconds}"
        return f"the transport could not say within {seconds} that everything is where it was to go"

    async def _settle_by_error(self, owner: Owner) -> None:
        """What the error's own ``settle`` comes to: an old answer must not settle the question of a later attempt."""
        if self.settled:
            raise already_settled(self.guest.owner)
        await self.guest.settle(owner)

    async def _settle(self, owner: Owner) -> None:
        """What :meth:`trimig.guest.Guest.settle` comes to."""
        self.settled = True
        if owner is Owner.ELSEWHERE:
            self.monitor.advance(Status.COMPLETED)
            return
        self.monitor.advance(Status.FAILED)  # first: a guest that is not this side's is not resumed
        if (failure := await self._resume_here()) is not None:
            raise failure

    async def _resume_here(self) -> GuestNotResumed | None:
        """Let the guest run again if it was paused for this attempt; returns why it does not."""
        if not self.touched:
            return None
        failure = await guest_calls.bring_back("resumed", self.guest.resume, self.config.teardown_grace)
        if failure is not None and self.guest.run_state != "running":
            stands = GuestNotResumed(str(failure))
            stands.__cause__ = failure.__cause__
            return stands
        self.monitor.emit("RESUME")
        return None

    async def _call(self, what: str, function: Callable[[], Awaitable[T]]) -> T:
        return await guest_calls.call(what, function, self.config.handover_timeout)

    # -- the answer ------------------------------------------------------------------------------------------------

    def take_refusal(self) -> PeerFailed | None:
        """Act on the answer to the decision, if it has come; without one, the frame finds the outcome uncertain."""
        code = self.reader.shut if self.reader is not None else None
        if code is None or self.answered or self.monitor.status is not Status.HANDOVER:
            return None
        self.answered = True
        if not code:
            self.confirmed = True
            self._complete()
            return None
        self.monitor.advance(Status.FAILED)
        assert self.reader is not None
        return PeerFailed(
            f"the destination could not take the guest over (it sent SHUT {code}){self.reader.why}", code=code
        )

    def _complete(self) -> None:
        """The guest is the destination's. The figures stand before anybody is told."""
        c = self.counters
        assert c.paused_at is not None
        assert self.channel is not None
        c.downtime = trio.current_time() - c.paused_at
        self.parts["commit"] = c.downtime - sum(self.parts.values())
        c.transferred = c.earlier + self.channel.sent
        self.monitor.advance(Status.COMPLETED)

    def nothing_left(self, channel: Channel) -> bool:
        """The decision was not taken by the transport, so nobody can have it."""
        return channel.sent <= self.undecided and not channel.unsure

    def _summary(self) -> Summary:
        c = self.counters
        for text in c.warnings:
            log.warning("%s", text)
        assert c.finished is not None
        return Summary(
            role=Role.SOURCE,
            confirmed=self.confirmed,
            prepared=self.prepared,
            total_time=c.finished - c.started,
            setup_time=(c.setup_done or c.started) - c.started,
            downtime=c.downtime or 0.0,
            downtime_parts=dataclasses.replace(Downtime(), **self.parts),
            iterations=c.iteration,
            bytes_transferred=c.transferred,
            normal_pages=c.normal,
            zero_pages=c.duplicate,
            ram_bytes=c.total,
            dirty_tracking=c.dirty_tracking,
            warnings=tuple(c.warnings),
            convergence=c.convergence,
        )


#: Statuses that say how the attempt ends, whatever exception ends it.
_DECIDED = (Status.UNCERTAIN, Status.CANCELLING, Status.COMPLETED, Status.FAILED, Status.POSTCOPY_LOST)

#: What a postcopy that nobody takes up again comes to.
_UNFINISHED = {
    Status.POSTCOPY_UNCERTAIN: Status.UNCERTAIN,
    Status.POSTCOPY_ACTIVE: Status.POSTCOPY_LOST,
    Status.POSTCOPY_PAUSED: Status.POSTCOPY_LOST,
    Status.POSTCOPY_RECOVER: Status.POSTCOPY_LOST,
}


def _cancel(nursery: trio.Nursery, reason: str) -> None:
    nursery.cancel_scope.cancel(reason)
