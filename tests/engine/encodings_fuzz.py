"""Recorded streams of multifd, XBZRLE and compression, spoiled from a seed, and a destination that must bear them.

A recording has the bytes of all connections of a sound migration. A seed changes it: bits, fields, cuts, parts that are
missing, doubled or moved, packets that change their channel, channels that lack or come twice. The destination ends with a
typed error, or completes; it does not hang, it starts no guest of an attempt that failed, and it uses little memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import random
import tracemalloc
from collections.abc import Callable, Mapping

import numpy as np
import trio
import trio.testing

import trimig
from tests.engine import multifd_source as played
from tests.engine.multifd_source import Peer, There
from tests.engine.threads import without_threads
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.config.peer import PEERS
from trimig.engine.source import migrate_stream
from trimig.errors import Ownership, RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.testing import FakeDevice, ScriptedGuest, deterministic_schedule
from trimig.wire import events as ev
from trimig.wire.decoder import Decoder
from trimig.wire.pages.multifd import HEADER_BYTES, HELLO_BYTES
from trimig.wire.sections.reader import SectionFormat
from trimig.wire.sections.table import SECTIONS, SECTIONS_WITH_MULTIFD

#: Virtual seconds in which an attempt must have ended, if its main connection was known for one.
LIMIT = 120.0
#: Bytes that an attempt may use at once; a recording has about 100 KB.
MOST_MEMORY = 16 << 20
_VALUES = (0, 1, 0x7F, 0x80, 0xFF, 0x1000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is migrated."""

    config: trimig.Config
    #: Headers of the packets are at known places, because their content is not compressed.
    plain: bool = True


def _multifd(profile: str, compression: str = "none") -> Kind:
    peer = dataclasses.replace(PEERS[profile], suppress_vmdesc=True)
    return Kind(played.config(max_bandwidth=0, multifd_compression=compression, peer=peer), plain=compression == "none")


def _single(**capabilities: bool) -> Kind:
    return Kind(
        trimig.Config(
            capabilities=trimig.Capabilities(**capabilities), parameters=trimig.Parameters(max_bandwidth=0),
            stall_timeout=20.0, handover_timeout=2.0, teardown_grace=1.0,
        )
    )  # fmt: skip


KINDS = {
    "multifd of 7.2": _multifd("qemu-7.2"),
    "multifd of 8.1": _multifd("qemu-8.1"),
    "multifd of 11.1": _multifd("qemu-11.1"),
    "multifd with zlib": _multifd("qemu-7.2", "zlib"),
    "multifd with zstd": _multifd("qemu-11.1", "zstd"),
    "xbzrle": _single(xbzrle=True),
    "compress": _single(compress=True),
    "compress and xbzrle": _single(compress=True, xbzrle=True),
}


_PLAIN_CHANNELS = ("multifd of 7.2", "multifd of 8.1", "multifd of 11.1")


class Busy(ScriptedGuest):
    """Writes a few bytes of each page at each of its first looks; its pages are text, zero, or noise."""

    def __init__(self) -> None:
        super().__init__(
            blocks={"ram": played.PAGES}, content="random", seed=4, devices=[FakeDevice("clock", size=8, seed=1)],
            dirty_per_sync=3,
        )  # fmt: skip
        pages = self.ram[0].pages
        pages[::3] = 0
        pages[1::3] = np.resize(np.frombuffer(b"words that repeat\n", np.uint8), PAGE_SIZE)


