"""Compression in whole migrations: the records, the figures, the threads, and bad pages."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running, waiting
from trimig.channel.offload import MAX_CALLS
from trimig.engine.ram import compress, inflate
from trimig.guest import PAGE_SIZE
from trimig.testing import FakeDevice, LazyScriptedGuest, ScriptedGuest, VirtualLink
from trimig.wire import Decoder, events
from trimig.wire.pages.compressed import CompressedRun

#: More than several pieces for the threads.
PAGES: Final = 5 * compress.PIECE_PAGES + 7


def able(*, postcopy: bool = False, **parameters: Any) -> trimig.Config:
    """A configuration with compression; parameters by name."""
    return dataclasses.replace(
        config(handover_timeout=5.0),
        capabilities=trimig.Capabilities(compress=True, postcopy_ram=postcopy),
        parameters=trimig.Parameters(max_bandwidth=0, **parameters),
    )


class Threads:
    """Stands for the threads: a call takes some virtual seconds. Counts how many calls work at once."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds
        self.working = self.most = self.calls = 0

    async def offload(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call *function* at the end of that time; like a thread, it cannot be cancelled."""
        self.working += 1
        self.calls += 1
        self.most = max(self.most, self.working)
        with trio.CancelScope(shield=True):
            await trio.sleep(self.seconds)
        self.working -= 1
        return function(*arguments)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """In place of real threads, in which the virtual clock would not wait."""
    found = Threads()
    monkeypatch.setattr(compress, "offload", found.offload)
    monkeypatch.setattr(inflate, "offload", found.offload)
    return found


def text_guest(pages: int = PAGES, **options: Any) -> ScriptedGuest:
    """A guest of which every third page is zero, and every other one has the same few words again and again."""
    guest = running(pages=pages, content="zero", **options)
    for page in range(pages):
        if page % 3:
            guest.ram[0].pages[page] = np.resize(np.frombuffer(b"page %06d\n" % page, np.uint8), PAGE_SIZE)
    return guest


def pair_of(source: ScriptedGuest | None = None, *, rate: float = 10e6, **options: Any) -> Pair:
    source = source or text_guest()
    link = VirtualLink(rate=rate, latency=0.0005, record=True) if rate else VirtualLink(latency=0.0005, record=True)
    return Pair(source, link=link, config_here=able(**options))


def compressed_pages(pair: Pair) -> int:
    """The number of compressed pages that were sent."""
    decoder = Decoder(measure=None)
    data = memoryview(pair.link.recorded("a->b"))
    found = 0
    while data:
        room = decoder.writable()
        take = min(len(room), len(data))
        room[:take] = data[:take]
        decoder.received(take)
        data = data[take:]
        while (event := decoder.next_event()) is not None:
            if isinstance(event, CompressedRun):
                found += len(event.streams)
            if isinstance(event, events.TailBytes):
                return found
    return found


# -- what is sent --------------------------------------------------------------------------------------------------------


async def test_pages_are_compressed_and_counted(autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    """Q5, S5, G2: `compression` has QEMU's members; zero pages stay ZERO records."""
    pair = pair_of()
    here, there = await pair.both()
    assert pair.source.digest() == pair.target.digest()
    count = PAGES - (PAGES + 2) // 3
    assert compressed_pages(pair) == here.encoded_pages == count
    assert here.zero_pages == (PAGES + 2) // 3
    assert here.normal_pages == 0
    assert there.normal_pages == count
    shown = pair.here.info()["compression"]
    assert shown["pages"] == count
    assert here.encoded_bytes - shown["compressed-size"] - 8 * count in (0, len("\x03ram"))
    assert shown["compression-rate"] == pytest.approx(count * PAGE_SIZE / shown["compressed-size"])
    assert shown["compression-rate"] > 20
    assert (shown["busy"], shown["busy-rate"]) == (0, 0)
    assert "compression" not in pair.there.info()


async def test_without_the_capability_nothing_is_compressed(autojump_clock: trio.testing.MockClock) -> None:
    pair = pair_of()
    pair.config_here = config()
    here, _ = await pair.both()
    assert (compressed_pages(pair), here.encoded_pages) == (0, 0)
    assert "compression" not in pair.here.info()


async def test_destination_needs_no_capability(autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    pair = pair_of()
    pair.config_there = config()
    await pair.both()
    assert pair.source.digest() == pair.target.digest()


@pytest.mark.parametrize("level", [0, 1, 9])
async def test_level(level: int, autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    """S5, D3: 0 stores each page in a record that is longer than the page."""
    pair = pair_of(compress_level=level)
    here, _ = await pair.both()
    assert pair.source.digest() == pair.target.digest()
    each = here.encoded_bytes / here.encoded_pages
    assert (each > PAGE_SIZE) is (level == 0)


async def test_pages_that_become_longer_go_as_they_are(
    autojump_clock: trio.testing.MockClock, threads: Threads
) -> None:
    pair = pair_of(running(pages=PAGES, content="random"))
    here, _ = await pair.both()
    assert pair.source.digest() == pair.target.digest()
    assert (compressed_pages(pair), here.normal_pages) == (0, PAGES)
    assert pair.here.info()["compression"] == {
        "pages": 0, "busy": 0, "busy-rate": 0, "compressed-size": 0, "compression-rate": 0,
    }  # fmt: skip


async def test_changes_meanwhile_take_effect(autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    """D2: the next batch has the new level."""
    pair = pair_of(text_guest(dirty_per_sync=20, working_set=60), compress_level=0)
    sizes: list[int] = []

    def heard(event: trimig.Event) -> None:
        if event.name == "PASS":
            sizes.append(pair.here.statistics().encoded_bytes)
            pair.here.set_parameters(compress_level=9)

    pair.here.add_listener(heard)
    pair.config_here = dataclasses.replace(
        pair.config_here, parameters=pair.config_here.parameters.replace(downtime_limit=0), max_iterations=3,
        on_bound="switchover",
    )  # fmt: skip
    await pair.both()
    assert pair.source.digest() == pair.target.digest()
    assert sizes[0] > PAGES // 2 * PAGE_SIZE
    assert 0 < sizes[1] - sizes[0] < 20 * 500


async def test_with_xbzrle_the_later_passes_are_differences(
    autojump_clock: trio.testing.MockClock, threads: Threads
) -> None:
    """S5, S1: as QEMU has both together; a page goes in one of the two encodings."""
    pair = pair_of(text_guest(dirty_per_sync=20, working_set=60), downtime_limit=0)
    pair.config_here = dataclasses.replace(
        pair.config_here,
        capabilities=trimig.Capabilities(compress=True, xbzrle=True), max_iterations=5, on_bound="switchover",
    )  # fmt: skip
    pages: list[int] = []
    pair.here.add_listener(
        lambda event: pages.append(pair.here.info()["compression"]["pages"]) if event.name == "PASS" else None
    )
    await pair.both()
    assert pair.source.digest() == pair.target.digest()
    info = pair.here.info()
    assert pages[0] == pages[-1] == info["compression"]["pages"] > 0
    assert info["xbzrle-cache"]["pages"] > 0


# -- the threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> tuple[Threads, Threads]:
    """The threads of the source, and those of the destination."""
    here, there = Threads(), Threads()
    monkeypatch.setattr(compress, "offload", here.offload)
    monkeypatch.setattr(inflate, "offload", there.offload)
    return here, there


@pytest.mark.parametrize(("wanted", "most"), [(1, 1), (2, 2), (255, 4)])
async def test_threads_at_once(
    wanted: int, most: int, autojump_clock: trio.testing.MockClock, sides: tuple[Threads, Threads]
) -> None:
    """S5, D4: as many as the parameter says, and never more than there are pieces, or calls that are allowed."""
    pair = pair_of(rate=0, compress_threads=wanted)
    await pair.both()
    assert pair.source.digest() == pair.target.digest()
    assert sides[0].most == most <= MAX_CALLS


@pytest.mark.parametrize(("wanted", "most"), [(1, 1), (2, 2)])
async def test_threads_of_the_destination(
    wanted: int, most: int, autojump_clock: trio.testing.MockClock, sides: tuple[Threads, Threads]
) -> None:
    """S5, D4: decompress-threads."""
    pair = pair_of(rate=0)
    pair.config_there = dataclasses.replace(config(), parameters=trimig.Parameters(decompress_threads=wanted))
    await pair.both()
    assert pair.source.digest() == pair.target.digest()
    assert sides[1].most == most


async def test_page_goes_as_it_is_if_no_thread_is_free(
    autojump_clock: trio.testing.MockClock, threads: Threads
) -> None:
    """S5: compress-wait-thread off; with it on, all pages wait for the threads."""
    pair = pair_of(compress_threads=1, compress_wait_thread=False)
    threads.seconds = 0.05
    here, _ = await pair.both()
    assert pair.source.digest() == pair.target.digest()
    shown = pair.here.info()["compression"]
    assert shown["busy"] == here.normal_pages > 0
    assert shown["pages"] == here.encoded_pages > 0
    assert shown["busy-rate"] == pytest.approx(shown["busy"] / (shown["busy"] + shown["pages"]))


async def test_few_pages_need_no_thread(autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    pair = pair_of(text_guest(6))
    await pair.both()
    assert threads.calls == 0
    assert compressed_pages(pair) > 0


async def test_cancel_leaves_no_thread(autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    """F10: the pieces in work are waited for."""
    pair = pair_of(compress_threads=3)
    threads.seconds = 1.0

    async def cancel() -> None:
        while threads.working < 3:  # noqa: ASYNC110 - the threads have no event
            await trio.sleep(0.01)
        pair.here.cancel("the test")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        here, _ = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    assert threads.working == 0
    assert pair.source.running


@pytest.mark.parametrize("direction", ["a->b", "b->a"])
async def test_cut_is_one_bare_error(direction: str, autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    """L9: while threads work; no group of errors comes out."""
    pair = pair_of(rate=10_000)
    errors: list[BaseException] = []

    async def cut() -> None:
        await trio.sleep(0.3)
        pair.link.inject("reset", direction)  # type: ignore[arg-type]  # one of the two

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        errors += await pair.both()
    assert [type(error) for error in errors] == [trimig.TransportFailed] * 2
    assert threads.working == 0


# -- bad pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [12, PAGES], ids=["inline", "in threads"])
async def test_bad_page_is_an_error_with_its_offset(
    pages: int, autojump_clock: trio.testing.MockClock, threads: Threads
) -> None:
    """T4, P4: of two bad pages the first; the destination is as it was, and takes another attempt."""
    pair = pair_of(text_guest(pages))
    await pair.both()
    sent = bytearray(pair.link.recorded("a->b"))
    starts = [at for at in range(len(sent) - 2) if sent[at : at + 2] == b"\x78\x01"]
    first, second = starts[len(starts) // 2], starts[-1]
    sent[first + 1] ^= 0x40
    sent[second + 1] ^= 0x40
    target = waiting(pages=pages)
    link = VirtualLink()

    async def feed() -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # the destination has closed the link
            await link.a.send_all(bytes(sent))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        with pytest.raises(trimig.RemoteProtocolError) as caught:
            await trimig.receive(target, link.b)
    assert caught.value.section == "ram"
    assert "inflates to no zlib stream" in str(caught.value)
    assert caught.value.offset is not None
    assert first - 16 <= caught.value.offset < first
    assert (target.run_state, target.claimed) == ("inmigrate", None)
    assert threads.working == 0


# -- postcopy ------------------------------------------------------------------------------------------------------------


async def test_pages_behind_the_switch_go_as_they_are(autojump_clock: trio.testing.MockClock, threads: Threads) -> None:
    """C4: postcopy-ram and compress together, as in 7.2."""
    target = LazyScriptedGuest(
        blocks={"ram": PAGES}, content="random", seed=9, run_state="inmigrate",
        devices=[FakeDevice("clock", size=8)], touches=(5, 150),
    )  # fmt: skip
    pair = Pair(
        text_guest(rate=2000.0), target, link=VirtualLink(rate=1e6, latency=0.0005, record=True),
        config_here=able(postcopy=True, downtime_limit=1),
    )  # fmt: skip
    pair.here.add_listener(lambda event: pair.here.start_postcopy() if event.name == "PASS" else None)
    here, _ = await pair.both()
    assert isinstance(here, trimig.Summary)
    assert here.encoded_pages > 0
    assert here.normal_pages > 0
    assert np.array_equal(pair.source.ram[0].pages, target.ram[0].pages)
