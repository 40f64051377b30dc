"""Compression in real threads, over a real socket: every byte, and no thread and no descriptor after a cancel."""

from __future__ import annotations

import gc
import os
import random

import numpy as np
import pytest
import trio

import trimig
from trimig import MiB
from trimig.channel.offload import limiter

SIZE = 16 * MiB
#: Seconds for one migration; far more than a loaded machine needs.
LIMIT = 60


def able(**parameters: int | bool) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(compress=True),
        parameters=trimig.Parameters(max_bandwidth=0, **parameters),  # type: ignore[arg-type]  # as they are
    )


def machine(*, running: bool) -> trimig.AppGuest:
    """A guest with text, random pages and zero pages."""
    guest = trimig.AppGuest("text", running=running, dirty_tracking="compare")
    pages = guest.add_ram("ram", SIZE).pages
    if running:
        pages[:] = np.resize(np.frombuffer(b"the quick brown fox jumps over the lazy dog\n", np.uint8), SIZE).reshape(
            -1, 4096
        )
        pages[::5] = np.random.default_rng(3).integers(0, 256, pages[::5].shape, np.uint8)
        pages[::7] = 0
    return guest


async def move(
    source: trimig.AppGuest, target: trimig.AppGuest, config: trimig.Config, scope: trio.CancelScope
) -> None:
    """Migrate over a socket of this machine; *scope* cancels the source."""
    listening = trimig.Monitor()

    async def receive() -> None:
        try:
            await trimig.receive(target, "tcp:127.0.0.1:0", config, monitor=listening)
        except trimig.TrimigError:
            assert scope.cancel_called

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        while not listening.addresses:
            await listening.wait_changed()
        with scope:
            await trimig.migrate(source, listening.addresses[0], config)
        if scope.cancelled_caught:
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "parameters",
    [{}, {"compress_threads": 3, "decompress_threads": 3, "compress_wait_thread": False}],
    ids=["default", "not waiting"],
)
async def test_every_byte_arrives(parameters: dict[str, int | bool]) -> None:
    """S5: with threads that work at the same time."""
    with machine(running=True) as source, machine(running=False) as target, trio.fail_after(LIMIT):
        await move(source, target, able(**parameters), trio.CancelScope())
        assert np.array_equal(source.ram[0].pages, target.ram[0].pages)
        assert limiter().borrowed_tokens == 0


@pytest.mark.parametrize("seed", range(4))
async def test_cancel_leaves_no_thread_and_no_descriptor(seed: int) -> None:
    """F10, F11: at a random moment; then the same guest goes."""
    seconds = random.Random(seed).uniform(0.01, 0.4)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with machine(running=True) as source, trio.fail_after(2 * LIMIT):
        with machine(running=False) as target:
            await move(source, target, able(compress_level=6), trio.move_on_after(seconds))
            assert limiter().borrowed_tokens == 0
            if source.owner is trimig.Owner.ELSEWHERE:
                return  # it was over before the cancel
            assert source.run_state == "running"
        with machine(running=False) as target:
            await move(source, target, able(), trio.CancelScope())
            assert np.array_equal(source.ram[0].pages, target.ram[0].pages)
    gc.collect()
    assert limiter().borrowed_tokens == 0
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # trio keeps one to wake its loop
