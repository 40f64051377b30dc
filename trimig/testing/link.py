"""A network connection that exists only in this process, with limits and faults, on trio's clock.

``trio.testing.memory_stream_pair`` never blocks a sender and cannot break on both sides at once, so no back-pressure
bug and no cut shows on it. Here each direction has a bounded window, a rate, a latency and random chunk sizes, and a
:class:`Fault` may strike after any byte. There is no task behind it: delivery times are computed from
``trio.current_time()`` when somebody asks, so a link works on :class:`trio.testing.MockClock` and costs nothing idle.

What passes is never reordered, lost in the middle or altered; TCP does not do that either. "Lossy" means late or cut.

How an end sees the other going away:

* after ``send_eof`` it reads what was sent, then ``b""``; it can go on sending;
* after ``aclose`` it reads the same, and its sends raise :exc:`trio.BrokenResourceError`;
* after ``aclose`` with unread bytes and ``reset_on_unread``, both raise :exc:`trio.BrokenResourceError` at once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
import random
from collections.abc import Sequence
from typing import Final, Literal, final, get_args

import trio

Direction = Literal["a->b", "b->a"]
FaultKind = Literal["eof", "reset", "half-close", "blackhole", "silence", "stall"]

DIRECTIONS: Final[tuple[Direction, ...]] = get_args(Direction)
FAULT_KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)

#: What ``receive_some()`` returns at most when the caller names no size.
_DEFAULT_RECEIVE = 65536
#: On a link with a rate, bytes arrive in pieces of this size, as packets do, and not when a whole send is through.
_PACKET = 4096


def opposite(direction: Direction) -> Direction:
    """The other direction."""
    return "b->a" if direction == "a->b" else "a->b"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One event that strikes when exactly *after* bytes have been sent in *direction*; they are still delivered.

    ``after=0`` strikes before the first byte. The kinds, seen from the sender S and the receiver R of that direction:

    * ``"eof"``: something between the two closed both connections. R reads the bytes, then ``b""``; so does S with
      what R had sent before. Every further send raises :exc:`trio.BrokenResourceError`.
    * ``"reset"``: R reads the bytes, then :exc:`trio.BrokenResourceError`; S gets that at once, and what R had sent and
      S had not read is lost.
    * ``"half-close"``: R reads the bytes, then ``b""``; S cannot send any more. The way back is whole.
    * ``"blackhole"``: nothing passes any more, either way, not even the news of a close. Sends succeed until the
      window is full, then block; reads block.
    * ``"silence"``: the same in this direction only.
    * ``"stall"``: what is sent later in this direction arrives *seconds* later.
    """

    direction: Direction
    after: int
    kind: FaultKind
    #: Only for ``"stall"``: virtual seconds.
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, not {self.direction!r}")
        if self.kind not in FAULT_KINDS:
            raise ValueError(f"kind must be one of {FAULT_KINDS}, not {self.kind!r}")
        if self.after < 0 or self.seconds < 0:
            raise ValueError("a fault cannot strike before byte 0 or last a negative time")
        if (self.kind == "stall") != (self.seconds > 0):
            raise ValueError("'stall' needs seconds > 0, and no other kind takes them")


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """One piece of data that a sender handed to the link."""

    time: float
    direction: Direction
    n: int


class _InUse:
    """Turns two tasks in the same call into an error instead of a mix."""

    __slots__ = ("_busy", "_message")

    def __init__(self, message: str) -> None:
        self._busy = False
        self._message = message

    def __enter__(self) -> None:
        if self._busy:
            raise trio.BusyResourceError(self._message)
        self._busy = True

    def __exit__(self, *exc_info: object) -> None:
        self._busy = False


