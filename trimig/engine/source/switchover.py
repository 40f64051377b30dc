"""Stops the guest and hands it over. Precopy and postcopy have the same steps."""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Final, Protocol

import trio

from ... import formats
from ...channel.streams import Delivering
from ...errors import GuestFailed, TransportFailed, TrimigError
from ...policy.rate import WINDOW
from ...status import ReturnPath, Status
from ...wire import encoder as wire
from ...wire import postcopy as wire_postcopy
from ...wire.constants import Command
from ...wire.marks import ATTEMPT_BYTES, Mark
from .. import guest_calls
from ..device_writer import DeviceSender, coming_state
from ..order import PING_LOADED, PING_RUNS
from ..shield import lift_shield, shield
from .answer import complete, end_downtime, take_refusal
from .link import one_way
from .postcopy import PING_DISCARDED, PING_FOLLOWED, PostcopySource

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ..sections.ram import RamSection
    from .outgoing import Outgoing

#: PING values that only a trimig sends. The answer to PING_PREPARE proves that the destination has loaded everything. The
#: answer to PING_QUEUED proves that it has read the pages that were queued before the switch to postcopy.
PING_PREPARE: Final = 0x74726967
PING_QUEUED: Final = 0x74726971


class Following(Protocol):
    """The memory that follows the guest."""

    async def run(self) -> None:
        """Send the memory, until the destination has all of it."""


class Switchover(Protocol):
    """The steps in which precopy and postcopy differ. The phases call them in this order."""

    async def drain(self) -> None:
        """Wait until queued bytes have been sent, while the guest still runs here: they would lengthen the downtime."""

    async def send_rest(self) -> None:
        """Send the last pages, or the list of pages that follow. The guest is stopped."""

    async def send_devices(self) -> None:
        """Save the devices. In precopy, send them; in postcopy they go with the commit."""

    async def prepare(self) -> None:
        """Wait for the proof that the destination has loaded everything so far, if the destination answers."""

    async def commit(self, nursery: trio.Nursery) -> Following:
        """Hand the guest over. In precopy this waits for the answer; in postcopy it returns when the commit was sent."""


class PrecopySwitchover:
    """The switchover of precopy: all memory is sent, and the end of the stream is the commit."""

    def __init__(self, out: Outgoing) -> None:
        self._out = out
        self._channel = out.link.channel
        self._devices = DeviceSender(out.guest, out.config.peer)

    async def drain(self) -> None:
        """Do nothing: the passes have made the queue short.

        **Cancellation:** no effect.
        """

    async def send_rest(self) -> None:
        """Send the last pages without the bandwidth limit.

        **Cancellation:** the end of the attempt resumes the guest, as in all steps before the commit.
        """
        out = self._out
        out.link.limiter.lift()
        await out.find_pending()
        await _announce(out, self._channel)
        for section in out.sections:
            await section.complete()

    async def send_devices(self) -> None:
        """Send the devices.

        **Cancellation:** as for the rest.
        """
        saved = await guest_calls.save_devices(self._out.guest, self._out.config.handover_timeout)
        await self._channel.send(self._devices.sections(saved, self._out.run_state))

    async def prepare(self) -> None:
        """Wait for the PONG after the devices. TransportFailed if it does not come.

        **Cancellation:** as for the rest.
        """
        if self._out.link.answers:
            await _wait_loaded(self._out, self._channel, PING_PREPARE)
            self._out.prepared = True

    async def commit(self, nursery: trio.Nursery) -> Following:
        """Send the end of the stream, and wait for the answer. No memory follows.

        **Cancellation:** held off from the decision on, for at most ``handover_timeout``.
        """
        out = self._out
        await _call_commit_hook(out)
        await _decide(out, nursery, out.config.handover_timeout)
        await _send_end(out, self._channel, self._devices.ending())
        return _Nothing()


class _Nothing:
    async def run(self) -> None:
        """Do nothing: the destination has everything.

        **Cancellation:** no effect.
        """


