"""Pages whose places are known before they come, over a real socket."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import socket

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from trimig.channel.channel import Channel
from trimig.channel.vectored import Pair, Pieces, elements
from trimig.engine.ram.placement import Target
from trimig.engine.ram.scatter import Scatterer
from trimig.guest import PAGE_SIZE
from trimig.memory.block import MemfdBlock
from trimig.wire.pages.multifd import PACKET_PAGES

PAGES = 700


async def read_all(channel: Channel, target: Target, indices: list[int]) -> bool:
    """Read them as packets of at most ``PACKET_PAGES`` pages. False if one of them has not come whole."""
    scatterer = Scatterer(np.empty(0, np.uint8))
    for start in range(0, len(indices), PACKET_PAGES):
        part = np.array(indices[start : start + PACKET_PAGES], np.int64)
        counts, whole = await scatterer.read(channel, target, part)
        assert counts == ([len(part)] if whole else [])
        if not whole:
            return False
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What became of the block, and what was sent."""

    whole: bool
    pages: NDArray[np.uint8]
    received: NDArray[np.bool_]
    untouched: NDArray[np.bool_]
    sent: NDArray[np.uint8]


async def scattered(indices: list[int], *, populated: bool, cut: int | None = None) -> Found:
    """Send random pages for *indices*, in small pieces."""
    data = np.random.default_rng(1).integers(0, 256, (len(indices), PAGE_SIZE), np.uint8)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    with contextlib.closing(MemfdBlock("ram", PAGES * PAGE_SIZE)) as block:
        if populated:
            block.pages[:] = 7
        target = Target(block)
        async with ours, theirs, trio.open_nursery() as nursery:

            async def send() -> None:
                raw = data.tobytes()[:cut]
                for start in range(0, len(raw), 70_001):
                    await ours.send_all(raw[start : start + 70_001])
                await ours.send_eof()

            nursery.start_soon(send)
            channel = Channel(theirs, stall_timeout=math.inf)
            whole = await read_all(channel, target, indices)
            assert channel.received == (len(indices) * PAGE_SIZE if cut is None else cut)
        pages = target.pages.copy()
        return Found(whole=whole, pages=pages, received=target.received, untouched=target.untouched, sent=data)


@pytest.mark.parametrize("populated", [False, True], ids=["cold", "populated"])
@pytest.mark.parametrize(
    "indices",
    [[5], list(range(PAGES)), list(range(100, 400)), [3, 1, 2, 699, 0], list(range(PAGES - 1, -1, -1))],
    ids=["one", "all", "a run", "some", "backwards"],
)
async def test_each_page_comes_into_its_place(indices: list[int], *, populated: bool) -> None:
    found = await scattered(indices, populated=populated)
    assert found.whole
    assert np.array_equal(found.pages[indices], found.sent)
    others = np.ones(PAGES, np.bool_)
    others[indices] = False
    assert (found.pages[others] == (7 if populated else 0)).all()
    assert np.array_equal(found.received, ~others)
    assert not found.untouched[indices].any()


@pytest.mark.parametrize("populated", [False, True], ids=["cold", "populated"])
@pytest.mark.parametrize("cut", [0, 1, 3 * PAGE_SIZE + 5])
async def test_pages_that_are_cut_were_not_received(cut: int, *, populated: bool) -> None:
    """And they are not untouched any more: a zero page that is sent for one of them must be written."""
    found = await scattered([0, 1, 5, 6], populated=populated, cut=cut)
    assert not found.whole
    assert not found.received.any()
    assert not found.untouched[[0, 1, 5, 6]].any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("second", [0, 1344])
def test_a_pair_goes_on_from_any_byte(seed: int, second: int) -> None:
    """As :class:`trimig.channel.vectored.Pieces` does for pieces of any number."""
    chosen, vector = random.Random(seed), np.zeros((2, 2), np.uint64)
    pair = Pair(vector)
    for _ in range(3):
        places = [(1 << 20, 8192), (1 << 30, second)]
        pair.begin(*places[0], *places[1])
        pieces = Pieces(np.array(places[: 2 if second else 1], np.uint64))
        while pieces.left:
            assert pair.left == pieces.left
            assert elements(pair.rest).tolist() == elements(pieces.rest).tolist()
            count = chosen.randint(1, min(pieces.left, 3000))
            pair.advance(count)
            pieces.advance(count)
        assert not pair.left
        assert not pair.rest[1]
