"""A source with data channels that a test plays byte by byte, and the destination under test."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import trio

import trimig
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.guest import PAGE_SIZE, DeviceSection
from trimig.monitor.core import MonitorCore
from trimig.testing import FakeDevice, LazyScriptedGuest, ScriptedGuest, VirtualLink
from trimig.wire import RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire.devices import globalstate
from trimig.wire.pages.multifd import Hello, Packet, PacketFlag, write_hello, write_packet
from trimig.wire.pages.zstd import zstd
from trimig.wire.return_path import Message, ReturnPathDecoder

PAGES = 12
CHANNELS = 3
LIMIT = 3600  # virtual seconds
FLAGS = {"none": 0, "zlib": int(PacketFlag.ZLIB), "zstd": int(PacketFlag.ZSTD)}

HEAD = wire.file_header() + wire.configuration("scripted", ()) + wire.command(1) + wire.ping(1)
CLOSE = wire.END_WORD + wire.section_footer(2)
LIST = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", PAGES * PAGE_SIZE)])


def start(*, new: bool) -> bytes:
    """The first section, with the synchronisation of the scheme."""
    return LIST + (wire.SYNC_WORD if new else b"") + CLOSE


def part(records: bytes = b"", *, new: bool) -> bytes:
    """A section that synchronises."""
    return wire.section_continue(Section.PART, 2) + records + (wire.SYNC_WORD if new else b"") + CLOSE


def end(*, new: bool) -> bytes:
    """The last section of the RAM, which synchronises, and the devices."""
    device = DeviceSection(idstr="clock", instance_id=0, version_id=1, payload=FakeDevice("clock", size=8).save())
    sections = wire.device_section(device, 4) + wire.device_section(globalstate.section("running"), 5)
    return (
        wire.section_continue(Section.END, 2)
        + (wire.SYNC_WORD if new else b"")
        + CLOSE
        + sections
        + wire.end_of_stream()
    )


def zeros(*pages: int) -> bytes:
    """Records of zero pages for the main connection."""
    return RecordWriter().zero_records("ram", np.array(pages, np.int64) * PAGE_SIZE)


def content(fill: int) -> bytes:
    """A page that is neither zero nor of one byte."""
    return bytes([fill]) * (PAGE_SIZE - 1) + b"\x01"


class Packets:
    """Writes the packets of one data channel."""

    def __init__(self, number: int, *, new: bool, compression: str = "none", uuid: bytes = bytes(16)) -> None:
        self.hello = write_hello(Hello(uuid=uuid, number=number))
        self._new = new
        self._flag = FLAGS[compression]
        self._deflate = zlib.compressobj(1)
        self._zstd = zstd.ZstdCompressor(level=1)

    @property
    def sync(self) -> bytes:
        """A packet that only synchronises."""
        return write_packet(Packet(number=0, sync=True), new=self._new)

    def compress(self, data: bytes) -> bytes:
        """The next content of the channel's continuous stream."""
        if self._flag == PacketFlag.ZLIB:
            return self._deflate.compress(data) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        if self._flag == PacketFlag.ZSTD:
            return self._zstd.compress(data, zstd.ZstdCompressor.FLUSH_BLOCK)
        return data

    def finished(self, data: bytes) -> bytes:
        """The last content of the channel's stream, with the end of the stream."""
        if self._flag == PacketFlag.ZLIB:
            return self._deflate.compress(data) + self._deflate.flush()
        return self._zstd.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)

    def pages(self, *pages: int, fill: int, zero: Sequence[int] = (), sync: bool = False) -> bytes:
        """A packet with these pages; in the scheme of 7.2 it may synchronise, too."""
        data = self.compress(content(fill) * len(pages)) if pages else b""
        packet = Packet(
            number=0,
            sync=sync,
            compression=self._flag,
            block="ram",
            offsets=np.array(pages, np.int64) * PAGE_SIZE,
            zeros=np.array(zero, np.int64) * PAGE_SIZE,
            size=len(data),
        )
        return write_packet(packet, new=self._new) + data


def config(**parameters: Any) -> trimig.Config:
    """With three data channels; parameters by name."""
    capabilities = {name: parameters.pop(name) for name in ("postcopy_ram", "postcopy_preempt") if name in parameters}
    parameters.setdefault("multifd_channels", CHANNELS)
    options = {name: parameters.pop(name) for name in ("peer", "stall_timeout") if name in parameters}
    options.setdefault("stall_timeout", 20.0)
    return trimig.Config(
        capabilities=trimig.Capabilities(multifd=True, **capabilities),
        parameters=trimig.Parameters(**parameters),
        handover_timeout=2.0,
        teardown_grace=1.0,
        **options,
    )


