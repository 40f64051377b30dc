"""Fifty postcopy migrations at once, their connections cut again and again: no guest gets a page of another."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable
from typing import Literal

import trio
import trio.testing

import trimig
from tests.fuzzed import Fuzzed
from tests.sweeps.postcopy import Meeting, given, make_config
from tests.sweeps.sampled import some
from trimig import Owner
from trimig.channel import closing
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.engine.source import migrate_stream
from trimig.errors import PostcopyLost, TransportFailed
from trimig.monitor.core import MonitorCore
from trimig.testing import FakeDevice, Fault, LazyScriptedGuest, ScriptedGuest, VirtualLink

PAIRS = 50
#: Bytes until the cut of a link; the part before the switch is smaller.
BEHIND_THE_SWITCH = 30_000
#: Virtual seconds for which a pair tries to find each other among the others: about 120 tries.
SEARCH = 600.0


class Both:
    """One pair: a source with its own content, and its destination."""

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
        """The guest has arrived, and only that guest."""
        assert [type(end) for end in self.ends] == [trimig.Summary] * 2, self.ends
        assert (self.source.owner, self.target.owner) == (Owner.ELSEWHERE, Owner.HERE)
        assert not self.target.overwritten
        for block in self.target.ram:
            (there,) = [b for b in self.source.ram if b.name == block.name]
            assert block.pages.tobytes() == there.pages.tobytes(), f"{block.name} is another guest's"


async def at_once(seed: int) -> int:
    """Run all pairs; returns the number of recoveries."""
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
    rounds = some(range(40), 2, always=(0,))
    recoveries = 0
    for seed in rounds:
        recoveries += trio.run(at_once, seed, clock=trio.testing.MockClock(autojump_threshold=0))
    fuzzed("pairs in postcopy with connections that are cut", len(rounds) * PAIRS)
    assert recoveries > len(rounds) * PAIRS


class Crowd:
    """One meeting point for all destinations; a source reaches its own destination or any other one."""

    def __init__(self, seed: int) -> None:
        self.chosen = random.Random(f"crowd {seed}")
        self.waiting: dict[int, list[VirtualLink]] = {}
        self._comes: dict[int, trio.Event] = {}
        self.wrong = 0
        self.links: list[VirtualLink] = []

    def accept(self, number: int) -> Callable[[str | None], Awaitable[AnyStream]]:
        """Wait there as destination *number*."""

        async def opener(_: str | None) -> AnyStream:
            place = self.waiting[number] = []
            self._comes[number] = trio.Event()
            try:
                await self._comes[number].wait()
            except trio.Cancelled:
                self.waiting.pop(number, None)
                for link in place:
                    await closing.close(link.b)
                raise
            return place[0].b

        return opener

    def connect(self, number: int) -> Callable[[str | None], Awaitable[AnyStream]]:
        """The link of source *number*: in one of four tries to its own destination, otherwise to any waiting one."""

        async def opener(_: str | None) -> AnyStream:
            await trio.lowlevel.checkpoint()
            chosen = self.chosen
            to = number if chosen.random() < 0.25 else chosen.choice(sorted(self.waiting) or [number])
            if to not in self.waiting:
                raise TransportFailed("no destination waits there")
            link = VirtualLink(seed=chosen.randrange(1 << 30), window=8192, latency=0.001, rate=1e6)
            if chosen.random() < 0.3:
                way: Literal["a->b", "b->a"] = chosen.choice(("a->b", "b->a"))
                after = chosen.randrange(10, 40_000 if way == "a->b" else 300)
                link.add_fault(Fault(direction=way, after=after, kind=chosen.choice(("reset", "eof"))))
            self.wrong += to != number
            self.links.append(link)
            self.waiting.pop(to).append(link)
            self._comes[to].set()
            return link.a

        return opener


class Lost(Both):
    """A pair in a crowd."""

    def __init__(self, number: int, seed: int, crowd: Crowd) -> None:
        super().__init__(number, seed)
        self.refused = 0
        self._config = dataclasses.replace(make_config(), recovery_timeout=SEARCH)
        self._connect, self._accept = crowd.connect(number), crowd.accept(number)
        self.taker.add_listener(self._paused)

    def _paused(self, event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == "postcopy-paused":
            self.refused += "of the source of another migration" in str(self.taker.counters.error)

    async def send(self) -> None:
        ways = Connections(first=given(self.link.a), again=self._connect)
        try:
            self.ends.append(await migrate_stream(self.source, ways, self._config, self.sender))
        except PostcopyLost as error:
            self.ends.append(error)

    async def take(self) -> None:
        ways = Connections(first=given(self.link.b), again=self._accept)
        self.ends.append(await receive_stream(self.target, ways, self._config, self.taker))

    def whole(self) -> None:
        """The guest has arrived; if only the last message was lost, the source reports that."""
        for end in self.ends:
            if isinstance(end, PostcopyLost):
                assert "all memory had been sent, so the destination may be complete" in str(end)
        self.unheard = sum(isinstance(end, PostcopyLost) for end in self.ends)
        self.ends = [end for end in self.ends if isinstance(end, trimig.Summary)]
        assert len(self.ends) == 2 - self.unheard
        self.ends += self.ends[:1] * self.unheard
        super().whole()


async def in_a_crowd(seed: int) -> tuple[int, int, int]:
    """Run all pairs; the numbers of wrong destinations, of refusals, and of sources that missed the last message."""
    crowd = Crowd(seed)
    pairs = [Lost(number, seed, crowd) for number in range(PAIRS)]
    with trio.fail_after(10 * SEARCH):
        async with trio.open_nursery() as nursery:
            for pair in pairs:
                nursery.start_soon(pair.send)
                nursery.start_soon(pair.take)
    for pair in pairs:
        pair.whole()
    assert all(link.closed for link in crowd.links), "a link was left open"
    return crowd.wrong, sum(pair.refused for pair in pairs), sum(pair.unheard for pair in pairs)


def test_fifty_pairs_that_come_to_wrong_destinations(fuzzed: Fuzzed) -> None:
    """O6, O8: a destination refuses the sources of others, and accepts its own; no page belongs to another guest."""
    rounds = some(range(40), 1)
    wrong = refused = unheard = 0
    for seed in rounds:
        found = trio.run(in_a_crowd, seed, clock=trio.testing.MockClock(autojump_threshold=0))
        wrong, refused, unheard = wrong + found[0], refused + found[1], unheard + found[2]
    fuzzed("sources at destinations of other guests", wrong)
    assert wrong > len(rounds) * PAIRS
    # The others were cut before the refusal.
    assert wrong // 2 < refused <= wrong
    assert unheard < len(rounds) * PAIRS // 2
