"""Sources that break the rules behind the switch to postcopy: nothing is lost, mixed or left, and recovery makes it whole.

The number of inputs is printed at the end of the run. ``-m full`` tries many more.
"""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing

from tests import tiers
from tests.engine.postcopy_fuzz import fuzz
from tests.fuzzed import Fuzzed
from trimig.engine.ram.postcopy_receiver import PostcopyReceiver
from trimig.guest import Wait
from trimig.monitor.statistics import Counters

INPUTS = 400
MANY = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("preempt", [False, True], ids=["one connection", "two"])
def test_pages_behind_the_switch(fuzzed: Fuzzed, *, preempt: bool) -> None:
    """T4, O6, O8, P12: blocks in any order, spoiled streams, wrong handshakes; the memory is that of an own reading."""
    count = MANY if tiers.everything() else INPUTS
    ways = fuzz(range(count), preempt=preempt)
    fuzzed("pages behind the switch to postcopy", count)
    assert ways.total() == count
    # All kinds of ends are among them, or the fuzz tests less than it says.
    assert ways["sound, 0 recoveries"] > count // 6
    assert sum(number for way, number in ways.items() if not way.endswith(" 0 recoveries")) > count // 6


class Closing:
    """Memory whose last fault becomes readable in the moment in which it is closed."""

    def __init__(self) -> None:
        self.near, self.far = trio.socket.socketpair()
        self.closed = False

    def fileno(self) -> int:
        return self.near.fileno()

    def waits(self) -> list[Wait]:
        assert not self.closed, "closed memory is asked for faults"
        return []

    def place(self, block: int, first: int, pages: object) -> int:
        raise AssertionError("no page comes")

    def place_zeros(self, block: int, first: int, count: int) -> int:
        raise AssertionError("no page comes")

    def close(self) -> None:
        self.closed = True
        self.near.close()
        self.far.close()


async def test_a_fault_and_the_end_in_the_same_moment() -> None:
    """The guest is whole: its faults are not read any more, and nothing fails."""

    async def nothing(_: bytes) -> None:
        raise AssertionError("nothing is asked for")

    for _ in range(20):  # which of the two tasks goes first is drawn by lot
        memory = Closing()
        receiver = PostcopyReceiver(memory, ["ram"], {"ram": np.ones(4, np.bool_)}, nothing, Counters())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver.serve)
            await trio.testing.wait_all_tasks_blocked()

            async def end(memory: Closing = memory, receiver: PostcopyReceiver = receiver) -> None:
                await trio.lowlevel.wait_readable(memory.far.fileno())
                receiver.close()

            nursery.start_soon(end)
            await trio.testing.wait_all_tasks_blocked()
            # Both ends become readable at once, so both tasks are woken in one turn of the run loop.
            await memory.far.send(b"x")
            await memory.near.send(b"x")
        assert memory.closed