class _Pipe:
    """One direction: what is on its way, and how it ends. Everything that changes state is synchronous."""

    def __init__(
        self,
        link: VirtualLink,
        direction: Direction,
        *,
        window: int,
        rate: float,
        latency: float,
        chunk: tuple[int, int] | None,
        seed: int,
        record: bool,
    ) -> None:
        self.link = link
        self.direction: Direction = direction
        self.window = window
        self.rate = rate
        self.latency = latency
        self.chunk = chunk
        self.random = random.Random(f"{seed} {direction}")
        self.faults: list[Fault] = []
        self.queue: collections.deque[tuple[float, memoryview]] = collections.deque()
        self.queued = 0  # bytes that occupy the window, swallowed ones included
        self.sent = 0
        self.delivered = 0
        self.dropped = 0
        self.record: bytearray | None = bytearray() if record else None
        self.free_at = -math.inf  # when the last bit accepted so far has left the sender
        self.eof_at: float | None = None  # the receiver reads b"" from then on, once the queue is empty
        self.send_broken = False
        self.receive_broken = False  # raised once the queue is empty
        self.silent = False
        self.dead_at = math.inf  # the receiver's kernel has found out by then that nothing comes any more
        self.senders = trio.lowlevel.ParkingLot()
        self.receivers = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        self.senders.unpark_all()
        self.receivers.unpark_all()

    @property
    def room(self) -> int:
        return self.window - self.queued

    def accept(self, data: memoryview) -> int:
        """Take as many bytes as the window, and the next fault, allow; strike the fault that this reaches."""
        n = min(len(data), self.room)
        for fault in self.faults:
            n = min(n, fault.after - self.sent)
        if n == 0:  # the window is full
            return 0
        now = trio.current_time()
        self.sent += n
        self.queued += n
        self.link.log.append(Transfer(now, self.direction, n))
        if self.record is not None:
            self.record += data[:n]
        if self.silent:
            self.dropped += n
        else:
            self._enqueue(memoryview(bytes(data[:n])), now)
            self.receivers.unpark_all()
        self.link.strike_due()
        return n

    def _enqueue(self, data: memoryview, now: float) -> None:
        start = max(now, self.free_at)
        if self.rate == math.inf:
            self.queue.append((start + self.latency, data))
            self.free_at = start
            return
        for offset in range(0, len(data), _PACKET):
            packet = data[offset : offset + _PACKET]
            start += len(packet) / self.rate
            self.queue.append((start + self.latency, packet))
        self.free_at = start

    def take(self, max_bytes: int) -> bytes | None:
        """What the receiver gets now, or None if it must wait.

        Raises:
            trio.BrokenResourceError: reset, and nothing left to read.
        """
        now = trio.current_time()
        limit = max_bytes
        if self.chunk is not None and self.queue and self.queue[0][0] <= now:
            limit = min(limit, self.random.randint(*self.chunk))
        parts: list[memoryview] = []
        n = 0
        while self.queue and n < limit and self.queue[0][0] <= now:
            due, data = self.queue.popleft()
            part, rest = data[: limit - n], data[limit - n :]
            if rest:
                self.queue.appendleft((due, rest))
            parts.append(part)
            n += len(part)
        if n:
            self.queued -= n
            self.delivered += n
            self.senders.unpark_all()
            return b"".join(parts)
        if not self.queue:
            if self.dead_at <= now:
                raise trio.BrokenResourceError("virtual link: the other end does not answer any more")
            if self.receive_broken:
                raise trio.BrokenResourceError("virtual link: connection reset")
            if self.eof_at is not None and self.eof_at <= now:
                return b""
        return None

    def next_change(self) -> float:
        """When something becomes readable without anybody doing anything; infinity if nothing does."""
        if self.queue:
            return self.queue[0][0]
        return self.dead_at if self.eof_at is None else min(self.eof_at, self.dead_at)

    def end(self) -> None:
        """No more bytes: the receiver reads end of file behind what is on its way, unless the news is swallowed."""
        if self.eof_at is None and not self.silent:
            self.eof_at = max(trio.current_time(), self.free_at) + self.latency
        self.wake()

    def reset(self, *, lose: bool) -> None:
        self.send_broken = self.receive_broken = True
        if lose:
            self.lose(after=-math.inf)
        self.wake()

    def silence(self, *, lose: bool) -> None:
        """Swallow everything from now on; with *lose*, also what is on its way and has not arrived yet."""
        self.silent = True
        if lose:
            self.lose(after=trio.current_time())
        self.wake()

    def lose(self, *, after: float) -> None:
        kept = [(due, data) for due, data in self.queue if due <= after]
        self.dropped += sum(len(data) for _, data in self.queue) - sum(len(data) for _, data in kept)
        self.queue = collections.deque(kept)


