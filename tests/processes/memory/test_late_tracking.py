"""The kernel protects pages just before they are sent: exact sets, and no lost write."""

from __future__ import annotations

import mmap
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.processes.memory.writer import Writer
from trimig.errors import GuestFailed, StateError
from trimig.guest import PAGE_SIZE
from trimig.memory import MemfdBlock, TrackedRange, UffdTracker, tracked_ranges, tracking

Make = Callable[..., MemfdBlock]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 pages, so that small blocks have many."""
    monkeypatch.setattr(tracking, "_SCAN_SLICE", 64)


async def dirty_pages(tracker: UffdTracker) -> list[int]:
    return np.flatnonzero((await tracker.sync())["ram"]).tolist()


def pages_at(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


@pytest.fixture
async def late(make_block: Make, small_slices: None) -> AsyncIterator[tuple[MemfdBlock, UffdTracker]]:
    """A block of 256 pages, half of them with memory, and its tracker, which was started late."""
    ram = make_block(256)
    ram.pages[:128] = 1
    tracker = UffdTracker(tracked_ranges([ram]))
    await tracker.start_late()
    yield ram, tracker
    tracker.stop()


async def test_until_it_is_protected_each_page_counts_as_written(late: tuple[MemfdBlock, UffdTracker]) -> None:
    _, tracker = late
    for _ in range(2):
        assert await dirty_pages(tracker) == list(range(256))
    await tracker.protect("ram", pages_at(*range(5), *range(130, 133)))
    # Those between were protected too. They count as sent only if they were among them, which the caller knows.
    assert await dirty_pages(tracker) == list(range(133, 256))


async def test_a_write_is_found_at_each_sync_until_the_page_is_protected_again(
    late: tuple[MemfdBlock, UffdTracker],
) -> None:
    ram, tracker = late
    await tracker.protect("ram", pages_at(*range(256)))
    assert await dirty_pages(tracker) == []
    for page in 0, 63, 64, 200:
        ram.pages[page, 0] += 1
    for _ in range(2):
        assert await dirty_pages(tracker) == [0, 63, 64, 200]
    await tracker.protect("ram", pages_at(0, 64))  # 63 is between them, and is not sent
    assert await dirty_pages(tracker) == [63, 200]
    ram.pages[64, 0] += 1
    await tracker.protect("ram", pages_at(63, 200))
    assert await dirty_pages(tracker) == [64]


@pytest.mark.parametrize("few", [0, 16])
async def test_pages_that_were_reached_in_no_order(
    late: tuple[MemfdBlock, UffdTracker], monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(tracking, "_FEW_RUNS", few)
    ram, tracker = late
    await tracker.protect("ram", pages_at(*range(100, 110)))
    ram.pages[105, 0] += 1
    await tracker.protect("ram", pages_at(*range(40, 100), *range(110, 140)))
    found = await dirty_pages(tracker)
    assert 105 in found
    assert not set(found) & {*range(40, 105), *range(106, 140)}
    for page in 50, 139:
        ram.pages[page, 0] += 1
    assert {50, 139} <= set(await dirty_pages(tracker))


async def test_late_tracking_that_is_off_protects_nothing(make_block: Make) -> None:
    tracker = UffdTracker(tracked_ranges([make_block(4)]))
    with pytest.raises(StateError):
        await tracker.protect("ram", pages_at(0))
    await tracker.start()
    with pytest.raises(StateError):
        await tracker.protect("ram", pages_at(0))
    tracker.stop()


async def test_a_second_start_changes_nothing(make_block: Make) -> None:
    ram = make_block(4)
    tracker = UffdTracker(tracked_ranges([ram]))
    await tracker.start()
    with pytest.raises(StateError):
        await tracker.start_late()
    ram.pages[2, 0] = 1
    assert await dirty_pages(tracker) == [2]
    assert await dirty_pages(tracker) == []
    tracker.stop()


async def test_memory_that_is_unmapped_cannot_be_protected(make_block: Make) -> None:
    area = mmap.mmap(-1, 16 * PAGE_SIZE)
    base = int(np.frombuffer(area, np.uint8).ctypes.data)
    tracker = UffdTracker([TrackedRange(name="ram", address=base, pages=16)])
    await tracker.start_late()
    area.close()
    with pytest.raises(GuestFailed, match="cannot be protected"):
        await tracker.protect("ram", pages_at(0, 15))
    tracker.stop()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small_slices")
async def test_late_no_write_of_another_process_is_lost(make_block: Make, seed: int) -> None:
    ram = make_block(1024)
    writer = Writer(ram)
    chooser = np.random.default_rng(seed)
    await writer.tracker.start_late()
    copy = np.zeros_like(ram.pages)
    writer.control.send(b"loop")
    unsent = np.ones(1024, np.bool_)
    for number in range(60):
        todo = np.flatnonzero(unsent)
        for part in np.array_split(todo, int(chooser.integers(1, 6))):
            if not len(part):
                continue
            await writer.tracker.protect("ram", part)
            copy[part] = ram.pages[part]
            unsent[part] = False
            if number % 7 == 3:
                break  # the rest of the pass is left
        unsent |= (await writer.tracker.sync())["ram"]
    writer.control.send(b"s")
    assert writer.control.recv(1) == b"k"
    unsent |= (await writer.tracker.sync())["ram"]
    copy[unsent] = ram.pages[unsent]
    assert ram.pages[:, 4088:].any()
    assert (copy == ram.pages).all()
    writer.close()