def guest(kind: type[ScriptedGuest] = ScriptedGuest, **options: Any) -> ScriptedGuest:
    """The guest that waits; its memory is not empty, and no byte of that may stay."""
    return kind(
        blocks={"ram": PAGES},
        content="random",
        seed=9,
        run_state="inmigrate",
        devices=[FakeDevice("clock", size=8)],
        **options,
    )


class Peer:
    """The source's end of one connection."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        #: What :meth:`There.connect` was given has been said.
        self.begun = trio.Event()
        self.decoder = ReturnPathDecoder({"ram": PAGES * PAGE_SIZE})
        self.heard: list[Message] = []

    async def say(self, *data: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.begun.wait()
            await self.stream.send_all(b"".join(data))

    async def end(self) -> None:
        """Nothing more is sent."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.stream.send_eof()

    async def hear(self) -> None:
        """Everything up to the end of the connection."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self.stream.receive_some():
                self.heard += self.decoder.feed(data)

    async def hear_until(self, message: Message) -> None:
        """Everything up to *message*."""
        while message not in self.heard:
            data = await self.stream.receive_some()
            assert data, f"closed before {message}; heard {self.heard}"
            self.heard += self.decoder.feed(data)


class There:
    """A destination that listens, and the connections that a source makes."""

    def __init__(self, target: ScriptedGuest, settings: trimig.Config, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.heard: list[Message] = []
        self.guest = target
        self.config = settings
        self.monitor = MonitorCore()
        self.outcome: trimig.Summary | trimig.TrimigError | None = None
        self.links: list[VirtualLink] = []
        self._offers, self._taken = trio.open_memory_channel[AnyStream](1000)

    async def run(self) -> None:
        ways = Connections(first=self.meet, entrance=self._entrance)
        try:
            self.outcome = await receive_stream(self.guest, ways, self.config, self.monitor)
        except trimig.TrimigError as error:
            self.outcome = error
        for link in self.links:  # those that were not met, too
            await trio.aclose_forcefully(link.b)

    async def _entrance(self, _: str | None) -> There:
        await trio.lowlevel.checkpoint()
        return self

    async def meet(self) -> AnyStream:
        """The next connection."""
        return await self._taken.receive()

    async def admit(self, stream: AnyStream) -> AnyStream:
        """The same."""
        await trio.lowlevel.checkpoint()
        return stream

    def close(self) -> None:
        """Nothing."""

    def link(self) -> VirtualLink:
        """A further connection; nothing is sent on it."""
        link = VirtualLink(seed=len(self.links), latency=0.001, record=True)
        self.links.append(link)
        self._offers.send_nowait(link.b)
        return link

    def connect(self, data: bytes = b"", *, ends: bool = False) -> Peer:
        """A further connection, on which *data* is sent.

        Args:
            ends: the connection ends behind *data*.
        """
        peer = Peer(self.link().a)

        async def say() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await peer.stream.send_all(data)
            peer.begun.set()
            if ends:
                await peer.end()

        self._nursery.start_soon(say)
        return peer

    def pages(self) -> list[int]:
        """The first byte of each page."""
        return [int(page[0]) for page in self.guest.ram[0].pages]


@contextlib.asynccontextmanager
async def destination(
    settings: trimig.Config | None = None, target: ScriptedGuest | None = None
) -> AsyncIterator[There]:
    """A destination that runs while the block does, and ends before it does."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            there = There(target or guest(), settings or config(), nursery)
            nursery.start_soon(there.run)
            yield there


async def played(
    main: bytes,
    channels: Sequence[bytes],
    settings: trimig.Config | None = None,
    target: ScriptedGuest | None = None,
    *,
    first: Sequence[int] = (),
    hold: bool = True,
) -> There:
    """A destination whose source says *main* and *channels*, and reads to the end.

    Args:
        first: the channels that are opened before the main one.
        hold: the channels stay open; otherwise each ends behind its bytes.
    """
    async with destination(settings, target) as there:
        for number in first:
            there.connect(channels[number], ends=not hold)
        peer = there.connect(main)
        for number, data in enumerate(channels):
            if number not in first:
                there.connect(data, ends=not hold)
        await peer.hear()
        there.heard = peer.heard
    return there


def lazy() -> LazyScriptedGuest:
    """A guest that can be followed by its memory."""
    found = guest(LazyScriptedGuest, touches=[])
    assert isinstance(found, LazyScriptedGuest)
    return found
