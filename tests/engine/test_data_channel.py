"""One data channel at the destination: a thread that reads many packets finds the same as a stream that gives piece by piece."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import socket
from collections.abc import AsyncIterator
from typing import Final

import numpy as np
import pytest
import trio
import trio.testing
from numpy.typing import NDArray

from trimig.channel import offload
from trimig.channel.channel import Channel
from trimig.engine.ram.multifd_channel import DataChannel
from trimig.engine.ram.receiver import RamReceiver
from trimig.errors import MigrationError
from trimig.guest import PAGE_SIZE
from trimig.memory.block import MemfdBlock
from trimig.monitor.statistics import Counters
from trimig.wire.events import RamList
from trimig.wire.pages.multifd import HEADER_BYTES, PACKET_PAGES, Packet, write_packet

PAGES: Final = 12 * PACKET_PAGES
BLOCKS: Final = {"ram": PAGES * PAGE_SIZE}
KINDS: Final = ("a thread", "no thread", "no socket")


@dataclasses.dataclass(kw_only=True)
class Found:
    """What a channel has brought."""

    pages: NDArray[np.uint8]
    received: NDArray[np.bool_]
    syncs: list[int]
    checks: int
    counted: int
    normal: int
    at: int
    error: str


def packets(order: NDArray[np.int64], content: NDArray[np.uint8], *, sync_at: int) -> list[bytes]:
    """Packets of the pages in *order*: the one of the number *sync_at* synchronises, and the last one is not full."""
    found = []
    for number, start in enumerate(range(0, len(order), PACKET_PAGES)):
        part = order[start : start + PACKET_PAGES]
        sync = number == sync_at
        size = len(part) * PAGE_SIZE
        head = write_packet(
            Packet(number=number, block="ram", offsets=part * PAGE_SIZE, size=size, sync=sync), new=False
        )
        found.append(head + content[part].tobytes())
    return [*found, write_packet(Packet(number=len(found), sync=True), new=True)]


@contextlib.asynccontextmanager
async def channel_of(kind: str, data: bytes, seed: int) -> AsyncIterator[Channel]:
    """A channel on which *data* comes, in pieces, and then its end."""
    draw = random.Random(seed)
    sender: trio.abc.SendStream
    receiver: trio.abc.ReceiveStream
    if kind == "no socket":
        sender, receiver = trio.testing.memory_stream_one_way_pair()
    else:
        sender, receiver = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    holders = [object() for _ in range(offload.MAX_PUMPS)] if kind == "no thread" else []
    for holder in holders:
        offload.pumps().acquire_on_behalf_of_nowait(holder)

    async def send() -> None:
        rest = data
        with contextlib.suppress(trio.BrokenResourceError):  # the reader has found an error
            while rest:
                size = draw.choice((1, HEADER_BYTES, 70_001, 3 << 20))
                await sender.send_all(rest[:size])
                rest = rest[size:]
                await trio.testing.wait_all_tasks_blocked()
        await sender.aclose()

    async with receiver, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        yield Channel(receiver)
        await receiver.aclose()
    for holder in holders:
        offload.pumps().release_on_behalf_of(holder)


async def read(kind: str, data: bytes, *, cold: bool, seed: int = 0, refuse_from: int = 1 << 30) -> Found:
    """Read the channel to its end or to an error, as :class:`MultifdReceiver` does it."""
    counters, syncs, checks, error = Counters(), [], 0, ""

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks >= refuse_from:
            raise MigrationError("no pages may come here")

    with contextlib.closing(MemfdBlock("ram", PAGES * PAGE_SIZE)) as block:
        if not cold:
            block.pages[:] = 7
        ram = RamReceiver(counters)
        ram.open(RamList(blocks=tuple(BLOCKS.items()), at=0), [block])
        async with channel_of(kind, data, seed) as channel:
            channel_reader = DataChannel(0, channel, ram, counters, 0)
            channel_reader.begin(BLOCKS, zero_pages=False)
            try:
                while (packet := await channel_reader.next()) is not None:
                    if len(packet.offsets):
                        check()
                        await channel_reader.place(packet, check)
                    if packet.sync:
                        syncs.append(channel_reader.at)
                        assert channel.received == channel_reader.at  # nothing behind it has been read
                        channel_reader.synchronised()
            except MigrationError as failure:
                error = str(failure)
        return Found(
            pages=block.pages.copy(),
            received=ram.received()["ram"].copy(),
            syncs=syncs,
            checks=checks,
            counted=counters.multifd_bytes,
            normal=counters.normal,
            at=channel_reader.at,
            error=error,
        )


def memory(seed: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Pages in an order with runs and single ones, and their contents."""
    generator = np.random.default_rng(seed)
    order = np.arange(PAGES, dtype=np.int64)
    order[2 * PACKET_PAGES : 4 * PACKET_PAGES] = generator.permutation(order[2 * PACKET_PAGES : 4 * PACKET_PAGES])
    order[6 * PACKET_PAGES : 8 * PACKET_PAGES : 2] = order[6 * PACKET_PAGES : 8 * PACKET_PAGES : 2][::-1].copy()
    return order[: PAGES - 17], generator.integers(0, 256, (PAGES, PAGE_SIZE), np.uint8)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "populated"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_all_pages_come_into_their_places(seed: int, kind: str, *, cold: bool) -> None:
    order, content = memory(seed)
    said = packets(order, content, sync_at=5)
    found = await read(kind, b"".join(said), cold=cold, seed=seed)
    assert found.error == ""
    assert (found.pages[order] == content[order]).all()
    others = np.ones(PAGES, np.bool_)
    others[order] = False
    assert (found.pages[others] == (0 if cold else 7)).all()
    assert np.array_equal(found.received, ~others)
    assert found.syncs == [len(b"".join(said[:6])), len(b"".join(said))]
    assert found.checks == len(said) - 1
    assert (found.normal, found.counted, found.at) == (len(order), found.at, len(b"".join(said)))


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "populated"])
@pytest.mark.parametrize("kind", KINDS[:2])
async def test_an_end_at_any_byte_keeps_the_whole_packets(kind: str, *, cold: bool) -> None:
    """And says where it is, as a stream says it that gives the bytes piece by piece."""
    order, content = memory(0)
    said = packets(order, content, sync_at=3)
    draw = random.Random(4)
    first = len(said[0])
    cuts = [0, 1, first - 1, first, first + 1, first + HEADER_BYTES, first + HEADER_BYTES + 1]
    for cut in cuts + [draw.randrange(len(b"".join(said))) for _ in range(6)]:
        data = b"".join(said)[:cut]
        found, other = await read(kind, data, cold=cold), await read("no socket", data, cold=cold)
        assert (found.error, found.at, found.syncs) == (other.error, other.at, other.syncs)
        assert np.array_equal(found.received, other.received)
        assert (found.pages[found.received] == content[found.received]).all()
        assert found.normal == other.normal == int(np.count_nonzero(found.received))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1, 4])
