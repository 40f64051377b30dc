"""Samples of dirty pages: what they would take in the encodings that are off."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running
from trimig.config.peer import QEMU_10_0
from trimig.engine.ram.sample import PageSampler, unused_encodings
from trimig.guest import PAGE_SIZE, Pages
from trimig.monitor.statistics import Counters
from trimig.testing import VirtualLink


def random_memory(pages: int = 64) -> Pages:
    return np.random.default_rng(1).integers(0, 256, (pages, PAGE_SIZE), np.uint8)


def dirty(*pages: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    found = np.zeros(64, np.bool_)
    found[list(pages)] = True
    return found


def sampled(sampler: PageSampler, pages: Pages, *todo: int) -> None:
    sampler.begin_pass()
    sampler.look("ram", pages, dirty(*todo))


def test_pages_that_come_again_show_what_differences_would_take() -> None:
    counters, pages = Counters(), random_memory()
    sampler = PageSampler(counters)
    sampled(sampler, pages, *range(8))
    assert set(counters.samples) == {"zlib"}
    assert counters.samples["zlib"].size == 4104  # random data
    pages[:8, 100] ^= 1
    sampled(sampler, pages, *range(8))
    assert (
        counters.samples["xbzrle"].size == 8 + 3 + 3
    )  # the head of the record, and: 100 equal, 1 different, that byte
    assert counters.samples["xbzrle"].seconds > 0


def test_pages_that_do_not_come_again_show_nothing_of_differences() -> None:
    counters, pages = Counters(), random_memory()
    sampler = PageSampler(counters)
    sampled(sampler, pages, *range(8))
    sampled(sampler, pages, *range(20, 28))
    sampled(sampler, pages)
    sampled(sampler, pages, *range(20, 28))
    assert set(counters.samples) == {"zlib"}


def test_pages_that_changed_wholly_and_not_at_all() -> None:
    counters, pages = Counters(), random_memory()
    sampler = PageSampler(counters)
    sampled(sampler, pages, 0, 1)
    pages[0] = random_memory()[9]
    sampled(sampler, pages, 0, 1)
    assert counters.samples["xbzrle"].size == 4104 / 2


def test_text_is_short() -> None:
    counters, pages = Counters(), random_memory()
    pages[:] = np.resize(np.frombuffer(b"some words; ", np.uint8), PAGE_SIZE)
    sampled(PageSampler(counters), pages, *range(64))
    assert 20 < counters.samples["zlib"].size < 100


@pytest.mark.parametrize(
    ("capabilities", "several", "found"),
    [
        ({}, True, ("xbzrle", "multifd")),
        ({}, False, ("xbzrle", "compress")),
        ({"xbzrle": True}, True, ("compress",)),
        ({"compress": True}, True, ("xbzrle",)),
        ({"xbzrle": True, "compress": True}, True, ()),
        ({"multifd": True}, True, ("multifd",)),
        ({"postcopy_ram": True}, True, ("xbzrle",)),
    ],
)
def test_encodings_that_could_be_on(capabilities: dict[str, bool], several: bool, found: tuple[str, ...]) -> None:
    """Each of them together with what is on is a configuration that is accepted."""
    settings = trimig.Config(capabilities=trimig.Capabilities(**capabilities))
    assert unused_encodings(settings, several_channels=several) == found
    for name in found:
        trimig.Config(
            capabilities=trimig.Capabilities(**capabilities, **({} if name in capabilities else {name: True}))
        )


def test_encodings_for_a_newer_peer() -> None:
    newer = trimig.Config(peer=QEMU_10_0)
    assert unused_encodings(newer, several_channels=False) == ("xbzrle",)
    packed = trimig.Config(
        capabilities=trimig.Capabilities(multifd=True), parameters=trimig.Parameters(multifd_compression="zlib")
    )
    assert unused_encodings(packed, several_channels=True) == ()


async def test_a_migration_that_does_not_converge_names_differences_with_their_effect(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """L6: a guest that writes eight bytes of a page at a time; random data, so that nothing is said of compression."""
    source = running(pages=64, rate=2000.0, working_set=32)
    settings = dataclasses.replace(config(downtime_limit=50, max_iterations=6))
    pair = Pair(source, link=VirtualLink(latency=0.001, rate=1e6), config_here=settings)
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    (clause,) = [clause for clause in here.advice if "xbzrle" in clause]
    assert clause.startswith("send differences (capability xbzrle): a dirtied page takes ")
    assert not any("compress" in clause for clause in here.advice)
    assert any("auto-converge" in clause and "which leaves" in clause for clause in here.advice)
