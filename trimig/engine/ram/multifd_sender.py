"""multifd at the source: pages on data channels, with a task for each channel (multifd.md, newer.md part 3).

Pages are given to the channels in turn, always to one that has nothing to do. At a synchronisation all channels come to the
same point. What was sent before it is in its place at the destination before anything behind it: so a page that is sent
again, on whatever connection, is never overwritten by its older copy.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...channel.offload import offload
from ...errors import RemoteProtocolError, TransportFailed
from ...guest import PAGE_SIZE, Pages
from ...wire.encoder import SYNC_WORD
from ...wire.pages.multifd import HEADER_BYTES, PACKET_PAGES, Packet, PacketFlag, write_packet, write_packets
from ...wire.pages.packing import Packer, packer
from .zeros import find_zero_pages

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.limiter import Limiter
    from ...channel.vectored import Vector
    from ...config.config import Config
    from ...monitor.statistics import Counters
    from .multifd_scheme import SchemeCheck
    from .records import PageSender

#: Packets that a channel gets at once. Their vector is built, and their turn is taken, once for all of them.
_JOB_PACKETS: Final = 32
#: Pages that are compressed in the run loop, up to that level: it takes about 0.1 ms, which is what a thread costs.
_INLINE_PAGES: Final = 4
_INLINE_LEVEL: Final = 3
#: Seconds for which a channel that broke waits before it ends the attempt: a destination that refuses closes all connections,
#: and says why on the main one.
_VERDICT_SECONDS: Final = 1.0
_COMPRESSIONS: Final[Mapping[str, PacketFlag]] = {"zlib": PacketFlag.ZLIB, "zstd": PacketFlag.ZSTD}
_HINT: Final = (
    "multifd must be on at the destination too, with the same multifd-channels and multifd-compression, and the peer profile "
    "must fit its machine type"
)


class Zeros(enum.Enum):
    """Where the zero pages go."""

    #: On the main connection, as records.
    MAIN = enum.auto()
    #: On the data channels, named in packets.
    PACKETS = enum.auto()
    #: On the data channels, as other pages: they are not looked for (zero-page-detection none).
    CONTENT = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How the data channels are used. It follows from the configuration and the peer profile.

    Attributes:
        channels: the number of the data channels.
        each_section: synchronise at the end of each RAM section. If False, once for each pass, with a word on the main
            connection.
        new_packets: packets as from QEMU 9.0 on.
        zeros: where the zero pages go.
        compression: of the pages: ``none``, ``zlib`` or ``zstd``.
        level: of the compression.
    """

    channels: int
    each_section: bool
    new_packets: bool
    zeros: Zeros
    compression: str
    level: int

    @staticmethod
    def of(config: Config) -> Manner:
        """The manner of a source with *config*, whose peer profile is settled."""
        scheme, parameters = config.peer.multifd_scheme, config.parameters
        if parameters.zero_page_detection == "none":
            zeros = Zeros.CONTENT
        elif parameters.zero_page_detection == "multifd" and scheme == "9.0":
            zeros = Zeros.PACKETS
        else:
            zeros = Zeros.MAIN  # an older destination would lose those that are named in packets
        levels = {"zlib": parameters.multifd_zlib_level, "zstd": parameters.multifd_zstd_level}
        return Manner(
            channels=parameters.multifd_channels,
            each_section=scheme == "7.2",
            new_packets=scheme == "9.0",
            zeros=zeros,
            compression=parameters.multifd_compression,
            level=levels.get(parameters.multifd_compression, 0),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Packets for one channel.

    Attributes:
        number: of the first packet.
        pages: where to read the content; None for zero pages, which have none.
        indices: the numbers of the pages, rising; empty for a packet that synchronises.
        cost: bytes for which the bandwidth limit was asked.
    """

    number: int
    block: str = ""
    pages: Pages | None = None
    indices: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    cost: int = 0


class MultifdSender:
    """Writes the pages of precopy to data channels.

    Args:
        main: writes the zero pages that go on the main connection.
        limiter: was asked for the bytes of :attr:`handed_over`, and gets those back that compression has saved.
        open_channel: opens the data channel of that number.
        check: whether the destination synchronises at the end of each section; None if that cannot be found out, or another
            scheme is used.

    Attributes:
        check: see above.
        handed_over: bytes of all packets so far, before any compression, without those that synchronise.
    """

    def __init__(
        self,
        manner: Manner,
        main: PageSender,
        limiter: Limiter,
        counters: Counters,
        open_channel: Callable[[int], Awaitable[Channel]],
        check: SchemeCheck | None = None,
    ) -> None:
        self.check = check
        self._manner = manner
        self._main = main
        self._limiter = limiter
        self._counters = counters
        self._lanes = [_Lane(number, manner, self._opened, self._done) for number in range(manner.channels)]
        self._open_channel = open_channel
        self._next = 0  # the channel whose turn it is
        self._number = 0  # of the next packet
        self._changed = trio.Event()
        self.handed_over = 0

    @property
    def tasks(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """The tasks of all channels, by their names. They wait for :meth:`open`, and end with :meth:`finish`."""
        found: dict[str, Callable[[], Awaitable[None]]] = {}
        for lane in self._lanes:
            found[f"trimig.multifd.{lane.number}"] = lane.run
            found[f"trimig.multifd.{lane.number}.end"] = lane.watch
        return found

    def open(self) -> None:
        """Let the tasks open their channels: the begin of the stream has been sent on the main connection."""
        for lane in self._lanes:
            lane.begin.set()

    async def send(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> None:
        """Hand some pages of *block* over, at least one. A task writes them; an error there ends the attempt.

        Args:
            pages: where to read the content. It must stay as it is until :meth:`synchronise` returns.
            indices: the numbers of the pages, rising.

        **Cancellation:** some have been handed over.
        """
        if self._manner.zeros is not Zeros.CONTENT:
            zero = await find_zero_pages(pages, indices)
            if zero.any():
                await self.send_zeros(block, indices[zero])
                indices = indices[~zero]
        await self._hand_over(block, pages, indices)
        self._count(normal=len(indices))

    async def send_zeros(self, block: str, indices: NDArray[np.int64]) -> None:
        """Send pages of *block* that are zero, at least one and at most ``ZERO_BATCH``.

        **Cancellation:** as for :meth:`send`.
        """
        if self._manner.zeros is Zeros.MAIN or self._manner.zeros is Zeros.CONTENT:
            await self._main.send_zeros(block, indices)
        else:
            await self._hand_over(block, None, indices)
            self._count(zero=len(indices))

    async def synchronise(self, *, pass_over: bool) -> bytes:
        """Bring all channels to the same point, where a RAM section ends.

        Args:
            pass_over: every page of the pass has been sent, or the section is not one of a pass.

        Returns:
            What the main connection says of it, before the end of its section; empty if nothing is said.

        **Cancellation:** some channels have come there.
        """
        if not (self._manner.each_section or pass_over):
            return b""
        for lane in self._lanes:
            lane.give(_Job(number=self._take(1)))
        while not all(lane.idle for lane in self._lanes):
            await self._changed.wait()
        return b"" if self._manner.each_section else SYNC_WORD

    def finish(self) -> None:
        """Nothing follows on the data channels, and it does no harm any more if they break: their tasks end."""
        for lane in self._lanes:
            lane.finish()

    async def _opened(self, number: int) -> Channel:
        channel = await self._open_channel(number)
        self._counters.data_channels += 1
        self._counters.multifd_bytes += channel.sent
        return channel

    async def _hand_over(self, block: str, pages: Pages | None, indices: NDArray[np.int64]) -> None:
        packets = -(-len(indices) // PACKET_PAGES)
        size = PACKET_PAGES * min(_JOB_PACKETS, -(-packets // len(self._lanes)))
        for start in range(0, len(indices), size or 1):
            part = indices[start : start + size]
            count = -(-len(part) // PACKET_PAGES)
            cost = count * HEADER_BYTES + (0 if pages is None else len(part) * PAGE_SIZE)
            lane = await self._free()
            lane.give(_Job(number=self._take(count), block=block, pages=pages, indices=part, cost=cost))
            self.handed_over += cost

    async def _free(self) -> _Lane:
        """The next channel that has nothing to do."""
        while True:
            for number in range(self._next, self._next + len(self._lanes)):
                lane = self._lanes[number % len(self._lanes)]
                if lane.idle:
                    self._next = lane.number + 1
                    return lane
            await self._changed.wait()

    def _take(self, packets: int) -> int:
        first = self._number
        self._number += packets
        return first

    def _done(self, job: _Job, sent: int) -> None:
        """A channel has written *job*, which took *sent* bytes."""
        self._counters.multifd_bytes += sent
        self._limiter.refund(max(0, job.cost - sent))
        self._changed.set()
        self._changed = trio.Event()

    def _count(self, *, normal: int = 0, zero: int = 0) -> None:
        c = self._counters
        c.normal += normal
        c.duplicate += zero
        c.remaining = max(0, c.remaining - (normal + zero) * PAGE_SIZE)


class _Lane:
    """One data channel, and what it has to write.

    Args:
        told: called for each job that was written, with the number of its bytes.

    Attributes:
        begin: set when the channel may be opened.
    """

    def __init__(
        self,
        number: int,
        manner: Manner,
        open_channel: Callable[[int], Awaitable[Channel]],
        told: Callable[[_Job, int], None],
    ) -> None:
        self.number = number
        self.begin = trio.Event()
        self._manner = manner
        self._open = open_channel
        self._told = told
        self._flag = _COMPRESSIONS.get(manner.compression, PacketFlag(0))
        self._packer: Packer | None = packer(manner.compression, manner.level) if self._flag else None
        self._jobs: collections.deque[_Job] = collections.deque()
        self._work = trio.Event()
        self._channel: Channel | None = None
        self._opened = trio.Event()
        self._over = trio.CancelScope()

    @property
    def idle(self) -> bool:
        """Everything that was given to it has been written."""
        return not self._jobs

    def give(self, job: _Job) -> None:
        """Write *job* after what was given before."""
        self._jobs.append(job)
        self._work.set()

    def finish(self) -> None:
        """End the tasks."""
        self._over.cancel("nothing more follows on the data channels")
        self._work.set()

    async def run(self) -> None:
        """Open the channel, and write what it is given, until :meth:`finish`.

        Raises:
            ConfigError: the connection cannot be opened with this configuration.
            TransportFailed: the connection could not be opened, or broke.

        **Cancellation:** the channel is poisoned.
        """
        failure = await self._until_failure()
        if failure is not None:
            await trio.sleep(_VERDICT_SECONDS)
            raise failure

    async def _until_failure(self) -> TransportFailed | None:
        await self.begin.wait()
        try:
            channel = self._channel = await self._open(self.number)
        except TransportFailed as error:
            return TransportFailed(f"data channel {self.number} of multifd could not be opened: {error}; {_HINT}")
        self._opened.set()
        try:
            while not self._over.cancel_called:
                if not self._jobs:
                    await self._work.wait()
                    self._work = trio.Event()
                    continue
                before = channel.sent
                await self._write(channel, self._jobs[0])
                self._told(self._jobs.popleft(), channel.sent - before)
        except TransportFailed as error:
            return TransportFailed(f"data channel {self.number} of multifd: {error}; {_HINT}")
        return None

    async def watch(self) -> None:
        """Notice the end of the channel, on which the destination sends nothing.

        Raises:
            RemoteProtocolError: the destination has sent something.
            TransportFailed: the connection has ended before :meth:`finish`.

        **Cancellation:** no effect.
        """
        failure: TransportFailed | RemoteProtocolError | None = None
        await self._opened.wait()
        assert self._channel is not None
        with self._over:
            failure = await self._ending(self._channel)
            await trio.sleep(_VERDICT_SECONDS)
        if failure is not None and not self._over.cancel_called:
            raise failure

    async def _ending(self, channel: Channel) -> TransportFailed | RemoteProtocolError:
        what = f"data channel {self.number} of multifd"
        try:
            count = await channel.receive_into(memoryview(bytearray(16)), stall_timeout=math.inf)
        except TransportFailed as error:
            return TransportFailed(f"{what}: {error}; {_HINT}")
        if count:
            return RemoteProtocolError(f"the destination has sent bytes on {what}", offset=0, section="multifd")
        return TransportFailed(f"{what}: the destination closed it; {_HINT}")

    async def _write(self, channel: Channel, job: _Job) -> None:
        new = self._manner.new_packets
        if not len(job.indices):
            await channel.send(write_packet(Packet(number=job.number, sync=True), new=new))
            return
        offsets = job.indices * PAGE_SIZE
        if job.pages is None:
            zeros = write_packets(job.block, offsets, number=job.number, zero=True, compression=self._flag)
            await channel.send(zeros.reshape(-1).data)
        elif self._packer is None:
            headers = write_packets(job.block, offsets, number=job.number)
            await channel.send_pieces(packets_vector(headers, job.pages, job.indices))
        else:
            await self._write_packed(channel, job, job.pages, self._packer)

    async def _write_packed(self, channel: Channel, job: _Job, pages: Pages, packer: Packer) -> None:
        """One packet after the other: the size of its content stands in front of it."""
        for packet, start in enumerate(range(0, len(job.indices), PACKET_PAGES)):
            part = job.indices[start : start + PACKET_PAGES]
            if len(part) <= _INLINE_PAGES and self._manner.level <= _INLINE_LEVEL:
                content = packer.pack(pages, part)
            else:
                content = await offload(packer.pack, pages, part)
            header = Packet(
                number=job.number + packet,
                compression=self._flag,
                block=job.block,
                offsets=part * PAGE_SIZE,
                size=len(content),
            )
            await channel.send(write_packet(header, new=self._manner.new_packets) + content)


def packets_vector(headers: NDArray[np.uint8], pages: Pages, indices: NDArray[np.int64]) -> Vector:
    """Where the bytes of some packets are: a header, its pages, the next header, and so on.

    Pages of one packet that follow each other in memory are one element.

    Args:
        headers: shape (packets, ``HEADER_BYTES``). The caller keeps it.
        pages: the block's memory, shape (n, page size).
        indices: the numbers of the pages, rising; each packet but the last has ``PACKET_PAGES`` of them.
    """
    new = np.empty(len(indices), np.bool_)
    np.not_equal(np.diff(indices), 1, out=new[1:])
    new[::PACKET_PAGES] = True
    starts = np.flatnonzero(new)
    packet = starts // PACKET_PAGES
    place = np.arange(len(starts)) + packet + 1  # one header stands before the first run of each packet
    vector = np.empty((len(starts) + len(headers), 2), np.uint64)
    vector[place, 0] = np.uint64(pages.ctypes.data) + indices[starts].astype(np.uint64) * np.uint64(PAGE_SIZE)
    vector[place, 1] = np.diff(starts, append=len(indices)) * PAGE_SIZE
    at = place[starts % PACKET_PAGES == 0] - 1
    vector[at, 0] = np.uint64(headers.ctypes.data) + np.arange(len(headers), dtype=np.uint64) * np.uint64(HEADER_BYTES)
    vector[at, 1] = HEADER_BYTES
    return vector
