"""A guest in a worker process that runs while part of its memory is missing: served from a trio task, page by page, and proved."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest
import trio

import trimig
from trimig.errors import GuestFailed
from trimig.guest import PAGE_SIZE
from trimig.guests.workload.guest import MiB, WorkloadGuest
from trimig.memory import UffdMemory
from trimig.policy.page_order import PageOrder

SIZE = 4 * MiB
PAGES = SIZE // PAGE_SIZE
LIMIT = 60


@contextlib.asynccontextmanager
async def a_pair(missing: int) -> AsyncIterator[tuple[WorkloadGuest, WorkloadGuest, UffdMemory, np.ndarray]]:
    """A paused source, a destination with its state and all its memory but *missing* pages, and which those are."""
    async with (
        WorkloadGuest.open(size=SIZE, hot=MiB, dirty_rate=40 * MiB, seed=5) as source,
        WorkloadGuest.open(size=SIZE, hot=MiB, running=False) as target,
    ):
        while (await source.stats()).writes < 100:  # noqa: ASYNC110 - it is another process
            await trio.sleep(0.002)
        await source.pause()
        chosen = np.zeros(PAGES, np.bool_)
        chosen[np.random.default_rng(3).permutation(PAGES)[:missing]] = True
        chosen[:8] = True  # of the hot ones
        target.block.pages[:] = source.block.pages
        for page in np.flatnonzero(chosen):
            target.block.discard_slice(int(page), 1)
        memory = await target.missing_memory()
        try:
            await target.load_devices(await source.save_devices())
            yield source, target, memory, chosen
        finally:
            memory.close()


async def test_a_guest_runs_on_memory_that_follows() -> None:
    """O7, P12: the pages that it waits for first, and not one write is lost."""
    with trio.fail_after(LIMIT):
        async with a_pair(700) as (source, target, memory, chosen):
            order = PageOrder([chosen.copy()])
            target.set_owner(trimig.Owner.HERE)
            await target.activate("running")
            served = 0
            while (run := order.next_batch(4)) is not None:
                for page in run.pages.tolist():
                    memory.place(run.block, page, source.block.pages[page : page + 1])
                served += run.urgent
                with trio.move_on_after(0.001):
                    await trio.lowlevel.wait_readable(memory.fileno())
                for wait in memory.waits():
                    assert wait.thread != target.pid  # the thread that touches, not the one that answers
                    order.request(wait.block, wait.page, 1)
            memory.close()
            (blocked,) = await target.memory_is_whole()
            times = target.touch_times
            assert times is not None
            assert blocked == times.blocked / 1e9
            assert served > 0
            assert times.touches >= served
            await target.pause()
            proof = await target.verify()
            assert proof.ok, str(proof)
            assert proof.writes >= source.state.writes


async def test_one_that_waits_can_be_paused_asked_and_resumed() -> None:
    """The line to the worker stays open while its guest sleeps in a fault; a pause then holds."""
    with trio.fail_after(LIMIT):
        async with a_pair(PAGES) as (source, target, memory, chosen):
            target.set_owner(trimig.Owner.HERE)
            await target.activate("running")
            await trio.lowlevel.wait_readable(memory.fileno())
            (wait,) = memory.waits()
            assert (await target.stats()).waiting
            await target.pause()
            before = (await target.stats()).writes
            memory.place(0, wait.page, source.block.pages[wait.page : wait.page + 1])
            await trio.sleep(0.05)
            assert (await target.stats()).writes == before
            await target.resume()
            await trio.lowlevel.wait_readable(memory.fileno())
            assert (await target.stats()).writes == before + 1
            assert memory.place(0, 0, source.block.pages) == PAGES - 1
            assert chosen.all()


async def test_what_would_look_at_missing_pages_is_refused() -> None:
    with trio.fail_after(LIMIT):
        async with a_pair(10) as (_, target, _memory, _chosen):
            with pytest.raises(GuestFailed, match="pages of its memory are missing"):
                await target.verify()


async def test_a_running_guest_has_its_memory() -> None:
    async with WorkloadGuest.open(size=SIZE, hot=MiB, seed=1) as guest:
        with pytest.raises(GuestFailed, match="the guest runs"):
            await guest.missing_memory()
        with pytest.raises(GuestFailed, match="no page was missing"):
            await guest.memory_is_whole()


async def test_pages_outside() -> None:
    async with WorkloadGuest.open(size=SIZE, hot=MiB, running=False) as guest:
        memory = await guest.missing_memory()
        try:
            with pytest.raises(ValueError, match=r"pages 1024\.\.1025 are not within the 1024 of 'ram'"):
                memory.place_zeros(0, PAGES, 1)
        finally:
            memory.close()
