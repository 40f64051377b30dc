"""Missing pages: real faults of a thread without the GIL, and of another process, served from a trio task."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import trio

from trimig.guest import PAGE_SIZE
from trimig.memory import MemfdBlock, MissingPages

MakeBlock = Callable[..., MemfdBlock]

_memmove = ctypes.CDLL(None).memmove  # a function of CDLL runs without the GIL
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@pytest.fixture
def missing() -> Iterator[MissingPages]:
    made = MissingPages.open()
    yield made
    made.close()


def touch(address: int) -> bytes:
    """The first bytes of a page; sleeps while it is missing."""
    found = ctypes.create_string_buffer(8)
    _memmove(ctypes.addressof(found), address, 8)
    return found.raw


def page(fill: int, count: int = 1) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.full(count * PAGE_SIZE, fill, np.uint8)


async def next_pages(missing: MissingPages) -> list[int]:
    await trio.lowlevel.wait_readable(missing.fileno())
    return [int(p) for p in missing.read().pages]


async def test_a_touched_page_waits_until_it_is_placed(make_block: MakeBlock, missing: MissingPages) -> None:
    """O: the touch is in the middle of a page, the fault names its beginning."""
    block = make_block(4)
    missing.register(block.address, block.length)
    seen: list[bytes] = []

    async def toucher() -> None:
        seen.append(await trio.to_thread.run_sync(touch, block.address + 2 * PAGE_SIZE + 100))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(toucher)
            assert await next_pages(missing) == [block.address + 2 * PAGE_SIZE]
            assert seen == []
            assert missing.place(block.address + 2 * PAGE_SIZE, page(7)) == 1
    assert seen == [b"\7" * 8]
    assert missing.read().pages.tolist() == []


async def test_threads_that_wait_for_the_same_page_are_all_named_and_all_woken(
    make_block: MakeBlock, missing: MissingPages
) -> None:
    block = make_block(1)
    missing.register(block.address, block.length)
    seen: list[bytes] = []

    async def toucher() -> None:
        seen.append(await trio.to_thread.run_sync(touch, block.address))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(toucher)
            threads: list[int] = []
            while len(threads) < 3:
                await trio.lowlevel.wait_readable(missing.fileno())
                faults = missing.read()
                assert set(faults.pages.tolist()) == {block.address}
                threads += faults.threads.tolist()
            assert len(set(threads)) == 3
            assert os.getpid() not in threads
            missing.place(block.address, page(9))
    assert seen == [b"\x09" * 8] * 3


def test_what_is_there_already_is_left_alone(make_block: MakeBlock, missing: MissingPages) -> None:
    """A run with pages in its middle that are there: the others are placed, and nothing is lost."""
    block = make_block(8)
    missing.register(block.address, block.length)
    assert missing.place(block.address + 3 * PAGE_SIZE, page(1, 2)) == 2
    assert missing.place(block.address, page(2, 8)) == 6
    assert block.pages[:, 0].tolist() == [2, 2, 2, 1, 1, 2, 2, 2]
    assert missing.place(block.address, page(3, 8)) == 0


def test_zero_pages(make_block: MakeBlock, missing: MissingPages) -> None:
    block = make_block(8)
    missing.register(block.address, block.length)
    missing.place(block.address + PAGE_SIZE, page(5))
    assert missing.place_zeros(block.address, 8 * PAGE_SIZE) == 7
    assert block.pages[:, 4095].tolist() == [0, 5, 0, 0, 0, 0, 0, 0]


def test_a_discarded_page_is_missing_again(make_block: MakeBlock, missing: MissingPages) -> None:
    block = make_block(2)
    missing.register(block.address, block.length)
    missing.place(block.address, page(5, 2))
    block.discard()
    assert missing.place(block.address, page(6, 2)) == 2
    assert (block.pages == 6).all()


async def test_closing_wakes_the_waiting_thread(make_block: MakeBlock) -> None:
    """What never came reads as zero: the caller decides whether it may be read."""
    missing = MissingPages.open()
    block = make_block(1)
    missing.register(block.address, block.length)
    seen: list[bytes] = []

    async def toucher() -> None:
        seen.append(await trio.to_thread.run_sync(touch, block.address))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(toucher)
            await next_pages(missing)
            missing.close()
            missing.close()
    assert seen == [bytes(8)]


@pytest.mark.parametrize("length", [1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_no_whole_pages(make_block: MakeBlock, missing: MissingPages, length: int) -> None:
    block = make_block(2)
    missing.register(block.address, block.length)
    with pytest.raises(ValueError, match="whole pages"):
        missing.place(block.address, np.zeros(length, np.uint8))
    with pytest.raises(ValueError, match="whole pages"):
        missing.place_zeros(block.address, length)
    with pytest.raises(ValueError, match="whole pages"):
        missing.place(block.address, np.zeros(2 * PAGE_SIZE, np.uint8)[::2])


def test_outside_of_what_is_registered(make_block: MakeBlock, missing: MissingPages) -> None:
    block = make_block(2)
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        missing.place(block.address, page(1))


class Child:
    """Another process with a block of its own mapping, which reads the pages it is told to."""

    def __init__(self, block: MemfdBlock) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            numbers = (theirs.fileno(), block.fd)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.processes.memory.toucher", *map(str, (*numbers, block.length))],
                pass_fds=numbers,
            )
        raw, fds, _, _ = socket.recv_fds(self.socket, 8, 1)
        self.base = int.from_bytes(raw, "little")
        self.missing = MissingPages(fds[0])

    def ask(self, number: int) -> None:
        self.socket.sendall(number.to_bytes(4, "little"))

    async def answer(self) -> int:
        await trio.lowlevel.wait_readable(self.socket)
        return self.socket.recv(1)[0]

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()
        self.missing.close()


async def test_another_process_is_served_here(make_block: MakeBlock) -> None:
    block = make_block(16)
    child = Child(block)
    try:
        with trio.fail_after(20):
            for number in (5, 0, 15):
                child.ask(number)
                assert await next_pages(child.missing) == [child.base + number * PAGE_SIZE]
                assert child.missing.place(child.base + number * PAGE_SIZE, page(number + 100)) == 1
                assert await child.answer() == number + 100
        assert block.pages[5, 0] == 105
    finally:
        child.close()


def test_a_process_that_has_ended(make_block: MakeBlock) -> None:
    block = make_block(1)
    child = Child(block)
    base = child.base
    try:
        child.process.kill()
        child.process.wait()
        with pytest.raises(ProcessLookupError):
            child.missing.place(base, page(1))
        assert child.missing.read().pages.tolist() == []
    finally:
        child.close()
