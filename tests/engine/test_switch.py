"""The switch to postcopy, element by element: what is sent, in which order, and what a pause before it does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import trio.testing

import trimig
from tests.engine.pair import Pair
from tests.reading import PAGE, Element, Memory, elements, ranges, words
from trimig.channel.channel import Channel
from trimig.engine.source.switchover import PING_QUEUED
from trimig.status import Status
from trimig.testing import FakeDevice, LazyScriptedGuest, OwnerReferee, ScriptedGuest, VirtualLink

CLOCK = {"clock": 8}
QUEUED = f"PING {PING_QUEUED:#x}"
MARK = "PING 0x74726d01"
ATTEMPT = f"command {0x7403}"


def able(*, hold: bool = False, bandwidth: int = 0, background: int = 0) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True, pause_before_switchover=hold),
        parameters=trimig.Parameters(max_bandwidth=bandwidth, downtime_limit=1, max_postcopy_bandwidth=background),
        peer=dataclasses.replace(trimig.PeerProfile(), suppress_vmdesc=True),
        handover_timeout=5.0,
    )


def going(pages: int = 64, *, touches: tuple[int, ...] = (), run_state: str = "running", **options: Any) -> Pair:
    """A guest that will go before its memory."""
    config = options.pop("config", None) or able()
    source = ScriptedGuest(
        blocks={"ram": pages}, content="mixed", seed=3, run_state=run_state,
        devices=[FakeDevice("clock", size=8, seed=1)], **options,
    )  # fmt: skip
    target = LazyScriptedGuest(
        blocks={"ram": pages}, content="random", seed=99, run_state="inmigrate",
        devices=[FakeDevice("clock", size=8)], touches=touches,
    )  # fmt: skip
    return Pair(source, target, link=VirtualLink(latency=0.001, rate=1e6, record=True), config_here=config)


def at(monitor: trimig.Monitor, status: str, act: Callable[[], object]) -> None:
    """Do that as soon as *monitor* has come to *status*."""

    def heard(event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == status:
            act()

    monitor.add_listener(heard)


def after_a_pass(pair: Pair, *, written: Sequence[int]) -> None:
    """Let the guest write some pages during the first pass, and go ahead behind it."""

    def write() -> None:
        for page in written:
            pair.source.write("ram", page, 7)

    def go(event: trimig.Event) -> None:
        if event.name == "MIGRATION_PASS" and event.data["pass"] == 2:
            pair.here.start_postcopy()

    at(pair.here, "active", write)
    pair.here.add_listener(go)


async def switched(pair: Pair, *, at_once: bool = True) -> list[Element]:
    """Migrate it by postcopy; what was sent."""
    if at_once:
        at(pair.here, "setup", pair.here.start_postcopy)
    here, there = await pair.both()
    assert isinstance(there, trimig.Summary), there
    assert isinstance(here, trimig.Summary), here
    return sent(pair)


def sent(pair: Pair) -> list[Element]:
    return elements(pair.link.recorded("a->b"), CLOCK)


def where(found: list[Element], word: str) -> int:
    """The index of the one element of that name."""
    (index,) = [n for n, element in enumerate(found) if element.word == word]
    return index


async def test_elements_come_in_the_order_of_the_protocol(autojump_clock: trio.testing.MockClock) -> None:
    """O1, O3, O4, O11, L3: from ADVISE to the end of file; the guest's devices and RUN in one package."""
    pair = going()
    after_a_pass(pair, written=range(5, 30))
    found = await switched(pair, at_once=False)
    assert words(found) == [
        "header", "configuration", "OPEN_RETURN_PATH", "PING 0x1", MARK, "ADVISE", "start ram", "part ram",
        QUEUED, ATTEMPT, "DISCARD ram", "PING 0x2", "PACKAGED", "PING 0x4", "part ram", "end ram", "eof",
    ]  # fmt: skip
    package = found[where(found, "PACKAGED")]
    assert words(list(package.inner)) == ["LISTEN", "full clock", "full globalstate", "PING 0x3", "PING 0x42", "RUN"]
    assert found[where(found, "ADVISE")].payload == PAGE.to_bytes(8, "big") * 2


