"""A destination with multifd that is played by the test: one main connection, and data channels, over virtual links."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import numpy as np
import trio

import trimig
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.config.peer import PEERS
from trimig.guest import PAGE_SIZE
from trimig.testing import FakeDevice, ScriptedGuest, VirtualLink, VirtualStream
from trimig.wire import Command, Decoder
from trimig.wire import events as ev
from trimig.wire.devices import globalstate
from trimig.wire.marks import PING_MARK, PONG_MARK
from trimig.wire.pages.multifd import (
    HEADER_BYTES,
    HELLO_BYTES,
    Hello,
    Packet,
    PacketFlag,
    PacketReader,
    read_hello,
)
from trimig.wire.pages.zstd import zstd
from trimig.wire.return_path import Pong, Shut, encode
from trimig.wire.sections.table import SECTIONS_WITH_MULTIFD

Compression = Literal["none", "zlib", "zstd"]
#: Virtual seconds of a whole test.
LIMIT = 3600


def config(
    *,
    channels: int = 2,
    profile: str = "qemu-7.2",
    compression: Compression = "none",
    zeros: str = "multifd",
    postcopy: bool = False,
    **parameters: Any,
) -> trimig.Config:
    """With multifd, and no bandwidth limit unless one is given."""
    return trimig.Config(
        capabilities=trimig.Capabilities(multifd=True, postcopy_ram=postcopy),
        parameters=trimig.Parameters(
            multifd_channels=channels,
            multifd_compression=compression,
            zero_page_detection=zeros,
            **{"max_bandwidth": 0, **parameters},
        ),
        peer=PEERS[profile],
    )


def guest(pages: int = 600, **options: Any) -> ScriptedGuest:
    """A running guest; each third page of it is zero."""
    options.setdefault("devices", [FakeDevice("clock", size=8, seed=1)])
    return ScriptedGuest(blocks={"ram": pages, "rom": 5}, content="mixed", seed=3, **options)


@dataclasses.dataclass
class Lane:
    """One data channel, as the destination sees it."""

    stream: VirtualStream
    hello: Hello | None = None
    packets: list[Packet] = dataclasses.field(default_factory=list)
    #: Numbers of synchronisations: that it has come to, and that it may leave.
    arrived: int = 0
    released: int = 0
    received: int = 0


class Played:
    """Reads all connections as a destination does, and places the pages.

    Args:
        config: of the source.
        source: whose blocks are known.
        mark: answer as a trimig.
        link: makes the links.
    """

    def __init__(
        self,
        config: trimig.Config,
        source: ScriptedGuest,
        *,
        mark: bool = False,
        link: Callable[[], VirtualLink] = VirtualLink,
    ) -> None:
        self._config = config
        self._mark = mark
        self._link = link
        self.main = link()
        self.links: list[VirtualLink] = []
        self.lanes: list[Lane] = []
        #: What came on the main connection, with ``sync`` where the channels were synchronised.
        self.order: list[str] = []
        self.memory = {block.name: np.zeros_like(block.pages) for block in source.ram}
        self.zero_records = 0
        self.page_records = 0
        self._changed = trio.Event()
        self._nursery: trio.Nursery | None = None
        #: Called for each connection beside the main one, with its number; may raise.
        self.refuse: Callable[[int], None] = lambda number: None
        #: Called for each packet.
        self.see: Callable[[Lane, Packet], None] = lambda lane, packet: None

    @property
    def old(self) -> bool:
        """The end of each section synchronises."""
        return self._config.capabilities.multifd and self._config.peer.multifd_scheme == "7.2"

    def connections(self) -> Connections:
        """For the source."""
        return Connections(first=self._first, beside=self._beside)

    async def _first(self) -> AnyStream:
        await trio.lowlevel.checkpoint()
        return self.main.a

    async def _beside(self) -> AnyStream:
        await trio.lowlevel.checkpoint()
        self.refuse(len(self.lanes))
        link = self._link()
        self.links.append(link)
        lane = Lane(link.b)
        self.lanes.append(lane)
        assert self._nursery is not None
        self._nursery.start_soon(self._read_lane, lane)
        return link.a

    async def run(self, source: Callable[[], Awaitable[Any]]) -> Any:
        """Read until *source* has ended; returns its result."""
        failure: trimig.TrimigError | None = None
        result: Any = None
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._read_main)
                try:
                    result = await source()
                except trimig.TrimigError as error:
                    failure = error
                self._nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result

    async def _read_main(self) -> None:
        stream = self.main.b
        decoder = Decoder(
            measure=lambda idstr, *_: 104 if idstr == globalstate.IDSTR else 8,
            description=False,
            sections=SECTIONS_WITH_MULTIFD,
        )
        if self._mark:
            decoder.accept_marks()
        while data := await stream.receive_some():
            decoder.feed(data)
            while (event := decoder.next_event()) is not None:
                await self._take(event, stream)

    async def _take(self, event: ev.Element, stream: VirtualStream) -> None:
        name = type(event).__name__
        match event:
            case ev.ZeroRun():
                self.zero_records += len(event.offsets)
                self.memory[event.block][event.offsets // PAGE_SIZE] = 0
            case ev.PageRun():
                self.page_records += len(event.offsets)
                self.memory[event.block][event.offsets // PAGE_SIZE] = event.data
            case ev.CommandElement(number=Command.PING):
                value = int.from_bytes(event.payload)
                await stream.send_all(encode(Pong(value=value)))
                if value == PING_MARK and self._mark:
                    await stream.send_all(encode(Pong(value=PONG_MARK)))
            case ev.PackageElement():
                await stream.send_all(encode(Pong(value=3)))
            case ev.RamEnd() if self.old and "PackageElement" not in self.order:
                await self._synchronise()
            case ev.RamSync():
                await self._synchronise()
            case ev.EndOfStream():
                await stream.send_all(encode(Shut(status=0)))
        self.order.append(name)

    async def _synchronise(self) -> None:
        count = self._config.parameters.multifd_channels
        while len(self.lanes) < count or any(lane.arrived == lane.released for lane in self.lanes):
            await self._changed.wait()
        assert all(lane.arrived == lane.released + 1 for lane in self.lanes)
        for lane in self.lanes:
            lane.released += 1
        self.order.append("sync")
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _exactly(self, lane: Lane, count: int) -> bytes | None:
        """That many bytes; None at the end of the channel between two packets."""
        data = b""
        while len(data) < count:
            try:
                more = await lane.stream.receive_some(count - len(data))
            except trio.BrokenResourceError:
                return None
            if not more:
                return None
            data += more
        lane.received += count
        return data

    async def _read_lane(self, lane: Lane) -> None:
        data = await self._exactly(lane, HELLO_BYTES)
        if data is None:
            return
        lane.hello = read_hello(data, channels=self._config.parameters.multifd_channels)
        method = self._config.parameters.multifd_compression
        flag = {"none": 0, "zlib": PacketFlag.ZLIB, "zstd": PacketFlag.ZSTD}[method]
        lengths = {name: pages.nbytes for name, pages in self.memory.items()}
        reader = PacketReader(
            lane.hello.number, lengths, compression=flag, zero_pages=self._config.peer.multifd_scheme == "9.0"
        )
        unpack = unpacker(method)
        while (head := await self._exactly(lane, HEADER_BYTES)) is not None:
            packet = reader.read(head, lane.received - HEADER_BYTES)
            if (content := await self._exactly(lane, packet.size)) is None:
                return
            self._place(packet, unpack(content, len(packet.offsets) * PAGE_SIZE))
            lane.packets.append(packet)
            self.see(lane, packet)
            if packet.sync:
                lane.arrived += 1
                self._tell()
                while lane.released < lane.arrived:
                    await self._changed.wait()

    def _place(self, packet: Packet, content: bytes) -> None:
        if len(packet.offsets):
            pages = np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)
            self.memory[packet.block][packet.offsets // PAGE_SIZE] = pages
        if len(packet.zeros):
            self.memory[packet.block][packet.zeros // PAGE_SIZE] = 0


def unpacker(method: str) -> Callable[[bytes, int], bytes]:
    """Takes the contents of packets of one channel, in their order, and how many bytes they are to become."""
    if method == "none":
        return lambda content, size: content
    if method == "zlib":
        inflate = zlib.decompressobj()
        return lambda content, size: inflate.decompress(content)
    stream = zstd.ZstdDecompressor()
    return lambda content, size: stream.decompress(content, max_length=size)


def data_packets(lane: Lane) -> list[Packet]:
    """The packets of *lane* that name pages."""
    return [packet for packet in lane.packets if len(packet.offsets) or len(packet.zeros)]
