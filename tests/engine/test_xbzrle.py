"""XBZRLE at the source: the destination has each page as it was sent, whatever the guest writes meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import strategies as st
from numpy.typing import NDArray

import trimig
from tests.engine.pair import Pair, config, running
from tests.engine.test_switch import going
from trimig.channel.channel import Channel
from trimig.engine.ram import xbzrle
from trimig.engine.ram.page_cache import PageCache
from trimig.engine.ram.records import PageSender
from trimig.engine.ram.xbzrle import XbzrleEncoder
from trimig.guest import PAGE_SIZE, PageBitmap, Pages
from trimig.monitor.statistics import Counters
from trimig.testing import VirtualLink
from trimig.wire import Decoder, Section, events
from trimig.wire.constants import RAM_VERSION
from trimig.wire.encoder import END_WORD, file_header, ram_list, section_continue, section_start
from trimig.wire.pages.sink import put
from trimig.wire.pages.xbzrle import DeltaRun

Indices = NDArray[np.int64]


@dataclasses.dataclass
class Block:
    """A RAM block in an array."""

    name: str
    pages: Pages

    @property
    def length(self) -> int:
        return self.pages.size

    def absent(self) -> PageBitmap | None:
        return None


class There:
    """A destination: a sink for what a decoder reads."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.memory = {name: np.zeros((length // PAGE_SIZE, PAGE_SIZE), np.uint8) for name, length in lengths.items()}
        self.records: list[tuple[str, str, int]] = []  # kind, block, page
        self._decoder = Decoder(measure=None, configuration=False, footers=False)
        head = file_header() + section_start(Section.START, 2, "ram", 0, RAM_VERSION)
        self._head = head + ram_list(lengths.items()) + END_WORD + section_continue(Section.PART, 2)

    async def take(self, data: bytes) -> None:
        data, self._head = self._head + data, b""
        view = memoryview(data)
        while view:
            room = self._decoder.writable()
            count = min(len(room), len(view))
            room[:count], view = view[:count], view[count:]
            self._decoder.received(count)
            while (event := self._decoder.next_event()) is not None:
                if isinstance(event, events.PageElement):
                    kinds = {events.PageRun: "page", events.ZeroRun: "zero", DeltaRun: "delta"}
                    kind = kinds.get(type(event), "compressed")
                    self.records += [(kind, event.block, int(offset) // PAGE_SIZE) for offset in event.offsets]
                    await put(self, event)

    async def pages(self, block: str, indices: Indices, data: Pages) -> None:
        self.memory[block][indices] = data

    async def zeros(self, block: str, indices: Indices, fills: NDArray[np.uint8]) -> None:
        self.memory[block][indices] = fills[:, None]

    def read(self, block: str, index: int) -> NDArray[np.uint8]:
        return np.asarray(self.memory[block][index])


class Busy(trio.abc.HalfCloseableStream):
    """A stream to a destination. Its guest writes whenever something is being sent."""

    def __init__(self, there: There, write: Callable[[], None]) -> None:
        self._there = there
        self.write = write

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.write()
        await trio.lowlevel.checkpoint()
        await self._there.take(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Source:
    """A guest whose pages are sent in passes by XBZRLE."""

    def __init__(self, *counts: int, cache: int, turn: int = 128) -> None:
        self.blocks = [Block(f"ram{n}", np.zeros((count, PAGE_SIZE), np.uint8)) for n, count in enumerate(counts)]
        self.there = There({block.name: block.length for block in self.blocks})
        self.dirty: dict[str, PageBitmap] = {b.name: np.ones(len(b.pages), np.bool_) for b in self.blocks}
        self.cache = cache
        self.counters = Counters()
        self.stream = Busy(self.there, lambda: None)
        self.encoder = XbzrleEncoder(self.blocks, lambda: self.cache, self.counters, turn_pages=turn)
        self.sender = PageSender(Channel(self.stream), self.counters, self.encoder)
        self.first = True

    def write(self, block: int, page: int, at: int, content: bytes) -> None:
        """The guest writes."""
        here = self.blocks[block]
        content = content[: PAGE_SIZE - at]
        here.pages[page, at : at + len(content)] = np.frombuffer(content, np.uint8)
        self.dirty[here.name][page] = True

    async def send(self, *, last: bool = False) -> list[tuple[str, int]]:
        """One pass over the dirty pages of each block; the kinds and numbers of its records."""
        self.encoder.begin_pass(first=self.first, last=last)
        self.first = False
        before = len(self.there.records)
        for block in self.blocks:
            dirty = np.flatnonzero(self.dirty[block.name])
            self.dirty[block.name][:] = False
            if len(dirty):
                await self.sender.send(block.name, block.pages, dirty)
        return [(kind, page) for kind, _, page in self.there.records[before:]]

    def check(self) -> None:
        """The destination has the guest's memory."""
        for block in self.blocks:
            wrong = np.flatnonzero((self.there.memory[block.name] != block.pages).any(axis=1))
            assert wrong.size == 0, (block.name, wrong.tolist())

    @property
    def figures(self) -> dict[str, Any]:
        found = self.counters.members["xbzrle-cache"]()
        assert isinstance(found, dict)
        return found


def filled(source: Source, block: int = 0, seed: int = 1) -> None:
    """Random memory."""
    pages = source.blocks[block].pages
    pages[:] = np.random.default_rng(seed).integers(0, 256, pages.shape, np.uint8)


async def test_a_guest_that_writes_one_byte_a_page_is_sent_as_differences() -> None:
    """S1, Q4, G6: from the second pass on, and in the last one."""
    source = Source(300, cache=2 << 20)
    filled(source)
    assert await source.send() == [("page", page) for page in range(300)]
    for counter in (1, 2):
        for page in range(300):
            source.write(0, page, 0, bytes([source.blocks[0].pages[page, 0] ^ counter]))
        sent = await source.send(last=counter == 2)
        assert sent == [("delta", page) for page in range(300)]
        source.check()
    c = source.counters
    assert (c.normal, c.encoded, c.duplicate) == (300, 600, 0)
    assert c.encoded_bytes == 600 * (8 + 3 + 3)
    assert source.figures == {
        "cache-size": 2 << 20,
        "bytes": 600 * 6,
        "pages": 600,
        "cache-miss": 0,
        "cache-miss-rate": 0.0,
        "encoding-rate": PAGE_SIZE / 6,
        "overflow": 0,
    }


async def test_pages_that_did_not_change_are_not_sent() -> None:
    """By ram.md 6.1 they count as handled, and in the figures."""
    source = Source(4, cache=1 << 20)
    filled(source)
    await source.send()
    source.write(0, 2, 9, b"\0")
    source.counters.remaining = 4 * PAGE_SIZE
    for page in range(4):
        source.dirty["ram0"][page] = True
    source.blocks[0].pages[2, 9] = source.there.memory["ram0"][2, 9] ^ 1
    assert await source.send() == [("delta", 2)]
    source.check()
    assert source.counters.remaining == 0
    assert (source.figures["pages"], source.counters.encoded) == (4, 4)


async def test_a_difference_longer_than_the_page_is_sent_as_the_page() -> None:
    source = Source(2, cache=1 << 20)
    filled(source)
    await source.send()
    filled(source, seed=2)
    source.dirty["ram0"][:] = True
    assert await source.send() == [("page", 0), ("page", 1)]
    source.write(0, 1, 4000, b"abc")
    assert await source.send() == [("delta", 1)]
    source.check()
    assert (source.figures["overflow"], source.figures["pages"]) == (2, 3)
    assert source.figures["bytes"] == 2 * PAGE_SIZE + 3 + 2 + 1 + 3


async def test_zero_pages_are_cached_too() -> None:
    """By ram.md part 5, step 3, a page of zeros is the base of the next difference, and the other way round."""
    source = Source(3, cache=1 << 20)
    source.write(0, 1, 0, b"xyz")
    assert sorted(await source.send()) == [("page", 1), ("zero", 0), ("zero", 2)]
    source.write(0, 0, 100, b"abc")
    source.write(0, 1, 0, b"\0\0\0")
    assert sorted(await source.send()) == [("delta", 0), ("zero", 1)]
    source.write(0, 1, 7, b"d")
    assert await source.send(last=True) == [("delta", 1)]
    source.check()


async def test_pages_that_share_a_slot() -> None:
    """D10, ram.md 6.1: the smallest cache has one slot. A page may take it when the one there was not sent for two passes."""
    source = Source(4, cache=PAGE_SIZE)
    filled(source)
    await source.send()  # page 0 is cached, and may be replaced

    async def written(page: int) -> list[tuple[str, int]]:
        source.write(0, page, 0, bytes([source.blocks[0].pages[page, 0] ^ 1]))
        return await source.send()

    assert await written(1) == [("page", 1)]  # pass 1: takes the slot
    assert await written(0) == [("page", 0)]  # pass 2: the slot is too young
    assert await written(1) == [("delta", 1)]  # pass 3: still there
    assert await written(2) == [("page", 2)]  # pass 4
    assert await written(2) == [("page", 2)]  # pass 5: takes the slot
    assert await written(2) == [("delta", 2)]
    source.check()
    assert source.figures["cache-miss"] == 4


async def test_a_slot_that_several_pages_of_a_batch_want() -> None:
    source = Source(8, cache=2 * PAGE_SIZE)
    filled(source)
    for _ in range(5):
        assert len(await source.send()) == 8
        for page in range(8):
            source.write(0, page, 5, bytes([source.blocks[0].pages[page, 5] ^ 1]))
    await source.send(last=True)
    source.check()


async def test_the_cache_follows_its_parameter() -> None:
    """D14, G6: an empty cache of the new size replaces the old one, in the middle of a migration."""
    source = Source(8, cache=1 << 20)
    filled(source)
    await source.send()
    source.cache = 2 << 20
    source.write(0, 3, 0, b"ab")
    assert await source.send() == [("page", 3)]
    source.write(0, 3, 0, b"cd")
    assert await source.send() == [("delta", 3)]
    source.check()
    assert source.figures["cache-size"] == 2 << 20
    assert source.figures["cache-miss"] == 1


async def test_without_memory_for_a_larger_cache_the_old_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """D14, U7: the migration goes on with it. One warning says so, and the size that is shown is that in use."""
    source = Source(4, cache=1 << 20)
    filled(source)
    await source.send()

    def none(size: int, pages: int) -> PageCache:
        raise MemoryError

    monkeypatch.setattr(xbzrle, "PageCache", none)
    source.cache = 1 << 40
    for value in b"xy":
        source.write(0, 1, 8, bytes([value]))
        assert await source.send() == [("delta", 1)]
    source.check()
    assert len(source.counters.warnings) == 1
    assert "XBZRLE cache of 1 TiB, so it keeps its 1 MiB" in source.counters.warnings[0]
    assert source.figures["cache-size"] == 1 << 20


def test_the_cache_is_no_larger_than_the_guest() -> None:
    """A size that no machine has is legal."""
    cache = PageCache(1 << 62, 16)
    numbers = np.array([3, 15])
    assert cache.claim(numbers, 1, 1).all()
    cache.store(numbers, np.ones((2, PAGE_SIZE), np.uint8))
    assert cache.hits(np.arange(16)).tolist() == [n in (3, 15) for n in range(16)]
    assert cache.content(numbers).all()


def test_rates_are_those_of_the_last_pass() -> None:
    """G6: the share of misses, and the bytes of pages for each byte sent; a pass without pages changes nothing."""
    counters = Counters()
    encoder = XbzrleEncoder([Block("ram", np.zeros((4, PAGE_SIZE), np.uint8))], lambda: 1 << 20, counters)
    figures = encoder.figures
    encoder.begin_pass(first=True, last=False)
    counters.normal = 100
    encoder.begin_pass(first=False, last=False)
    counters.normal, counters.encoded = 130, 10
    figures.misses, figures.pages, figures.bytes = 30, 10, 1024
    for _ in range(2):
        encoder.begin_pass(first=False, last=False)
        assert (figures.miss_rate, figures.encoding_rate) == (30 / 40, 10 * PAGE_SIZE / 1024)
    counters.normal = 131
    encoder.begin_pass(first=False, last=True)
    assert (figures.miss_rate, figures.encoding_rate) == (0.0, 0.0)


WRITES = st.tuples(
    st.integers(0, 1), st.integers(0, 9), st.integers(0, PAGE_SIZE - 1), st.binary(min_size=1, max_size=40)
)


@hypothesis.settings(max_examples=120, deadline=None)
@hypothesis.given(
    passes=st.lists(st.lists(WRITES, max_size=12), min_size=1, max_size=6),
    during=st.lists(WRITES, max_size=40),
    sizes=st.lists(st.sampled_from([1, 2, 4, 8, 64]), min_size=1, max_size=7),
    turn=st.sampled_from([1, 3, 128]),
)
def test_whatever_the_guest_writes_while_it_is_sent(
    passes: list[list[tuple[int, int, int, bytes]]],
    during: list[tuple[int, int, int, bytes]],
    sizes: list[int],
    turn: int,
) -> None:
    """T4, D14: pages are compared, sent and cached as one copy. Writes come between any two sends, and sizes change."""

    async def run() -> None:
        source = Source(10, 10, cache=sizes[0] * PAGE_SIZE, turn=turn)
        filled(source)
        waiting = list(during)
        source.stream.write = lambda: source.write(*waiting.pop()) if waiting else None
        for number, writes in enumerate(passes):
            source.cache = sizes[number % len(sizes)] * PAGE_SIZE
            await source.send()
            for write in writes:
                source.write(*write)
        source.stream.write = lambda: None
        await source.send(last=True)
        source.check()

    trio.run(run)


# -- in a migration ----------------------------------------------------------------------------------------------------


def able(**options: Any) -> trimig.Config:
    found = config(**options)
    return dataclasses.replace(found, capabilities=dataclasses.replace(found.capabilities, xbzrle=True))


def busy() -> Pair:
    """A guest that writes eight bytes of some pages between any two passes, of which there are six."""
    source = running(pages=64, dirty_per_sync=10, working_set=16, content="mixed")
    passes = able(downtime_limit=0, max_iterations=6, on_bound="switchover")
    return Pair(source, link=VirtualLink(latency=0.001, rate=1e6), config_here=passes)


async def test_a_busy_guest_arrives_whole(autojump_clock: trio.testing.MockClock) -> None:
    """S1, G6: several passes; the destination need not have the capability."""
    pair = busy()
    pair.config_there = config()
    here, _ = await pair.both()
    assert pair.target.digest() == pair.source.digest()
    assert here.iterations == 6
    assert here.encoded_pages >= 5 * 4
    assert here.encoded_bytes < 40 * here.encoded_pages
    info = pair.here.info()
    assert info["xbzrle-cache"]["pages"] == here.encoded_pages
    assert info["xbzrle-cache"]["bytes"] <= here.encoded_bytes
    assert info["xbzrle-cache"]["cache-size"] == 64 << 20
    assert info["ram"]["normal"] == here.normal_pages


@pytest.mark.parametrize("xbzrle", [False, True])
async def test_a_guest_that_writes_little_of_many_pages(
    autojump_clock: trio.testing.MockClock, *, xbzrle: bool
) -> None:
    """S1, L6: plain pages do not converge here. As differences the rest fits into the downtime limit, and it does."""
    source = running(pages=64, rate=2000.0, working_set=32, content="mixed")
    settings = (able if xbzrle else config)(downtime_limit=50, max_iterations=8)
    pair = Pair(source, link=VirtualLink(latency=0.001, rate=1e6), config_here=settings)
    here, _ = await pair.both()
    if not xbzrle:
        assert isinstance(here, trimig.NotConverging)
        return
    assert pair.target.digest() == pair.source.digest()
    assert here.downtime_parts.ram <= 0.05
    assert here.iterations < 4


async def test_the_member_is_there_only_with_the_capability(autojump_clock: trio.testing.MockClock) -> None:
    """G6, G2."""
    pair = Pair()
    await pair.both()
    assert "xbzrle-cache" not in pair.here.info()
    assert "xbzrle-cache" not in pair.there.info()


async def test_the_cache_is_resized_while_it_runs(autojump_clock: trio.testing.MockClock) -> None:
    """D14, E3: by Monitor.set_parameters, as for migrate-set-parameters."""
    pair = busy()

    def resize(event: trimig.Event) -> None:
        if event.name == "PASS" and event.data["iteration"] == 2:
            pair.here.set_parameters(xbzrle_cache_size=8192)

    pair.here.add_listener(resize)
    await pair.both()
    assert pair.target.digest() == pair.source.digest()
    shown = pair.here.info()["xbzrle-cache"]
    assert shown["cache-size"] == 8192
    assert shown["cache-miss"] > 0


async def test_postcopy_follows_without_differences(autojump_clock: trio.testing.MockClock) -> None:
    """S1: differences in the passes; behind the switch each page comes whole."""
    pair = going(64, dirty_per_sync=10, touches=(5, 11))
    capabilities = dataclasses.replace(pair.config_here.capabilities, xbzrle=True)
    parameters = pair.config_here.parameters.replace(downtime_limit=0)
    pair.config_here = dataclasses.replace(pair.config_here, capabilities=capabilities, parameters=parameters)
    encoded: list[int] = []

    def heard(event: trimig.Event) -> None:
        if event.name == "MIGRATION_PASS" and event.data["pass"] == 4:
            pair.here.start_postcopy()
        if event.name == "MIGRATION" and event.data["status"] == "postcopy-active":
            encoded.append(pair.here.statistics().encoded_pages)

    pair.here.add_listener(heard)
    here, _ = await pair.both()
    assert pair.target.digest() == pair.source.digest()
    assert encoded == [here.encoded_pages]
    assert here.encoded_pages > 0
