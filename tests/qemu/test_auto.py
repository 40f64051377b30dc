"""A choice of the encoding for each batch: QEMU takes plain pages, differences and compressed pages in one pass, in any order."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator

import numpy as np
import pytest

import trimig
from tests.qemu import peers
from tests.qemu.peers import PAGE
from tests.qemu.test_compress import HOT, SIZE, compressing, target
from trimig.engine.ram import auto
from trimig.policy.encoding import EncodingChoice, Rates

pytestmark = pytest.mark.qemu

NAMES = ("plain", "xbzrle", "compress")


class InTurns(EncodingChoice):
    """Each encoding in turn; of each batch a quarter goes by each of the others."""

    turns = itertools.cycle(NAMES)

    def choose(self, rates: Rates, *, without: str | None = None) -> str:
        self.present = next(name for name in self.turns if name != without)
        return self.present

    def is_known(self, name: str) -> bool:
        return True

    def one_in(self, name: str, rates: Rates) -> int:
        return 4


@contextlib.asynccontextmanager
async def writing(guest: trimig.AppGuest) -> AsyncIterator[None]:
    """The guest writes a byte, or text, or zeros, to each hot page, and now and then its former content."""
    pages, numbers = guest.ram[0].pages, itertools.count(1)

    def write() -> None:
        number = next(numbers)
        pages[:HOT:2, number % 64] = number % 3
        pages[1:HOT:2] = np.resize(np.frombuffer(b"%12d\n" % (number % 5), np.uint8), PAGE)
        pages[1 : HOT : 2 + number % 7] = 0

    async with peers.writing(guest, write, 0.003):
        yield


async def test_pages_in_any_encoding_reach_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3, S5: every byte, after eight passes."""
    monkeypatch.setattr(auto, "EncodingChoice", InTurns)
    config = dataclasses.replace(compressing(8, capabilities={"xbzrle": True}), encoding="auto")
    async with target("xbzrle") as (vm, uri):
        with peers.source(SIZE) as guest:
            async with writing(guest):
                summary = await trimig.migrate(guest, uri, config)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
    assert {use.name for use in summary.encodings if use.pages > HOT // 4} == set(NAMES)
    assert sum(use.saved_bytes for use in summary.encodings) > HOT * PAGE
