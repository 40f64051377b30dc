"""One data channel of multifd at the destination: its packets, and the pages in them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...channel.offload import offload
from ...errors import RemoteProtocolError, TransportFailed
from ...guest import PAGE_SIZE
from ...wire.pages.inflate import Inflater, inflater_of
from ...wire.pages.multifd import HEADER_BYTES, HELLO_BYTES, PACKET_PAGES, Packet, PacketReader
from .scatter import Scatterer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...channel.channel import Channel
    from ...monitor.statistics import Counters
    from .receiver import RamReceiver
    from .scatter import Place

#: Pages that are inflated in the run loop; it takes about 0.1 ms. More pages are inflated in a thread.
_INLINE_PAGES: Final = 16
#: Bytes of packets that a thread reads one after the other before the figures are brought up to date.
_AT_ONCE_BYTES: Final = 32 << 20


class DataChannel:
    """Reads one data channel, behind its hello.

    Args:
        number: of the channel.
        channel: its connection. The first bytes that are read from it are the hello.
        compression: one of the bits of :data:`trimig.wire.pages.multifd.COMPRESSION`; 0 for none.

    Attributes:
        number: of the channel.
        channel: its connection.
        pages: pages in packets since the last synchronisation; a packet counts from its header on.
        begun: the first synchronisation has been passed.
    """

    def __init__(self, number: int, channel: Channel, ram: RamReceiver, counters: Counters, compression: int) -> None:
        self.number = number
        self.channel = channel
        self.pages = 0
        self.begun = False
        self._ram = ram
        self._counters = counters
        self._compression = compression
        self._inflater: Inflater | None = inflater_of(compression)
        self._reader: PacketReader | None = None
        self._room = np.zeros(HEADER_BYTES, np.uint8)
        self._header = self._room.data
        self._scatterer = Scatterer(self._room)
        #: The header that was read behind the last content, and not taken yet.
        self._ahead: Packet | None = None
        #: Offset in the channel of the next byte that is read.
        self._at = 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"data channel {self.number}"

    @property
    def at(self) -> int:
        """Offset in the channel of the next byte that is read."""
        return self._at

    async def skip_hello(self) -> None:
        """Read the hello, which a judge has examined. TransportFailed.

        **Cancellation:** the channel must be given up.
        """
        await self._fill(self._header[:HELLO_BYTES])
        self._counters.multifd_bytes += HELLO_BYTES

    def expect(self, blocks: Mapping[str, int]) -> None:
        """The first packet is read next.

        Args:
            blocks: used length in bytes of the RAM blocks, by name.
        """
        self._reader = PacketReader(self.number, blocks, compression=self._compression, zero_pages=False)

    def begin(self, blocks: Mapping[str, int], *, zero_pages: bool) -> None:
        """The first synchronisation has been passed: packets may have pages.

        Args:
            blocks: as for :meth:`expect`.
            zero_pages: packets name zero pages, too (the scheme of 9.0).
        """
        self.begun = True
        self._reader = PacketReader(self.number, blocks, compression=self._compression, zero_pages=zero_pages)

    def synchronised(self) -> None:
        """All channels stand behind a packet with SYNC."""
        self.pages = 0

    async def next(self) -> Packet | None:
        """The header of the next packet; None if the channel ends in front of it.

        Raises:
            RemoteProtocolError: it is malformed.
            TransportFailed: the connection broke, or ends inside the header.

        **Cancellation:** the channel must be given up.
        """
        assert self._reader is not None
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead
        at = self._at
        # Between two packets a source may be silent for any time.
        if not await self._fill(self._header, patience=math.inf, may_end=True):
            return None
        packet = self._reader.read(self._header, at)
        self.pages += len(packet.offsets) + len(packet.zeros)
        self._counters.multifd_bytes += HEADER_BYTES
        return packet

    async def place(self, packet: Packet, check: Callable[[], None] | None = None) -> None:
        """Read the content of *packet*, and put its pages into their places.

        Args:
            check: packets behind it may be placed too, after this was called, perhaps by a thread. It raises
                RemoteProtocolError if they may have no pages. None to place one packet.

        Raises:
            RemoteProtocolError: the compressed content is malformed, or a header behind it.
            TransportFailed: the connection broke, or ends inside the content.

        **Cancellation:** the channel must be given up; pages that were not received yet may hold a part of their content.
        """
        if len(packet.zeros):
            indices = packet.zeros // PAGE_SIZE
            await self._ram.zeros(packet.block, indices, np.zeros(len(indices), np.uint8))
        if not len(packet.offsets):
            return
        if packet.compression:
            await self._inflate(packet, packet.offsets // PAGE_SIZE)
            self._counters.multifd_bytes += packet.size
            return
        place = self._ram.place_of(packet.block, packet.offsets // PAGE_SIZE)
        # More packets follow a full one. Nothing behind one with SYNC may be read before the others have come there.
        goes_on = check is not None and len(packet.offsets) == PACKET_PAGES and not packet.sync
        start, at = self.channel.received, self._at

        def following() -> Place | None:
            assert self._reader is not None
            assert check is not None
            done = self.channel.received - start
            self._at = at + done
            run = self._reader.read_run(self._header) if done < _AT_ONCE_BYTES else None
            if run is not None:
                block, first = run
                self.pages += PACKET_PAGES
                check()
                return self._ram.place_of(block, range(first, first + PACKET_PAGES))
            found = self._reader.read(self._header, self._at - HEADER_BYTES)
            self.pages += len(found.offsets) + len(found.zeros)
            plain = len(found.offsets) and not len(found.zeros) and not found.compression and not found.sync
            if not plain or done >= _AT_ONCE_BYTES:
                self._ahead = found
                return None
            check()
            return self._ram.place_of(found.block, found.offsets // PAGE_SIZE)

        try:
            counts, whole = await self._ram.scatter(
                self._scatterer, self.channel, place, _AT_ONCE_BYTES if goes_on else 0, following if goes_on else None
            )
        finally:
            self._at = at + self.channel.received - start
        self._counters.multifd_bytes += sum(counts) * PAGE_SIZE
        self._counters.multifd_bytes += HEADER_BYTES * (len(counts) - 1 + (self._ahead is not None))
        if not whole:
            raise self._cut()

    async def _inflate(self, packet: Packet, indices: NDArray[np.int64]) -> None:
        assert self._inflater is not None
        content = bytearray(packet.size)
        at = self._at
        await self._fill(memoryview(content))
        size = len(indices) * PAGE_SIZE
        try:
            if len(indices) > _INLINE_PAGES:
                data = await offload(self._inflater.inflate, content, size)
            else:
                data = self._inflater.inflate(content, size)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self.name}: {error.reason}", offset=at, section="multifd") from error
        await self._ram.pages(packet.block, indices, np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE))

    async def _fill(self, view: memoryview, *, patience: float | None = None, may_end: bool = False) -> bool:
        """Fill *view*. False if *may_end* is given and the channel ends in front of it.

        Args:
            patience: seconds to wait for the first byte, in place of ``stall_timeout``.
        """
        have = 0
        while have < len(view):
            count = await self.channel.receive_into(view[have:], stall_timeout=None if have else patience)
            if not count and not have and may_end:
                return False
            if not count:
                raise self._cut()
            have += count
            self._at += count
        return True

    def _cut(self) -> TransportFailed:
        return TransportFailed(f"{self.name} ends at byte {self._at}, inside a packet")

    async def drain(self) -> None:
        """Read to the end of the channel, whatever comes. Its connection may break.

        **Cancellation:** no effect.
        """
        sink = memoryview(bytearray(1 << 14))
        try:
            while await self.channel.receive_into(sink, stall_timeout=math.inf):
                await trio.lowlevel.checkpoint()
        except TransportFailed:
            return