class PostcopySwitchover:
    """The switchover to postcopy: a package with the devices is the commit, and the memory follows."""

    def __init__(self, out: Outgoing, ram: RamSection) -> None:
        self._out = out
        self._ram = ram
        self._channel = out.link.channel
        self._package = b""

    async def drain(self) -> None:
        """Wait until the destination has read all queued bytes: they would lengthen the downtime.

        Raises:
            TransportFailed: the destination does not answer.

        **Cancellation:** the guest runs on.
        """
        out = self._out
        await _drain(out)
        _decide_return_path(out)
        if not out.link.answers:
            raise TransportFailed("postcopy needs a return path, and the destination does not answer on this one")
        await out.link.open_beside()
        out.counters.switched_to_postcopy = True
        await _wait_loaded(out, self._channel, PING_QUEUED)
        await _introduce(out, self._channel)

    async def send_rest(self) -> None:
        """Send the list of unsent pages, as ranges that the destination discards.

        **Cancellation:** the end of the attempt resumes the guest, as in all steps before the commit.
        """
        await self._out.find_pending()
        await _announce(self._out, self._channel)
        for section in self._out.sections:
            await section.switch_to_postcopy()

    async def send_devices(self) -> None:
        """Save the devices into the package.

        **Cancellation:** as for the rest.
        """
        out = self._out
        devices = DeviceSender(out.guest, out.config.peer)
        saved = await guest_calls.save_devices(out.guest, out.config.handover_timeout)
        if (state := coming_state(out.guest, out.run_state, saved)) != "running":
            out.monitor.warn(
                f"the run state of the guest is {state}: a QEMU runs it all the same when it comes by postcopy, unless it was "
                "started with -S"
            )
        self._package = wire_postcopy.packaged(
            wire.command(Command.POSTCOPY_LISTEN)
            + devices.sections(saved, out.run_state)
            + wire.ping(PING_LOADED)
            + wire.ping(PING_RUNS)
            + wire.command(Command.POSTCOPY_RUN)
        )

    async def prepare(self) -> None:
        """Wait for the PONG after the discards. TransportFailed if it does not come.

        **Cancellation:** as for the rest.
        """
        await _wait_loaded(self._out, self._channel, PING_DISCARDED)
        self._out.prepared = True

    async def commit(self, nursery: trio.Nursery) -> Following:
        """Send the package. The result sends the memory, see :meth:`.postcopy.PostcopySource.run`.

        **Cancellation:** held off from the decision on, while there is a connection.
        """
        out, channel, package = self._out, self._channel, self._package
        await _call_commit_hook(out)
        out.in_postcopy = True
        out.link.limiter.resume(out.rate)
        following = PostcopySource(out, nursery, self._ram)
        await _decide(out, nursery, math.inf)
        out.commit_offset = channel.sent + len(package) - 1
        following.begin()
        with trio.move_on_after(out.config.handover_timeout):
            try:
                await channel.send(package + wire.ping(PING_FOLLOWED))
            except TrimigError:
                if out.commit_not_sent:
                    raise
        end_downtime(out)
        out.counters.transferred_at_postcopy = out.counters.on_main
        return following


async def stop_guest(out: Outgoing) -> None:
    """Decide whether the return path is used, and stop the guest.

    Raises:
        GuestFailed: the guest cannot be stopped.

    **Cancellation:** the end of the attempt resumes the guest.
    """
    c = out.counters
    _decide_return_path(out)
    c.paused_at = out.stopped_at = trio.current_time()
    if not out.config.capabilities.pause_before_switchover:
        await out.advance(Status.DEVICE)
    await _pause_guest(out)
    if c.transferred_at_pause is None:
        c.transferred_at_pause = c.on_main


async def hold(out: Outgoing) -> None:
    """Wait for :meth:`trimig.Monitor.resume` without a time limit (pause-before-switchover). Nothing is sent meanwhile.

    **Cancellation:** the end of the attempt resumes the guest.
    """
    out.turn.close()  # this may take long
    await out.advance(Status.PRE_SWITCHOVER)
    while out.monitor.status is Status.PRE_SWITCHOVER:
        await out.monitor.wait_changed()
    await trio.lowlevel.checkpoint_if_cancelled()
    if out.guest.run_state == "running":
        await _pause_guest(out)  # the guest's user has resumed it during the wait


def check_stopped(out: Outgoing) -> None:
    """Raise GuestFailed if the guest runs again. From here on its starts are counted, see :func:`_decide`."""
    out.starts = out.count_starts()
    if out.guest.run_state == "running":
        raise GuestFailed(
            "pause() has returned and run_state is still 'running': the guest was resumed while it was being stopped for the "
            "switchover, or its pause() did not change run_state"
        )