async def _listen(peer: Peer) -> None:
    """Read the return path to its end, whatever it says."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await peer.stream.receive_some():
            pass


@functools.cache
def recorded(name: str) -> tuple[bytes, ...]:
    """The bytes of each connection of a sound migration, the main one first."""
    kind = KINDS[name]

    async def record() -> tuple[bytes, ...]:
        source = Busy()
        async with played.destination(kind.config) as there:

            async def connect() -> AnyStream:
                await trio.lowlevel.checkpoint()
                return there.link().a

            ways = Connections(first=connect, beside=connect)
            await migrate_stream(source, ways, kind.config, MonitorCore())
        assert there.guest.digest() == source.digest()
        return tuple(bytes(link.recorded("a->b")) for link in there.links)

    with without_threads(), deterministic_schedule(0):
        return trio.run(record, clock=trio.testing.MockClock(autojump_threshold=0))


def packets_of(data: bytes | bytearray) -> list[tuple[int, int]]:
    """Where the packets of a data channel begin and end; their content is not compressed."""
    spans, at = [], HELLO_BYTES
    while at + HEADER_BYTES <= len(data):
        end = min(at + HEADER_BYTES + int.from_bytes(data[at + 20 : at + 24]), len(data))
        spans.append((at, end))
        at = end
    return spans


class Spoiled:
    """A recording after some changes.

    Attributes:
        streams: the bytes of each connection, in the order in which they are opened.
        main: the index of the main connection.
        hold: connections stay open behind their bytes.
        changes: the changes, in words.
    """

    def __init__(self, name: str, chosen: random.Random) -> None:
        self.streams = [bytearray(data) for data in recorded(name)]
        self.main = 0
        self.hold = chosen.random() < 0.5
        self.changes: list[str] = []
        self._chosen = chosen
        self._plain = KINDS[name].plain
        for _ in range(chosen.choice((0, 1, 1, 1, 2, 3))):
            changes = self._ANYWHERE if len(self.streams) == 1 or chosen.random() < 0.5 else self._CHANNELS
            change = chosen.choice(changes)
            self.changes.append(change.__name__.strip("_"))
            change(self)
        if len(self.streams) > 1 and chosen.random() < 0.3:
            self._open_in_another_order()

    @property
    def whole(self) -> bool:
        """No byte inside of a page was changed."""
        return not {"bits", "field", "missing", "doubled", "noise"} & set(self.changes)

    def _one(self) -> bytearray:
        return self._chosen.choice([data for data in self.streams if data] or [bytearray(1)])

    def _place(self, data: bytearray) -> int:
        """Any byte, or with a higher probability one of a header or record at the beginning."""
        near = self._chosen.choice((64, 400, 3000, len(data)))
        return self._chosen.randrange(min(near, len(data)))

    # -- on any connection

    def _bits(self) -> None:
        data = self._one()
        for _ in range(self._chosen.choice((1, 1, 3, 20))):
            data[self._place(data)] ^= 1 << self._chosen.randrange(8)

    def _field(self) -> None:
        data, size = self._one(), self._chosen.choice((1, 2, 4, 8))
        at = self._place(data)
        data[at : at + size] = self._chosen.choice(_VALUES).to_bytes(8)[-size:]

    def _cut(self) -> None:
        data = self._one()
        del data[self._place(data) :]

    def _missing(self) -> None:
        data = self._one()
        at = self._place(data)
        del data[at : at + self._chosen.choice((1, 4, 64, 1344, 4096, 9000))]

    def _doubled(self) -> None:
        data = self._one()
        at = self._place(data)
        data[at:at] = data[at : at + self._chosen.choice((1, 4, 64, 1344, 4096, 9000))]

    def _noise(self) -> None:
        data = self._one()
        at = self._chosen.choice((self._place(data), len(data)))
        data[at:at] = self._chosen.randbytes(self._chosen.choice((1, 4, 64, 1344, 20_000)))

    # -- between connections

    def _lacking(self) -> None:
        lanes = [index for index in range(len(self.streams)) if index != self.main]
        if lanes:
            self._take(self._chosen.choice(lanes))

    def _twice(self) -> None:
        self.streams.append(bytearray(self._chosen.choice(self.streams)))

    def _hello(self) -> None:
        data = self._chosen.choice(self.streams)
        data[:HELLO_BYTES] = self._chosen.choice(self.streams)[:HELLO_BYTES]

    def _moved(self) -> None:
        """A packet, or some bytes, change the connection or the place."""
        here, there = self._chosen.choice(self.streams), self._chosen.choice(self.streams)
        start, end = self._span(here)
        part = here[start:end]
        del here[start:end]
        at = self._span(there)[0]
        there[at:at] = part

    def _changed_about(self) -> None:
        """Two packets, or two parts, take each other's place."""
        here, there = self._chosen.choice(self.streams), self._chosen.choice(self.streams)
        if here is there:
            return
        mine, theirs = self._span(here), self._span(there)
        here[slice(*mine)], there[slice(*theirs)] = there[slice(*theirs)], here[slice(*mine)]

    def _tails(self) -> None:
        here, there = self._chosen.choice(self.streams), self._chosen.choice(self.streams)
        start, other = self._span(here)[0], self._span(there)[0]
        if here is not there:
            here[start:], there[other:] = there[other:], here[start:]

    def _span(self, data: bytearray) -> tuple[int, int]:
        """A packet of a data channel; any part of another connection."""
        spans = packets_of(data) if self._plain and data is not self.streams[self.main] else []
        if spans:
            return self._chosen.choice(spans)
        start = self._chosen.randrange(len(data) + 1)
        return start, min(start + self._chosen.choice((1, 64, 1344, 5440)), len(data))

    def _take(self, index: int) -> bytearray:
        self.main -= index < self.main
        return self.streams.pop(index)

    def _open_in_another_order(self) -> None:
        order = list(range(len(self.streams)))
        self._chosen.shuffle(order)
        self.streams, self.main = [self.streams[index] for index in order], order.index(self.main)

    _ANYWHERE: tuple[Callable[[Spoiled], None], ...] = (_bits, _field, _cut, _missing, _doubled, _noise)
    _CHANNELS: tuple[Callable[[Spoiled], None], ...] = (_lacking, _twice, _hello, _moved, _changed_about, _tails)