async def test_every_page_is_there_once_in_the_end(autojump_clock: trio.testing.MockClock) -> None:
    """O8, O13: what came before the switch and was not discarded, and what came behind it, is all of the memory."""
    pair = going(rate=2000.0, touches=(63, 5, 40))
    found = await switched(pair)
    memory = Memory().take(found)
    assert memory.here["ram"].all()
    assert memory.twice == []
    assert np.array_equal(memory.pages["ram"], pair.source.ram[0].pages)
    assert np.array_equal(memory.pages["ram"], pair.target.ram[0].pages)
    before = Memory().take(found[: where(found, "PACKAGED")])
    assert not before.here["ram"].all()


async def test_discarded_are_exactly_the_pages_written_since(autojump_clock: trio.testing.MockClock) -> None:
    """O2: ranges of pages that were sent and changed, or were never sent; no more than 12 in a command."""
    pair = going(pages=128)
    written = [page for page in range(128) if page % 3 == 1 or 40 <= page < 44]
    after_a_pass(pair, written=written)
    found = await switched(pair, at_once=False)
    discards = [element for element in found if element.word == "DISCARD ram"]
    assert [len(ranges(element)) for element in discards] == [12, 12, 12, len(ranges(discards[-1]))]
    pages = [page for element in discards for first, count in ranges(element) for page in range(first, first + count)]
    assert pages == written