async def _announce(out: Outgoing, channel: Channel) -> None:
    """Send SWITCHOVER_START, which announces the last pages, if the destination's profile has this command."""
    if out.config.peer.send_switchover_start:
        await channel.send(wire.command(Command.SWITCHOVER_START))


async def _call_commit_hook(out: Outgoing) -> None:
    if out.commit_hook is not None:
        await out.call("the commit hook", out.commit_hook)


async def _decide(out: Outgoing, nursery: trio.Nursery, seconds: float) -> None:
    """Set the shield and the status `handover`. From here on a cancellation is held off for at most *seconds*.

    The shield comes before the event of the status, because a listener of that event may cancel: then it is too late.

    Raises:
        GuestFailed: the guest runs, or has run since it was stopped.

    **Cancellation:** neither the shield nor the status is set.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    if out.count_starts() != out.starts:
        raise GuestFailed(
            "the guest was resumed while its last pages and devices were sent, and what it wrote since would be lost; "
            "do not resume it before the migration is over"
        )
    shield(nursery, seconds)
    try:
        out.monitor.advance(Status.HANDOVER)
    except TrimigError:
        lift_shield(nursery)
        raise


def _decide_return_path(out: Outgoing) -> None:
    """Decide once, before the guest stops, whether the destination answers; warn if it does not."""
    if not out.link.decide_return_path():
        out.monitor.warn(one_way("no answer comes on the return path, so there is none"))


async def _pause_guest(out: Outgoing) -> None:
    # The run state is read as late as here, because the guest's user may have changed it while the memory was sent.
    out.run_state = out.guest.run_state
    if out.run_state == "running":
        out.paused_by_us = True
        await out.call("pausing the guest", out.guest.pause)
        out.monitor.emit("STOP")


async def _wait_loaded(out: Outgoing, channel: Channel, value: int) -> None:
    """Send PING(*value*), and wait for its PONG: then the destination has loaded everything that was sent before."""
    await channel.send(wire.ping(value))
    with trio.move_on_after(out.config.handover_timeout) as limit:
        await out.link.reader.wait_pong(value)
    if limit.cancelled_caught:
        seconds = formats.duration(out.config.handover_timeout)
        raise TransportFailed(
            f"the destination did not confirm within {seconds} that it has loaded the guest{out.link.hint}"
        )


async def _drain(out: Outgoing) -> None:
    """Wait until the queue of the transport fits into the downtime limit, while the guest still runs here."""
    limit = out.monitor.config.parameters.downtime_limit / 1000
    while out.counters.bandwidth and out.link.channels.backlog / out.counters.bandwidth > limit:  # noqa: ASYNC110 - the kernel has no event for it
        await trio.sleep(WINDOW)


async def _send_end(out: Outgoing, channel: Channel, ending: bytes) -> None:
    """Send the decision, and wait for its answer. Returns without an error also if the answer does not come."""
    link = out.link
    link.reader.enter(ReturnPath.COMMITTED)
    out.commit_offset = channel.sent
    try:
        await channel.send(ending)
    except TrimigError:
        if not link.answers or out.commit_not_sent:
            raise
        # The deciding byte may have left. Only the destination's answer can tell, and it may still come.
    if link.answers:
        await link.reader.wait_answer()
    else:
        await _wait_delivered(out, channel)
    if (refusal := take_refusal(out)) is not None:
        raise refusal
    if not link.answers and not out.answered:
        out.answered = True
        complete(out)


async def _wait_delivered(out: Outgoing, channel: Channel) -> None:
    """Without a return path: wait until the transport confirms the delivery, if it can confirm it."""
    if not isinstance(channel.stream, Delivering):
        return
    try:
        await channel.stream.delivered()
    except (TransportFailed, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        # An answer may have come all the same, and then it counts.
        if out.link.reader.shut is None:
            raise


async def _introduce(out: Outgoing, channel: Channel) -> None:
    """Send the id of this attempt to a destination that is a trimig, once. A recovery must name the same id."""
    if not out.attempt and out.link.reader.marked:
        attempt = secrets.token_bytes(ATTEMPT_BYTES)
        await channel.send(wire.command(Mark.ATTEMPT, attempt))
        out.attempt = attempt
