"""Fifty guests on their way by postcopy at once, their connections cut again and again: none gets a page of another."""

from __future__ import annotations

import random

import trio
import trio.testing

import trimig
from tests import tiers
from tests.fuzzed import Fuzzed
from tests.sweeps.postcopy import Meeting, given, make_config
from trimig import Owner
from trimig.engine.channel import AnyStream
from trimig.engine.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.engine.source import migrate_stream
from trimig.monitor_core import MonitorCore
from trimig.testing import FakeDevice, Fault, LazyScriptedGuest, ScriptedGuest, VirtualLink

PAIRS = 50
#: Of a link that is cut: everything before the switch fits into less.
BEHIND_THE_SWITCH = 30_000


class Both:
    """One pair: a source with its own content, and where it goes."""

    def __init__(self, number: int, seed: int) -> None:
        chosen = random.Random(f"{seed} {number}")
        self.source = ScriptedGuest(
            blocks={"ram": 24, "b2": 3}, seed=1000 * seed + number, devices=[FakeDevice("clock", seed=number)]
        )
        touches = chosen.sample(range(24), 3)
        self.target = LazyScriptedGuest(
            blocks={"b2": 3, "ram": 24}, content="random", seed=7, run_state="inmigrate", devices=[FakeDevice("clock")],
            touches=[page for page in touches if page < 3],
        )  # fmt: skip
        self.link = VirtualLink(seed=number, window=8192, latency=0.001, rate=1e6)
        self.link.add_fault(Fault(direction="a->b", after=chosen.randrange(BEHIND_THE_SWITCH, 90_000), kind="reset"))
        again = [
            Fault(direction="a->b", after=chosen.randrange(10, 40_000), kind=chosen.choice(("reset", "eof")))
            for _ in range(2)
        ]
        self.meeting = Meeting(again)
        self.sender, self.taker = MonitorCore(), MonitorCore()
        self.ends: list[object] = []
        self.sender.add_listener(self._soon)

    def _soon(self, event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == "setup":
            self.sender.start_postcopy()

    async def send(self) -> None:
        ways = Connections(first=given(self.link.a), again=self.meeting.connect)
        self.ends.append(await migrate_stream(self.source, ways, make_config(), self.sender))

    async def take(self) -> None:
        async def again(uri: str | None) -> AnyStream:
            return await self.meeting.accept(uri)

        ways = Connections(first=given(self.link.b), again=again)
        self.ends.append(await receive_stream(self.target, ways, make_config(), self.taker))

    def whole(self) -> None:
        """It has arrived, it alone."""
        assert [type(end) for end in self.ends] == [trimig.Summary] * 2, self.ends
        assert (self.source.owner, self.target.owner) == (Owner.ELSEWHERE, Owner.HERE)
        assert not self.target.overwritten
        for block in self.target.ram:
            (there,) = [b for b in self.source.ram if b.name == block.name]
            assert block.pages.tobytes() == there.pages.tobytes(), f"{block.name} is another guest's"


async def at_once(seed: int) -> int:
    """All pairs; returns how many recoveries there were."""
    pairs = [Both(number, seed) for number in range(PAIRS)]
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            for pair in pairs:
                nursery.start_soon(pair.send)
                nursery.start_soon(pair.take)
    for pair in pairs:
        pair.whole()
    return sum(len(pair.meeting.links) for pair in pairs)


def test_fifty_pairs_at_once(fuzzed: Fuzzed) -> None:
    """O6, O8: each source recovers to its own destination, and the memory is its own."""
    rounds = 40 if tiers.everything() else 2
    recoveries = 0
    for seed in range(rounds):
        recoveries += trio.run(at_once, seed, clock=trio.testing.MockClock(autojump_threshold=0))
    fuzzed("pairs in postcopy with connections that are cut", rounds * PAIRS)
    assert recoveries > rounds * PAIRS
