"""An encoding beside PAGE and ZERO: what its encoder is asked and told, and which pages never come to it."""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing
from numpy.typing import NDArray

from tests.engine.pair import Pair, running
from tests.engine.test_switch import going, switched
from trimig.channel.channel import Channel
from trimig.channel.vectored import BATCH_PAGES
from trimig.engine.ram.records import PageSender
from trimig.engine.sections import table
from trimig.guest import PAGE_SIZE, Pages
from trimig.monitor.statistics import Counters
from trimig.wire.constants import RamFlag

Indices = NDArray[np.int64]


class Encoder:
    """Takes the pages whose number can be divided by *every*: sends a one-byte record, a copy, or nothing, in turns."""

    def __init__(self, every: int = 2) -> None:
        self.every = every
        self.passes: list[tuple[bool, bool]] = []
        self.asked: list[int] = []
        self.zero: list[int] = []

    def begin_pass(self, *, first: bool, last: bool) -> None:
        self.passes.append((first, last))

    def zeros(self, block: str, indices: Indices) -> None:
        self.zero += indices.tolist()

    async def send(self, records: PageSender, block: str, pages: Pages, indices: Indices) -> Indices:
        self.asked += indices.tolist()
        mine = indices[indices % self.every == 0]
        encoded, copied, same = (mine[mine // self.every % 3 == kind] for kind in range(3))
        if len(encoded):
            await records.send_encoded(block, encoded, RamFlag.COMPRESS_PAGE, [b"x"] * len(encoded))
        if len(copied):
            await records.send_copies(block, copied, pages[copied])
        if len(same):
            records.skip(len(same))
        left: Indices = indices[indices % self.every != 0]
        return left


class Rest:
    """A page sender that writes into memory."""

    def __init__(self, encoder: Encoder | None) -> None:
        near, self.far = trio.testing.memory_stream_pair()
        self.counters = Counters(remaining=1 << 30)
        self.sender = PageSender(Channel(near), self.counters, encoder)

    async def sent(self) -> bytes:
        return bytes(await self.far.receive_some(1 << 30))


def filled(count: int) -> Pages:
    """Pages of one byte each, all different from zero."""
    return np.repeat((np.arange(count) % 255 + 1).astype(np.uint8)[:, None], PAGE_SIZE, axis=1)


def word(page: int, flag: RamFlag) -> bytes:
    return (page * PAGE_SIZE | flag | RamFlag.CONTINUE).to_bytes(8, "big")


async def test_an_encoder_sends_its_pages_and_leaves_the_others() -> None:
    pages, encoder = filled(7), Encoder()
    pages[3] = 0
    rest = Rest(encoder)
    await rest.sender.send("ram", pages, np.arange(7))
    assert await rest.sent() == b"".join(
        [
            (3 * PAGE_SIZE | RamFlag.ZERO).to_bytes(8, "big") + b"\3ram" + b"\0",
            word(0, RamFlag.COMPRESS_PAGE) + b"x",
            word(6, RamFlag.COMPRESS_PAGE) + b"x",
            word(2, RamFlag.PAGE) + pages[2].tobytes(),
            word(1, RamFlag.PAGE) + pages[1].tobytes(),
            word(5, RamFlag.PAGE) + pages[5].tobytes(),
        ]
    )
    assert (encoder.asked, encoder.zero) == ([0, 1, 2, 4, 5, 6], [3])
    c = rest.counters
    assert (c.normal, c.duplicate, c.encoded, c.encoded_bytes) == (3, 1, 3, 18)
    assert c.remaining == (1 << 30) - 7 * PAGE_SIZE


async def test_the_first_record_of_an_encoder_names_the_block() -> None:
    rest = Rest(Encoder())
    await rest.sender.send("ram", filled(1), np.arange(1))
    assert await rest.sent() == int(RamFlag.COMPRESS_PAGE).to_bytes(8, "big") + b"\3ram" + b"x"


async def test_a_batch_has_a_largest_size() -> None:
    pages = np.broadcast_to(filled(1), (BATCH_PAGES + 5, PAGE_SIZE))
    sizes = []

    class Counting(Encoder):
        async def send(self, records: PageSender, block: str, pages: Pages, indices: Indices) -> Indices:
            sizes.append(len(indices))
            records.skip(len(indices))
            await trio.lowlevel.checkpoint()
            return indices[:0]

    rest = Rest(Counting())
    await rest.sender.send("ram", pages, np.arange(len(pages)))
    assert sizes == [BATCH_PAGES, 5]
    assert rest.counters.encoded == BATCH_PAGES + 5


async def test_urgent_pages_and_pages_after_stop_encoding_are_plain() -> None:
    encoder = Encoder()
    rest = Rest(encoder)
    pages = filled(3)
    assert len(rest.sender.send_now("ram", pages, 0)) == 12 + PAGE_SIZE  # a stream that is no socket takes nothing
    assert encoder.asked == []
    rest.sender.stop_encoding()
    await rest.sender.send("ram", pages, np.arange(3))
    assert await rest.sent() == b"".join(word(page, RamFlag.PAGE) + pages[page].tobytes() for page in range(3))
    assert (encoder.asked, encoder.zero) == ([], [])


# -- in a migration ----------------------------------------------------------------------------------------------------


def with_encoder(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    monkeypatch.setattr(table, "choose_encoder", lambda *_: encoder)


async def test_passes_of_a_migration(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder is told which pass is the first, and which the last."""
    encoder = Encoder(every=1 << 40)
    with_encoder(monkeypatch, encoder)
    pair = Pair(running(pages=8, content="mixed", dirty_per_sync=2))
    here, there = await pair.both()
    assert encoder.passes == [(True, False), (False, True)]
    assert sorted(encoder.zero) == [0, 3, 6]
    assert encoder.asked[:5] == [1, 2, 4, 5, 7]
    assert len(encoder.asked) > 5
    assert pair.target.digest() == pair.source.digest()
    assert here.encoded_pages == there.encoded_pages == 0


async def test_nothing_is_encoded_in_postcopy(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what the guest waits for, nor the rest."""
    encoder = Encoder(every=1 << 40)
    with_encoder(monkeypatch, encoder)
    await switched(going(16, touches=(5, 11)))
    assert encoder.passes == [(True, False)]
    assert encoder.asked == encoder.zero == []
