"""A network connection that exists only in this process, with limits and faults, on trio's clock.

``trio.testing.memory_stream_pair`` never blocks a sender and cannot break on both sides at once, so it shows no
back-pressure bug and no cut. Here each direction has a bounded window, a rate, a latency and random chunk sizes, and a
:class:`Fault` may strike after any byte. There is no background task: each call computes delivery times from
``trio.current_time()``, so a link works on :class:`trio.testing.MockClock` and costs nothing while idle.

Bytes are never reordered, lost in the middle or altered; TCP does not do that either. "Lossy" means late or cut.

How an end sees that the other end goes away:

* after ``send_eof`` it reads what was sent, then ``b""``; it can go on sending;
* after ``aclose`` it reads the same, and its sends raise :exc:`trio.BrokenResourceError`;
* after ``aclose`` with unread bytes and ``reset_on_unread``, both raise :exc:`trio.BrokenResourceError` at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import final

import trio

from .pipe import DEFAULT_RECEIVE, DIRECTIONS, Direction, Fault, FaultKind, InUse, Pipe, Transfer, opposite


@final
class VirtualStream(trio.abc.HalfCloseableStream):
    """One end of a :class:`VirtualLink`. Made by the link only."""

    def __init__(self, link: VirtualLink, name: str, outgoing: Pipe, incoming: Pipe) -> None:
        #: The link of this end.
        self.link = link
        #: ``"a"`` or ``"b"``.
        self.name = name
        self._out = outgoing
        self._in = incoming
        self._closed = False
        self._eof_sent = False
        self._sending = InUse("another task is sending on this end")
        self._receiving = InUse("another task is receiving on this end")

    def __repr__(self) -> str:
        return f"<VirtualStream {self.name}{' closed' if self._closed else ''}>"

    @property
    def closed(self) -> bool:
        """This end was closed by its owner."""
        return self._closed

    def _check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this end of the virtual link was closed")
        if self._eof_sent:
            raise trio.ClosedResourceError("send_eof was called on this end of the virtual link")
        self.link.strike_due()
        if self._out.send_broken:
            raise trio.BrokenResourceError("virtual link: the connection is broken, or the other end closed it")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Hand over all of *data*; blocks while the window is full.

        Raises:
            trio.BrokenResourceError: the other end is closed, or a fault struck; part of *data* may have been sent.
            trio.ClosedResourceError: this end was closed, or ``send_eof`` was called.
            trio.BusyResourceError: another task is sending here.

        **Cancellation:** any part of *data* may have been sent, all of it included: there is a checkpoint before the
        first byte and another one behind the last, as a real socket may be interrupted there too.
        """
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            rest = memoryview(data).cast("B")
            while rest:  # a fault behind the very last byte fails the next call, as on a socket
                self._check_sendable()
                n = self._out.accept(rest)
                rest = rest[n:]
                if n == 0:
                    await self._out.senders.park()
            await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait for room in the window; raises the errors of :meth:`send_all`.

        **Cancellation:** has no effect.
        """
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            while True:
                self._check_sendable()
                if self._out.room > 0:
                    return
                await self._out.senders.park()

    async def send_eof(self) -> None:
        """Send no more bytes from this end; the other direction stays open. Idempotent.

        **Cancellation:** nothing was done.
        """
        with self._sending:
            if not self._eof_sent:
                self._check_sendable()
            await trio.lowlevel.checkpoint()
            if not self._eof_sent:
                self._check_sendable()
                self._eof_sent = True
                self._out.end()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The received bytes, at most *max_bytes* and at most a random chunk; ``b""`` at the end.

        Raises:
            trio.BrokenResourceError: the connection was reset.
            trio.ClosedResourceError: this end was closed, perhaps while waiting.
            trio.BusyResourceError: another task is receiving here.

        **Cancellation:** nothing was taken.
        """
        limit = DEFAULT_RECEIVE if max_bytes is None else operator.index(max_bytes)
        if limit < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            self._check_open()
            await trio.lowlevel.checkpoint()
            while True:
                self._check_open()
                self.link.strike_due()
                data = self._in.take(limit)
                if data is not None:
                    return data
                arrival = self._in.next_change()
                if arrival == math.inf:  # the usual case; a scope for nothing would cost as much as the rest
                    await self._in.receivers.park()
                else:
                    with trio.move_on_at(arrival):
                        await self._in.receivers.park()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this end of the virtual link was closed")

    def close(self) -> None:
        """Close at once, without a checkpoint. The bytes sent so far are still delivered. Idempotent."""
        if self._closed:
            return
        self._closed = True
        unread = bool(self._in.queue)
        if unread and self.link.reset_on_unread and not self._out.silent:
            self._out.reset(lose=True)
        else:
            self._out.end()
        # A sender learns of the close unless a fault swallows everything in that direction.
        if not self._out.silent:
            self._in.refuse_sends()
        self._in.queue.clear()
        self._in.wake()

    async def aclose(self) -> None:
        """Close; always succeeds.

        **Cancellation:** the end is closed nevertheless.
        """
        self.close()
        await trio.lowlevel.checkpoint()


