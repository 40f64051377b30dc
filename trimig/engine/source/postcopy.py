"""The source behind the switch to postcopy: the guest has gone, its memory follows, over as many connections as it takes.

The decision is the last byte of the package. Until the destination answers the PING inside of it, the owner
of the guest is not certain; from then on it is the destination's, whatever happens to the connection. A lost connection
pauses the migration on both sides, and the destination's bitmaps tell a later one what is missing.

The caller's cancellation is held off while a connection is there: it would take the guest's memory away from it. It
strikes where the migration is paused (gaps G7 and G8).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from ... import formats
from ...channel.channel import AnyStream, Channel
from ...channel.channels import ChannelKind
from ...channel.return_path import ReturnPathReader
from ...errors import Ownership, PostcopyLost, RemoteProtocolError, TransportFailed, TrimigError
from ...guest import PAGE_SIZE, PageBitmap, RamBlock
from ...policy.page_order import PageOrder
from ...status import ReturnPath, Status
from ...wire import encoder as wire
from ...wire.constants import Command
from ...wire.encoder import cstr
from ...wire.marks import PING_MARK, Mark
from ...wire.postcopy import runs_of
from ...wire.return_path import Message, PageRequest, Pong, ReceivedPages, ResumeAck, Shut
from ..order import PING_LOADED, PING_RUNS
from ..ram.postcopy_sender import PostcopySender
from ..ram.sender import RamSender
from ..recovery import Search
from ..shield import lift_shield, shield
from . import uncertain
from .answer import take_refusal

if TYPE_CHECKING:
    from ...channel.connections import Connections
    from ...channel.limiter import Limiter
    from .outgoing import Outgoing

#: PING values, QEMU's: behind the discards, behind the package.
PING_DISCARDED: Final = 2
PING_FOLLOWED: Final = 4


def at_least_one(unsent: list[PageBitmap]) -> list[PageBitmap]:
    """*unsent*, by block; where nothing is left to follow the guest, with one page that goes a second time.

    A QEMU that was told no DISCARD makes LISTEN the first one, and then refuses RUN: the guest would be lost.
    """
    if unsent and not any(bitmap.any() for bitmap in unsent):
        max(unsent, key=len)[-1:] = True
    return unsent


class PostcopySource:
    """The memory of a guest that has gone ahead.

    Args:
        out: the migration; its channel and reader are those of the first connection.
        nursery: of the attempt, shielded.
        unsent: by block.
        connections: makes others.
    """

    def __init__(
        self,
        out: Outgoing,
        nursery: trio.Nursery,
        records: RamSender,
        limiter: Limiter,
        blocks: Sequence[RamBlock],
        unsent: Sequence[PageBitmap],
        connections: Connections,
    ) -> None:
        assert out.channel is not None
        assert out.reader is not None
        self._out = out
        self._monitor = out.monitor
        self._config = out.config
        self._counters = out.counters
        self._nursery = nursery
        self._channel = out.channel
        self._reader = out.reader
        self._records = records
        self._limiter = limiter
        self._blocks = tuple(blocks)
        self._search = Search(self._monitor, self._config, connections.again, listens=False)
        self._scope: trio.CancelScope | None = None
        self._why: str | None = None
        self._all_sent = False
        self._once_sent = False  # over this connection or an earlier one
        self._release = False  # what was sent may have been given back to the host
        self._handshake = _Handshake(())  # the first connection begins without
        self._least = math.inf  # pages that the destination lacked at the last handshake
        self._news = trio.Event()
        self._sender = self._sender_of(PageOrder([bitmap.copy() for bitmap in unsent]))

    def _sender_of(self, order: PageOrder) -> PostcopySender:
        self._order = order
        preempt = self._out.preempt
        return PostcopySender(self._channel, self._records, self._limiter, self._blocks, order, self._counters, preempt)

    def begin(self) -> None:
        """Hear what is asked for: from the package on, the guest's first accesses come."""
        self._hear(ReturnPath.FOLLOWING)

    def _hear(self, state: ReturnPath) -> None:
        self._reader.state = state
        self._reader.listener = self._heard

    async def run(self) -> None:
        """Until the destination has said that it has everything.

        Raises:
            PeerFailed: it did not take the guest over; it is this side's.
            TransportFailed: the package cannot have arrived, or that is not known and the recovery was given up.
            PostcopyLost: it was given up.

        **Cancellation:** held off while there is a connection; then as for PostcopyLost.
        """
        while (why := await self._send()) is not None:
            await self._lost(why)
            if self._release and not self._once_sent:
                raise PostcopyLost(f"{why}; it cannot be recovered, because release-ram has given the sent memory back")
            await self._recover()
        c, out = self._counters, self._out
        out.answered = out.confirmed = True
        c.remaining = 0
        self._monitor.advance(Status.COMPLETED)

    # -- one connection ------------------------------------------------------------------------------------------------

    async def _send(self) -> str | None:
        """Send the rest; None if the destination has it all, otherwise why this connection is of no use any more."""
        config = self._config
        unanswered = self._monitor.status is Status.HANDOVER
        with self._connected(config.handover_timeout if unanswered else None) as scope:
            await self._sender.run()
            await self._records.end([])
            await self._channel.send(wire.end_of_stream())
            self._all_sent = True
            self._monitor.interrupt(None)  # nothing is left to be taken up again: only the last word is to come
            scope.deadline = trio.current_time() + config.handover_timeout
            await self._reader.wait_answer()
        match self._reader.shut:
            case None:
                pass
            case 0 if self._all_sent:
                return None
            case 0:
                return "the destination ended the migration before it had everything"
            case code:
                if (refusal := take_refusal(self._out)) is not None:
                    raise refusal
                return f"the destination reported an error (it sent SHUT {code}){self._reader.why}"
        return self._why or str(self._reader.lost or f"no answer came for {formats.duration(config.handover_timeout)}")

    @contextlib.contextmanager
    def _connected(self, seconds: float | None) -> Iterator[trio.CancelScope]:
        """What is done over the present connection; it ends when that is lost, or after *seconds*."""
        self._why, self._all_sent = None, False
        self._monitor.interrupt(self._interrupted)
        try:
            with trio.CancelScope() as self._scope:
                if seconds is not None:
                    self._scope.deadline = trio.current_time() + seconds
                if self._reader.lost is not None:
                    self._scope.cancel("the connection was lost")
                yield self._scope
        except (TransportFailed, RemoteProtocolError) as error:
            self._why = str(error)
        finally:
            self._monitor.interrupt(None)
            self._scope = None

    def _interrupted(self, why: str) -> None:
        self._why = why
        if self._scope is not None:
            self._scope.cancel(why)

    def _heard(self, message: Message | None) -> None:
        """Take what the destination says. RemoteProtocolError if it is not its time for that: then it is paused."""
        match message:
            case PageRequest():
                if self._reader.state is ReturnPath.RECOVERING:  # a fault that was read between the two connections
                    self._handshake.hold(message)
                else:
                    self._sender.request(message)
            case Pong(value=value) if value in (PING_LOADED, PING_RUNS):
                self._confirmed()
            case ReceivedPages(block=block, pages=pages):
                self._handshake.bitmap(block, pages)
                self._tell()
            case ResumeAck():
                self._tell()
            case Shut() | None:
                # Where everything was sent, the migration task sees for itself.
                if self._scope is not None and not self._all_sent:
                    self._scope.cancel("the connection has ended")

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _confirmed(self) -> None:
        """The destination has loaded the guest: it is its own, and what follows is only memory."""
        if self._monitor.status is Status.HANDOVER:
            if self._scope is not None and not self._all_sent:
                self._scope.deadline = math.inf
            self._release = self._sender.release = self._config.capabilities.release_ram
            self._monitor.advance(Status.POSTCOPY_ACTIVE)
            shield(self._nursery, math.inf)

    # -- without one ---------------------------------------------------------------------------------------------------

    async def _lost(self, why: str) -> None:
        """The connection is gone. The owner of the guest follows from how far it came."""
        monitor, out = self._monitor, self._out
        if self._reader.lost is None:
            self._reader.lost = TransportFailed(why)  # before it sees nothing but its own end closed
        self._search.paused(why)
        self._once_sent = self._once_sent or not self._order.remaining
        self._limiter.rest()
        await out.channels.close()
        self._counters.error = why
        if monitor.status is Status.HANDOVER:
            if out.commit_not_sent(self._channel):
                raise TransportFailed(f"{why}; the guest cannot have reached the destination")
            monitor.advance(Status.POSTCOPY_UNCERTAIN)
            await self._ask_fence(why)
        elif monitor.status is not Status.POSTCOPY_UNCERTAIN:
            monitor.advance(Status.POSTCOPY_PAUSED)

    async def _ask_fence(self, why: str) -> None:
        try:
            owner = await uncertain.ask_fence(self._out)
        except TrimigError as error:  # it knows no more than we do: a recovery may still answer the question
            self._monitor.warn(str(error))
            return
        if owner is Ownership.SOURCE:
            self._monitor.advance(Status.FAILED)
            raise TransportFailed(f"the answer was lost ({why}); the fence gave the guest back")
        if owner is Ownership.DESTINATION:
            self._monitor.advance(Status.POSTCOPY_PAUSED)

    async def _recover(self) -> None:
        """Over as many attempts as it takes, until a connection is there on which memory follows again."""
        lift_shield(self._nursery)
        while True:
            try:
                stream = await self._search.connection()
            except PostcopyLost as error:
                if self._monitor.status is Status.POSTCOPY_UNCERTAIN:
                    raise TransportFailed(str(error)) from None
                if self._once_sent:
                    raise PostcopyLost(
                        f"{error}; all memory had been sent, so the destination may be complete: look there"
                    ) from None
                raise
            shield(self._nursery, math.inf)
            if (why := await self._shake_hands(stream)) is None:
                return
            await self._lost(why)
            lift_shield(self._nursery)

    async def _shake_hands(self, stream: AnyStream) -> str | None:
        """Find out over a new connection what is missing; None if that is known now, otherwise what went wrong."""
        monitor, config, parameters = self._monitor, self._config, self._monitor.config.parameters
        if monitor.status is Status.POSTCOPY_PAUSED:
            monitor.advance(Status.POSTCOPY_RECOVER)
        channel = self._channel = self._out.channel = Channel(stream, stall_timeout=config.stall_timeout)
        self._out.channels.add(ChannelKind.MAIN, channel)
        reader = ReturnPathReader(channel, {b.name: b.length for b in self._blocks})
        self._reader = self._out.reader = reader
        handshake = self._handshake = _Handshake(self._blocks)
        self._hear(ReturnPath.RECOVERING)
        self._limiter.move_to(channel, parameters.max_postcopy_bandwidth)
        self._records = RamSender(channel, self._limiter, self._counters, footers=config.peer.send_section_footer)
        if not (channel.sends and channel.receives):
            reader.lost = TransportFailed("this transport has one direction only, and postcopy needs both")
            return str(reader.lost)
        self._nursery.start_soon(reader.run, name="trimig.return_path")
        seconds = min(config.handover_timeout, self._search.deadline - trio.current_time())
        with self._connected(seconds):
            if config.peer.preempt_pre_7_2:
                await self._out.open_preempt()
            if (attempt := self._out.attempt) is not None:
                await channel.send(wire.ping(PING_MARK) + wire.command(Mark.ATTEMPT, attempt))
            for block in self._blocks:
                reader.expect_bitmap(block.name)
                await channel.send(wire.command(Command.RECV_BITMAP, cstr(block.name)))
            while not handshake.complete:
                await self._news.wait()
            if not config.peer.preempt_pre_7_2:
                await self._out.open_preempt()
            unsent = [~handshake.bitmaps[block.name] for block in self._blocks]
            # A page may be asked for in the same moment as the answer comes.
            order = PageOrder(unsent)
            missing = order.remaining
            if self._release and missing:
                raise PostcopyLost(f"{missing} pages are missing there, and release-ram has given them back here")
            self._sender = self._sender_of(order)
            self._counters.remaining = missing * PAGE_SIZE
            reader.state = ReturnPath.RESUMING
            for request in handshake.held():
                self._sender.request(request)
            await channel.send(wire.command(Command.POSTCOPY_RESUME))
            while reader.state is ReturnPath.RESUMING:
                await self._news.wait()
        if reader.state is not ReturnPath.FOLLOWING or reader.lost is not None or reader.shut is not None:
            return self._why or str(reader.lost or self._no_handshake(seconds))
        if missing < self._least:
            self._least = missing
            self._search.gained()
        monitor.advance(Status.POSTCOPY_ACTIVE)
        self._counters.error = None
        return None

    def _no_handshake(self, seconds: float) -> str:
        if self._reader.shut is not None:
            return f"the destination ended the recovery (it sent SHUT {self._reader.shut}){self._reader.why}"
        return f"the handshake of the recovery took longer than {formats.duration(seconds)}"