@final
class VirtualStream(trio.abc.HalfCloseableStream):
    """One end of a :class:`VirtualLink`. Made by the link only."""

    def __init__(self, link: VirtualLink, name: str, outgoing: _Pipe, incoming: _Pipe) -> None:
        self.link = link
        #: ``"a"`` or ``"b"``.
        self.name = name
        self._out = outgoing
        self._in = incoming
        self._closed = False
        self._eof_sent = False
        self._sending = _InUse("another task is sending on this end")
        self._receiving = _InUse("another task is receiving on this end")

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
            while rest:  # a fault behind the very last byte is the next call's news, as it would be on a socket
                self._check_sendable()
                n = self._out.accept(rest)
                rest = rest[n:]
                if n == 0:
                    await self._out.senders.park()
            await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait for room in the window; errors as for :meth:`send_all`.

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
        """No more bytes from this end; the way back stays open. Harmless when repeated.

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
        """What has arrived, at most *max_bytes* and at most a random chunk; ``b""`` at the end.

        Raises:
            trio.BrokenResourceError: the connection was reset.
            trio.ClosedResourceError: this end was closed, perhaps while waiting.
            trio.BusyResourceError: another task is receiving here.

        **Cancellation:** nothing was taken.
        """
        limit = _DEFAULT_RECEIVE if max_bytes is None else operator.index(max_bytes)
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
        """Close at once, without a checkpoint. What was sent is still delivered. Idempotent."""
        if self._closed:
            return
        self._closed = True
        unread = bool(self._in.queue)
        if unread and self.link.reset_on_unread and not self._out.silent:
            self._out.reset(lose=True)
        else:
            self._out.end()
        # A sender learns of the close unless the way of that news is swallowed.
        if not self._out.silent:
            self._in.send_broken = True
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
        reset_on_unread: an end that is closed with unread bytes resets the connection, which also destroys what it
            sent and the other has not read yet. TCP does this, and it has eaten many a last error message.
        record: keep all bytes sent (:meth:`recorded`).
        keepalive: seconds after a blackhole, or silence, in which whoever hears nothing finds that out, as TCP does.

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
        self._pipes: dict[Direction, _Pipe] = {
            direction: _Pipe(
                self, direction, window=window, rate=rate, latency=latency, chunk=chunk, seed=seed, record=record
            )
            for direction in DIRECTIONS
        }
        there, back = self._pipes["a->b"], self._pipes["b->a"]
        self.a = VirtualStream(self, "a", there, back)
        self.b = VirtualStream(self, "b", back, there)
        for fault in faults:
            self.add_fault(fault)

    def sent(self, direction: Direction) -> int:
        """Bytes that senders have handed over."""
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
        """Let those faults strike whose byte is reached; the ends call it, nobody else needs to."""
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
                    each.send_broken = True
                    each.end()
            case "reset":
                pipe.reset(lose=False)
                back.reset(lose=True)
            case "half-close":
                pipe.send_broken = True
                pipe.end()
            case "blackhole":
                pipe.silence(lose=False)
                back.silence(lose=True)
                for each in (pipe, back):
                    each.dead_at = trio.current_time() + self._keepalive
                    each.wake()
            case "silence":
                pipe.silence(lose=False)
                pipe.dead_at = trio.current_time() + self._keepalive  # its receiver's probes are not answered either
                pipe.wake()
            case "stall":
                pipe.free_at = max(pipe.free_at, trio.current_time()) + fault.seconds


def virtual_link(*, seed: int = 0, window: int = 65536) -> tuple[VirtualStream, VirtualStream]:
    """The two ends of a plain :class:`VirtualLink`, where its counters and faults are not needed."""
    link = VirtualLink(seed=seed, window=window)
    return link.a, link.b
