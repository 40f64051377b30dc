"""Transfers over real sockets, in a thread and without one: what left is what came, and nothing stays behind."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final

import numpy as np
import pytest
import trio
import trio.testing
from numpy.typing import NDArray

import trimig
from trimig.channel import offload, pump
from trimig.channel.channel import Channel
from trimig.channel.step import Step
from trimig.channel.vectored import Records
from trimig.guest import PAGE_SIZE

LIMIT: Final = 60
PAGES: Final = 1024
RECORD: Final = 8 + PAGE_SIZE
SIZE: Final = PAGES * RECORD
_BUFFER_BYTES: Final = 1 << 17


@pytest.fixture(scope="module")
def memory() -> NDArray[np.uint8]:
    """Pages that all differ."""
    return np.random.default_rng(3).integers(0, 256, (PAGES, PAGE_SIZE), np.uint8)


@pytest.fixture(scope="module")
def stream(memory: NDArray[np.uint8]) -> bytes:
    """Their records."""
    records = np.empty((PAGES, RECORD), np.uint8)
    records[:, :8] = words().view(np.uint8).reshape(-1, 8)
    records[:, 8:] = memory
    return records.tobytes()


def words() -> NDArray[np.uint64]:
    return np.arange(PAGES, dtype=np.uint64)


async def pair(kind: str) -> tuple[trio.SocketStream, trio.SocketStream]:
    if kind == "unix":
        a, b = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
        return a, b
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    a = await trio.testing.open_stream_to_socket_listener(listener)
    b = await listener.accept()
    await listener.aclose()
    return a, b


@contextlib.asynccontextmanager
async def connected(kind: str = "tcp") -> AsyncIterator[tuple[Channel, trio.SocketStream]]:
    """A channel, and the other end. At the end no thread of ours runs any more."""
    a, b = await pair(kind)
    threads, tokens = threading.active_count(), offload.pumps().borrowed_tokens
    try:
        with trio.fail_after(LIMIT):
            channel = Channel(a)
            for end in (a, b):  # small buffers, so that a transfer waits again and again
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            yield channel, b
    finally:
        await trio.aclose_forcefully(a)
        await trio.aclose_forcefully(b)
    assert offload.pumps().borrowed_tokens == tokens
    # trio keeps the thread of the last transfer for the next one.
    assert threading.active_count() <= threads + 1


def plan_of(memory: NDArray[np.uint8], heads: NDArray[np.uint64]) -> Records:
    addresses = np.uint64(memory.ctypes.data) + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_SIZE)
    return Records(heads.ctypes.data, 8, addresses, PAGE_SIZE)


@contextlib.contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch, why: str) -> Iterator[None]:
    """Transfers have no thread, for one reason or another."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    def exhausted(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    holders = [object() for _ in range(offload.MAX_PUMPS)] if why == "all are taken" else []
    with monkeypatch.context() as patch:
        if why == "no descriptor":
            patch.setattr(os, "eventfd", refuse)
        if why == "no thread":
            patch.setattr(trio.lowlevel, "start_thread_soon", exhausted)
        for holder in holders:
            offload.pumps().acquire_on_behalf_of_nowait(holder)
        yield
        for holder in holders:
            offload.pumps().release_on_behalf_of(holder)


async def taken(end: trio.SocketStream, wanted: int) -> bytes:
    data = bytearray()
    while len(data) < wanted and (part := await end.receive_some(min(1 << 20, wanted - len(data)))):
        data += part
    return bytes(data)


WHYS: Final = ("", "all are taken", "no descriptor", "no thread")


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("why", WHYS)
async def test_records_leave_and_come(
    monkeypatch: pytest.MonkeyPatch, memory: NDArray[np.uint8], stream: bytes, why: str, kind: str
) -> None:
    """In both directions; the other end is a plain socket of trio."""
    with no_threads(monkeypatch, why):
        async with connected(kind) as (channel, end):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.send_pages, b"", words(), memory, np.arange(PAGES))
                assert await taken(end, SIZE) == stream
            assert (channel.sent, channel.poisoned) == (SIZE, False)
            placed, heads = np.zeros_like(memory), np.zeros(PAGES, np.uint64)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end.send_all, stream + b"more")
                assert not await channel.receive_vector(plan_of(placed, heads), SIZE)
            assert (placed == memory).all()
            assert (heads == words()).all()
            assert channel.received == SIZE
            four = bytearray(8)  # SO_RCVLOWAT is back at one byte, or this would wait for ever
            assert await channel.receive_into(memoryview(four)) == 4


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("why", WHYS[:2])
async def test_a_cancelled_send_has_sent_what_it_says(
    monkeypatch: pytest.MonkeyPatch, memory: NDArray[np.uint8], stream: bytes, why: str, *, reads: bool
) -> None:
    """At random bytes, while the peer reads, and while it does not. The rest of the record is known."""
    choose = random.Random(7)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100 if not why else 10):
        after = choose.randrange(SIZE) if reads else 0
        with no_threads(monkeypatch, why):
            async with connected(choose.choice(("tcp", "unix"))) as (channel, end):
                got = b""
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(channel.send_pages, b"", words(), memory, np.arange(PAGES))
                        if reads:
                            got = await taken(end, after)
                        else:
                            sent = -1
                            while channel.sent != sent:  # until the kernel takes nothing more, or nearly so
                                sent = channel.sent
                                await trio.testing.wait_all_tasks_blocked(0.001)
                        scope.cancel()
                assert channel.poisoned == scope.cancelled_caught  # it may have been done by then
                rest = channel.mend()
                assert rest is not None
                await channel.stream.aclose()
                got += await taken(end, SIZE)
                assert len(got) == channel.sent
                assert got == stream[: len(got)]
                assert stream[channel.sent : channel.sent + len(rest)] == rest
                assert (channel.sent + len(rest)) % RECORD == 0
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("why", WHYS[:2])
async def test_a_cancelled_read_has_taken_what_it_says(
    monkeypatch: pytest.MonkeyPatch, memory: NDArray[np.uint8], stream: bytes, why: str
) -> None:
    """The next read goes on behind it."""
    choose = random.Random(8)
    for _ in range(50 if not why else 10):
        given = choose.randrange(SIZE)
        with no_threads(monkeypatch, why):
            async with connected(choose.choice(("tcp", "unix"))) as (channel, end):
                placed, heads = np.zeros_like(memory), np.zeros(PAGES, np.uint64)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(channel.receive_vector, plan_of(placed, heads), SIZE)
                        await end.send_all(stream[:given])
                        scope.cancel()
                assert scope.cancelled_caught
                came = channel.received
                await end.send_eof()
                rest = await taken(channel.stream, SIZE) if isinstance(channel.stream, trio.SocketStream) else b""
                assert stream[came:given] == rest
                whole = came // RECORD
                assert (placed[:whole] == memory[:whole]).all()
                assert not placed[whole + 1 :].any()