@final
class VirtualLink:
    """A connection with two ends, :attr:`a` and :attr:`b`.

    Args:
        seed: for the chunk sizes only.
        window: bytes that may be on their way in each direction before a sender blocks.
        rate: bytes per second in each direction.
        latency: seconds from the sender to the receiver.
        chunk: smallest and largest amount that ``receive_some`` hands out, drawn anew for each call; None hands out
            all that has arrived.
        faults: at most a few; each strikes once.
        reset_on_unread: closing an end with unread bytes resets the connection, which also destroys bytes that this end
            sent and the other has not read yet. TCP does this, and so loses many a last error message.
        record: keep all bytes sent (:meth:`recorded`).
        keepalive: seconds after a blackhole or silence until a waiting receiver finds that out, as with TCP.

    With *rate* or *latency* in use, ends must be used inside :func:`trio.run`.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        window: int = 65536,
        rate: float = math.inf,
        latency: float = 0.0,
        chunk: tuple[int, int] | None = None,
        faults: Sequence[Fault] = (),
        reset_on_unread: bool = False,
        record: bool = False,
        keepalive: float = math.inf,
    ) -> None:
        if window < 1 or rate <= 0 or latency < 0:
            raise ValueError("a link needs a window of at least one byte, a rate above 0 and a latency of at least 0")
        if chunk is not None and not 1 <= chunk[0] <= chunk[1]:
            raise ValueError("chunk is (smallest, largest), both at least 1")
        #: Every piece handed to the link, in order.
        self.log: list[Transfer] = []
        #: Faults that have struck, in order.
        self.struck: list[Fault] = []
        self.reset_on_unread = reset_on_unread
        self._keepalive = keepalive
        self._pipes: dict[Direction, Pipe] = {
            direction: Pipe(
                self, direction, window=window, rate=rate, latency=latency, chunk=chunk, seed=seed, record=record
            )
            for direction in DIRECTIONS
        }
        there, back = self._pipes["a->b"], self._pipes["b->a"]
        #: One end.
        self.a = VirtualStream(self, "a", there, back)
        #: The other end.
        self.b = VirtualStream(self, "b", back, there)
        for fault in faults:
            self.add_fault(fault)

    def sent(self, direction: Direction) -> int:
        """Bytes that senders have handed to the link."""
        return self._pipes[direction].sent

    def delivered(self, direction: Direction) -> int:
        """Bytes that receivers have read."""
        return self._pipes[direction].delivered

    def dropped(self, direction: Direction) -> int:
        """Bytes that a fault swallowed."""
        return self._pipes[direction].dropped

    def recorded(self, direction: Direction) -> bytes:
        """All bytes sent. ValueError without ``record=True``."""
        record = self._pipes[direction].record
        if record is None:
            raise ValueError("this link was made without record=True")
        return bytes(record)

    @property
    def closed(self) -> bool:
        """Both ends were closed by their owners."""
        return self.a.closed and self.b.closed

    def add_fault(self, fault: Fault) -> None:
        """Let *fault* strike when its byte is reached; ValueError if that byte has passed already."""
        pipe = self._pipes[fault.direction]
        if fault.after < pipe.sent:
            raise ValueError(f"{pipe.sent} bytes have passed already")
        pipe.faults.append(fault)

    def inject(self, kind: FaultKind, direction: Direction = "a->b", *, seconds: float = 0.0) -> None:
        """Let a fault strike now. Call it inside the run."""
        self._strike(Fault(direction=direction, after=self._pipes[direction].sent, kind=kind, seconds=seconds))

    def strike_due(self) -> None:
        """Let those faults strike whose byte is reached; only the ends need to call this."""
        for pipe in self._pipes.values():
            if pipe.faults:
                due = [fault for fault in pipe.faults if fault.after <= pipe.sent]
                for fault in due:
                    pipe.faults.remove(fault)
                    self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        self.struck.append(fault)
        pipe, back = self._pipes[fault.direction], self._pipes[opposite(fault.direction)]
        match fault.kind:
            case "eof":
                for each in (pipe, back):
                    each.refuse_sends()
                    each.end()
            case "reset":
                pipe.reset(lose=False)
                back.reset(lose=True)
            case "half-close":
                pipe.refuse_sends()
                pipe.end()
            case "blackhole":
                pipe.silence(lose=False)
                back.silence(lose=True)
                for each in (pipe, back):
                    each.die(after=self._keepalive)
            case "silence":
                pipe.silence(lose=False)
                pipe.die(after=self._keepalive)  # the receiver's probes get no answer
            case "stall":
                pipe.stall(fault.seconds)


def virtual_link(*, seed: int = 0, window: int = 65536) -> tuple[VirtualStream, VirtualStream]:
    """The two ends of a plain :class:`VirtualLink`, for tests without counters and faults."""
    link = VirtualLink(seed=seed, window=window)
    return link.a, link.b
