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
from ...errors import Ownership, PostcopyLost, RemoteProtocolError, TransportFailed, TrimigError
from ...guest import PAGE_SIZE
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
from ..recovery import Search
from ..shield import lift_shield, shield
from . import uncertain
from .answer import complete_postcopy, take_refusal

if TYPE_CHECKING:
    from ...channel.channel import AnyStream
    from ...guest import PageBitmap, RamBlock
    from ..sections.ram import RamSection
    from .outgoing import Outgoing

#: PING values, QEMU's: behind the discards, behind the package.
PING_DISCARDED: Final = 2
PING_FOLLOWED: Final = 4


class PostcopySource:
    """The memory of a guest that has gone ahead.

    Args:
        nursery: of the attempt, shielded.
        ram: knows what has not been sent.
    """

    def __init__(self, out: Outgoing, nursery: trio.Nursery, ram: RamSection) -> None:
        self._out = out
        self._link = out.link
        self._monitor = out.monitor
        self._config = out.config
        self._counters = out.counters
        self._nursery = nursery
        self._ram = ram
        self._search = Search(self._monitor, self._config, out.link.ways.again, listens=False)
        self._scope: trio.CancelScope | None = None
        self._why: str | None = None
        self._all_sent = False
        self._once_sent = False  # over this connection or an earlier one
        self._release = False  # what was sent may have been given back to the host
        self._handshake = _Handshake(())  # the first connection begins without
        self._least = math.inf  # pages that the destination lacked at the last handshake
        self._news = trio.Event()
        self._sender = self._sender_of(PageOrder([bitmap.copy() for bitmap in ram.unsent]))

    def _sender_of(self, order: PageOrder) -> PostcopySender:
        self._order = order
        link, ram = self._link, self._ram
        return PostcopySender(link.channel, ram.sender, link.limiter, ram.blocks, order, self._counters, link.preempt)

    def begin(self) -> None:
        """Hear what is asked for: from the package on, the guest's first accesses come."""
        self._hear(ReturnPath.FOLLOWING)

    def _hear(self, state: ReturnPath) -> None:
        self._link.reader.enter(state, self._heard)

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
        complete_postcopy(self._out)

    # -- one connection ------------------------------------------------------------------------------------------------

    async def _send(self) -> str | None:
        """Send the rest; None if the destination has it all, otherwise why this connection is of no use any more."""
        config, reader = self._config, self._link.reader
        unanswered = self._monitor.status is Status.HANDOVER
        with self._connected(config.handover_timeout if unanswered else None) as scope:
            await self._sender.run()
            await self._ram.sender.end([])
            await self._link.channel.send(wire.end_of_stream())
            self._all_sent = True
            self._monitor.interrupt(None)  # nothing is left to be taken up again: only the last word is to come
            scope.deadline = trio.current_time() + config.handover_timeout
            await reader.wait_answer()
        match reader.shut:
            case None:
                pass
            case 0 if self._all_sent:
                return None
            case 0:
                return "the destination ended the migration before it had everything"
            case code:
                if (refusal := take_refusal(self._out)) is not None:
                    raise refusal
                return f"the destination reported an error (it sent SHUT {code}){reader.why}"
        return self._why or str(reader.lost or f"no answer came for {formats.duration(config.handover_timeout)}")

    @contextlib.contextmanager
    def _connected(self, seconds: float | None) -> Iterator[trio.CancelScope]:
        """What is done over the present connection; it ends when that is lost, or after *seconds*."""
        self._why, self._all_sent = None, False
        self._monitor.interrupt(self._interrupted)
        try:
            with trio.CancelScope() as self._scope:
                if seconds is not None:
                    self._scope.deadline = trio.current_time() + seconds
                if self._link.reader.lost is not None:
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
                if (
                    self._link.reader.state is ReturnPath.RECOVERING
                ):  # a fault that was read between the two connections
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
        self._link.reader.lose(TransportFailed(why))  # before it sees nothing but its own end closed
        self._search.paused(why)
        self._once_sent = self._once_sent or not self._order.remaining
        self._link.limiter.rest()
        await self._link.channels.close()
        self._counters.error = why
        if monitor.status is Status.HANDOVER:
            if out.commit_not_sent:
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
        monitor, config, link, blocks = self._monitor, self._config, self._link, self._ram.blocks
        if monitor.status is Status.POSTCOPY_PAUSED:
            monitor.advance(Status.POSTCOPY_RECOVER)
        link.replace(stream, self._out.rate)
        channel, reader = link.channel, link.reader
        handshake = self._handshake = _Handshake(blocks)
        self._hear(ReturnPath.RECOVERING)
        self._ram.move_to(channel)
        if not (channel.sends and channel.receives):
            reader.lose(TransportFailed("this transport has one direction only, and postcopy needs both"))
            return str(reader.lost)
        self._nursery.start_soon(reader.run, name="trimig.return_path")
        seconds = min(config.handover_timeout, self._search.deadline - trio.current_time())
        with self._connected(seconds):
            if config.peer.preempt_pre_7_2:
                await link.open_preempt()
            if attempt := self._out.attempt:
                await channel.send(wire.ping(PING_MARK) + wire.command(Mark.ATTEMPT, attempt))
            for block in blocks:
                reader.expect_bitmap(block.name)
                await channel.send(wire.command(Command.RECV_BITMAP, cstr(block.name)))
            while not handshake.complete:
                await self._news.wait()
            if not config.peer.preempt_pre_7_2:
                await link.open_preempt()
            unsent = [~handshake.bitmaps[block.name] for block in blocks]
            # A page may be asked for in the same moment as the answer comes.
            order = PageOrder(unsent)
            missing = order.remaining
            if self._release and missing:
                raise PostcopyLost(f"{missing} pages are missing there, and release-ram has given them back here")
            self._sender = self._sender_of(order)
            self._counters.remaining = missing * PAGE_SIZE
            reader.enter(ReturnPath.RESUMING, self._heard)
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
        reader = self._link.reader
        if reader.shut is not None:
            return f"the destination ended the recovery (it sent SHUT {reader.shut}){reader.why}"
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
