"""The destination after the switch to postcopy: the guest runs here, and its memory follows.

There are three tasks. One reads the stream and places pages. One serves the guest's page faults. One starts the guest and
ends. A lost connection ends none of them. The guest runs on until it needs a missing page, and a later connection brings
the rest. While a connection is there, :mod:`.pages` does the work of the first two tasks in a thread, if it can.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from ...channel.channels import MAIN
from ...channel.first_bytes import judge_again
from ...errors import GuestFailed, PostcopyLost, RemoteProtocolError, TransportFailed
from ...guest import DiscardableBlock, LazyGuest, MissingMemory, OpaqueGuest
from ...status import Status, Stream
from ...wire import events as ev
from ...wire.constants import Command, Section
from ...wire.decoder import Decoder
from ...wire.marks import PING_MARK, PONG_MARK, Mark, is_mark, reason_bytes, shown_reason
from ...wire.postcopy import Runs, runs_of
from ...wire.return_path import Clock, Pong, Reason, ResumeAck
from .. import guest_calls
from ..order import PING_RUNS
from ..ram.postcopy_receiver import PostcopyReceiver
from ..recovery import Search
from ..shield import lift_shield, shield
from .activate import activate
from .answers import Answers
from .arriving import KeptMemory, keep_ram
from .lazy import open_memory
from .package import parse_package
from .pages import PageReader
from .recovering import bitmap_of, wrong_attempt
from .section import measure_device
from .stream import IncomingStream

if TYPE_CHECKING:
    from ...channel.channel import AnyStream
    from ...channel.connections import Reopen
    from .arriving import Storing
    from .devices import IncomingDevices
    from .incoming import Incoming
    from .memory import Taken
    from .package import Package


async def follow(
    into: Incoming, stream: IncomingStream, devices: IncomingDevices, taken: Taken, nursery: trio.Nursery
) -> None:
    """Parse the package at the end of *taken*, start the guest, and receive the rest of its memory.

    Raises:
        TrimigError: the guest could not be started, or the rest of its memory was given up.

    **Cancellation:** until the guest runs, the source keeps it. Then the cancellation is held off while there is a
    connection.
    """
    assert isinstance(taken.last, ev.PackageElement)
    footers = into.config.peer.send_section_footer
    measure = None if isinstance(into.guest, OpaqueGuest) else functools.partial(measure_device, into.guest)
    package = await parse_package(taken.last, stream.decoder, measure, footers=footers)
    stream.enter(Stream.FOLLOWING)
    await into.preempt.wait()
    memory = await _listen(into, taken.storing)
    following = PostcopyDestination(into, nursery, stream, devices, taken.storing, package, memory)
    into.following = following
    await following.run()


async def _listen(into: Incoming, storing: Storing | None) -> MissingMemory:
    """Discard the pages that have not come, and make each access to one of them wait. Returns that memory."""
    guest, received = into.guest, into.ram.received()
    for block in guest.ram:
        runs = runs_of(~received[block.name])
        if not isinstance(block, DiscardableBlock):
            if len(runs):
                raise GuestFailed(f"pages of RAM block {block.name!r} cannot be discarded, as postcopy needs it")
            continue
        for first, end in runs.tolist():
            with guest_calls.guarded("discarding pages"):
                block.discard_slice(first, end - first)
        await trio.lowlevel.checkpoint()
    if isinstance(guest, LazyGuest):
        return await open_memory(guest, into.config.handover_timeout)
    return KeptMemory(guest.ram, storing)


class PostcopyDestination:
    """Runs the destination of postcopy, after the package. Implements :class:`.incoming.Following`.

    Args:
        nursery: of the attempt.
        stream: the stream that has brought *package*.
    """

    def __init__(
        self,
        into: Incoming,
        nursery: trio.Nursery,
        stream: IncomingStream,
        devices: IncomingDevices,
        storing: Storing | None,
        package: Package,
        memory: MissingMemory,
    ) -> None:
        self._into = into
        self._guest = into.guest
        self._monitor = into.monitor
        self._config = into.config
        self._counters = into.counters
        self._nursery = nursery
        self._stream = stream
        self._devices = devices
        self._storing = storing
        self._package = package
        self._answers = Answers(stream.channel, self._interrupted)
        if not into.return_path:
            self._answers.drop()
        names = [block.name for block in into.guest.ram]
        self._receiver = PostcopyReceiver(memory, names, into.ram.received(), self._answers.say_bytes, self._counters)
        self._scope = trio.CancelScope()  # around the reading from the present connection
        self._why = ""  # the reason for which that scope was cancelled, if it was
        #: The id of the attempt that the present connection has named, in a recovery.
        self._named: bytes | None = None
        self._told_unnamed = False
        self._lives = trio.Event()
        #: Set when pages may come on this connection: on the first one at once, on a recovery connection after RESUME.
        self._resumed = trio.Event()
        self._resumed.set()
        self._search = Search(self._monitor, self._config, self._reopen(), listens=True)
        self._least = math.inf  # pages that were missing at the last RESUME
        self._finished = False  # the guest was told that all of its memory has come
        #: True until the source shows that it has read the answer to PING_RUNS. Without that answer it resumes its guest.
        self._doubt = PING_RUNS in package.pings and not into.of_trimig
        self._pages = self._page_reader()

    async def run(self) -> None:
        """Run until the guest runs and has all of its memory. A lost connection does not stop the start of the guest.

        Raises:
            TrimigError: the guest could not be started, or the rest of its memory was given up.

        **Cancellation:** until the guest runs, the source keeps it. Then the cancellation is held off while there is a
        connection.
        """
        if isinstance(self._guest, LazyGuest):
            self._nursery.start_soon(self._receiver.serve, name="trimig.faults")
        self._nursery.start_soon(self._take_over, name="trimig.activation")
        while (why := await self._read()) is not None:
            # The package has brought the guest, so its start is completed even without a connection: the source may count
            # the guest as handed over.
            await self._lives.wait()
            await self._lost(why)
            if not await self._recover():
                break
        await self._lives.wait()
        await self._finish()
        self._counters.error = None
        self._monitor.advance(Status.COMPLETED)

    # -- the switch ------------------------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Start the guest, then answer the PINGs inside the package: after that the source does not resume its guest."""
        sections, devices = self._package.sections, self._devices
        if isinstance(self._guest, OpaqueGuest):
            # A parked guest is not started. Everything that can fail is checked now, before the PINGs are answered.
            devices.check_kept(sections)
            if self._storing is not None:
                await self._storing.reserve(self._receiver.missing)
            await trio.lowlevel.checkpoint_if_cancelled()
            shield(self._nursery, math.inf)
            self._monitor.advance(Status.HANDOVER)
            await self._pong()
            self._monitor.advance(Status.POSTCOPY_ACTIVE)
        else:
            for section in sections:
                devices.take(section)
            with self._into.phase("devices"):
                await devices.load_all(None)
            shield(self._nursery, math.inf)
            await activate(self._into, devices.run_state, Status.POSTCOPY_ACTIVE, self._pong)
        self._lives.set()
        self._pages.wake()

    async def _pong(self) -> None:
        for value in self._package.pings:
            await self._answers.say(Pong(value=value))

    async def _finish(self) -> None:
        """Tell the guest that all of its memory has come. Idempotent."""
        if self._finished:
            return
        self._finished = True
        self._receiver.close()
        if isinstance(self._guest, LazyGuest):
            waited = await self._told_whole(self._guest)
            if self._monitor.config.capabilities.postcopy_blocktime:
                self._counters.members.update(_blocktime(waited))
        else:
            await self._keep()

    async def _told_whole(self, guest: LazyGuest) -> Sequence[float]:
        """Tell *guest* that all of its memory has come. Returns the seconds that each worker has waited for pages.

        An error of the guest is only a warning, because the guest runs and has all of its memory.
        """
        try:
            whole = guest.memory_is_whole
            return await guest_calls.call("ending the wait for memory", whole, self._config.handover_timeout)
        except GuestFailed as error:
            self._monitor.warn(f"{error}; the guest has all of its memory")
            return ()

    async def _keep(self) -> None:
        """Complete a parked guest: all of its memory has come, and now its devices are kept with it."""
        await keep_ram(self._into, self._storing)
        await self._devices.keep(self._package.sections)
        keeping = functools.partial(self._guest.activate, self._devices.run_state)
        failure = await guest_calls.bring_back("kept", keeping, self._config.handover_timeout)
        if failure is not None:
            raise failure

    # -- one connection --------------------------------------------------------------------------------------------

    async def _read(self) -> str | None:
        """Receive pages from this connection. None if everything has come, else the reason why the connection has ended."""
        self._why = ""
        why: str | None = "the connection was lost"
        self._monitor.interrupt(self._interrupted)
        try:
            with trio.CancelScope() as self._scope:
                if not self._resumed.is_set():
                    self._scope.deadline = self._search.deadline
                why = await self._take_both()
        finally:
            self._monitor.interrupt(None)
        return None if why is None else self._why or why

    async def _take_both(self) -> str | None:
        """Receive the pages of the main connection and of the preempt channel. Returns as :meth:`_read`."""
        why: str | None = None
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            if self._into.preempt.wanted:
                nursery.start_soon(self._take_urgent, name="trimig.urgent")
            try:
                await self._take_pages()
            except (TransportFailed, RemoteProtocolError) as error:
                why = str(error)
            nursery.cancel_scope.cancel("nothing more comes on the main connection")
        return why

    def _page_reader(self) -> PageReader:
        """For the present connection."""

        def ready() -> bool:
            return self._lives.is_set() and self._resumed.is_set()

        return PageReader(self._into, self._stream, self._receiver, self._answers, ready)

    async def _take_urgent(self) -> None:
        await self._resumed.wait()
        wake, decoder = self._pages.wake, self._stream.decoder
        await self._into.preempt.take_pages(self._receiver, decoder, wake, self._interrupted)

    def _interrupted(self, why: str) -> None:
        self._why = why
        self._scope.cancel(why)

    async def _take_pages(self) -> None:
        receiver, pages = self._receiver, self._pages
        while True:
            match event := await pages.next():
                case ev.CommandElement():
                    await self._command(event)
                case ev.EndOfStream():
                    await self._into.preempt.wait_last(receiver)
                    if receiver.missing:
                        raise RemoteProtocolError(
                            f"the source ends, and {receiver.missing} pages are missing", offset=event.at
                        )
                    return
                case ev.SectionHeader(kind=Section.END):
                    await self._proved()  # a source sends this only after it has read the answer

    async def _command(self, event: ev.CommandElement) -> None:
        receiver = self._receiver
        if is_mark(event.number):
            await self._mark(Mark(event.number), event)
            return
        match event.number:
            case Command.PING:
                await self._answers.say(Pong(value=int.from_bytes(event.payload)))
                if int.from_bytes(event.payload) == PING_MARK:
                    await self._answers.say(Pong(value=PONG_MARK))
                    self._stream.accept_marks()
            case Command.SWITCHOVER_START:
                pass  # it announces the switchover, which is over
            case Command.RECV_BITMAP:
                await self._check_attempt(event)
                answer = bitmap_of(event, receiver.received)
                await self._proved()  # a source that has resumed its guest does not connect for a recovery
                await self._answers.say(answer)
            case Command.POSTCOPY_RESUME:
                await self._into.preempt.wait()
                await self._proved()
                self._counters.error = None
                if receiver.missing < self._least:
                    self._least = receiver.missing
                    self._search.gained()
                self._monitor.advance(Status.POSTCOPY_ACTIVE)
                self._resumed.set()
                self._scope.deadline = math.inf
                await self._answers.say(ResumeAck())
                await receiver.ask_again()

    async def _mark(self, mark: Mark, event: ev.CommandElement) -> None:
        match mark:
            case Mark.REASON:
                raise TransportFailed(f"the source ended the connection: {shown_reason(event.payload)}")
            case Mark.CLOCK:
                await self._answers.say(Clock(microseconds=round(trio.current_time() * 1e6)))
            case Mark.ATTEMPT:
                self._named = event.payload

    async def _check_attempt(self, event: ev.CommandElement) -> None:
        """Check that the source has named the attempt of this guest, as a trimig does. RemoteProtocolError.

        Without the check the memory of another guest could come into this one.
        """
        expected = self._into.attempt
        if self._named == expected:
            if expected is None and not self._told_unnamed:
                self._told_unnamed = True
                self._monitor.warn(
                    "the source names no attempt (a QEMU has none to name), so its RAM blocks are all that tells whether it "
                    "is the source of this guest"
                )
            return
        refusal = wrong_attempt(self._named, event.at)
        if self._stream.marks:
            await self._answers.say_last(Reason(payload=reason_bytes(str(refusal))), self._config.teardown_grace)
        raise refusal

    # -- without one -----------------------------------------------------------------------------------------------

    async def _lost(self, why: str) -> None:
        self._answers.drop()
        self._receiver.hold()
        await self._into.channels.close()
        await self._into.preempt.close()
        self._counters.error = why
        self._search.paused(why)
        if not self._doubt:
            self._monitor.advance(Status.POSTCOPY_PAUSED)
        elif self._monitor.status is not Status.POSTCOPY_UNCERTAIN:
            self._into.stopped = self._guest.run_state == "running" and not isinstance(self._guest, OpaqueGuest)
            await self._stop_guest(self._config.teardown_grace)
            self._monitor.advance(Status.POSTCOPY_UNCERTAIN)

    async def _stop_guest(self, grace: float) -> None:
        """Stop the guest, if it runs. A failure is only a warning.

        **Cancellation:** held off, for at most *grace* seconds.
        """
        if self._guest.run_state != "running" or isinstance(self._guest, OpaqueGuest):
            return
        failure = await guest_calls.bring_back("stopped", self._guest.pause, grace)
        if failure is not None:
            self._monitor.warn(str(failure))
        else:
            self._monitor.emit("STOP")

    async def _proved(self) -> None:
        """Note that the source knows that the guest is here and so does not run it. Resume a stopped guest. GuestFailed."""
        if not self._doubt:
            return
        self._doubt = False
        if self._monitor.status is Status.POSTCOPY_UNCERTAIN:
            self._monitor.advance(Status.POSTCOPY_RECOVER)
        if self._into.stopped:
            self._into.stopped = False
            failure = await guest_calls.bring_back("resumed", self._guest.resume, self._config.handover_timeout)
            if failure is not None and self._guest.run_state != "running":
                raise failure
            self._monitor.emit("RESUME")

    async def _recover(self) -> bool:
        """Wait for another connection; :meth:`_read` then reads from it.

        Returns:
            False if no connection came and none is needed: the guest has all of its memory, and only the source does not
            know that.

        Raises:
            PostcopyLost: no connection came, and pages are missing.
        """
        if self._receiver.missing or self._doubt:
            lift_shield(self._nursery)
            stream = await self._search.connection()
            shield(self._nursery, math.inf)
        else:
            if not self._finished:
                await self._finish()
                self._search.shorten(self._config.handover_timeout if self._search.tries else 0.0)
            try:
                stream = await self._search.connection()
            except PostcopyLost:
                return False
        await self._take_up(stream)
        return True

    def _reopen(self) -> Reopen | None:
        """The function that waits for another connection of this source; None if the transport can have no other."""
        judge = judge_again([block.name for block in self._guest.ram])
        return (
            functools.partial(self._into.reception.again, self._nursery, judge=judge)
            if self._into.reception.can_come_again
            else None
        )

    async def _take_up(self, stream: AnyStream) -> None:
        self._monitor.listening()
        channel = self._into.reception.channel(stream)
        self._into.channels.add(MAIN, channel)
        await self._answers.use(channel)
        decoder = Decoder(
            measure=None,
            footers=self._config.peer.send_section_footer,
            description=False,
            max_device_bytes=self._config.max_device_bytes,
            continues=self._stream.decoder,
        )
        self._stream = IncomingStream(self._into, channel, decoder, Stream.RECOVERING)
        self._pages = self._page_reader()
        self._into.preempt.expect(self._nursery)
        self._resumed = trio.Event()
        self._named = None
        if self._monitor.status is not Status.POSTCOPY_UNCERTAIN:
            self._monitor.advance(Status.POSTCOPY_RECOVER)

    @property
    def whole(self) -> bool:
        """True if every page has come."""
        return not self._receiver.missing

    async def end(self) -> Mapping[str, Runs]:
        """End the attempt. If pages are missing, the guest is stopped, because they read as zero from then on.

        A parked guest with missing pages gets its devices, so that it can be saved with the memory that has come.

        Returns:
            The missing pages, by block.

        **Cancellation:** held off, for at most ``teardown_grace``.
        """
        receiver = self._receiver
        missing = receiver.missing_runs()
        if receiver.closed:
            return missing
        try:
            if isinstance(self._guest, OpaqueGuest) and self._lives.is_set():
                keeping = functools.partial(self._guest.load_opaque, self._package.sections, None)
                failure = await guest_calls.bring_back("given its devices", keeping, self._config.teardown_grace)
                if failure is not None:
                    self._monitor.warn(str(failure))
            await self._stop_guest(self._config.teardown_grace)
        finally:
            receiver.close()
        return missing


def _blocktime(waited: Sequence[float]) -> Mapping[str, Callable[[], object]]:
    """The members of query-migrate for the capability postcopy-blocktime, in milliseconds.

    Args:
        waited: the seconds that each processor has waited for pages.
    """
    each = [round(seconds * 1000) for seconds in waited]
    # QEMU's first member is the time in which all processors waited at once, which is not measured. With one processor
    # it is that processor's time. With several it is at most the smallest time, which is shown.
    return {"postcopy-blocktime": lambda: min(each, default=0), "postcopy-vcpu-blocktime": lambda: each}