async def test_a_malformed_header_is_named_by_its_place(kind: str, number: int) -> None:
    order, content = memory(1)
    said = packets(order, content, sync_at=3)
    at = len(b"".join(said[:number]))
    said[number] = b"\0" + said[number][1:]
    found = await read(kind, b"".join(said), cold=False)
    assert "data channel 0: magic 00223344" in found.error
    assert f"byte {at}" in found.error
    assert int(np.count_nonzero(found.received)) == number * PACKET_PAGES


@pytest.mark.parametrize("kind", KINDS)
async def test_pages_that_may_not_come_are_refused_at_their_packet(kind: str) -> None:
    order, content = memory(2)
    said = packets(order, content, sync_at=9)
    found = await read(kind, b"".join(said), cold=True, refuse_from=4)
    assert found.error == "no pages may come here"
    assert int(np.count_nonzero(found.received)) == 3 * PACKET_PAGES
    assert found.at == len(b"".join(said[:3])) + HEADER_BYTES


async def test_a_source_may_be_silent_between_two_packets() -> None:
    """For longer than the stall timeout. The thread has ended by then, and the packet is in its place."""
    order, content = memory(0)
    first, second, *_ = packets(order, content, sync_at=20)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    with contextlib.closing(MemfdBlock("ram", PAGES * PAGE_SIZE)) as block:
        ram = RamReceiver(Counters())
        ram.open(RamList(blocks=tuple(BLOCKS.items()), at=0), [block])
        async with ours, theirs, trio.open_nursery() as nursery:
            reader = DataChannel(0, Channel(theirs, stall_timeout=0.05), ram, Counters(), 0)
            reader.begin(BLOCKS, zero_pages=False)
            placed = trio.Event()

            async def send() -> None:
                await ours.send_all(first)
                await placed.wait()
                await trio.sleep(0.1)
                await ours.send_all(second)

            nursery.start_soon(send)
            for _ in range(2):
                packet = await reader.next()
                assert packet is not None
                await reader.place(packet, lambda: None)
                assert offload.pumps().borrowed_tokens == 0
                placed.set()
        assert (block.pages[: 2 * PACKET_PAGES] == content[: 2 * PACKET_PAGES]).all()
