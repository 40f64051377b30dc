"""An encoding of pages is one class: a sink gets whole pages, and an encoder writes the records again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.wire.cases import pages, zeros
from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.wire.encoder import Encoder, RecordWriter
from trimig.wire.events import PageElement, PageRun, ReadPage
from trimig.wire.pages.sink import put


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AddedRun(PageElement):
    """A page is the one before plus a number: an encoding of differences, which no sender has."""

    amount: int

    def content(self, read: ReadPage) -> PageRun:
        if not self.amount:
            raise RemoteProtocolError("nothing is added", offset=self.at)
        former = [read(self.block, index) for index in self.indices()]
        data = np.stack([page + np.uint8(self.amount) for page in former if page is not None])
        return PageRun(block=self.block, named=self.named, offsets=self.offsets, data=data, at=self.at)

    def indices(self) -> Sequence[int]:
        return [int(offset) // PAGE_SIZE for offset in self.offsets]

    def records(self, writer: RecordWriter) -> bytes:
        return b"+%d" % self.amount


class Memory:
    """A sink of one block."""

    def __init__(self, count: int) -> None:
        self.content = np.zeros((count, PAGE_SIZE), np.uint8)

    async def pages(self, block: str, indices: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        assert block == "ram"
        self.content[indices] = data

    async def zeros(self, block: str, indices: NDArray[np.int64], fills: NDArray[np.uint8]) -> None:
        assert block == "ram"
        self.content[indices] = fills[:, None]

    def read(self, block: str, index: int) -> NDArray[np.uint8]:
        assert block == "ram"
        return np.asarray(self.content[index])


def added(*where: int, amount: int) -> AddedRun:
    return AddedRun(block="ram", named=False, offsets=np.array(where, np.int64) * PAGE_SIZE, amount=amount, at=9)


async def test_a_sink_gets_whole_pages_of_any_encoding() -> None:
    memory = Memory(5)
    await put(memory, pages("ram", [PAGE_SIZE, 3 * PAGE_SIZE], [b"\5" * PAGE_SIZE, b"\7" * PAGE_SIZE], named=True))
    await put(memory, added(3, 1, 0, amount=2))
    await put(memory, zeros("ram", [PAGE_SIZE, 4 * PAGE_SIZE], named=False, fills=[0, 8]))
    assert memory.content[:, 0].tolist() == [2, 0, 0, 9, 8]
    assert (memory.content == memory.content[:, :1]).all()


async def test_a_damaged_page_changes_nothing() -> None:
    memory = Memory(2)
    with pytest.raises(RemoteProtocolError, match="nothing is added") as caught:
        await put(memory, added(1, amount=0))
    assert caught.value.offset == 9
    assert not memory.content.any()


def test_an_encoder_writes_the_records_of_any_encoding() -> None:
    assert Encoder().encode(added(1, amount=2)) == b"+2"
