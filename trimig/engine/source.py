"""The source: a straight list of phases inside one nursery.

Setup (connect, header, size list), passes over the memory until the rest fits into the downtime limit, the switchover
(pause, the rest, devices), *prepare* (PING; the PONG proves that the destination has loaded everything), *commit* (end
of file) and the answer. design.md part 5 argues the handover; states.md part 14 lists what goes wrong without it.
:mod:`.departure` has what is around the phases.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence

import numpy as np
import trio

from .. import blockers, formats
from ..config import Config
from ..errors import ConfigError, GuestFailed, NotConverging, TransportFailed, TrimigError
from ..guest import PAGE_SIZE, DeviceSection, Guest, IdentifiedGuest, OpaqueGuest, PageBitmap
from ..info import Summary
from ..memory import snapshot_of
from ..monitor_core import MonitorCore
from ..owner import check_here
from ..policy import convergence
from ..policy.eta import Stall
from ..policy.rate import WINDOW
from ..status import Role, Status
from ..wire import Command, postcopy
from ..wire import encoder as wire
from ..wire.marks import ATTEMPT_BYTES, PING_MARK, Mark
from . import guest_calls
from .channel import Channel, Delivering, PerhapsSilent
from .connections import Connections
from .departure import SILENT_PEER, CommitHook, Departure, FenceHook
from .limiter import Limiter
from .order import PING_LOADED, PING_RUNS
from .postcopy_source import PING_DISCARDED, PING_FOLLOWED, Following, at_least_one
from .ram_out import RamSender
from .reader import ReturnPathReader
from .stream_out import UUID_SUBSECTION, DeviceSender, coming_state, early_sections, opening, profile_of

#: PING values: 1 is QEMU's, directly behind OPEN_RETURN_PATH; ours asks for the proof of prepare.
PING_OPENED = 1
#: Seconds for the answer to it, which takes a round trip: then its absence is told, and then it ends the attempt. A
#: longer stall timeout lengthens the second one.
_ANSWER_SECONDS = 5.0
_ANSWER_MOST_SECONDS = 30.0
PING_PREPARE = 0x74726967
#: The same before a switch to postcopy, about the memory that is on its way.
PING_QUEUED = 0x74726971

#: Seconds that a peer who may be none gets after the first copy to answer the first PING; the guest runs meanwhile.
SILENCE_SECONDS = 2.0
#: A pass that sent no more than this does not change what is shown of the expected downtime (states.md part 13).
TELLING_BYTES = 10_000


async def migrate_stream(
    guest: Guest,
    connections: Connections,
    config: Config,
    monitor: MonitorCore,
    *,
    commit: CommitHook | None = None,
    fence: FenceHook | None = None,
) -> Summary:
    """Move *guest* to whoever is at the other end of *connections*.

    :func:`trimig.migrate` is the public form and has the contract.

    **Cancellation:** up to the decision, the guest is as it was; behind it the call ends within
    ``handover_timeout`` + ``teardown_grace`` with the answer or HandoverUncertain.
    """
    guest.claim("an outgoing migration")
    try:
        check_here(guest)
        config = dataclasses.replace(config, peer=profile_of(guest, config.peer))
        blockers.check_outgoing(guest)
        monitor.begin(Role.SOURCE, config, guest)
        return await _Attempt(guest, connections, config, monitor, commit, fence).run()
    finally:
        guest.release()


class _Attempt(Departure):
    """One outgoing migration."""

    def __init__(
        self,
        guest: Guest,
        connections: Connections,
        config: Config,
        monitor: MonitorCore,
        commit: CommitHook | None,
        fence: FenceHook | None,
    ) -> None:
        super().__init__(guest, connections, config, monitor, commit, fence)
        self._todo: Sequence[PageBitmap] = ()  # what the last pass left, by block
        self._stall = Stall()
        self._acks = 0  # SWITCHOVER_ACK that are waited for
        self._run_state = ""  # what the destination brings the guest into

    # -- setup -----------------------------------------------------------------------------------------------------

    async def _phases(self, nursery: trio.Nursery) -> None:
        config = self.config
        self.connections.for_preempt(config)
        stream = await self.connections.first()
        channel = self.channel = Channel(stream, stall_timeout=config.stall_timeout)
        if config.peer.preempt_pre_7_2:
            await self.open_urgent()
        limiter = self.limiter = Limiter(channel, self.rate, self.counters)
        with guest_calls.guarded("looking at the RAM blocks"):
            blocks = list(self.guest.ram)
        self.counters.total = self.counters.remaining = sum(b.length for b in blocks)
        if config.capabilities.postcopy_ram and not channel.receives:
            raise ConfigError(
                "postcopy needs a return path, and this transport has one direction only", name="postcopy-ram"
            )
        if config.capabilities.switchover_ack and not channel.receives:
            raise ConfigError(
                "switchover-ack needs a return path, and this transport has one direction only", name="switchover-ack"
            )
        if (config.capabilities.return_path or config.capabilities.postcopy_ram) and channel.receives:
            silent = isinstance(stream, PerhapsSilent) and stream.perhaps_silent
            lengths = {b.name: b.length for b in blocks}
            acks = config.capabilities.switchover_ack
            self._acks = config.peer.switchover_acks if acks else 0
            self.reader = ReturnPathReader(channel, lengths, perhaps_silent=silent, acks=acks)
            self.two_way = not silent
            nursery.start_soon(self.reader.run, name="trimig.return_path")
        else:
            why = "" if channel.receives else " (the transport has one direction only)"
            self._warn_one_way(f"no return path{why}")
        nursery.start_soon(limiter.run, name="trimig.limiter")
        if config.capabilities.validate_uuid:
            self._warn_unnamed()
        await channel.send(opening(self.guest, config.peer, validate_uuid=config.capabilities.validate_uuid))
        if self.reader is not None:
            await channel.send(wire.command(1) + wire.ping(PING_OPENED) + wire.ping(PING_MARK))
            if self.two_way:
                nursery.start_soon(self._await_answer, self.reader, name="trimig.first_answer")
        if config.capabilities.postcopy_ram:
            await channel.send(postcopy.advise(postcopy.Advice()))
        sender = self.records = RamSender(channel, limiter, self.counters, footers=config.peer.send_section_footer)
        early: Sequence[DeviceSection] = ()
        if isinstance(self.guest, OpaqueGuest):
            early = await self._call("saving the devices in front of the memory", self.guest.save_devices)
        if ahead := early_sections(early, "list", config.peer):
            await channel.send(ahead)
        await sender.start(blocks)
        if behind := early_sections(early, "pages", config.peer):
            await channel.send(behind)
        with guest_calls.guarded("preparing dirty tracking"):
            tracker = self.tracker = self.guest.dirty_tracker()
        await self._call("starting dirty tracking", tracker.start)
        self.counters.dirty_tracking = tracker.method
        self._synced()
        self.counters.setup_done = trio.current_time()
        if self.guest.run_state != "running":
            self.counters.transferred_at_pause = 0  # it stands still all the time, as QEMU counts it
        self.counters.convergence = convergence.FIRST_COPY
        await self._advance(Status.ACTIVE)
        if await self._iterate(sender):
            await self._go_ahead(nursery, channel, sender)
        else:
            await self._switch_over(nursery, channel, sender)

    async def _await_answer(self, reader: ReturnPathReader) -> None:
        """A destination answers the first PING before all else. One that has connected and does not is told of, then given up.

        Raises:
            TransportFailed: nothing at all came for too long.

        **Cancellation:** no effect.
        """
        stall = self.config.stall_timeout
        most = min(stall, max(_ANSWER_MOST_SECONDS, stall / 2))
        with trio.move_on_after(most) as limit:
            with trio.move_on_after(_ANSWER_SECONDS) as patience:
                await reader.wait_life()
            if patience.cancelled_caught:
                self.monitor.warn(
                    f"the destination has answered nothing for {formats.duration(_ANSWER_SECONDS)}: {SILENT_PEER}"
                )
                await reader.wait_life()
        if limit.cancelled_caught:
            raise TransportFailed(f"the destination has answered nothing for {formats.duration(most)}")

    async def _introduce(self, channel: Channel) -> None:
        """Tell a destination that is a trimig the id of this attempt, once: a recovery must name the same."""
        if self.attempt is None and self.reader is not None and self.reader.marked:
            attempt = secrets.token_bytes(ATTEMPT_BYTES)
            await channel.send(wire.command(Mark.ATTEMPT, attempt))
            self.attempt = attempt

    def _warn_one_way(self, what: str) -> None:
        self.monitor.warn(f"{what}: the destination cannot confirm that it has the guest, nor refuse it")

    def _warn_unnamed(self) -> None:
        """Tell it if the capability validate-uuid has no effect, because there is no UUID to be compared."""
        guest = self.guest
        if isinstance(guest, OpaqueGuest):
            named = any(subsection.name == UUID_SUBSECTION for subsection in guest.subsections)
        else:
            named = isinstance(guest, IdentifiedGuest) and guest.uuid is not None
        if not named or not self.config.peer.send_configuration:
            why = "the guest has none" if not named else "the peer profile has no configuration section for it"
            self.monitor.warn(f"validate-uuid is on, but no UUID is sent and none is compared: {why}")

    async def _advance(self, status: Status) -> None:
        """The next status, unless a cancel has come since the last checkpoint: the monitor is in `cancelling` then."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.monitor.advance(status)

    def _synced(self) -> None:
        self.counters.dirty_sync_count += 1
        self.monitor.emit("MIGRATION_PASS", **{"pass": self.counters.dirty_sync_count})

    # -- the passes ------------------------------------------------------------------------------------------------

    async def _iterate(self, sender: RamSender) -> bool:
        """Passes over what is dirty, until the rest is small enough (or a bound says otherwise).

        Returns:
            Whether the guest is to go before its memory: somebody has asked for that, and the rest is not small.
        """
        c, blocks = self.counters, list(self.guest.ram)
        todo: list[PageBitmap] = [np.ones(b.length // PAGE_SIZE, np.bool_) for b in blocks]
        first = True
        assert self.tracker is not None
        while True:
            c.iteration += 1
            began, sent = trio.current_time(), self._delivered()
            left: list[PageBitmap | None] = []
            for block, bitmap in zip(blocks, todo, strict=True):
                with guest_calls.guarded("looking at the guest's memory"):
                    pages = snapshot_of(self.tracker, block)
                    absent = block.absent() if first else None
                left.append(await sender.send_pass(block, pages, bitmap, absent, self._leaves_now))
            moved, busy = self._delivered() - sent, max(trio.current_time() - began, 1e-6)
            if first:
                first, c.first_copy_done = False, True
                await self._wait_for_life()
            todo = self._ordered(await self._call("finding dirty pages", self.tracker.sync))
            todo = [a if b is None else a | b for a, b in zip(todo, left, strict=True)]
            self._synced()
            now = trio.current_time()
            c.remaining = sum(int(np.count_nonzero(bitmap)) for bitmap in todo) * PAGE_SIZE
            c.dirty_rate = c.remaining / max(now - began, 1e-6)
            if not c.bandwidth or busy < 0.1 or c.iteration == 1:
                # Before the first whole window the pass itself is the best measurement there is.
                c.bandwidth = max(c.bandwidth, moved / busy)
            self._todo = todo
            if self._decide(now, moved) is convergence.Decision.SWITCH_OVER:
                return False
            if self._leaves_now():
                return True
            await self._wait_allowed()
            await self._drain()

    def _leaves_now(self) -> bool:
        """The guest is to go before its memory, and may."""
        return self.monitor.postcopy_wanted and self._allowed

    @property
    def _allowed(self) -> bool:
        """The destination has allowed the switchover, or is not asked."""
        return self.reader is None or self.reader.acks >= self._acks

    async def _wait_allowed(self) -> None:
        """Where nothing but that is missing: a pass now would find nothing to do."""
        if not self._allowed and self.counters.convergence is convergence.NOT_ALLOWED:
            assert self.reader is not None
            with trio.move_on_after(WINDOW):
                await self.reader.wait_acks(self._acks)

    async def _wait_for_life(self) -> None:
        """Where no answer has come yet, give it time, while the guest still runs.

        A destination that must answer and does not ends the attempt (:meth:`_await_answer`); another one is given a moment.
        """
        if self.reader is not None:
            with trio.move_on_after(math.inf if self.two_way else SILENCE_SECONDS):
                await self.reader.wait_life()

    async def _drain(self) -> None:
        """Before another pass: what fills the transport must go first, and a pass now would find nothing to do."""
        assert self.channel is not None
        seconds = self.channel.backlog() / self.counters.bandwidth if self.counters.bandwidth else 0.0
        if seconds > self.monitor.config.parameters.downtime_limit / 1000:
            await trio.sleep(min(seconds, WINDOW))

    async def _drain_all(self) -> None:
        """Before the guest goes ahead: what is queued goes out while it still runs here, or it would stand still for it."""
        assert self.channel is not None
        limit = self.monitor.config.parameters.downtime_limit / 1000
        while self.counters.bandwidth and self.channel.backlog() / self.counters.bandwidth > limit:  # noqa: ASYNC110 - the kernel tells nobody
            await trio.sleep(WINDOW)

    def _delivered(self) -> int:
        assert self.channel is not None
        return self.channel.sent - self.channel.backlog()

    def _ordered(self, written: Mapping[str, PageBitmap]) -> list[PageBitmap]:
        return [written[b.name] for b in self.guest.ram]

    def _decide(self, now: float, moved: int) -> convergence.Decision:
        c, config = self.counters, self.monitor.config
        progress = convergence.Progress(
            remaining=c.remaining,
            bandwidth=c.bandwidth,
            iteration=c.iteration,
            elapsed=now - c.started,
            dirty_rate=c.dirty_rate,
            queued=self.channel.backlog() if self.channel is not None else 0,
            least=self._stall.least,
            switchover_bandwidth=config.parameters.avail_switchover_bandwidth,
        )
        bounds = convergence.Bounds(
            downtime_limit=config.parameters.downtime_limit / 1000,
            max_bandwidth=config.parameters.max_bandwidth,
            max_iterations=config.max_iterations,
            max_total_time=config.max_total_time,
            switch_over=config.on_bound == "switchover",
            postcopy=config.capabilities.postcopy_ram,
        )
        c.expected_downtime = convergence.expected_downtime(progress)
        if c.dirty_rate and moved > TELLING_BYTES:
            c.shown_downtime = c.expected_downtime
        c.chase = max(c.chase, convergence.chase(progress, bounds))
        why = c.convergence = convergence.explain(progress, bounds)
        decision = convergence.decide(progress, bounds)
        ready = decision is convergence.Decision.SWITCH_OVER
        if (ready or self.monitor.postcopy_wanted) and not self._allowed:
            why = c.convergence = convergence.NOT_ALLOWED
        if ready and not self._allowed:
            over = convergence.reached(progress, bounds) is not None
            decision = convergence.Decision.GIVE_UP if over else convergence.Decision.ITERATE
        self.monitor.emit(
            "PASS", iteration=c.iteration, sent=c.transferred, remaining=c.remaining, dirty_rate=c.dirty_rate,
            bandwidth=c.bandwidth, expected_downtime=c.expected_downtime,
        )  # fmt: skip
        if self._stall.passed(c.remaining) and decision is convergence.Decision.ITERATE and not why.converging:
            self.monitor.warn(convergence.stalled(why))
        if decision is convergence.Decision.GIVE_UP:
            bound = convergence.reached(progress, bounds)
            raise NotConverging(
                f"no convergence within {bound}: {convergence.sentence(why)}", reason=why.reason, advice=why.advice
            )
        return decision

    # -- the switchover --------------------------------------------------------------------------------------------

    async def _switch_over(self, nursery: trio.Nursery, channel: Channel, sender: RamSender) -> None:
        """Stop the guest, send the rest, and hand it over."""
        assert self.limiter is not None
        assert self.tracker is not None
        watch = _Stopwatch()
        await self._stand_still(channel, watch)
        self.limiter.lift()
        last = await self._last_pages()
        await self._announce(channel)
        await sender.end([(b, snapshot_of(self.tracker, b), d) for b, d in zip(self.guest.ram, last, strict=True)])
        self.parts["ram"] = watch.lap()
        devices = DeviceSender(self.guest, self._run_state, self.config.peer)
        await channel.send(devices.sections(await self._call("saving the devices", self.guest.save_devices)))
        self.parts["devices"] = watch.lap()
        if self.two_way:
            await self._prepare(channel, PING_PREPARE)
        self.parts["prepare"] = watch.lap()
        if self.commit_hook is not None:
            await self._call("the commit hook", self.commit_hook)
        await self.hand_over_status(nursery, self.config.handover_timeout)
        await self._hand_over(channel, devices.ending())

    async def _go_ahead(self, nursery: trio.Nursery, channel: Channel, sender: RamSender) -> None:
        """Postcopy: stop the guest, send its devices, and hand it over; then its memory follows."""
        c, config = self.counters, self.config
        assert self.limiter is not None
        assert self.reader is not None
        await self._drain_all()
        self._judge_silence()
        if not self.two_way:
            raise TransportFailed("postcopy needs a return path, and nobody answers on this one")
        await self.open_urgent()
        c.ahead = True
        # What waits in the destination's buffers is read while the guest still runs here, or it would stand still for it.
        await self._ping(channel, PING_QUEUED)
        await self._introduce(channel)
        watch = _Stopwatch()
        await self._stand_still(channel, watch)
        blocks = list(self.guest.ram)
        unsent = at_least_one(await self._last_pages())
        await self._announce(channel)
        for block, bitmap in zip(blocks, unsent, strict=True):
            await channel.send(b"".join(postcopy.discards(block.name, bitmap)))
        self.parts["ram"] = watch.lap()
        devices = DeviceSender(self.guest, self._run_state, config.peer)
        saved = await self._call("saving the devices", self.guest.save_devices)
        if (state := coming_state(self.guest, self._run_state, saved)) != "running":
            self.monitor.warn(
                f"the run state of the guest is {state}: a QEMU runs it all the same when it comes by postcopy, unless it was "
                "started with -S"
            )
        sections = devices.sections(saved)
        self.parts["devices"] = watch.lap()
        await self._prepare(channel, PING_DISCARDED)
        self.parts["prepare"] = watch.lap()
        package = postcopy.packaged(
            wire.command(Command.POSTCOPY_LISTEN)
            + sections
            + wire.ping(PING_LOADED)
            + wire.ping(PING_RUNS)
            + wire.command(Command.POSTCOPY_RUN)
        )
        if self.commit_hook is not None:
            await self._call("the commit hook", self.commit_hook)
        self.in_postcopy = True
        self.limiter.move_to(channel, self.rate)
        following = Following(self, nursery, sender, self.limiter, blocks, unsent, self.connections)
        await self.hand_over_status(nursery, math.inf)
        self.undecided = channel.sent + len(package) - 1
        following.begin()
        with trio.move_on_after(config.handover_timeout):
            try:
                await channel.send(package + wire.ping(PING_FOLLOWED))
            except TrimigError:
                if self.nothing_left(channel):
                    raise
        assert c.paused_at is not None
        c.downtime = trio.current_time() - c.paused_at
        self.parts["commit"] = watch.lap()
        c.transferred_at_postcopy = c.earlier + channel.sent
        await following.run()

    async def _stand_still(self, channel: Channel, watch: _Stopwatch) -> None:
        """Stop the guest, and hold it if it is to be held."""
        c, hold = self.counters, self.config.capabilities.pause_before_switchover
        self._judge_silence()
        c.paused_at = trio.current_time()
        if not hold:
            await self._advance(Status.DEVICE)
        await self._stop_guest()
        self.parts["pause"] = watch.lap()
        if c.transferred_at_pause is None:
            c.transferred_at_pause = channel.sent
        if hold:
            await self._hold()
            self.parts["held"] = watch.lap()
        self.starts = self.count_starts()
        if self.guest.run_state == "running":
            raise GuestFailed("the guest was resumed while it was being stopped for the switchover")

    async def _announce(self, channel: Channel) -> None:
        """Say that the last pages are next, to whoever knows the word."""
        if self.config.peer.send_switchover_start:
            await channel.send(wire.command(Command.SWITCHOVER_START))

    async def _last_pages(self) -> list[PageBitmap]:
        """What of each block has not been sent, or has changed since; the guest stands still."""
        assert self.tracker is not None
        last = self._ordered(await self._call("finding dirty pages", self.tracker.sync))
        self._synced()
        last = [a | b for a, b in zip(last, self._todo, strict=True)]
        self.counters.remaining = sum(int(np.count_nonzero(bitmap)) for bitmap in last) * PAGE_SIZE
        return last

    def _judge_silence(self) -> None:
        """From here on the return path counts, or it does not."""
        if self.reader is not None and not self.two_way:
            self.two_way = self.reader.heard
            if not self.two_way:
                self._warn_one_way("nobody answers on the return path, so there is none")

    async def _stop_guest(self) -> None:
        # Looked at only now: its user may have paused or resumed it while the memory was sent.
        self._run_state = self.guest.run_state
        if self._run_state == "running":
            self.touched = True
            await self._call("pausing the guest", self.guest.pause)
            self.monitor.emit("STOP")

    async def _hold(self) -> None:
        """pause-before-switchover: nothing is sent until :meth:`trimig.Monitor.resume` says so, however long that takes."""
        await self._advance(Status.PRE_SWITCHOVER)
        while self.monitor.status is Status.PRE_SWITCHOVER:
            await self.monitor.wait_changed()
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.guest.run_state == "running":
            await self._stop_guest()  # somebody has resumed it meanwhile

    async def _prepare(self, channel: Channel, value: int) -> None:
        await self._ping(channel, value)
        self.prepared = True

    async def _ping(self, channel: Channel, value: int) -> None:
        """Wait until the destination has taken everything that was sent so far."""
        assert self.reader is not None
        await channel.send(wire.ping(value))
        with trio.move_on_after(self.config.handover_timeout) as limit:
            await self.reader.wait_pong(value)
        if limit.cancelled_caught:
            raise TransportFailed(
                f"the destination did not confirm within {formats.duration(self.config.handover_timeout)} that it has loaded the guest"
            )

    async def _hand_over(self, channel: Channel, ending: bytes) -> None:
        """Send the decision and wait for its answer. On return, or by the error raised, the owner is known."""
        reader = self.reader
        if reader is not None:
            reader.decided = True
        self.undecided = channel.sent
        try:
            await channel.send(ending)
        except TrimigError:
            if not self.two_way or self.nothing_left(channel):
                raise
            # Something may have left. Only the destination's word counts now, if it is still to be had.
        if self.two_way:
            assert reader is not None
            await reader.wait_answer()
        else:
            await self._deliver(channel)
        if (refusal := self.take_refusal()) is not None:
            raise refusal
        if not self.two_way and not self.answered:
            self.answered = True
            self._complete()

    async def _deliver(self, channel: Channel) -> None:
        """Without a return path: wait until the transport says that everything is where it was to go, if it can say so."""
        if not isinstance(channel.stream, Delivering):
            return
        try:
            await channel.stream.delivered()
        except (TransportFailed, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            # Unless somebody has answered after all.
            if self.reader is None or self.reader.shut is None:
                raise


class _Stopwatch:
    def __init__(self) -> None:
        self._then = trio.current_time()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = trio.current_time()
        passed, self._then = now - self._then, now
        return passed