class _Handshake:
    """What the destination has said on a recovery connection, and what it may say next.

    Args:
        blocks: whose bitmaps are asked for.
    """

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = {block.name: block.length // PAGE_SIZE for block in blocks}
        self._wanted: dict[str, PageBitmap] = {}
        self.bitmaps: dict[str, PageBitmap] = {}

    @property
    def complete(self) -> bool:
        """Every bitmap has come."""
        return len(self.bitmaps) == len(self._blocks)

    def hold(self, request: PageRequest) -> None:
        """A page is asked for before that: a QEMU does so where its guest meets it while the connection changes."""
        wanted = self._wanted.setdefault(request.block, np.zeros(self._blocks[request.block], np.bool_))
        wanted[request.start // PAGE_SIZE :][: request.length // PAGE_SIZE] = True

    def held(self) -> Iterator[PageRequest]:
        """What was asked for too early, each page once."""
        for block, wanted in self._wanted.items():
            for first, end in runs_of(wanted).tolist():
                yield PageRequest(block=block, start=first * PAGE_SIZE, length=(end - first) * PAGE_SIZE)

    def bitmap(self, block: str, pages: PageBitmap) -> None:
        """A bitmap of *block* has come. RemoteProtocolError if it was not asked for, or has come before."""
        if block not in self._blocks or block in self.bitmaps:
            raise RemoteProtocolError(
                f"a bitmap of the RAM block {block!r} that was not asked for, or comes a second time",
                section="return path",
            )
        self.bitmaps[block] = pages
