"""multifd and XBZRLE over real sockets, disturbed at random moments: nothing is left, and the next attempt completes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import socket
import threading

import numpy as np
import pytest
import trio

import trimig
from trimig import MiB
from trimig.channel import offload
from trimig.config.peer import PEERS

SIZE = 8 * MiB
#: Bytes per second: a migration takes a quarter of a second.
RATE = 32 * MiB
#: Seconds for one case; far more than a loaded machine needs.
LIMIT = 120
CHANNELS = 3
KINDS = {
    "multifd of 7.2": ("qemu-7.2", "none"),
    "multifd of 11.1": ("qemu-11.1", "none"),
    "multifd with zlib": ("qemu-7.2", "zlib"),
    "multifd with zstd": ("qemu-11.1", "zstd"),
    "xbzrle": None,
}
WHAT = ("source is cancelled", "destination is cancelled", "one connection is cut", "all connections are cut")


def config_of(kind: str, rate: int) -> trimig.Config:
    multifd = KINDS[kind]
    base = trimig.Config(
        capabilities=trimig.Capabilities(multifd=multifd is not None, xbzrle=multifd is None),
        parameters=trimig.Parameters(
            max_bandwidth=rate, multifd_channels=CHANNELS, multifd_compression=multifd[1] if multifd else "none"
        ),
    )
    return dataclasses.replace(base, peer=PEERS[multifd[0]]) if multifd else base


def machine(*, running: bool) -> trimig.AppGuest:
    guest = trimig.AppGuest("swept", running=running, dirty_tracking="compare")
    pages = guest.add_ram("ram", SIZE).pages
    if running:
        pages[:] = np.random.default_rng(1).integers(0, 256, pages.shape, np.uint8)
        pages[::7] = 0
    return guest


def sockets() -> dict[int, str]:
    """The sockets of this process, by descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the list itself
            continue
        if target.startswith("socket:"):
            found[int(name)] = target
    return found


class Attempt:
    """One migration of *source* in this process, over tcp."""

    def __init__(self, source: trimig.AppGuest, target: trimig.AppGuest, config: trimig.Config) -> None:
        self.guests = (source, target)
        self.config = config
        self.monitors = (trimig.Monitor(), trimig.Monitor())
        self.ends: dict[str, trimig.Summary | trimig.TrimigError] = {}
        self._before = sockets()

    async def _end(self, name: str, uri: str | None) -> None:
        sender, taker = self.monitors
        try:
            if uri is None:
                self.ends[name] = await trimig.receive(self.guests[1], "tcp:127.0.0.1:0", self.config, monitor=taker)
            else:
                self.ends[name] = await trimig.migrate(self.guests[0], uri, self.config, monitor=sender)
        except trimig.TrimigError as error:
            self.ends[name] = error

    async def run(self, what: str = "", share: float = 0.0, chosen: random.Random | None = None) -> None:
        """Disturb it when that *share* of the memory has been sent, or not."""
        sender, taker = self.monitors
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end, "destination", None)
            while not taker.addresses:
                await taker.wait_changed()
            async with trio.open_nursery() as inner:
                if chosen is not None:
                    inner.start_soon(self._disturb, what, share, chosen)
                await self._end("source", taker.addresses[0])
                inner.cancel_scope.cancel("it is over")
            if sender.status is not trimig.Status.COMPLETED and taker.status is trimig.Status.SETUP:
                taker.cancel("no source comes any more")

    async def _disturb(self, what: str, share: float, chosen: random.Random) -> None:
        sender, taker = self.monitors
        async for now in sender.watch(0.002):
            if now.transferred >= share * SIZE:
                break
        try:
            if what == WHAT[0]:
                sender.cancel("the test")
            elif what == WHAT[1]:
                taker.cancel("the test")
            else:
                self._cut(chosen, every=what == WHAT[3])
        except trimig.StateError:
            return  # it is over, or cannot be cancelled any more

    def _cut(self, chosen: random.Random, *, every: bool) -> None:
        ours = [number for number, target in sockets().items() if self._before.get(number) != target]
        connected = []
        for number in ours:
            with socket.socket(fileno=os.dup(number)) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and not one.getsockopt(
                    socket.SOL_SOCKET, socket.SO_ACCEPTCONN
                ):
                    connected.append(number)
        for number in connected if every else [chosen.choice(connected)]:
            # The other end may have been cut before.
            with socket.socket(fileno=os.dup(number)) as one, contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.full if "with" in kind else ()) for kind in KINDS]
)
async def test_nothing_is_left(kind: str, what: str) -> None:
    """F10, L9, T1, T6, T7: three moments each; no thread and no descriptor more than before, and one owner."""
    for seed in range(3):
        chosen = random.Random(f"{kind} {what} {seed}")
        with trio.fail_after(LIMIT):
            await swept(kind, what, chosen.uniform(0, 1.1), chosen)


async def swept(kind: str, what: str, share: float, chosen: random.Random) -> None:
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with machine(running=True) as source:
        with machine(running=False) as target:
            attempt = Attempt(source, target, config_of(kind, RATE))
            await attempt.run(what, share, chosen)
            arrived = source.owner is trimig.Owner.ELSEWHERE
            whole = np.array_equal(source.ram[0].pages, target.ram[0].pages)
            assert (target.run_state == "running") is arrived, attempt.ends
            assert whole or not arrived
        assert all(isinstance(end, trimig.Summary | trimig.MigrationError) for end in attempt.ends.values()), (
            attempt.ends
        )
        assert not any(isinstance(end, trimig.InternalError) for end in attempt.ends.values()), attempt.ends
        if not arrived:
            assert source.run_state == "running", attempt.ends
            with machine(running=False) as target:
                again = Attempt(source, target, config_of(kind, 0))
                await again.run()
                assert all(isinstance(end, trimig.Summary) for end in again.ends.values()), again.ends
                assert np.array_equal(source.ram[0].pages, target.ram[0].pages)
    gc.collect()
    assert (offload.pumps().borrowed_tokens, offload.limiter().borrowed_tokens) == (0, 0)
    # trio keeps threads for the next calls for some seconds, and a descriptor to wake its loop.
    assert threading.active_count() <= threads + offload.MAX_PUMPS
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
