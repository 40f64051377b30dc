"""Bytes from where they lie in memory: the vector of their pieces, over a socket, and over streams that take only bytes."""

from __future__ import annotations

import itertools
import random
import socket

import numpy as np
import pytest
import trio
import trio.testing

from trimig.channel import vectored
from trimig.channel.channel import Channel
from trimig.channel.channels import Channels
from trimig.channel.limiter import Limiter
from trimig.engine.ram.multifd_sender import packets_vector
from trimig.errors import LocalProtocolError, TransportFailed
from trimig.guest import PAGE_SIZE
from trimig.monitor.statistics import Counters
from trimig.testing import VirtualLink
from trimig.wire.pages.multifd import HEADER_BYTES, PACKET_PAGES


def pieces(sizes: list[int]) -> tuple[vectored.Vector, bytes, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """A vector of pieces of these sizes, the bytes that it names, and the memory, which the caller keeps."""
    memory = np.frombuffer(random.Random(5).randbytes(sum(sizes) * 2), np.uint8).copy()
    vector = np.empty((len(sizes), 2), np.uint64)
    said, at = b"", 0
    for row, size in enumerate(sizes):
        vector[row] = memory.ctypes.data + at, size
        said += memory[at : at + size].tobytes()
        at += 2 * size
    return vector, said, memory


def named(span: vectored.Span, memory: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> bytes:
    start = memory.ctypes.data
    return b"".join(memory[a - start : a - start + n].tobytes() for a, n in vectored.elements(span).tolist())


def test_any_part_of_a_vector_may_be_taken() -> None:
    """What is left is always what was not counted."""
    draw = random.Random(2)
    for _ in range(300):
        vector, said, memory = pieces([draw.choice([1, 2, 7, 100]) for _ in range(draw.randint(1, 6))])
        taken = vectored.Pieces(vector)
        assert (taken.size, taken.left, taken.done) == (len(said), len(said), 0)
        while taken.left:
            assert named(taken.rest, memory) == said[taken.done :]
            taken.advance(draw.randint(1, taken.left))
        assert not taken.rest[1]


@pytest.mark.parametrize("room", [1, 3, 100, 1000])
def test_copied_through_a_small_room(room: int) -> None:
    vector, said, memory = pieces([5, 1, 300, 7])
    parts = [bytes(part) for part in vectored.copied(vectored.Pieces(vector).rest, np.empty(room, np.uint8))]
    assert b"".join(parts) == said
    assert all(len(part) == room for part in parts[:-1])
    assert len(memory)


async def read(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := await stream.receive_some(1 << 16)):
        data += more
    return data


@pytest.mark.parametrize("kind", ["socket", "bytes"])
async def test_what_is_sent_is_what_lies_there(kind: str) -> None:
    """Several system calls, and several copies: it is more than the buffers hold."""
    vector, said, memory = pieces([1344, 1 << 20, 4096, 3 << 20, 10])
    if kind == "socket":
        a, b = socket.socketpair()
        near: trio.abc.Stream = trio.SocketStream(trio.socket.from_stdlib_socket(a))
        far: trio.abc.Stream = trio.SocketStream(trio.socket.from_stdlib_socket(b))
    else:
        link = VirtualLink()
        near, far = link.a, link.b
    channel, got = Channel(near), b""

    async def receive() -> None:
        nonlocal got
        got = await read(far, len(said))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await channel.send_pieces(vector)
    assert got == said
    assert channel.sent == len(said)
    assert not channel.poisoned
    assert len(memory)
    await near.aclose()
    await far.aclose()


async def test_after_a_cancel_nothing_more_is_sent() -> None:
    """Rule C3: the count is exact, the channel is poisoned, and cannot be mended."""
    vector, said, memory = pieces([8 << 20])
    a, b = socket.socketpair()
    near, far = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (a, b))
    channel = Channel(near)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send_pieces, vector)
            begin = await far.receive_some(1 << 16)
            scope.cancel()
    assert 0 < channel.sent < len(said)
    assert channel.poisoned
    assert channel.mend() is None
    with pytest.raises(LocalProtocolError):
        await channel.send(b"x")
    await near.aclose()
    assert begin + await read(far, len(said)) == said[: channel.sent]
    await far.aclose()
    assert len(memory)


async def test_a_broken_connection() -> None:
    vector, _, memory = pieces([8 << 20])
    a, b = socket.socketpair()
    near = trio.SocketStream(trio.socket.from_stdlib_socket(a))
    b.close()
    channel = Channel(near)
    with pytest.raises(TransportFailed, match="broke while sending"):
        await channel.send_pieces(vector)
    assert channel.poisoned
    assert len(memory)
    await near.aclose()


def test_the_vector_of_packets() -> None:
    """Header, its pages, header: neighbours in memory are one piece, unless a header stands between them."""
    pages = np.frombuffer(random.Random(1).randbytes(400 * PAGE_SIZE), np.uint8).reshape(-1, PAGE_SIZE).copy()
    draw = random.Random(3)
    for count in (1, 2, PACKET_PAGES, PACKET_PAGES + 1, 300, 400):
        indices = np.array(sorted(draw.sample(range(400), count)), np.int64)
        headers = np.arange(-(-count // PACKET_PAGES) * HEADER_BYTES, dtype=np.uint8).reshape(-1, HEADER_BYTES)
        parts = []
        for row, start in enumerate(range(0, count, PACKET_PAGES)):
            parts += [headers[row].tobytes(), pages[indices[start : start + PACKET_PAGES]].tobytes()]
        plan = vectored.Pieces(packets_vector(headers, pages, indices))
        assert b"".join(bytes(part) for part in vectored.copied(plan.rest, np.empty(1 << 20, np.uint8))) == b"".join(
            parts
        )
    assert len(packets_vector(headers, pages, np.arange(400, dtype=np.int64))) == 2 * 4
    gaps = itertools.pairwise(packets_vector(headers[:1], pages, np.array([3, 4, 9], np.int64)).tolist())
    assert [size for _, (_, size) in gaps] == [2 * PAGE_SIZE, PAGE_SIZE]


async def test_bytes_that_compression_has_saved_may_be_sent_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """A sender that waits for the next window goes on in this one."""
    limiter = Limiter(Channels(), 100 * (8 + PAGE_SIZE) * 10, Counters())
    assert await limiter.pages(1000) == 100
    got = 0

    async def wait() -> None:
        nonlocal got
        got = await limiter.pages(1000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        limiter.refund(40 * (8 + PAGE_SIZE))
        await trio.testing.wait_all_tasks_blocked()
    assert got == 40
    assert trio.current_time() == 0
