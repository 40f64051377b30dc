"""A tracker that protects pages just before they are sent: no write is lost, wherever it falls."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

import trimig
from tests.engine.pair import Pair, config, waiting
from trimig.guest import PAGE_SIZE, PageBitmap
from trimig.memory.tracking import LateTracker
from trimig.testing import FakeDevice, ScriptedGuest
from trimig.testing.parts import FakeBlock, MarksTracker
from trimig.testing.referee import BrokenRule

PAGES = 96


class Kernel(MarksTracker):
    """As userfaultfd: a write to a protected page lifts the protection. The guest writes before and after each of its steps."""

    def __init__(self, guest: LateGuest, seed: int) -> None:
        super().__init__(guest)
        self.busy = guest
        self.choose = random.Random(seed)
        self.protected = {block.name: np.zeros(block.length // PAGE_SIZE, np.bool_) for block in guest.ram}
        self.found = {name: np.zeros_like(bits) for name, bits in self.protected.items()}
        self.calls = 0
        #: Pages whose next write is not noticed.
        self.missed = np.zeros(PAGES, np.bool_)

    async def start_late(self) -> None:
        """No page is protected. **Cancellation:** tracking may be on."""
        await super().start()
        self.write(range(PAGES))

    async def protect(self, name: str, indices: NDArray[np.int64]) -> None:
        """In two steps. **Cancellation:** no effect."""
        assert (np.diff(indices) > 0).all()
        self.calls += 1
        first, end = int(indices[0]), int(indices[-1]) + 1
        near = range(max(0, first - 1), min(PAGES, end + 1))
        middle = (first + end) // 2
        self.write(near)
        for start, stop in (first, middle), (middle, end):
            self.found[name][start:stop] |= ~self.protected[name][start:stop]
            self.protected[name][start:stop] = True
            await trio.lowlevel.checkpoint()
            self.write(near)
        self.found[name][indices] = False  # they are sent, with what was written before
        if self.busy.forgetful:
            self.missed[indices] = True
        self.write(near)

    async def sync(self) -> Mapping[str, PageBitmap]:
        """Protects nothing. **Cancellation:** nothing is forgotten."""
        await super().sync()
        result = {name: self.found[name] | ~bits for name, bits in self.protected.items()}
        for bits in self.found.values():
            bits[:] = False
        return result

    def mark(self, block: str, page: int) -> None:
        """A write."""
        if self.missed[page]:
            self.missed[page] = False
        else:
            self.protected[block][page] = False

    def write(self, near: Sequence[int]) -> None:
        """Up to two pages, as long as the guest is to be busy."""
        if self.busy.running and self.calls < 40:
            for _ in range(self.choose.randrange(3)):
                self.busy.write("ram", self.choose.choice(near), self.choose.randrange(256))


class HoleyBlock(FakeBlock):
    """Knows its absent pages."""

    def absent(self) -> PageBitmap | None:
        """Those that are zero now."""
        return np.logical_not(self.pages.any(axis=1))


class LateGuest(ScriptedGuest):
    """A guest with such a tracker."""

    forgetful = False
    kernel: Kernel

    def __init__(self, seed: int, *, holes: bool) -> None:
        super().__init__(
            blocks={"ram": PAGES}, content="mixed", seed=seed, devices=[FakeDevice("clock", size=8, seed=1)], rate=20.0
        )
        self.seed = seed
        if holes:
            self._ram = tuple(HoleyBlock(block.name, block.pages, self.update) for block in self._ram)

    def dirty_tracker(self) -> Kernel:
        """A new one."""
        self.kernel = Kernel(self, self.seed)
        return self.kernel


def of(encoding: str) -> dict[str, Any]:
    capabilities = {"plain": {}, "xbzrle": {"xbzrle": True}, "compress": {"compress": True}}[encoding]
    return {"capabilities": trimig.Capabilities(**capabilities)}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("encoding", ["plain", "xbzrle", "compress"])
async def test_no_write_is_lost(autojump_clock: trio.testing.MockClock, seed: int, holes: bool, encoding: str) -> None:
    settings = trimig.Config(parameters=trimig.Parameters(max_bandwidth=1_000_000, downtime_limit=60), **of(encoding))
    guest = LateGuest(seed, holes=holes)
    pair = Pair(guest, waiting(pages=PAGES), config_here=settings)
    here, there = await pair.both()
    assert isinstance(here, trimig.Summary), here
    assert isinstance(there, trimig.Summary), there
    assert guest.kernel.calls > 3
    assert pair.target.digest() == guest.digest()


async def test_these_tests_see_a_lost_write(autojump_clock: trio.testing.MockClock) -> None:
    guest = LateGuest(0, holes=False)
    guest.forgetful = True
    pair = Pair(guest, waiting(pages=PAGES), config_here=config(max_bandwidth=1_000_000, downtime_limit=60))
    with pytest.raises(BrokenRule, match="not as they were"):
        await pair.both()


def test_the_tracker_is_taken_for_a_late_one() -> None:
    assert isinstance(LateGuest(0, holes=False).dirty_tracker(), LateTracker)
