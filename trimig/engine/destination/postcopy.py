"""The destination behind the switch to postcopy: the guest runs here, and its memory follows.

Three tasks: one reads the stream and places pages, one serves the guest's page faults, and for a moment one brings the
guest to life. A lost connection is none of their failures: the guest goes on as far as its memory reaches, and a later
connection brings the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from ...channel import closing
from ...channel.channels import ChannelKind
from ...channel.first_bytes import judge_again
from ...errors import GuestFailed, PostcopyLost, RemoteProtocolError, TransportFailed, TrimigError
from ...guest import DiscardableBlock, LazyGuest, MissingMemory, OpaqueGuest
from ...status import Status
from ...wire import events as ev
from ...wire.constants import Command, Section
from ...wire.decoder import Decoder
from ...wire.marks import PING_MARK, PONG_MARK, Mark, is_mark, reason_bytes, shown_reason
from ...wire.postcopy import Runs, runs_of
from ...wire.return_path import Clock, Message, Pong, Reason, ResumeAck, encode
from .. import guest_calls
from ..order import PING_RUNS, Place, check_place
from ..ram.postcopy_receiver import PostcopyReceiver
from ..recovery import Search
from ..shield import lift_shield, shield
from .arriving import KeptMemory
from .lazy import open_memory
from .recovering import bitmap_of, wrong_attempt

if TYPE_CHECKING:
    from ...channel.channel import AnyStream, Channel
    from ...channel.connections import Reopen
    from ..ram.preempt_receiver import PreemptReceiver
    from .incoming import Incoming
    from .package import Package

#: Events handled before other tasks get a turn.
_SLICE_EVENTS: Final = 32
#: How long a connection in a recovery may be silent before RESUME, where the time for the recovery is short: a quarter of
#: that, but not less than this. Who is silent may be a stranger who has asked for the pages of a block, and must not use it
#: up. A source waits there for the bitmaps, which may be long, and for a turn of a busy machine.
_ASKING_SECONDS: Final = 10.0


class PostcopyDestination:
    """A guest that has come before its memory.

    Args:
        arrival: whose end this is.
        nursery: of the attempt.
        decoder: has read the package.
        urgent: the second connection, which is there if it is to be.
    """

    def __init__(
        self, arrival: Incoming, nursery: trio.Nursery, channel: Channel, decoder: Decoder, urgent: PreemptReceiver
    ) -> None:
        self._arrival = arrival
        self._guest = arrival.guest
        self._monitor = arrival.monitor
        self._config = arrival.config
        self._counters = arrival.counters
        self._nursery = nursery
        self._channel = channel
        self._decoder = decoder
        self._urgent = urgent
        self._connected = True
        self._sending = trio.Lock()
        self._scope: trio.CancelScope | None = None
        self._why: str | None = None
        self._receiver: PostcopyReceiver | None = None
        self._package: Package | None = None
        #: The id of the attempt that the present connection has named, in a recovery.
        self._named: bytes | None = None
        self._told_unnamed = False
        self._lives = trio.Event()
        #: Pages may come on this connection: it is the first, or RESUME has been read.
        self._resumed = trio.Event()
        self._resumed.set()
        assert arrival.reception is not None
        self._reception = arrival.reception
        self._search = Search(self._monitor, self._config, self._reopen(), listens=True)
        self._least = math.inf  # pages that were missing at the last RESUME
        self._finished = False  # the guest knows that it is whole
        #: The source takes its guest back if it has not read the answer to PING_RUNS, and nothing shows yet that it has.
        self._doubt = False

    async def run(self, package: Package) -> None:
        """Until the guest is whole and lives. Losing the connection does not undo what is in the package.

        Raises:
            TrimigError: it could not be brought to life, or the rest of its memory was given up.

        **Cancellation:** until the guest lives, the source keeps it; then it is held off while there is a connection.
        """
        receiver = await self._listen()
        self._package = package
        self._doubt = PING_RUNS in package.pings and not self._arrival.of_trimig
        if isinstance(self._guest, LazyGuest):
            self._nursery.start_soon(receiver.serve, name="trimig.faults")
        self._nursery.start_soon(self._take_over, package, name="trimig.activation")
        while (why := await self._read(receiver)) is not None:
            # With the package the guest has come: the source does not take it back unless it is told to.
            await self._lives.wait()
            await self._lost(why)
            if not await self._recover(receiver):
                break
        await self._lives.wait()
        await self._finish(package)
        self._counters.error = None
        self._monitor.advance(Status.COMPLETED)

    # -- the switch ------------------------------------------------------------------------------------------------

    async def _listen(self) -> PostcopyReceiver:
        """From here on, pages that have not come are missing, and an access to one waits."""
        guest = self._guest
        received = self._arrival.ram.received()
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
        memory: MissingMemory = KeptMemory(guest.ram, self._arrival.storing)
        if isinstance(guest, LazyGuest):
            memory = await open_memory(guest, self._config.handover_timeout)
        names = [block.name for block in guest.ram]
        self._receiver = PostcopyReceiver(memory, names, received, self._say_bytes, self._counters)
        return self._receiver

    async def _take_over(self, package: Package) -> None:
        """Bring the guest to life. The PING inside the package is answered when it does: then the source does not take it back."""
        arrival = self._arrival
        if isinstance(self._guest, OpaqueGuest):
            # It is kept: what can be wrong with it is looked at now, and then nothing of it can fail until it is whole.
            arrival.check_kept(package.sections)
            assert self._receiver is not None
            if arrival.storing is not None:
                await arrival.storing.reserve(self._receiver.missing)
            await trio.lowlevel.checkpoint_if_cancelled()
            shield(self._nursery, math.inf)
            self._monitor.advance(Status.HANDOVER)
            await self._pong(package)
            self._monitor.advance(Status.POSTCOPY_ACTIVE)
        else:
            for section in package.sections:
                arrival.take(section)
            arrival.check_complete(ram=False)
            await arrival.load()
            shield(self._nursery, math.inf)
            await arrival.activate(Status.POSTCOPY_ACTIVE, functools.partial(self._pong, package))
        self._lives.set()

    async def _pong(self, package: Package) -> None:
        for value in package.pings:
            await self._say(Pong(value=value))

    async def _finish(self, package: Package) -> None:
        """The last page has come, and the guest is told so. Idempotent."""
        assert self._receiver is not None
        if self._finished:
            return
        self._finished = True
        self._receiver.close()
        if isinstance(self._guest, LazyGuest):
            waited = await self._told_whole(self._guest)
            if self._monitor.config.capabilities.postcopy_blocktime:
                self._counters.blocktime = tuple(waited)
        else:
            await self._keep(package)

    async def _told_whole(self, guest: LazyGuest) -> Sequence[float]:
        """Seconds that each worker has waited. The guest is whole and runs, whatever it says to that."""
        try:
            whole = guest.memory_is_whole
            return await guest_calls.call("ending the wait for memory", whole, self._config.handover_timeout)
        except GuestFailed as error:
            self._monitor.warn(f"{error}; the guest has all of its memory")
            return ()

    async def _keep(self, package: Package) -> None:
        """The last page has come: a guest that is only kept is kept whole now."""
        guest, arrival = self._guest, self._arrival
        assert isinstance(guest, OpaqueGuest)
        await arrival.ram_received()
        await arrival.keep(package.sections)
        keeping = functools.partial(guest.activate, arrival.run_state)
        failure = await guest_calls.bring_back("kept", keeping, self._config.handover_timeout)
        if failure is not None:
            raise failure

    # -- one connection --------------------------------------------------------------------------------------------

    async def _read(self, receiver: PostcopyReceiver) -> str | None:
        """Take pages until the end; None if everything is here, otherwise why this connection is of no use any more."""
        self._why = None
        why: str | None = "the connection was lost"
        self._monitor.interrupt(self._interrupted)
        try:
            with trio.CancelScope() as self._scope:
                if not self._resumed.is_set():
                    self._scope.deadline = self._search.deadline
                why = await self._take_both(receiver)
        finally:
            self._scope = None
            self._monitor.interrupt(None)
        return None if why is None else self._why or why

    async def _take_both(self, receiver: PostcopyReceiver) -> str | None:
        """The pages of the main connection and of the one beside it; returns as :meth:`_read`."""
        why: str | None = None
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            if self._urgent.wanted:
                nursery.start_soon(self._take_urgent, receiver, name="trimig.urgent")
            try:
                await self._take_pages(receiver)
            except (TransportFailed, RemoteProtocolError) as error:
                why = str(error)
            nursery.cancel_scope.cancel("nothing more comes on the main connection")
        return why

    async def _take_urgent(self, receiver: PostcopyReceiver) -> None:
        await self._resumed.wait()
        await self._urgent.take_pages(receiver, self._decoder, self._interrupted)

    def _interrupted(self, why: str) -> None:
        self._why = why
        if self._scope is not None:
            self._scope.cancel(why)

    async def _take_pages(self, receiver: PostcopyReceiver) -> None:
        decoder, channel = self._decoder, self._channel
        if not self._urgent.wanted:
            channel.keep_backlog_short()
        handled = 0
        while True:
            while (event := decoder.next_event()) is not None:
                handled += 1
                if handled % _SLICE_EVENTS == 0:
                    await trio.lowlevel.checkpoint()
                if not self._resumed.is_set() and not isinstance(event, ev.CommandElement):
                    raise RemoteProtocolError(
                        f"{type(event).__name__} in a recovery, before RESUME", offset=event.at, section="postcopy"
                    )
                match event:
                    case ev.PageRun():
                        self._reception.settle()
                        if self._urgent.wanted:
                            await receiver.pages_in_turns(event)
                        else:  # what is asked for is behind this
                            receiver.pages(event)
                    case ev.ZeroRun():
                        receiver.zeros(event)
                    case ev.CommandElement():
                        await self._command(event, receiver)
                    case ev.EndOfStream():
                        await self._urgent.wait_last(receiver)
                        if receiver.missing:
                            raise RemoteProtocolError(
                                f"the source ends, and {receiver.missing} pages are missing", offset=event.at
                            )
                        return
                    case ev.SectionHeader(kind=Section.END):
                        await self._proved()  # it is sent by a source that has read the answer, and by no other
                    case ev.SectionHeader(kind=Section.PART) | ev.SectionFooter() | ev.RamEnd():
                        pass
                    case _:
                        raise RemoteProtocolError(f"{type(event).__name__} in postcopy", offset=event.at)
            count = await channel.receive_into(decoder.writable(), stall_timeout=self._patience())
            if count:
                decoder.received(count)
            else:
                decoder.receive_eof()
                if decoder.next_event() is None:
                    raise TransportFailed("the connection ended before the guest's memory was complete")

    def _patience(self) -> float | None:
        """Seconds that the source may be silent; None for the usual ones."""
        if self._resumed.is_set():
            return None
        config = self._config  # a source that is a trimig gives the handshake up after handover_timeout
        shared = max(_ASKING_SECONDS, config.recovery_timeout / 4)
        return min(config.stall_timeout, config.handover_timeout, shared)

    async def _command(self, event: ev.CommandElement, receiver: PostcopyReceiver) -> None:
        place = Place.FOLLOWING if self._resumed.is_set() else Place.RECOVERING
        check_place(event.number, place, event.at, "postcopy")
        if is_mark(event.number):
            await self._mark(Mark(event.number), event)
            return
        match event.number:
            case Command.PING:
                await self._say(Pong(value=int.from_bytes(event.payload)))
                if int.from_bytes(event.payload) == PING_MARK:
                    await self._say(Pong(value=PONG_MARK))
                    self._decoder.marks = True
            case Command.SWITCHOVER_START:
                pass  # announces the switch, which has been
            case Command.RECV_BITMAP:
                await self._check_attempt(event)
                answer = bitmap_of(event, receiver.received)
                await self._proved()  # a source that has taken its guest back does not come again
                await self._say(answer)
            case Command.POSTCOPY_RESUME:
                await self._urgent.wait()
                await self._proved()
                self._counters.error = None
                if receiver.missing < self._least:
                    self._least = receiver.missing
                    self._search.gained()
                self._monitor.advance(Status.POSTCOPY_ACTIVE)
                self._resumed.set()
                if self._scope is not None:
                    self._scope.deadline = math.inf
                await self._say(ResumeAck())
                await receiver.ask_again()

    async def _mark(self, mark: Mark, event: ev.CommandElement) -> None:
        match mark:
            case Mark.REASON:
                raise TransportFailed(f"the source ended the connection: {shown_reason(event.payload)}")
            case Mark.CLOCK:
                await self._say(Clock(microseconds=round(trio.current_time() * 1e6)))
            case Mark.ATTEMPT:
                self._named = event.payload

    async def _check_attempt(self, event: ev.CommandElement) -> None:
        """Memory of another guest must not come into this one: a source that is a trimig has named its attempt."""
        expected = self._arrival.attempt
        if self._named == expected:
            if expected is None and not self._told_unnamed:
                self._told_unnamed = True
                self._monitor.warn(
                    "the source names no attempt (a QEMU has none to name), so its RAM blocks are all that tells whether it "
                    "is the source of this guest"
                )
            return
        refusal = wrong_attempt(self._named, event.at)
        if self._decoder.marks:
            message = encode(Reason(payload=reason_bytes(str(refusal))))
            async with self._sending:
                self._connected = False
                await closing.farewell(self._channel, message, self._config.teardown_grace)
        raise refusal

    async def _say(self, message: Message) -> None:
        await self._say_bytes(encode(message))

    async def _say_bytes(self, data: bytes) -> None:
        """Tell the source, if there is one at present. What is asked for is asked again on the next connection."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if not self._connected or not self._arrival.return_path:
                return
            # Mostly the kernel takes it at once, and the guest waits for what is asked for here.
            if rest := data[self._channel.send_now(data) :]:
                await self._channel.send(rest)
        except TrimigError as error:
            self._connected = False
            self._interrupted(str(error))
        finally:
            self._sending.release()

    # -- without one -----------------------------------------------------------------------------------------------

    async def _lost(self, why: str) -> None:
        self._connected = False
        if self._receiver is not None:
            self._receiver.hold()
        await self._arrival.channels.close()
        await self._urgent.close()
        self._counters.error = why
        self._search.paused(why)
        if not self._doubt:
            self._monitor.advance(Status.POSTCOPY_PAUSED)
        elif self._monitor.status is not Status.POSTCOPY_UNCERTAIN:
            self._arrival.stopped = self._guest.run_state == "running" and not isinstance(self._guest, OpaqueGuest)
            await self._stop_guest(self._config.teardown_grace)
            self._monitor.advance(Status.POSTCOPY_UNCERTAIN)

    async def _stop_guest(self, grace: float) -> None:
        """It stands still from here on, unless it cannot be stopped: then that is a warning.

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
        """The source has shown that it knows the guest to be here: the source does not run it. GuestFailed."""
        if not self._doubt:
            return
        self._doubt = False
        if self._monitor.status is Status.POSTCOPY_UNCERTAIN:
            self._monitor.advance(Status.POSTCOPY_RECOVER)
        if self._arrival.stopped:
            self._arrival.stopped = False
            failure = await guest_calls.bring_back("resumed", self._guest.resume, self._config.handover_timeout)
            if failure is not None and self._guest.run_state != "running":
                raise failure
            self._monitor.emit("RESUME")

    async def _recover(self, receiver: PostcopyReceiver) -> bool:
        """Wait for another connection; what it says is read by :meth:`_read`.

        Returns:
            False if none came and none is needed: the guest has all of its memory, and only the source does not know it.

        Raises:
            PostcopyLost: none came, and pages are missing.
        """
        if receiver.missing or self._doubt:
            lift_shield(self._nursery)
            stream = await self._search.connection()
            shield(self._nursery, math.inf)
        else:
            if not self._finished:
                assert self._package is not None
                await self._finish(self._package)
                self._search.shorten(self._config.handover_timeout if self._search.tries else 0.0)
            try:
                stream = await self._search.connection()
            except PostcopyLost:
                return False
        await self._take_up(stream)
        return True

    def _reopen(self) -> Reopen | None:
        """What waits for another connection of this source; None where none can come."""
        judge = judge_again([block.name for block in self._guest.ram])
        return functools.partial(self._reception.again, judge=judge) if self._reception.can_come_again else None

    async def _take_up(self, stream: AnyStream) -> None:
        self._monitor.listening()
        async with self._sending:
            self._channel = self._arrival.channel = self._reception.channel(stream)
            self._arrival.channels.add(ChannelKind.MAIN, self._channel)
            self._connected = self._channel.sends
        self._decoder = Decoder(
            measure=None,
            footers=self._config.peer.send_section_footer,
            description=False,
            max_device_bytes=self._config.max_device_bytes,
            continues=self._decoder,
        )
        self._urgent.expect()
        self._resumed = trio.Event()
        self._named = None
        if self._monitor.status is not Status.POSTCOPY_UNCERTAIN:
            self._monitor.advance(Status.POSTCOPY_RECOVER)

    @property
    def whole(self) -> bool:
        """Every page has come."""
        return self._receiver is not None and not self._receiver.missing

    def missing(self) -> dict[str, Runs]:
        """What has not come, by block."""
        return dict(self._receiver.missing_runs()) if self._receiver is not None else {}

    async def end(self) -> None:
        """The end of an attempt that did not succeed: the guest stands still before its missing pages read as zero.

        One that is only kept is given its devices: with what has come of its memory they can be saved.

        **Cancellation:** held off, for at most ``teardown_grace``.
        """
        receiver = self._receiver
        if receiver is None or receiver.closed:
            return
        try:
            if isinstance(self._guest, OpaqueGuest) and self._package is not None and self._lives.is_set():
                keeping = functools.partial(self._guest.load_opaque, self._package.sections, None)
                failure = await guest_calls.bring_back("given its devices", keeping, self._config.teardown_grace)
                if failure is not None:
                    self._monitor.warn(str(failure))
            await self._stop_guest(self._config.teardown_grace)
        finally:
            receiver.close()
