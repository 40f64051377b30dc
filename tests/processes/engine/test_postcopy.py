"""The two halves of postcopy against each other on a real socket: a guest runs on memory that is still coming."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from trimig.channel.channel import Channel
from trimig.channel.channels import MAIN, Channels
from trimig.channel.limiter import Limiter
from trimig.config import PeerProfile
from trimig.engine.device_writer import opening
from trimig.engine.ram.postcopy_receiver import PostcopyReceiver
from trimig.engine.ram.postcopy_sender import PostcopySender
from trimig.engine.ram.records import PageSender
from trimig.engine.ram.sender import RamSender
from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE, MissingMemory, PageBitmap
from trimig.guests.workload.guest import MiB, WorkloadGuest
from trimig.memory import MemfdBlock, MissingPages, TrackedRange, UffdMemory
from trimig.monitor.statistics import Counters
from trimig.policy.page_order import PageOrder
from trimig.wire import Decoder
from trimig.wire import events as ev
from trimig.wire.pages.sink import put
from trimig.wire.return_path import PageRequest, ReturnPathDecoder, encode

SIZE = 8 * MiB
HOT = 4 * MiB
PAGES = SIZE // PAGE_SIZE
LIMIT = 60


@contextlib.asynccontextmanager
async def connection() -> AsyncIterator[tuple[Channel, Channel]]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        async with near, await listener.accept() as far:
            yield Channel(near), Channel(far)


@contextlib.asynccontextmanager
async def guests(here: PageBitmap) -> AsyncIterator[tuple[WorkloadGuest, WorkloadGuest, MissingMemory]]:
    """A source that has stopped, and a destination with its devices and the pages *here*."""
    async with (
        WorkloadGuest.open(size=SIZE, hot=HOT, dirty_rate=200 * MiB, seed=9) as source,
        WorkloadGuest.open(size=SIZE, hot=HOT, running=False) as target,
    ):
        while (await source.stats()).writes < 2000:  # noqa: ASYNC110 - it is another process
            await trio.sleep(0.002)
        await source.pause()
        target.block.pages[here] = source.block.pages[here]
        memory = await target.missing_memory()
        try:
            await target.load_devices(await source.save_devices())
            yield source, target, memory
        finally:
            memory.close()


class CountingLimiter(Limiter):
    granted = 0

    async def pages(self, wanted: int) -> int:
        count = await super().pages(wanted)
        self.granted += count
        return count


class Sending:
    """The source's side of one connection."""

    def __init__(self, channel: Channel, source: WorkloadGuest, unsent: PageBitmap, rate: int) -> None:
        self.channel = channel
        self.counters = Counters()
        self.source = source
        self.order = PageOrder([unsent.copy()])
        channels = Channels()
        channels.add(MAIN, channel)
        self.limiter = CountingLimiter(channels, rate, self.counters)
        self.records = RamSender(channel, self.limiter, PageSender(channel, self.counters))
        self.sender = PostcopySender(channel, self.records, self.limiter, source.ram, self.order, self.counters)

    async def run(self) -> None:
        await self.channel.send(opening(self.source, PeerProfile()))
        await self.records.start(self.source.ram)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.limiter.run)
            nursery.start_soon(self.hear)
            await self.sender.run()
            nursery.cancel_scope.cancel()

    async def hear(self) -> None:
        decoder = ReturnPathDecoder({"ram": SIZE})
        buffer = memoryview(bytearray(4096))
        while count := await self.channel.receive_into(buffer):
            for message in decoder.feed(buffer[:count]):
                assert isinstance(message, PageRequest)
                self.sender.request(message)


async def receive(channel: Channel, receiver: PostcopyReceiver) -> None:
    decoder = Decoder(measure=lambda *_: None)
    while receiver.missing:
        while (event := decoder.next_event()) is not None:
            if isinstance(event, ev.PageElement):
                await put(receiver.sink(turns=False), event)
        if receiver.missing:
            decoder.received(await channel.receive_into(decoder.writable()))


async def move(here: PageBitmap, rate: int) -> tuple[Sending, PostcopyReceiver]:
    """All of it; returns when the guest has run for a while on whole memory and was verified."""
    async with guests(here) as (source, target, memory), connection() as (near, far):
        sending = Sending(near, source, ~here, rate)
        counters = Counters()
        receiver = PostcopyReceiver(memory, ["ram"], {"ram": here.copy()}, far.send, counters)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sending.run)
            nursery.start_soon(receiver.serve)
            target.set_owner(trimig.Owner.HERE)
            await target.activate("running")
            await receive(far, receiver)
            await receiver.wait_whole()
            nursery.cancel_scope.cancel()
        assert receiver.missing_runs() == {}
        assert counters.page_requests >= sending.counters.page_requests, "both sides count each page once"
        memory.close()
        await target.memory_is_whole()
        assert target.touch_times is not None
        assert target.touch_times.touches > 0
        before = (await target.stats()).writes
        while (await target.stats()).writes < before + 100:  # noqa: ASYNC110 - it is another process
            await trio.sleep(0.002)
        await target.pause()
        proof = await target.verify()
        assert proof.ok, str(proof)
        assert proof.writes > source.state.writes
        return sending, receiver


@pytest.mark.parametrize("there", [0.0, 0.7])
async def test_a_guest_runs_while_its_memory_follows(there: float) -> None:
    """O8, P12: nothing is sent twice, nothing is lost."""
    here = np.random.default_rng(1).random(PAGES) < there
    with trio.fail_after(LIMIT):
        sending, _ = await move(here, rate=0)
    counters = sending.counters
    assert counters.normal + counters.duplicate == np.count_nonzero(~here)


