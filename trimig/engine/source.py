"""The source: a straight list of phases inside one nursery.

Setup (connect, header, size list), passes over the memory until the rest fits into the downtime limit, the switchover
(pause, the rest, devices), *prepare* (PING; the PONG proves that the destination has loaded everything), *commit* (end
of file) and the answer. DESIGN.md part 5 argues the handover; states.md part 14 lists what goes wrong without it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import trio

from ..config import Config
from ..errors import (
    GuestFailed,
    HandoverUncertain,
    MigrationCancelled,
    MigrationError,
    NotConverging,
    Ownership,
    PeerFailed,
    TransportFailed,
)
from ..guest import PAGE_SIZE, DirtyTracker, Guest, PageBitmap
from ..memory import snapshot_of
from ..monitor import Downtime, Monitor, Summary
from ..policy import convergence
from ..policy.rate import WINDOW
from ..status import Role, Status
from ..wire import encoder as wire
from . import guest_calls, teardown
from .boundary import Outcome, domain_error
from .channel import Channel, OpenStream
from .handover import shield
from .limiter import Limiter
from .ram_out import RamSender
from .reader import ReturnPathReader
from .stream_out import DeviceSender, opening

log = logging.getLogger("trimig.source")

T = TypeVar("T")

#: Records the decision somewhere durable; a failure rolls back.
CommitHook = Callable[[], Awaitable[None]]
#: Finds out, or forces, who owns the guest when the answer did not come.
FenceHook = Callable[[], Awaitable[Ownership]]

#: PING values: 1 is QEMU's, directly behind OPEN_RETURN_PATH; ours asks for the proof of prepare.
PING_OPENED = 1
PING_PREPARE = 0x74726967


async def migrate_stream(
    guest: Guest,
    open_stream: OpenStream,
    config: Config,
    monitor: Monitor,
    *,
    commit: CommitHook | None = None,
    fence: FenceHook | None = None,
) -> Summary:
    """Move *guest* to whoever is at the other end of the stream that *open_stream* makes.

    :func:`trimig.migrate` is the public form and has the contract.

    **Cancellation:** up to the decision, the guest is as it was; behind it the call ends within
    ``handover_timeout`` + ``teardown_grace`` with the answer or HandoverUncertain.
    """
    guest.claim("an outgoing migration")
    try:
        monitor.begin(Role.SOURCE, config)
        return await _Attempt(guest, config, monitor, commit, fence).run(open_stream)
    finally:
        guest.release()


class _Attempt:
    """One outgoing migration."""

    def __init__(
        self, guest: Guest, config: Config, monitor: Monitor, commit: CommitHook | None, fence: FenceHook | None
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
        self.channel: Channel | None = None
        self.tracker: DirtyTracker | None = None
        self.reader: ReturnPathReader | None = None
        self.parts: dict[str, float] = {}

    # -- the frame -------------------------------------------------------------------------------------------------

    async def run(self, open_stream: OpenStream) -> Summary:
        """The whole attempt, and the one place where its outcome is decided."""
        outcome = Outcome()
        with outcome.watch():
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                self.monitor.control(functools.partial(_cancel, nursery), self._retuned)
                await self._phases(open_stream, nursery)
                nursery.cancel_scope.cancel("the migration is over")
        self.monitor.control(None, None)
        # The answer may have come in the same moment as the end of the time for it: it is an answer.
        refusal = self._take_answer()
        if outcome.failure is None:
            outcome.failure = refusal
        guest_failure = await self._unwind(outcome.failure)
        await self._conclude(outcome.failure, guest_failure)
        return self._summary()

    def _retuned(self) -> None:
        if self._limiter is not None:
            self._limiter.set_rate(self.monitor.config.parameters.max_bandwidth)

    async def _unwind(self, failure: BaseException | None) -> GuestFailed | None:
        """Guest first, then the connection. Decides by the status who owns the guest, and settles the final status."""
        monitor = self.monitor
        if monitor.status is Status.HANDOVER and not self.answered:
            assert self.channel is not None
            monitor.advance(Status.FAILED if self._nothing_left(self.channel) else Status.UNCERTAIN)
        if failure is not None and monitor.status not in _DECIDED:
            cancelled = domain_error(failure, monitor.owner) is None
            monitor.advance(Status.CANCELLING if cancelled and monitor.status is not Status.HANDOVER else Status.FAILED)
        guest_failure: GuestFailed | None = None
        try:
            if self.tracker is not None:
                self.tracker.stop()
            if monitor.owner is Ownership.SOURCE:
                guest_failure = await self._resume_here()
        finally:
            if self.channel is not None:
                self.counters.transferred = self.channel.sent
                await teardown.close(self.channel.stream)
        return guest_failure

    async def _conclude(self, failure: BaseException | None, guest_failure: GuestFailed | None) -> None:
        """Raise what is to be raised; the final status is set on the way. Returns for a migration that succeeded."""
        monitor = self.monitor
        error = domain_error(failure, monitor.owner) if failure is not None else None
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
                raise failure
            raise error
        if error is None and failure is None and monitor.status is Status.FAILED:
            error = TransportFailed(
                f"the transport took nothing of the decision within {self.config.handover_timeout:g} s"
            )
        if error is not None:
            self.counters.error = str(error)
            raise error
        if failure is not None:
            raise failure

    async def _uncertain(self, error: MigrationError | None) -> None:
        """The answer is missing. Ask the caller's fence; without a definite word raise HandoverUncertain."""
        monitor = self.monitor
        why = str(error or (self.reader.lost if self.reader is not None else None) or self._no_answer())
        settled = Ownership.UNKNOWN
        others: list[BaseException] = [error] if error is not None else []
        if self.fence_hook is not None:
            try:
                settled = await teardown.bounded(self._fence, self.config.handover_timeout, Ownership.UNKNOWN)
            except MigrationError as failed:
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
            resume=self._settle_here,
            give_up=functools.partial(monitor.advance, Status.COMPLETED),
        )
        uncertain.others = tuple(others)
        self.counters.error = str(uncertain)
        raise uncertain

    async def _fence(self) -> Ownership:
        assert self.fence_hook is not None
        return await self._call("the fence hook", self.fence_hook())

    async def _given_back(self, why: str, others: Sequence[BaseException]) -> MigrationError:
        """The fence says that the destination does not have the guest: resume it here. Returns what is to be raised."""
        self.monitor.advance(Status.FAILED)  # the owner is certain now, also if the guest cannot be resumed
        failure: MigrationError | None = await self._resume_here()
        if failure is None:
            how = "it runs here again" if self.touched else "it is as it was"
            failure = TransportFailed(f"the answer was lost ({why}); the fence gave the guest back, and {how}")
        failure.others = tuple(others)
        self.counters.error = str(failure)
        return failure

    def _no_answer(self) -> str:
        return f"nothing came for {self.config.handover_timeout:g} s"

    async def _settle_here(self) -> None:
        if (failure := await self._resume_here()) is not None:
            raise failure
        self.monitor.advance(Status.FAILED)

    async def _resume_here(self) -> GuestFailed | None:
        """Let the guest run again if it was paused for this attempt; returns why it does not."""
        if not self.touched:
            return None
        failure = await teardown.guest_call("resumed", self.guest.resume, self.config.teardown_grace)
        if failure is not None and self.guest.run_state != "running":
            return failure
        self.monitor.emit("RESUME")
        return None

    # -- the phases ------------------------------------------------------------------------------------------------

    async def _phases(self, open_stream: OpenStream, nursery: trio.Nursery) -> None:
        monitor, config = self.monitor, self.config
        stream = await open_stream()
        channel = self.channel = Channel(stream, stall_timeout=config.stall_timeout)
        limiter = self._limiter = Limiter(channel, monitor.config.parameters.max_bandwidth, self.counters)
        blocks = list(self.guest.ram)
        self.counters.total = self.counters.remaining = sum(b.length for b in blocks)
        if config.capabilities.return_path and channel.receives:
            self.reader = ReturnPathReader(channel, {b.name: b.length for b in blocks})
            nursery.start_soon(self.reader.run, name="trimig.return_path")
        else:
            monitor.warn("no return path: the destination cannot confirm that it has the guest, nor refuse it")
        nursery.start_soon(limiter.run, name="trimig.limiter")
        await channel.send(opening(self.guest, config.peer))
        if self.reader is not None:
            await channel.send(wire.command(1) + wire.ping(PING_OPENED))
        sender = RamSender(channel, limiter, self.counters, footers=config.peer.send_section_footer)
        await sender.start(blocks)
        tracker = self.tracker = self.guest.dirty_tracker()
        await self._call("starting dirty tracking", tracker.start())
        self.counters.dirty_tracking = tracker.method
        self._synced()
        self.counters.setup_done = trio.current_time()
        await self._advance(Status.ACTIVE)
        await self._iterate(sender)
        await self._switch_over(nursery, sender)

    async def _advance(self, status: Status) -> None:
        """The next status, unless a cancel has come since the last checkpoint: the monitor is in `cancelling` then."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.monitor.advance(status)

    async def _call(self, what: str, awaitable: Awaitable[T]) -> T:
        return await guest_calls.call(what, awaitable, self.config.handover_timeout)

    def _synced(self) -> None:
        self.counters.dirty_sync_count += 1
        self.monitor.emit("MIGRATION_PASS", **{"pass": self.counters.dirty_sync_count})

    async def _iterate(self, sender: RamSender) -> None:
        """Passes over what is dirty, until the rest is small enough (or a bound says otherwise)."""
        c, blocks = self.counters, list(self.guest.ram)
        todo: list[PageBitmap] = [np.ones(b.length // PAGE_SIZE, np.bool_) for b in blocks]
        first = True
        assert self.tracker is not None
        while True:
            c.iteration += 1
            began, sent = trio.current_time(), self._delivered()
            for block, bitmap in zip(blocks, todo, strict=True):
                pages = snapshot_of(self.tracker, block)
                await sender.send_pass(block, pages, bitmap, block.absent() if first else None)
            first = False
            todo = self._ordered(await self._call("finding dirty pages", self.tracker.sync()))
            self._synced()
            now = trio.current_time()
            c.remaining = sum(int(np.count_nonzero(bitmap)) for bitmap in todo) * PAGE_SIZE
            passed = max(now - began, 1e-6)
            c.dirty_rate = c.remaining / passed
            if not c.bandwidth or passed < 0.1 or c.iteration == 1:
                # Before the first whole window the pass itself is the best measurement there is.
                c.bandwidth = max(c.bandwidth, (self._delivered() - sent) / passed)
            self._todo = todo
            if self._decide(now) is convergence.Decision.SWITCH_OVER:
                return
            await self._drain()

    async def _drain(self) -> None:
        """Before another pass: what fills the transport must go first, and a pass now would find nothing to do."""
        assert self.channel is not None
        seconds = self.channel.backlog() / self.counters.bandwidth if self.counters.bandwidth else 0.0
        if seconds > self.monitor.config.parameters.downtime_limit / 1000:
            await trio.sleep(min(seconds, WINDOW))

    def _delivered(self) -> int:
        assert self.channel is not None
        return self.channel.sent - self.channel.backlog()

    def _ordered(self, written: Mapping[str, PageBitmap]) -> list[PageBitmap]:
        return [written[b.name] for b in self.guest.ram]

    def _decide(self, now: float) -> convergence.Decision:
        c, config = self.counters, self.monitor.config
        progress = convergence.Progress(
            remaining=c.remaining,
            bandwidth=c.bandwidth,
            iteration=c.iteration,
            elapsed=now - c.started,
            dirty_rate=c.dirty_rate,
            queued=self.channel.backlog() if self.channel is not None else 0,
        )
        bounds = convergence.Bounds(
            downtime_limit=config.parameters.downtime_limit / 1000,
            max_iterations=config.max_iterations,
            max_total_time=config.max_total_time,
            switch_over=config.on_bound == "switchover",
        )
        c.expected_downtime = convergence.expected_downtime(progress)
        decision = convergence.decide(progress, bounds)
        self.monitor.emit(
            "PASS", iteration=c.iteration, sent=c.transferred, remaining=c.remaining, dirty_rate=c.dirty_rate,
            bandwidth=c.bandwidth, expected_downtime=c.expected_downtime,
        )  # fmt: skip
        if decision is convergence.Decision.GIVE_UP:
            bound = convergence.reached(progress, bounds)
            raise NotConverging(f"no convergence within {bound}: {convergence.explain(progress, bounds)}")
        return decision

    async def _switch_over(self, nursery: trio.Nursery, sender: RamSender) -> None:
        """Stop the guest, send the rest, and hand it over."""
        monitor, c, config, channel = self.monitor, self.counters, self.config, self.channel
        assert channel is not None
        assert self.tracker is not None
        assert self._limiter is not None
        watch = _Stopwatch()
        c.paused_at = trio.current_time()
        await self._advance(Status.DEVICE)
        # Only now: its user may have paused or resumed it while the memory was sent.
        run_state = self.guest.run_state
        devices = DeviceSender(self.guest, run_state, config.peer)
        if run_state == "running":
            self.touched = True
            await self._call("pausing the guest", self.guest.pause())
            monitor.emit("STOP")
        self.parts["pause"] = watch.lap()
        c.transferred_at_pause = channel.sent
        self._limiter.lift()
        last = self._ordered(await self._call("finding dirty pages", self.tracker.sync()))
        self._synced()
        last = [a | b for a, b in zip(last, self._todo, strict=True)]
        c.remaining = sum(int(np.count_nonzero(bitmap)) for bitmap in last) * PAGE_SIZE
        await sender.end([(b, snapshot_of(self.tracker, b), d) for b, d in zip(self.guest.ram, last, strict=True)])
        self.parts["ram"] = watch.lap()
        await channel.send(devices.sections(await self._call("saving the devices", self.guest.save_devices())))
        self.parts["devices"] = watch.lap()
        if self.reader is not None:
            await self._prepare(channel, self.reader)
        self.parts["prepare"] = watch.lap()
        if self.commit_hook is not None:
            await self._call("the commit hook", self.commit_hook())
        await self._advance(Status.HANDOVER)
        # No checkpoint since the look for a cancel: from here on it is refused.
        shield(nursery, config.handover_timeout)
        await self._hand_over(channel, devices.ending())

    async def _prepare(self, channel: Channel, reader: ReturnPathReader) -> None:
        await channel.send(wire.ping(PING_PREPARE))
        with trio.move_on_after(self.config.handover_timeout) as limit:
            await reader.wait_pong(PING_PREPARE)
        if limit.cancelled_caught:
            raise TransportFailed(
                f"the destination did not confirm within {self.config.handover_timeout:g} s that it has loaded the guest"
            )
        self.prepared = True

    async def _hand_over(self, channel: Channel, ending: bytes) -> None:
        """Send the decision and wait for its answer. On return, or by the error raised, the owner is known."""
        reader = self.reader
        if reader is not None:
            reader.decided = True
        self._undecided = channel.sent
        try:
            await channel.send(ending)
        except MigrationError:
            if reader is None or self._nothing_left(channel):
                raise
            # Something may have left. Only the destination's word counts now, if it is still to be had.
        if reader is None:
            self.answered = True
            self._complete()
            return
        await reader.wait_answer()
        if (refusal := self._take_answer()) is not None:
            raise refusal

    def _take_answer(self) -> PeerFailed | None:
        """Act on the answer to the decision, if it has come; without one, the frame finds the outcome uncertain."""
        code = self.reader.shut if self.reader is not None else None
        if code is None or self.answered or self.monitor.status is not Status.HANDOVER:
            return None
        self.answered = True
        if not code:
            self._complete()
            return None
        self.monitor.advance(Status.FAILED)
        return PeerFailed(
            f"the destination could not take the guest over (it sent SHUT {code}); its own log says why", code=code
        )

    def _complete(self) -> None:
        """The guest is the destination's. The figures stand before anybody is told."""
        c = self.counters
        assert c.paused_at is not None
        assert self.channel is not None
        c.downtime = trio.current_time() - c.paused_at
        self.parts["commit"] = c.downtime - sum(self.parts.values())
        c.transferred = self.channel.sent
        self.monitor.advance(Status.COMPLETED)

    def _nothing_left(self, channel: Channel) -> bool:
        """Not one byte of the decision was taken by the transport, so nobody can have it."""
        return channel.sent == self._undecided and not channel.unsure

    _undecided = -1
    _limiter: Limiter | None = None
    _todo: Sequence[PageBitmap] = ()

    def _summary(self) -> Summary:
        c = self.counters
        for text in c.warnings:
            log.warning("%s", text)
        assert c.finished is not None
        return Summary(
            role=Role.SOURCE,
            confirmed=self.reader is not None,
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
        )


#: Statuses that say how the attempt ends, whatever exception ends it.
_DECIDED = (Status.UNCERTAIN, Status.CANCELLING, Status.COMPLETED, Status.FAILED)


def _cancel(nursery: trio.Nursery, reason: str) -> None:
    nursery.cancel_scope.cancel(reason)


class _Stopwatch:
    def __init__(self) -> None:
        self._then = trio.current_time()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = trio.current_time()
        passed, self._then = now - self._then, now
        return passed