async def test_a_page_is_discarded_where_none_is_left(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O2: a QEMU that was told no DISCARD before LISTEN refuses RUN; so one page goes a second time."""
    pair = going()
    after_a_pass(pair, written=())
    # All is sent, but too much of it waits in the kernel for a short pause: otherwise there would be no postcopy.
    waits = True

    def heard(event: trimig.Event) -> None:
        nonlocal waits
        if event.name == "PASS" and event.data["remaining"] == 0:
            waits = False

    pair.here.add_listener(heard)
    monkeypatch.setattr(Channel, "backlog", lambda _: 1 << 30 if waits else 0)
    found = await switched(pair, at_once=False)
    assert not waits
    assert ranges(found[where(found, "DISCARD ram")]) == [(63, 1)]
    behind = found[where(found, "PACKAGED") :]
    assert [page.number for element in behind for page in element.pages] == [63]
    assert np.array_equal(pair.source.ram[0].pages, pair.target.ram[0].pages)


async def test_a_page_that_is_waited_for_is_the_next_one_sent(autojump_clock: trio.testing.MockClock) -> None:
    """O7: whatever the order of the others; and the limit of the bandwidth is not asked."""
    pair = going(pages=64, touches=(60, 33, 47), config=able(background=8192))
    found = await switched(pair)
    behind = [page.number for element in found[where(found, "PACKAGED") :] for page in element.pages]
    places = [behind.index(page) for page in (60, 33, 47)]
    assert places == sorted(places)
    assert places[-1] < 12, behind[:20]


def note(times: dict[str, float], status: str) -> None:
    times[status] = trio.current_time()


async def test_memory_that_follows_has_a_limit_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    """O12: max-bandwidth does not hold behind the switch, max-postcopy-bandwidth does; 0 is no limit."""
    seconds = {}
    for background in (0, 40_000):
        pair = going(pages=64, config=able(bandwidth=40_000, background=background))
        times: dict[str, float] = {}
        for status in ("postcopy-active", "completed"):
            at(pair.here, status, functools.partial(note, times, status))
        await switched(pair)
        seconds[background] = times["completed"] - times["postcopy-active"]
    assert seconds[0] < 1
    assert seconds[40_000] > 3


async def test_listeners_are_told_when_the_devices_are_there(autojump_clock: trio.testing.MockClock) -> None:
    """O9, H5: postcopy-active is told when the whole package has been taken, and no sooner."""
    pair = going()
    taken: list[int] = []
    at(pair.here, "postcopy-active", lambda: taken.append(pair.link.delivered("a->b")))
    found = await switched(pair)
    assert len(taken) == 1
    assert taken[0] >= found[where(found, "PACKAGED")].end
    assert pair.target.executed


async def test_it_is_completed_when_the_destination_has_said_so(autojump_clock: trio.testing.MockClock) -> None:
    """O11: the end of file has been sent, and SHUT has come."""
    pair = going()
    seen: list[tuple[int, int]] = []
    at(pair.here, "completed", lambda: seen.append((pair.link.sent("a->b"), pair.link.delivered("b->a"))))
    await switched(pair)
    assert seen == [(pair.link.sent("a->b"), pair.link.sent("b->a"))]
    assert pair.link.recorded("b->a").endswith(b"\0\1\0\4\0\0\0\0")


@pytest.mark.parametrize("run_state", ["paused", "running"])
async def test_run_state_goes_with_the_package(autojump_clock: trio.testing.MockClock, run_state: str) -> None:
    """M2, M3, gap G17: a guest that stood still stands still there; QEMU starts it."""
    pair = going(run_state=run_state)
    found = await switched(pair)
    (state,) = [e for e in found[where(found, "PACKAGED")].inner if e.word == "full globalstate"]
    assert state.payload[4:].rstrip(b"\0") == run_state.encode()
    assert pair.target.run_state == run_state


# -- held before it ----------------------------------------------------------------------------------------------------


async def test_pause_before_the_switch_to_postcopy(autojump_clock: trio.testing.MockClock) -> None:
    """N2, N3, S12: the guest is stopped, nothing is sent for an hour, and postcopy-active comes behind it."""
    pair = going(config=able(hold=True))
    statuses: list[str] = []
    sizes: list[int] = []

    def heard(event: trimig.Event) -> None:
        if event.name == "MIGRATION":
            statuses.append(event.data["status"])

    async def hold() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        for _ in range(2):
            await trio.sleep(1800)
            sizes.append(pair.link.sent("a->b"))
            assert (pair.here.status, pair.source.run_state) == (Status.PRE_SWITCHOVER, "paused")
            assert not pair.target.executed
        pair.here.resume()

    pair.here.add_listener(heard)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold)
        found = await switched(pair)
    assert sizes[0] == sizes[1]
    held = [element.word for element in found if element.at < sizes[0]]
    assert held[-2:] == [QUEUED, ATTEMPT]
    middle = statuses[statuses.index("pre-switchover") :]
    assert [s for s in statuses if s.startswith(("pre", "post"))] == ["pre-switchover", "postcopy-active"]
    assert middle[-2:] == ["postcopy-active", "completed"]


@pytest.mark.parametrize("run_state", ["paused", "running"])
async def test_cancel_in_the_pause_before_postcopy(autojump_clock: trio.testing.MockClock, run_state: str) -> None:
    """N4, gap G6: the guest is in the run state it had, and can go again."""
    pair = going(config=able(hold=True), run_state=run_state)
    before = pair.source.digest()
    at(pair.here, "setup", pair.here.start_postcopy)
    at(pair.here, "pre-switchover", lambda: pair.here.cancel("the test"))
    here, _ = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    assert (pair.source.run_state, pair.target.executed) == (run_state, False)
    assert pair.source.digest() == before
    again = going(run_state=run_state)
    again.source = pair.source
    at(again.here, "setup", again.here.start_postcopy)
    here = await _again(pair.source, again)
    assert isinstance(here, trimig.Summary), here


async def _again(source: ScriptedGuest, other: Pair) -> Any:
    other.referee = OwnerReferee(source=source, destination=other.target)
    return (await other.both())[0]


# -- how long its processors waited ------------------------------------------------------------------------------------


class FourProcessors(LazyScriptedGuest):
    """Says how long each has waited."""

    async def memory_is_whole(self) -> Sequence[float]:
        """Nothing is missing. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()
        return (0.5, 0.25, 1.0, 0.75)


@pytest.mark.parametrize("asked", [False, True])
async def test_blocktime_of_several_processors(autojump_clock: trio.testing.MockClock, *, asked: bool) -> None:
    """G11, P13: each one's own in order; all of them at once waited no longer than the one that waited least."""
    pair = going()
    pair.target = FourProcessors(blocks={"ram": 64}, run_state="inmigrate", devices=[FakeDevice("clock", size=8)])
    pair.referee = OwnerReferee(source=pair.source, destination=pair.target)
    capabilities = trimig.Capabilities(postcopy_ram=True, postcopy_blocktime=asked)
    pair.config_there = dataclasses.replace(pair.config_here, capabilities=capabilities)
    await switched(pair)
    info = pair.there.info()
    if asked:
        assert info["postcopy-vcpu-blocktime"] == [500, 250, 1000, 750]
        assert info["postcopy-blocktime"] == 250
    else:
        assert "blocktime" not in " ".join(info)
