"""RAM blocks are known by their names: the two sides may have added them in different orders.

Every way in which memory goes, from a source to a destination that has the same blocks in another order. Two blocks have
the same length, so that a page in the wrong block is not found by its offset.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import trio

import trimig
from tests.sweeps.postcopy import Backlog, Meeting, given, make_config
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.engine.ram.postcopy_receiver import PostcopyReceiver
from trimig.engine.source import migrate_stream
from trimig.guest import PAGE_SIZE, PageBitmap
from trimig.guests.lazy_app import LazyAppGuest
from trimig.memory import MemfdBlock, MissingPages, TrackedRange, UffdMemory
from trimig.monitor.core import MonitorCore
from trimig.monitor.statistics import Counters
from trimig.status import Status
from trimig.testing import LazyScriptedGuest, ScriptedGuest, VirtualLink
from trimig.wire import events as ev
from trimig.wire.pages.sink import put
from trimig.wire.return_path import PageRequest, encode

PAGES = {"a": 5, "b": 5, "c": 3}
ORDERS = list(itertools.permutations(PAGES))
LIMIT = 3600

Order = tuple[str, ...]
Memory = Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]


def memory_of(guest: trimig.Guest) -> Memory:
    return {block.name: block.pages.copy() for block in guest.ram}


def compare(guest: trimig.Guest, expected: Memory) -> None:
    wrong = {b.name: np.flatnonzero((b.pages != expected[b.name]).any(axis=1)).tolist() for b in guest.ram}
    assert set(wrong) == set(expected)
    assert not any(wrong.values()), f"wrong pages: {wrong}"


def scripted(order: Order) -> LazyScriptedGuest:
    """As a guest in another process: it touches all of its first block, which is another one at the source."""
    return LazyScriptedGuest(
        blocks={name: PAGES[name] for name in order}, seed=99, run_state="inmigrate",
        touches=list(range(PAGES[order[0]])),
    )  # fmt: skip


def application(order: Order) -> LazyAppGuest:
    guest = LazyAppGuest("scripted", running=False)
    for name in order:
        guest.add_ram(name, PAGES[name] * PAGE_SIZE)
    return guest


def parked(_: Order) -> trimig.ParkedGuest:
    """It has no blocks of its own: the order is the source's."""
    return trimig.ParkedGuest()


async def reach_all(guest: trimig.Guest, expected: Memory, monitor: MonitorCore) -> None:
    """An application that looks at its memory while it comes."""
    if isinstance(guest, LazyAppGuest):
        await monitor.wait_status(Status.POSTCOPY_ACTIVE)
        for block in reversed(guest.ram):
            for page in range(len(block.pages)):
                await trio.sleep(0.05)
                await guest.ensure_present(block.name, page * PAGE_SIZE, PAGE_SIZE)
                assert (block.pages[page] == expected[block.name][page]).all(), f"page {page} of {block.name!r}"


