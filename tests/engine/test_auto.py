"""``encoding = "auto"`` at the source: whatever is chosen, the destination has each page as it was sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import strategies as st

import trimig
from tests.engine.pair import Pair, running
from tests.engine.test_compress import Threads
from tests.engine.test_xbzrle import Source, filled
from trimig.channel.channel import Channel
from trimig.engine.ram import auto, compress, effort, inflate, xbzrle
from trimig.engine.ram.auto import AutoEncoder
from trimig.engine.ram.compress import CompressEncoder
from trimig.engine.ram.effort import Effort
from trimig.engine.ram.records import PageSender
from trimig.engine.ram.xbzrle import XbzrleEncoder
from trimig.guest import PAGE_SIZE
from trimig.policy.encoding import PLAIN_BYTES, EncodingChoice, Rates
from trimig.testing import VirtualLink

#: Seconds of a processor that one page takes.
COSTS = {"xbzrle": 20e-6, "compress": 40e-6}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page takes the same time: the processor's clock would make each run another one."""

    def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, Effort]:
        seconds = len(args[-2] if function is compress.compress_pages else args[-1]) * (
            COSTS["compress"] if function is compress.compress_pages else COSTS["xbzrle"]
        )
        return function(*args), Effort(seconds, seconds)

    for module in (compress, xbzrle):
        monkeypatch.setattr(module, "timed", timed)


class AutoSource(Source):
    """A :class:`Source` that chooses. Its threads are the run loop: a batch of a test has few pages."""

    def __init__(self, *counts: int, limit: int = 10_000_000, cache: int = 1 << 22) -> None:
        super().__init__(*counts, cache=cache)
        self.counters.members.clear()
        parameters = trimig.Parameters(max_bandwidth=limit)
        self.auto = AutoEncoder(
            CompressEncoder(lambda: parameters, self.counters),
            XbzrleEncoder(self.blocks, lambda: self.cache, self.counters),
            lambda: parameters,
            self.blocks,
            self.counters,
            lambda: 0,
        )
        self.encoder = self.auto  # type: ignore[assignment]  # a PageEncoder, too
        self.sender = PageSender(Channel(self.stream), self.counters, self.auto)

    @property
    def used(self) -> dict[str, int]:
        return {name: use.pages for name, use in self.counters.encodings.items()}


def one_byte(source: Source, counter: int) -> None:
    for page in range(len(source.blocks[0].pages)):
        source.write(0, page, 7, bytes([source.blocks[0].pages[page, 7] ^ counter]))


def random_pages(source: Source, seed: int) -> None:
    filled(source, seed=seed)
    source.dirty["ram0"][:] = True


def text(source: Source, counter: int) -> None:
    for page in range(len(source.blocks[0].pages)):
        source.write(0, page, 0, b"%03d %04d;" % (counter, page) * 455)


@pytest.mark.usefixtures("clock", "threads")
@pytest.mark.parametrize(("write", "best"), [(one_byte, "xbzrle"), (random_pages, "plain"), (text, "compress")])
async def test_each_kind_of_guest_gets_its_encoding(write: Callable[[Source, int], None], best: str) -> None:
    """S3: over a limited link. All but the pages that are tried go by it, in every pass and in the last one."""
    source = AutoSource(600)
    filled(source)
    write(source, 0)
    await source.send()
    for counter in (1, 2, 3):
        write(source, counter)
        await source.send(last=counter == 3)
        source.check()
    used = source.used
    assert sum(used.values()) == 4 * 600
    assert used[best] >= 1100
    assert source.counters.members["encoding"]() == {
        "mode": "auto",
        "present": best,
        "used": [use.members() for use in source.counters.encodings.values()],
    }


@pytest.mark.usefixtures("clock", "threads")
async def test_bytes_saved_are_those_of_the_records() -> None:
    source = AutoSource(600)
    filled(source)
    text(source, 0)
    for counter in (1, 2, 3):
        await source.send()
        one_byte(source, counter)
    c = source.counters
    whole = (c.normal + c.encoded) * PLAIN_BYTES
    assert sum(use.saved_bytes for use in c.encodings.values()) == whole - c.normal * PLAIN_BYTES - c.encoded_bytes
    assert c.encodings["xbzrle"].processor_time == pytest.approx(c.encodings["xbzrle"].pages * COSTS["xbzrle"])
    assert c.encodings["compress"].processor_time == pytest.approx(c.encodings["compress"].pages * COSTS["compress"])
    assert c.encodings["plain"].saved_bytes == 0


class Scripted(EncodingChoice):
    """Chooses as the test says, again and again."""

    script: list[str]

    def choose(self, rates: Rates, *, without: str | None = None) -> str:
        self.script.append(self.script.pop(0))
        self.present = self.script[-1]
        return "plain" if self.present == without else self.present

    def is_known(self, name: str) -> bool:
        return self.script[0] != name

    def one_in(self, name: str, rates: Rates) -> int:
        return 4


