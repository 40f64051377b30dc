"""One direction of a virtual link."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from typing import TYPE_CHECKING, Final, Literal, get_args

import trio

if TYPE_CHECKING:
    from .link import VirtualLink


Direction = Literal["a->b", "b->a"]


FaultKind = Literal["eof", "reset", "half-close", "blackhole", "silence", "stall"]


DIRECTIONS: Final[tuple[Direction, ...]] = get_args(Direction)


FAULT_KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)


#: The most bytes of ``receive_some()`` if the caller names no size.
DEFAULT_RECEIVE = 65536


#: On a link with a rate, bytes arrive in pieces of this size, like packets, and not all at the end of a send.
_PACKET = 4096


def opposite(direction: Direction) -> Direction:
    """The other direction."""
    return "b->a" if direction == "a->b" else "a->b"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One event that strikes when exactly *after* bytes have been sent in *direction*; those bytes are still delivered.

    ``after=0`` strikes before the first byte. The kinds, seen from the sender S and the receiver R of that direction:

    * ``"eof"``: a device between the two closed both connections. R reads the bytes, then ``b""``. S reads
      the bytes that R had sent before, then ``b""``. Every further send raises :exc:`trio.BrokenResourceError`.
    * ``"reset"``: R reads the bytes, then :exc:`trio.BrokenResourceError`; S gets that at once, and loses the
      bytes that R had sent and S had not read.
    * ``"half-close"``: R reads the bytes, then ``b""``; S cannot send any more. The other direction still works.
    * ``"blackhole"``: nothing passes any more in either direction, not even a close. Sends succeed until the
      window is full, then block; reads block.
    * ``"silence"``: the same in this direction only.
    * ``"stall"``: bytes sent later in this direction arrive *seconds* later.
    """

    direction: Direction
    #: The number of bytes sent before it strikes.
    after: int
    #: One of the kinds above.
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

    #: Virtual seconds.
    time: float
    #: From its sender to its receiver.
    direction: Direction
    #: The number of bytes.
    n: int


class InUse:
    """Raises an error if two tasks make the same call at once, instead of mixing their data."""

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


class Pipe:
    """One direction: the bytes on their way, and how the direction ends. Every change of state is synchronous."""

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
        self.queued = 0  # bytes that occupy the window, including swallowed ones
        self.sent = 0
        self.delivered = 0
        self.dropped = 0
        self.record: bytearray | None = bytearray() if record else None
        self.free_at = -math.inf  # when the last bit accepted so far has left the sender
        self.eof_at: float | None = None  # the receiver reads b"" from then on, once the queue is empty
        self.send_broken = False
        self.receive_broken = False  # raised once the queue is empty
        self.silent = False
        self.dead_at = math.inf  # by then the receiver's kernel has found out that no more bytes come
        self.senders = trio.lowlevel.ParkingLot()
        self.receivers = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        self.senders.unpark_all()
        self.receivers.unpark_all()

    @property
    def room(self) -> int:
        return self.window - self.queued

    def accept(self, data: memoryview) -> int:
        """Take as many bytes as the window and the next fault allow; strike the fault that is then reached."""
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
        """The bytes that the receiver gets now, or None if it must wait.

        Raises:
            trio.BrokenResourceError: reset, and no bytes left to read.
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
        """The next time at which bytes become readable without any action; infinity if there is none."""
        if self.queue:
            return self.queue[0][0]
        return self.dead_at if self.eof_at is None else min(self.eof_at, self.dead_at)

    def end(self) -> None:
        """Send no more bytes: the receiver reads end of file after the bytes on their way, unless swallowed."""
        if self.eof_at is None and not self.silent:
            self.eof_at = max(trio.current_time(), self.free_at) + self.latency
        self.wake()

    def refuse_sends(self) -> None:
        """Let every further send fail."""
        self.send_broken = True

    def die(self, *, after: float) -> None:
        """Let the receiver's kernel find out in *after* seconds that no more bytes come."""
        self.dead_at = trio.current_time() + after
        self.wake()

    def stall(self, seconds: float) -> None:
        """Delay all further bytes by *seconds*."""
        self.free_at = max(self.free_at, trio.current_time()) + seconds

    def reset(self, *, lose: bool) -> None:
        self.send_broken = self.receive_broken = True
        if lose:
            self.lose(after=-math.inf)
        self.wake()

    def silence(self, *, lose: bool) -> None:
        """Swallow all bytes from now on; with *lose*, also the bytes on their way that have not arrived."""
        self.silent = True
        if lose:
            self.lose(after=trio.current_time())
        self.wake()

    def lose(self, *, after: float) -> None:
        kept = [(due, data) for due, data in self.queue if due <= after]
        self.dropped += sum(len(data) for _, data in self.queue) - sum(len(data) for _, data in kept)
        self.queue = collections.deque(kept)