@pytest.mark.parametrize("how", ["cut", "closed here", "closed there", "reset"])
@pytest.mark.parametrize("direction", ["send", "receive"])
async def test_a_broken_connection_ends_the_thread(memory: NDArray[np.uint8], direction: str, how: str) -> None:
    """It waits for a peer that neither reads nor writes."""
    async with connected() as (channel, end):
        failed: list[BaseException | None] = []

        async def transfer() -> None:
            try:
                if direction == "send":
                    await channel.send_pages(b"", words(), memory, np.arange(PAGES))
                else:
                    placed, heads = np.zeros_like(memory), np.zeros(PAGES, np.uint64)
                    assert await channel.receive_vector(plan_of(placed, heads), SIZE)
                    failed.append(None)
            except trimig.TransportFailed as error:
                failed.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert offload.pumps().borrowed_tokens == 1
            match how:
                case "cut":
                    assert channel.cut()
                case "closed here":
                    await channel.stream.aclose()
                case "closed there":
                    await end.aclose()
                case "reset":
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    await end.aclose()
        (error,) = failed
        ends = direction == "receive" and how in ("cut", "closed there")
        assert (error is None) == ends
        if error is not None:
            assert "the connection broke while" in str(error)
        assert channel.poisoned == (direction == "send")


@pytest.mark.parametrize("direction", ["send", "receive"])
@pytest.mark.parametrize("why", WHYS[:2])
async def test_a_peer_that_does_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, memory: NDArray[np.uint8], why: str, direction: str
) -> None:
    with no_threads(monkeypatch, why):
        async with connected() as (channel, _):
            assert isinstance(channel.stream, trio.SocketStream)
            sock = channel.stream.socket
            step = Step(plan_of(memory, words()))
            move: Callable[..., Awaitable[None]] = pump.send if direction == "send" else pump.receive
            said = "took no data" if direction == "send" else "sent nothing"
            with pytest.raises(trimig.TransportFailed, match=f"the peer {said} for 100 ms"):
                await move(sock, step, SIZE, 0.1)
            assert (step.done > 0) == (direction == "send")


async def test_an_error_of_the_plan_is_no_error_of_the_connection(stream: bytes) -> None:
    """A full disk, for example."""

    class Full(Records):
        def advance(self, count: int) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

    async with connected() as (channel, end):
        placed = np.zeros((PAGES, PAGE_SIZE), np.uint8)
        heads = np.zeros(PAGES, np.uint64)
        addresses = np.uint64(placed.ctypes.data) + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        await end.send_all(stream[:RECORD])
        with pytest.raises(OSError, match="no space left"):
            await channel.receive_vector(Full(heads.ctypes.data, 8, addresses, PAGE_SIZE), SIZE)
        assert 0 < channel.received <= RECORD


async def test_a_task_that_is_cancelled_already_moves_nothing(memory: NDArray[np.uint8]) -> None:
    async with connected() as (channel, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.send_pages(b"", words(), memory, np.arange(PAGES))
        assert channel.sent == 0
        assert channel.mend() == b""


async def test_the_run_loop_goes_on_during_a_transfer(memory: NDArray[np.uint8], stream: bytes) -> None:
    """Another task is run meanwhile, and sees the count rise."""
    async with connected() as (channel, end):
        seen: set[int] = set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send_pages, b"", words(), memory, np.arange(PAGES))
            got = b""
            while len(got) < SIZE:
                got += await end.receive_some(1 << 20)
                seen.add(channel.sent)
        assert got == stream
        assert len(seen) > 3