def _sections(name: str) -> Mapping[str, SectionFormat]:
    return SECTIONS_WITH_MULTIFD if KINDS[name].config.capabilities.multifd else SECTIONS


def _ends_behind_ram(data: bytes, sections: Mapping[str, SectionFormat]) -> bool:
    """A source with pause-before-switchover may be silent there for any time, so the destination waits without a limit."""
    decoder = Decoder(measure=None, sections=sections)
    last: ev.Element | None = None
    with contextlib.suppress(RemoteProtocolError):
        decoder.writable()[: len(data)] = data
        decoder.received(len(data))
        while (event := decoder.next_event()) is not None:
            last = event
    return isinstance(last, ev.SectionFooter | ev.RamEnd) and decoder.offset == len(data)


async def one(name: str, seed: int) -> str:
    """One input; returns a word for how it went, and raises AssertionError for what must not be."""
    spoiled = Spoiled(name, random.Random(f"{name} {seed}"))
    living = trio.lowlevel.current_statistics().tasks_living
    async with played.destination(KINDS[name].config) as there:
        peers = [there.connect(bytes(data), ends=not spoiled.hold) for data in spoiled.streams]
        with trio.move_on_after(LIMIT):
            await _listen(peers[spoiled.main])
        with contextlib.suppress(trio.TooSlowError), trio.fail_after(LIMIT):
            while there.outcome is None:  # noqa: ASYNC110 - time is virtual
                await trio.sleep(0.1)
        if there.outcome is None:
            held = spoiled.hold and _ends_behind_ram(bytes(spoiled.streams[spoiled.main]), _sections(name))
            assert held or there.monitor.status is Status.SETUP, f"it hangs: {there.monitor.info()} {spoiled.changes}"
            there.monitor.cancel("no connection was taken for the main one")
    assert trio.lowlevel.current_statistics().tasks_living == living
    assert all(link.b.closed for link in there.links), "a connection was left open"
    return _judge(there, spoiled, name)


def _judge(there: There, spoiled: Spoiled, name: str) -> str:
    end = there.outcome
    assert there.guest.claimed is None
    assert not there.guest.misuse, there.guest.misuse
    if isinstance(end, trimig.Summary):
        assert there.guest.executed
        if not spoiled.changes:
            assert there.guest.digest() == _digest(name), "other memory"
        elif spoiled.whole and name in _PLAIN_CHANNELS:
            sent = _contents(name)
            mixed = [page for page, data in enumerate(there.guest.ram[0].pages) if data.tobytes() not in sent[page]]
            assert not mixed, f"pages {mixed} have a content that was never sent"
        return "sound" if not spoiled.changes else "completed"
    assert spoiled.changes, f"sound, and refused: {end!r}"
    assert isinstance(end, trimig.TrimigError), repr(end)
    assert not isinstance(end, trimig.InternalError | trimig.StateError | trimig.GuestFailed), repr(end)
    assert not there.guest.executed
    assert end.owner is Ownership.SOURCE, repr(end)
    if isinstance(end, trimig.RemoteProtocolError):
        assert end.offset is not None or "never received" in str(end), repr(end)
    return type(end).__name__


@functools.cache
def _contents(name: str) -> list[set[bytes]]:
    """Each content that a packet of the recording gives to each page; a page may be zero at any time."""
    found = [{bytes(PAGE_SIZE)} for _ in range(played.PAGES)]
    for data in recorded(name)[1:]:
        for start, end in packets_of(data):
            offsets = np.frombuffer(data, ">u8", int.from_bytes(data[start + 16 : start + 20]), start + 320)
            content = data[start + HEADER_BYTES : end]
            for index, offset in enumerate(offsets):
                found[int(offset) // PAGE_SIZE].add(content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
    return found


@functools.cache
def _digest(name: str) -> str:
    async def read() -> str:
        async with played.destination(KINDS[name].config) as there:
            peers = [there.connect(data) for data in recorded(name)]
            await _listen(peers[0])
        return there.guest.digest()

    with without_threads():
        return trio.run(read, clock=trio.testing.MockClock(autojump_threshold=0))


def fuzz(name: str, seeds: range) -> collections.Counter[str]:
    """How often each end came; AssertionError with the seed for what must not be."""
    ends: collections.Counter[str] = collections.Counter()
    with without_threads():
        recorded(name), _digest(name)
        tracemalloc.start()
        try:
            for seed in seeds:
                ends[_counted(name, seed)] += 1
        finally:
            tracemalloc.stop()
    return ends


def _counted(name: str, seed: int) -> str:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]  # with what the runs before this one have left to be collected
    try:
        with deterministic_schedule(seed):
            end = trio.run(one, name, seed, clock=trio.testing.MockClock(autojump_threshold=0))
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < MOST_MEMORY, f"{peak >> 20} MiB of memory"
    except BaseException as error:
        error.add_note(f"{name}, seed {seed}")
        raise
    return end
