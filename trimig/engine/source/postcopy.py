"""The source after the switch to postcopy: it sends the guest's memory, over one connection after the other if need be.

The decision is the last byte of the package. Until the destination answers the PING inside the package, the owner of the
guest is not certain. After that answer the destination owns the guest, even if the connection is lost. A lost connection
pauses the migration on both sides. On the next connection the destination's bitmaps show which pages are missing.

The caller's cancellation is held off while there is a connection, because the guest needs the rest of its memory. It takes
effect while the migration is paused (gaps G7 and G8).
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

#: QEMU's PING values after the discards, and after the package.
PING_DISCARDED: Final = 2
PING_FOLLOWED: Final = 4


class PostcopySource:
    """Sends the memory of a guest that was handed over before it.

    Args:
        nursery: of the attempt, with the shield.
        ram: the section of the RAM, which has the bitmaps of unsent pages.
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
        self._once_sent = False  # every page was sent, over this connection or an earlier one
        self._release = False  # sent pages may have been given back to the host (release-ram)
        self._handshake = _Handshake(())  # only a recovery connection has a handshake
        self._least = math.inf  # pages that the destination lacked at the last handshake
        self._news = trio.Event()
        self._sender = self._sender_of(PageOrder([bitmap.copy() for bitmap in ram.unsent]))

    def _sender_of(self, order: PageOrder) -> PostcopySender:
        self._order = order
        link, ram = self._link, self._ram
        # With release-ram each page is given back behind its batch, by code of the guest's program: not in a thread.
        reader = None if self._config.capabilities.release_ram else link.reader
        return PostcopySender(
            link.channel, ram.sender, link.limiter, ram.blocks, order, self._counters, link.preempt, reader
        )

    def begin(self) -> None:
        """Begin to handle page requests: once the package has arrived, the guest's first accesses cause some."""
        self._hear(ReturnPath.FOLLOWING)

    def _hear(self, state: ReturnPath) -> None:
        self._link.reader.enter(state, self._heard)

    async def run(self) -> None:
        """Send the memory until the destination confirms that it has everything.

        Raises:
            PeerFailed: the destination did not take the guest over, so this side owns it.
            TransportFailed: the package cannot have arrived; or its arrival is not certain and the recovery was given up.
            PostcopyLost: the recovery was given up after the package had arrived.

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
        """Send the rest of the memory. None if the destination has everything, else why this connection has ended."""
        config, reader = self._config, self._link.reader
        unanswered = self._monitor.status is Status.HANDOVER
        with self._connected(config.handover_timeout if unanswered else None) as scope:
            await self._sender.run()
            await self._ram.sender.end([])
            await self._link.channel.send(wire.end_of_stream())
            self._all_sent = True
            self._monitor.interrupt(None)  # no pause any more: everything was sent, and only SHUT is missing
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
        """Run the block over the present connection. It ends when the connection is lost, or after *seconds*."""
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
        """Handle a message of the destination. RemoteProtocolError if it is not legal now; then the migration pauses."""
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
                # If everything was sent, the migration task waits for this message and needs no cancellation.
                if self._scope is not None and not self._all_sent:
                    self._scope.cancel("the connection has ended")

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _confirmed(self) -> None:
        """The destination has loaded the guest and owns it from now on: only memory follows."""
        if self._monitor.status is Status.HANDOVER:
            if self._scope is not None and not self._all_sent:
                self._scope.deadline = math.inf
            if self._config.capabilities.release_ram:
                self._release = True
                self._sender.release_sent()
            self._monitor.advance(Status.POSTCOPY_ACTIVE)
            shield(self._nursery, math.inf)

    # -- without one ---------------------------------------------------------------------------------------------------

    async def _lost(self, why: str) -> None:
        """Handle the loss of the connection. The bytes and answers so far decide which side owns the guest."""
        monitor, out = self._monitor, self._out
        # Before the channels are closed: otherwise the reader would report this side's own close as the reason.
        self._link.reader.lose(TransportFailed(why))
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
        except TrimigError as error:  # the fence failed, so the owner stays unknown; a recovery may still find it out
            self._monitor.warn(str(error))
            return
        if owner is Ownership.SOURCE:
            self._monitor.advance(Status.FAILED)
            raise TransportFailed(f"the answer was lost ({why}); the fence gave the guest back")
        if owner is Ownership.DESTINATION:
            self._monitor.advance(Status.POSTCOPY_PAUSED)

    async def _recover(self) -> None:
        """Open connections until the handshake of a recovery has succeeded on one of them."""
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
        """Ask over a new connection which pages are missing. None after the handshake, else the reason why it failed."""
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
            await link.open_beside(early=True)
            if attempt := self._out.attempt:
                await channel.send(wire.ping(PING_MARK) + wire.command(Mark.ATTEMPT, attempt))
            for block in blocks:
                reader.expect_bitmap(block.name)
                await channel.send(wire.command(Command.RECV_BITMAP, cstr(block.name)))
            while not handshake.complete:
                await self._news.wait()
            await link.open_beside()
            unsent = [~handshake.bitmaps[block.name] for block in blocks]
            # The order must be made before the state RESUMING: a request may come together with the answer to RESUME.
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
    """The bitmaps and the early page requests that the destination has sent on a recovery connection.

    Args:
        blocks: the RAM blocks whose bitmaps are requested.
    """

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = {block.name: block.length // PAGE_SIZE for block in blocks}
        self._wanted: dict[str, PageBitmap] = {}
        self.bitmaps: dict[str, PageBitmap] = {}

    @property
    def complete(self) -> bool:
        """True if the bitmap of every block has come."""
        return len(self.bitmaps) == len(self._blocks)

    def hold(self, request: PageRequest) -> None:
        """Keep a page request that came before the bitmaps. A QEMU sends one if its guest faults during the reconnection."""
        wanted = self._wanted.setdefault(request.block, np.zeros(self._blocks[request.block], np.bool_))
        wanted[request.start // PAGE_SIZE :][: request.length // PAGE_SIZE] = True

    def held(self) -> Iterator[PageRequest]:
        """The page requests that came before the bitmaps, with each page once."""
        for block, wanted in self._wanted.items():
            for first, end in runs_of(wanted).tolist():
                yield PageRequest(block=block, start=first * PAGE_SIZE, length=(end - first) * PAGE_SIZE)

    def bitmap(self, block: str, pages: PageBitmap) -> None:
        """Keep the bitmap of *block*. RemoteProtocolError if it was not requested, or has come before."""
        if block not in self._blocks or block in self.bitmaps:
            raise RemoteProtocolError(
                f"a bitmap of the RAM block {block!r} that was not asked for, or comes a second time",
                section="return path",
            )
        self.bitmaps[block] = pages