async def move(source: ScriptedGuest, target: trimig.Guest, mode: str) -> None:
    """One migration by *mode*, over virtual links."""
    config = make_config(preempt=mode == "preempt", background=32 << 10)
    if mode == "precopy":
        config = dataclasses.replace(config, parameters=trimig.Parameters(max_bandwidth=0), peer=trimig.PeerProfile())
    link = VirtualLink(latency=0.001, window=8192)
    meeting, backlog = Meeting([]), Backlog([])
    sender, taker = MonitorCore(), MonitorCore()
    pauses: list[str] = []

    def soon(event: trimig.Event) -> None:
        if mode != "precopy" and event.data.get("status") == "setup":
            sender.start_postcopy()
        if event.name == "MIGRATION":
            pauses.append(event.data["status"])

    sender.add_listener(soon)
    expected = memory_of(source)

    async def accept_again(uri: str | None) -> AnyStream:
        return await meeting.accept(uri)

    async def interrupt() -> None:
        await taker.wait_status(Status.POSTCOPY_ACTIVE)
        await sender.wait_status(Status.POSTCOPY_ACTIVE)
        await trio.sleep(0.25)
        sender.pause("the test cuts it")

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            ways_in = Connections(first=given(link.b), again=accept_again, beside=backlog.accept)
            nursery.start_soon(receive_stream, target, ways_in, config, taker)
            if mode != "precopy":
                nursery.start_soon(reach_all, target, expected, taker)
            if mode == "recovery":
                nursery.start_soon(interrupt)
            ways_out = Connections(first=given(link.a), again=meeting.connect, beside=backlog.connect)
            await migrate_stream(source, ways_out, config, sender)
    await backlog.close()
    assert ("postcopy-active" in pauses) is (mode != "precopy")
    assert pauses.count("postcopy-recover") == (mode == "recovery")
    compare(target, expected)
    if isinstance(target, LazyScriptedGuest):
        assert mode == "precopy" or not target.touches
        assert not target.overwritten
        assert not target.misuse


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "preempt", "recovery"])
@pytest.mark.parametrize("make", [scripted, application, parked])
@pytest.mark.parametrize("order", ORDERS, ids="".join)
async def test_blocks_in_any_order(
    autojump_clock: trio.testing.MockClock, order: Order, make: Callable[[Order], trimig.Guest], mode: str
) -> None:
    """Each page in the block that it belongs to, in every mode."""
    source = ScriptedGuest(blocks=PAGES, seed=4)
    target = make(order)
    with contextlib.ExitStack() as stack:
        if isinstance(target, trimig.AppGuest | trimig.ParkedGuest):
            stack.callback(target.close)
        await move(source, target, mode)


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "preempt", "recovery"])
@pytest.mark.parametrize("order", ORDERS, ids="".join)
async def test_a_source_with_its_blocks_in_any_order(
    autojump_clock: trio.testing.MockClock, order: Order, mode: str
) -> None:
    """The other way round, and with pages that change while they are sent."""
    source = ScriptedGuest(blocks={name: PAGES[name] for name in order}, seed=4)
    await move(source, scripted(("a", "b", "c")), mode)


def run_of(block: str, page: int, fill: int) -> ev.PageRun:
    data = np.full((1, PAGE_SIZE), fill, np.uint8)
    return ev.PageRun(at=0, block=block, named=True, offsets=np.array([page * PAGE_SIZE]), data=data)


@pytest.mark.parametrize("announced", [("first", "second"), ("second", "first")])
async def test_faults_of_a_process_with_several_blocks(announced: Order) -> None:
    """By userfaultfd, what is waited for is asked for by the right name, and put where it is waited for."""
    names, fills = ("first", "second"), {"first": 1, "second": 2}
    asked: list[bytes] = []
    received: dict[str, PageBitmap] = {name: np.zeros(4, np.bool_) for name in announced}
    with contextlib.ExitStack() as stack:
        blocks = [stack.enter_context(contextlib.closing(MemfdBlock(name, 4 * PAGE_SIZE))) for name in names]
        missing = stack.enter_context(contextlib.closing(MissingPages.open()))
        memory = UffdMemory(missing, [TrackedRange(name=b.name, address=b.address, pages=4) for b in blocks])
        memory.open()

        async def send(data: bytes) -> None:
            asked.append(data)
            name = names[len(asked) - 1]
            await put(receiver.sink(turns=True), run_of(name, 2, fills[name]))

        receiver = PostcopyReceiver(memory, names, received, send, Counters())
        touch = ctypes.CDLL(None).memmove  # a function of CDLL runs without the GIL
        touch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        found = ctypes.create_string_buffer(8)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receiver.serve)
                for block in blocks:
                    look = functools.partial(touch, ctypes.addressof(found), block.address + 2 * PAGE_SIZE, 8)
                    await trio.to_thread.run_sync(look, abandon_on_cancel=True)  # closing wakes it
                    assert found.raw == bytes([fills[block.name]] * 8)
                nursery.cancel_scope.cancel()
    assert asked == [encode(PageRequest(block=name, start=2 * PAGE_SIZE, length=PAGE_SIZE)) for name in names]
    assert {name: np.flatnonzero(bitmap).tolist() for name, bitmap in receiver.received.items()} == {
        "first": [2],
        "second": [2],
    }
