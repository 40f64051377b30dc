"""The source behind the switch to postcopy: the guest has gone, its memory follows, over as many connections as it takes.

The decision is the last byte of the package. Until the destination answers the PING inside of it nobody knows for
certain who has the guest; from then on it is the destination's, whatever happens to the connection. A lost connection
pauses the migration on both sides, and the destination's bitmaps tell a later one what is missing.

The caller's cancellation is held off while a connection is there: it would take the guest's memory away from it. It
strikes where the migration is paused (G7, G8).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import trio

from ..errors import Ownership, PostcopyLost, RemoteProtocolError, TransportFailed
from ..guest import PAGE_SIZE, PageBitmap, RamBlock
from ..policy.postcopy import PageOrder
from ..status import Status
from ..wire import Command
from ..wire import encoder as wire
from ..wire.encoder import cstr
from ..wire.return_path import Message, PageRequest, Pong, ReceivedPages, ResumeAck, Shut
from . import teardown
from .channel import AnyStream, Channel
from .connections import Connections
from .departure import Departure
from .handover import lift_shield, shield
from .limiter import Limiter
from .postcopy_out import PostcopySender
from .ram_out import RamSender
from .reader import ReturnPathReader
from .recovery import wait_for_connection

#: PING values, QEMU's: behind the discards, inside the package behind the devices, behind the package.
PING_DISCARDED: Final = 2
PING_LOADED: Final = 3
PING_FOLLOWED: Final = 4


class Following:
    """The memory of a guest that has gone ahead.

    Args:
        departure: whose end this is; its channel and reader are those of the first connection.
        nursery: of the attempt, shielded.
        unsent: by block.
        connections: makes others.
    """

    def __init__(
        self,
        departure: Departure,
        nursery: trio.Nursery,
        records: RamSender,
        limiter: Limiter,
        blocks: Sequence[RamBlock],
        unsent: Sequence[PageBitmap],
        connections: Connections,
    ) -> None:
        assert departure.channel is not None
        assert departure.reader is not None
        self._departure = departure
        self._monitor = departure.monitor
        self._config = departure.config
        self._counters = departure.counters
        self._nursery = nursery
        self._channel = departure.channel
        self._reader = departure.reader
        self._records = records
        self._limiter = limiter
        self._blocks = tuple(blocks)
        self._connections = connections
        self._scope: trio.CancelScope | None = None
        self._why: str | None = None
        self._all_sent = False
        self._once_sent = False  # over this connection or an earlier one
        self._bitmaps: dict[str, PageBitmap] = {}
        self._resumed = False
        self._news = trio.Event()
        self._sender = self._sender_of(PageOrder([bitmap.copy() for bitmap in unsent]))

    def _sender_of(self, order: PageOrder) -> PostcopySender:
        urgent = self._departure.urgent
        return PostcopySender(self._channel, self._records, self._limiter, self._blocks, order, self._counters, urgent)

    def begin(self) -> None:
        """Hear what is asked for: from the package on, the guest's first accesses come."""
        self._reader.decided = True
        self._reader.listener = self._heard

    async def run(self) -> None:
        """Until the destination has said that it has everything.

        Raises:
            PeerFailed: it did not take the guest over; it is this side's.
            TransportFailed: the package cannot have arrived, or nobody knows and it was given up.
            PostcopyLost: it was given up.

        **Cancellation:** held off while there is a connection; then as for PostcopyLost.
        """
        while (why := await self._send()) is not None:
            await self._lost(why)
            if self._sender.release:
                raise PostcopyLost(f"{why}; it cannot be recovered, because release-ram has given the sent memory back")
            await self._recover()
        c, departure = self._counters, self._departure
        departure.answered = departure.confirmed = True
        c.transferred = c.earlier + self._channel.sent
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
            self._all_sent = self._once_sent = True
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
                if (refusal := self._departure.take_refusal()) is not None:
                    raise refusal
                return f"the destination reported an error (it sent SHUT {code}); its own log says why"
        return self._why or str(self._reader.lost or f"no answer came for {config.handover_timeout:g} s")

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
        match message:
            case PageRequest():
                self._sender.request(message)
            case Pong(value=value) if value == PING_LOADED:
                self._confirmed()
            case ReceivedPages(block=block, pages=pages):
                self._bitmaps[block] = pages
                self._tell()
            case ResumeAck():
                self._resumed = True
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
            self._sender.release = self._config.capabilities.release_ram
            self._monitor.advance(Status.POSTCOPY_ACTIVE)
            shield(self._nursery, math.inf)

    # -- without one ---------------------------------------------------------------------------------------------------

    async def _lost(self, why: str) -> None:
        """The connection is gone. Who has the guest follows from how far it came."""
        monitor, departure = self._monitor, self._departure
        if self._reader.lost is None:
            self._reader.lost = TransportFailed(why)  # before it sees nothing but its own end closed
        self._limiter.rest()
        await teardown.close(self._channel.stream)
        await departure.close_urgent()
        self._counters.earlier += self._channel.sent
        self._counters.transferred = self._counters.earlier
        self._counters.error = why
        if monitor.status is Status.HANDOVER:
            if departure.nothing_left(self._channel):
                raise TransportFailed(f"{why}; the guest cannot have reached the destination")
            monitor.advance(Status.POSTCOPY_UNCERTAIN)
            await self._ask_fence(why)
        elif monitor.status is not Status.POSTCOPY_UNCERTAIN:
            monitor.advance(Status.POSTCOPY_PAUSED)

    async def _ask_fence(self, why: str) -> None:
        owner = await self._departure.fenced()
        if owner is Ownership.SOURCE:
            self._monitor.advance(Status.FAILED)
            raise TransportFailed(f"the answer was lost ({why}); the fence gave the guest back")
        if owner is Ownership.DESTINATION:
            self._monitor.advance(Status.POSTCOPY_PAUSED)

    async def _recover(self) -> None:
        """Over as many attempts as it takes, until a connection is there on which memory follows again."""
        lift_shield(self._nursery)
        connecting = functools.partial(wait_for_connection, self._monitor, self._config, self._connections.again)
        while True:
            try:
                stream = await connecting(trio.current_time())
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
        channel = self._channel = self._departure.channel = Channel(stream, stall_timeout=config.stall_timeout)
        reader = ReturnPathReader(channel, {b.name: b.length for b in self._blocks})
        self._reader = self._departure.reader = reader
        self._bitmaps, self._resumed = {}, False
        self.begin()
        self._limiter.move_to(channel, parameters.max_postcopy_bandwidth)
        self._records = RamSender(channel, self._limiter, self._counters, footers=config.peer.send_section_footer)
        if not (channel.sends and channel.receives):
            reader.lost = TransportFailed("this transport has one direction only, and postcopy needs both")
            return str(reader.lost)
        self._nursery.start_soon(reader.run, name="trimig.return_path")
        with self._connected(config.handover_timeout):
            if config.peer.preempt_pre_7_2:
                await self._departure.open_urgent()
            for block in self._blocks:
                reader.expect_bitmap(block.name)
                await channel.send(wire.command(Command.RECV_BITMAP, cstr(block.name)))
            while len(self._bitmaps) < len(self._blocks):
                await self._news.wait()
            if not config.peer.preempt_pre_7_2:
                await self._departure.open_urgent()
            unsent = [~self._bitmaps[block.name] for block in self._blocks]
            # A page may be asked for in the same moment as the answer comes.
            self._sender = self._sender_of(PageOrder(unsent))
            self._counters.remaining = sum(int(np.count_nonzero(bitmap)) for bitmap in unsent) * PAGE_SIZE
            await channel.send(wire.command(Command.POSTCOPY_RESUME))
            while not self._resumed:
                await self._news.wait()
        if not self._resumed or reader.lost is not None:
            return self._why or str(reader.lost or f"the handshake took longer than {config.handover_timeout:g} s")
        monitor.advance(Status.POSTCOPY_ACTIVE)
        self._counters.error = None
        return None