async def test_awaited_page_is_not_held_up_by_the_bandwidth_limit() -> None:
    """O7: at 1 MiB/s the rest of this would take 8 s; what the guest touches comes at once."""
    here = np.ones(PAGES, np.bool_)
    here[: HOT // PAGE_SIZE] = False
    here[-8:] = False
    with trio.fail_after(LIMIT):
        sending, receiver = await move(here, rate=MiB)
    assert receiver.missing == 0
    requests = sending.counters.page_requests
    assert requests > 1  # how many they are depends on the machine
    # What the limiter let through is the background; what was asked for in time went past it.
    assert sending.limiter.granted < np.count_nonzero(~here) - requests // 2


class Recorded:
    """Memory that records what is placed, and where pages may be waited for."""

    def __init__(self) -> None:
        self.placed: list[tuple[int, int, int]] = []

    def place(self, block: int, first: int, pages: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
        self.placed.append((block, first, len(pages)))
        return len(pages)

    def place_zeros(self, block: int, first: int, count: int) -> int:
        self.placed.append((block, first, -count))
        return count

    def fileno(self) -> int:
        raise AssertionError("no thread waits")

    def waits(self) -> list[Any]:
        raise AssertionError("no thread waits")

    def close(self) -> None:
        raise AssertionError("it is not this object's")


def run_of(*pages: int) -> ev.PageRun:
    return ev.PageRun(
        at=0,
        block="ram",
        named=True,
        offsets=np.array(pages, np.int64) * PAGE_SIZE,
        data=np.zeros((len(pages), PAGE_SIZE), np.uint8),
    )


async def nothing(_: bytes) -> None:
    raise AssertionError("nothing is asked for")


def receiver_of(memory: MissingMemory, *here: int) -> PostcopyReceiver:
    received = np.zeros(10, np.bool_)
    received[list(here)] = True
    return PostcopyReceiver(memory, ["ram"], {"ram": received}, nothing, Counters())


async def test_runs_with_gaps_are_placed_in_stretches() -> None:
    memory = Recorded()
    receiver = receiver_of(memory, 9)
    await put(receiver.sink(turns=False), run_of(0, 1, 2, 5, 7, 8))
    assert memory.placed == [(0, 0, 3), (0, 5, 1), (0, 7, 2)]
    assert receiver.missing == 3
    assert {name: runs.tolist() for name, runs in receiver.missing_runs().items()} == {"ram": [[3, 5], [6, 7]]}


async def test_zeros_and_other_fill_bytes() -> None:
    memory = Recorded()
    receiver = receiver_of(memory)
    fills = np.array([0, 0, 7], np.uint8)
    await put(
        receiver.sink(turns=False),
        ev.ZeroRun(at=0, block="ram", named=True, offsets=np.array([0, 1, 4], np.int64) * PAGE_SIZE, fills=fills),
    )
    assert memory.placed == [(0, 0, -2), (0, 4, 1)]


@pytest.mark.parametrize("pages", [(3,), (2, 3), (5, 5)])
async def test_a_page_that_comes_a_second_time_is_refused_before_anything_is_placed(pages: tuple[int, ...]) -> None:
    """The guest may have written it since."""
    memory = Recorded()
    receiver = receiver_of(memory, 3)
    with pytest.raises(RemoteProtocolError, match="came a second time"):
        await put(receiver.sink(turns=False), run_of(*pages))
    assert memory.placed == []


async def test_touch_of_a_page_that_came_as_zero_before_the_switch_does_not_wait_for_it() -> None:
    """It has no memory, so the touch is a fault; and the source will never send it again."""
    with (
        contextlib.closing(MemfdBlock("ram", 4 * PAGE_SIZE)) as block,
        contextlib.closing(MissingPages.open()) as missing,
    ):
        missing.register(block.address, block.length)
        memory = UffdMemory(missing, [TrackedRange(name="ram", address=block.address, pages=4)])
        receiver = PostcopyReceiver(memory, ["ram"], {"ram": np.ones(4, np.bool_)}, nothing, Counters())
        found = ctypes.create_string_buffer(b"unread", 8)
        touch = ctypes.CDLL(None).memmove  # a function of CDLL runs without the GIL
        touch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receiver.serve)
                await trio.to_thread.run_sync(touch, ctypes.addressof(found), block.address + 2 * PAGE_SIZE, 8)
                nursery.cancel_scope.cancel()
        assert found.raw == bytes(8)


async def test_what_was_asked_for_is_asked_for_again_on_a_new_connection() -> None:
    """O6: with the name of its block first; what has come meanwhile is not."""
    sent: list[bytes] = []

    async def send(data: bytes) -> None:
        sent.append(data)

    async with WorkloadGuest.open(size=SIZE, hot=MiB, running=False) as target:
        memory = await target.missing_memory()
        try:
            receiver = PostcopyReceiver(memory, ["ram"], {"ram": np.zeros(PAGES, np.bool_)}, send, Counters())
            asked = [receiver.want(0, page) for page in (4, 7, 4, 9)]
            assert [bool(message) for message in asked] == [True, True, False, True]
            await put(
                receiver.sink(turns=False),
                ev.ZeroRun(
                    at=0, block="ram", named=True, offsets=np.array([7 * PAGE_SIZE]), fills=np.zeros(1, np.uint8)
                ),
            )
            sent.clear()
            await receiver.ask_again()
            assert sent == [
                encode(PageRequest(block="ram", start=4 * PAGE_SIZE, length=PAGE_SIZE)),
                encode(PageRequest(block="ram", start=9 * PAGE_SIZE, length=PAGE_SIZE, named=False)),
            ]
        finally:
            memory.close()