Written = tuple[int, int, int, bytes]
#: Few places and values, so that a page gets its former content back: only then a difference from the wrong content shows.
PLACES = [0, 9, PAGE_SIZE - 1]
WRITES = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 3), st.sampled_from(PLACES), st.sampled_from([b"\0", b"x"])),
    max_size=12,
)
NAMES = st.sampled_from(["plain", "xbzrle", "compress"])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    passes=st.lists(st.tuples(WRITES, WRITES), min_size=2, max_size=6),
    script=st.lists(NAMES, min_size=1, max_size=8),
    cache=st.sampled_from([PAGE_SIZE, 4 * PAGE_SIZE, 1 << 20]),
)
def test_no_difference_is_sent_from_content_that_the_destination_has_not(
    passes: list[tuple[list[Written], list[Written]]], script: list[str], cache: int
) -> None:
    """Each page in any encoding in any pass, while the guest writes between and during the batches."""

    async def run() -> None:
        source = AutoSource(4, 4, cache=cache)
        for block in source.blocks:
            block.pages[:] = 1
            block.pages[:, PLACES] = 0
        pending: list[Written] = []

        def meanwhile() -> None:
            if pending:
                source.write(*pending.pop())

        source.stream.write = meanwhile
        for before, during in passes:
            for write in before:
                source.write(*write)
            pending[:] = during
            await source.send()
        pending.clear()
        await source.send(last=True)
        source.check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "EncodingChoice", Scripted)
        patch.setattr(Scripted, "script", list(script), raising=False)
        patch.setattr(compress, "offload", Threads(0.0).offload)
        trio.run(run)


class Chosen(Scripted):
    """Nothing is measured or tried."""

    def is_known(self, name: str) -> bool:
        return True

    def one_in(self, name: str, rates: Rates) -> int:
        return 1 << 32


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("other", ["plain", "compress"])
async def test_a_page_that_goes_in_another_way_leaves_the_cache(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a difference from the content before that, a page that is as it was then would not be sent at all."""
    monkeypatch.setattr(auto, "EncodingChoice", Chosen)
    monkeypatch.setattr(Chosen, "script", ["plain", other, "xbzrle", "xbzrle"], raising=False)
    source = AutoSource(2)
    source.blocks[0].pages[:] = 1
    assert await source.send() == [("page", 0), ("page", 1)]
    source.write(0, 0, 5, b"x")
    assert await source.send() == [({"plain": "page", "compress": "compressed"}[other], 0)]
    source.write(0, 0, 5, b"\1")
    assert await source.send() == [("page", 0)]
    source.check()
    source.write(0, 0, 5, b"x")
    assert await source.send() == [("delta", 0)]
    source.check()


def auto_config(**capabilities: bool) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(**capabilities),
        parameters=trimig.Parameters(max_bandwidth=4_000_000, downtime_limit=20),
        encoding="auto",
        handover_timeout=5.0,
        max_iterations=6,
        on_bound="switchover",
    )


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Threads(0.0)
    monkeypatch.setattr(compress, "offload", found.offload)
    monkeypatch.setattr(inflate, "offload", found.offload)


@pytest.mark.usefixtures("clock", "threads")
async def test_a_migration_says_what_it_chose_and_what_that_saved(autojump_clock: trio.testing.MockClock) -> None:
    """S3, G6: in the summary, the statistics and query-migrate."""
    guest = running(pages=512, rate=20_000.0, content="random")
    pair = Pair(guest, link=VirtualLink(rate=50e6, latency=0.0005), config_here=auto_config(xbzrle=True, compress=True))
    here, _there = await pair.both()
    assert pair.target.digest() == pair.source.digest()
    used = {use.name: use for use in here.encodings}
    assert used["xbzrle"].pages > 500
    assert used["xbzrle"].saved_bytes > 0.9 * PLAIN_BYTES * used["xbzrle"].pages
    assert sum(use.pages for use in used.values()) == here.normal_pages + here.encoded_pages
    assert pair.here.statistics().encodings == here.encodings
    shown = pair.here.info()["encoding"]
    assert shown["mode"] == "auto"
    assert [each["encoding"] for each in shown["used"]] == ["plain", "xbzrle", "compress"]
    assert [each["pages"] for each in shown["used"]] == [use.pages for use in here.encodings]
    assert "encoding" not in pair.there.info()


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        ({}, "turn a capability on that it may use, xbzrle or"),
        ({"multifd": True}, "nothing to choose with multifd"),
    ],
)
async def test_where_nothing_can_be_chosen_the_migration_is_refused_before_it_connects(
    capabilities: dict[str, bool], words: str
) -> None:
    guest = running()
    with pytest.raises(trimig.ConfigError, match=words) as caught:
        await trimig.migrate(guest, "tcp:127.0.0.1:1", auto_config(**capabilities))
    assert caught.value.name == "encoding"
    assert guest.run_state == "running"


def test_time_of_a_thread_is_measured() -> None:
    result, took = effort.timed(sum, range(200_000))
    assert result == sum(range(200_000))
    assert took.elapsed > 0
    assert 0 < took.processor <= took.elapsed * 2
    whole = Effort(1.0, 2.0)
    whole.add(Effort(0.5, 0.25))
    assert whole == Effort(1.5, 2.25)
    assert dataclasses.asdict(whole) == {"processor": 1.5, "elapsed": 2.25}
