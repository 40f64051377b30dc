"""Dirty tracking: exact sets, no lost write, clean stop, and the fallbacks."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
from collections.abc import Callable

import numpy as np
import pytest
import trio
import trio.testing

from tests.processes.memory.writer import Writer
from trimig.errors import ConfigError, GuestFailed, StateError
from trimig.guest import PAGE_SIZE, DirtyTracker
from trimig.memory import (
    CompareTracker,
    MarkTracker,
    MemfdBlock,
    NullTracker,
    TrackedRange,
    UffdTracker,
    choose_tracker,
    linux,
    snapshot_of,
    tracked_ranges,
    tracking,
)

Make = Callable[..., MemfdBlock]


async def dirty_pages(tracker: DirtyTracker, name: str = "ram") -> list[int]:
    return np.flatnonzero((await tracker.sync())[name]).tolist()


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 pages, so that small blocks have many."""
    monkeypatch.setattr(tracking, "_SCAN_SLICE", 64)
    monkeypatch.setattr(tracking, "_COMPARE_SLICE", 64)


def uffd_tracker(*blocks: MemfdBlock) -> DirtyTracker:
    return UffdTracker(tracked_ranges(blocks))


def compare_tracker(*blocks: MemfdBlock) -> DirtyTracker:
    return CompareTracker(blocks)


both_ways = pytest.mark.parametrize("make_tracker", [uffd_tracker, compare_tracker])


@both_ways
@pytest.mark.usefixtures("small_slices")
async def test_each_sync_gives_exactly_the_pages_written_since_the_last(
    make_block: Make, make_tracker: Callable[..., DirtyTracker]
) -> None:
    ram = make_block(1000)
    ram.pages[::3, 0] = 1  # a part is populated before
    tracker = make_tracker(ram)
    await tracker.start()
    assert await dirty_pages(tracker) == []
    rng = np.random.default_rng(1)
    for share in (0.01, 0.3, 1.0):
        written = np.sort(rng.choice(1000, int(1000 * share), replace=False))
        ram.pages[written, 9] += 1
        ram.pages[: 1000 // 2, 5].sum()  # reading is not writing
        assert await dirty_pages(tracker) == written.tolist()
        assert await dirty_pages(tracker) == []
    # the borders of slices
    ram.pages[[0, 63, 64, 127, 128, 999], 4095] ^= 1
    assert await dirty_pages(tracker) == [0, 63, 64, 127, 128, 999]
    tracker.stop()
    tracker.stop()
    ram.pages[:] = 3


@both_ways
@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.usefixtures("small_slices")
async def test_tracking_ends_in_slices(
    make_block: Make, make_tracker: Callable[..., DirtyTracker], *, cancelled: bool
) -> None:
    """Other tasks have turns meanwhile, where it takes long. A cancellation ends it at once. Then the memory is free."""
    ram = make_block(1000)
    tracker = make_tracker(ram)
    await tracker.start()
    ram.pages[:] = 1
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with trio.CancelScope() as scope:
            if cancelled:
                scope.cancel()
            await tracking.end_tracking(tracker)
        nursery.cancel_scope.cancel()
    assert (turns > 3) == (make_tracker is uffd_tracker and not cancelled)
    with pytest.raises(StateError):
        await tracker.sync()
    again = make_tracker(ram)
    await again.start()
    ram.pages[7] = 2
    assert await dirty_pages(again) == [7]
    again.stop()


@both_ways
async def test_blocks_are_told_apart_by_name(make_block: Make, make_tracker: Callable[..., DirtyTracker]) -> None:
    one, two = make_block(16, "one"), make_block(32, "two")
    tracker = make_tracker(one, two)
    await tracker.start()
    two.pages[30, 0] = 1
    result = await tracker.sync()
    assert {name: np.flatnonzero(dirty).tolist() for name, dirty in result.items()} == {"one": [], "two": [30]}
    assert {name: len(dirty) for name, dirty in result.items()} == {"one": 16, "two": 32}
    tracker.stop()


@both_ways
async def test_the_bitmaps_are_the_callers_to_keep(make_block: Make, make_tracker: Callable[..., DirtyTracker]) -> None:
    ram = make_block(16)
    tracker = make_tracker(ram)
    await tracker.start()
    ram.pages[4, 0] = 1
    first = (await tracker.sync())["ram"]
    assert (await tracker.sync())["ram"] is not first
    assert np.flatnonzero(first).tolist() == [4]
    tracker.stop()


@both_ways
async def test_sync_before_start_and_after_stop_is_refused(
    make_block: Make, make_tracker: Callable[..., DirtyTracker]
) -> None:
    tracker = make_tracker(make_block(4))
    with pytest.raises(StateError, match="not on"):
        await tracker.sync()
    await tracker.start()
    tracker.stop()
    with pytest.raises(StateError, match="not on"):
        await tracker.sync()


@both_ways
@pytest.mark.usefixtures("small_slices")
async def test_the_run_loop_goes_on_between_slices(make_block: Make, make_tracker: Callable[..., DirtyTracker]) -> None:
    tracker = make_tracker(make_block(64 * 8))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await tracker.start()
        started, turns = turns, 0
        await tracker.sync()
        assert started >= 7
        assert turns >= 7
        nursery.cancel_scope.cancel()
    tracker.stop()


@both_ways
@pytest.mark.usefixtures("small_slices")
async def test_a_cancelled_start_or_sync_leaves_nothing_after_stop(
    make_block: Make, make_tracker: Callable[..., DirtyTracker]
) -> None:
    ram = make_block(256)
    tracker = make_tracker(ram)
    with trio.CancelScope() as scope:
        scope.cancel()
        await tracker.start()
    assert scope.cancelled_caught
    tracker.stop()

    tracker = make_tracker(ram)
    await tracker.start()
    with trio.CancelScope() as scope:
        scope.cancel()
        await tracker.sync()
    assert scope.cancelled_caught
    tracker.stop()
    tracker = make_tracker(ram)  # would fail if the range were still registered
    await tracker.start()
    tracker.stop()


async def test_a_write_by_the_kernel_for_this_process_is_seen(make_block: Make) -> None:
    ram = make_block(8)
    tracker = uffd_tracker(ram)
    await tracker.start()
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"x")
        here.recv_into(ram.view[3 * PAGE_SIZE :], 1)
    assert await dirty_pages(tracker) == [3]
    tracker.stop()


async def test_a_written_page_whose_mapping_the_kernel_dropped_is_still_reported(make_block: Make) -> None:
    # What memory reclaim does to a page of a file: the page table entry goes, the content stays in the file. With it
    # went the only mark that the page had been written.
    raw = MemfdBlock("raw", 1024 * PAGE_SIZE)
    with mmap.mmap(raw.fd, raw.length) as mapping:
        window = np.frombuffer(mapping, dtype=np.uint8)
        tracker = UffdTracker([TrackedRange(name="ram", address=int(window.ctypes.data), pages=1024)])
        await tracker.start()
        window[5 * PAGE_SIZE] = 1
        mapping.madvise(mmap.MADV_DONTNEED, 5 * PAGE_SIZE, PAGE_SIZE)
        assert await dirty_pages(tracker) == [5]
        assert await dirty_pages(tracker) == []
        tracker.stop()
        del window
    raw.close()


async def test_stop_lifts_the_protection(make_block: Make) -> None:
    ram = make_block(32)
    ram.pages[:, 0] = 1
    tracker = uffd_tracker(ram)
    await tracker.start()
    assert "uw" in vm_flags(ram.address)
    tracker.stop()
    assert "uw" not in vm_flags(ram.address)


def vm_flags(address: int) -> list[str]:
    flags: list[str] = []
    here = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                here = head.startswith(f"{address:x}-")
            elif here and head == "VmFlags:":
                flags = line.split()[1:]
    assert flags
    return flags


async def test_two_trackers_on_one_block_are_refused_with_a_reason(make_block: Make) -> None:
    ram = make_block(4)
    first, second = uffd_tracker(ram), uffd_tracker(ram)
    await first.start()
    with pytest.raises(GuestFailed, match="could not be started"):
        await second.start()
    ram.pages[1, 0] = 1
    assert await dirty_pages(first) == [1]  # the refused one has not disturbed it
    first.stop()


async def test_memory_that_is_unmapped_meanwhile_is_an_error(make_block: Make) -> None:
    anonymous = mmap.mmap(-1, 16 * PAGE_SIZE)
    base = int(np.frombuffer(anonymous, dtype=np.uint8).ctypes.data)
    tracker = UffdTracker([TrackedRange(name="ram", address=base, pages=16)])
    await tracker.start()
    linux.unregister(tracker._uffd, base, 16 * PAGE_SIZE)  # as seen from the scan: no longer under protection
    with pytest.raises(GuestFailed, match="cannot be read"):
        await tracker.sync()
    tracker.stop()
    anonymous.close()


def test_pid_and_descriptor_go_together() -> None:
    with pytest.raises(ValueError, match="go together"):
        UffdTracker([], pid=1)


@pytest.mark.usefixtures("small_slices")
async def test_the_writes_of_another_process_are_exact_and_ours_are_not_among_them(make_block: Make) -> None:
    ram = make_block(512)
    ram.pages[:256] = 1  # populated from here: that process has no page table entries for it
    writer = Writer(ram)
    await writer.write([0, 300])
    await writer.tracker.start()
    assert await dirty_pages(writer.tracker) == []
    await writer.write([0, 1, 63, 64, 300, 511])
    ram.pages[7, 0] += 1
    assert await dirty_pages(writer.tracker) == [0, 1, 63, 64, 300, 511]
    await writer.write([1])
    assert await dirty_pages(writer.tracker) == [1]
    writer.close()


@pytest.mark.usefixtures("small_slices")
async def test_no_write_is_lost_while_another_process_writes_without_pause(make_block: Make) -> None:
    ram = make_block(1024)
    writer = Writer(ram)
    await writer.tracker.start()
    copy = ram.pages.copy()
    writer.control.send(b"loop")
    for _ in range(60):
        for page in np.flatnonzero((await writer.tracker.sync())["ram"]):
            copy[page] = ram.pages[page]  # as a source would send it, after the sync
    writer.control.send(b"s")
    assert writer.control.recv(1) == b"k"
    left = (await writer.tracker.sync())["ram"]
    copy[left] = ram.pages[left]
    assert ram.pages[:, 4088:].any()
    assert (copy == ram.pages).all()
    writer.close()


async def test_tracking_survives_the_death_of_the_other_process_without_an_error_at_stop(make_block: Make) -> None:
    writer = Writer(make_block(16))
    await writer.tracker.start()
    writer.process.kill()
    writer.process.wait()
    writer.tracker.stop()
    writer.control.close()


async def test_a_page_that_changes_and_changes_back_reaches_the_destination_by_the_snapshot(make_block: Make) -> None:
    ram = make_block(4)
    tracker = CompareTracker([ram])
    await tracker.start()
    destination = snapshot_of(tracker, ram).copy()
    ram.pages[2] = 5
    await tracker.sync()
    ram.pages[2] = 9  # a sender that read the guest's memory now would send the 9 ...
    destination[2] = snapshot_of(tracker, ram)[2]
    ram.pages[2] = 5  # ... and never hear of this
    assert await dirty_pages(tracker) == []
    assert (destination == ram.pages).all()
    tracker.stop()


async def test_where_the_kernel_tracks_pages_are_sent_from_the_memory_itself(make_block: Make) -> None:
    ram = make_block(4)
    assert snapshot_of(uffd_tracker(ram), ram) is ram.pages


async def test_marks_cover_every_page_they_touch_and_only_since_the_start(make_block: Make) -> None:
    tracker = MarkTracker([make_block(16)])
    tracker.mark("ram", 0, PAGE_SIZE)
    with pytest.raises(StateError, match="not on"):
        await tracker.sync()
    await tracker.start()
    assert await dirty_pages(tracker) == []
    tracker.mark("ram", PAGE_SIZE - 1, 2)
    tracker.mark("ram", 4 * PAGE_SIZE, PAGE_SIZE)
    tracker.mark("ram", 9 * PAGE_SIZE, 0)
    tracker.mark("ram", 16 * PAGE_SIZE - 1, 1)
    assert await dirty_pages(tracker) == [0, 1, 4, 15]
    assert await dirty_pages(tracker) == []
    tracker.stop()


@pytest.mark.parametrize(
    ("name", "start", "length"), [("rom", 0, 1), ("ram", -1, 1), ("ram", 65535, 2), ("ram", 4, -4)]
)
async def test_a_mark_outside_the_memory_is_refused(make_block: Make, name: str, start: int, length: int) -> None:
    tracker = MarkTracker([make_block(16)])
    await tracker.start()
    with pytest.raises(ValueError, match="not in a RAM block"):
        tracker.mark(name, start, length)


async def test_a_guest_that_never_runs_has_no_dirty_page(make_block: Make) -> None:
    tracker = NullTracker([make_block(16)])
    await tracker.start()
    assert await dirty_pages(tracker) == []
    tracker.stop()


@pytest.mark.parametrize(
    ("prefer", "method"),
    [(None, "userfaultfd-wp"), ("auto", "userfaultfd-wp"), ("userfaultfd", "userfaultfd-wp"), ("compare", "compare"),
     ("marks", "marks")],
)  # fmt: skip
def test_the_choice_is_the_kernels_unless_another_is_preferred(
    make_block: Make, prefer: str | None, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trimig.memory")
    assert choose_tracker([make_block(4)], prefer=prefer).method == method
    assert [record.message for record in caplog.records] == [f"dirty tracking by {method}"]


def test_an_unknown_method_is_refused(make_block: Make) -> None:
    with pytest.raises(ConfigError, match="magic"):
        choose_tracker([make_block(4)], prefer="magic")


def refuse(code: int) -> Callable[[int], int]:
    def opener(flags: int) -> int:
        raise OSError(code, os.strerror(code))

    return opener


def test_without_permission_memory_is_compared_and_the_log_names_sysctl_and_device(
    make_block: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "_by_syscall", refuse(errno.EPERM))
    monkeypatch.setattr(linux, "_by_device", refuse(errno.EACCES))
    ram = make_block(4)
    assert choose_tracker([ram]).method == "compare"
    (record,) = caplog.records
    assert "vm.unprivileged_userfaultfd" in record.message
    assert "/dev/userfaultfd" in record.message
    with pytest.raises(GuestFailed, match=r"vm\.unprivileged_userfaultfd.*/dev/userfaultfd"):
        choose_tracker([ram], prefer="userfaultfd")


def test_without_full_permission_user_mode_faults_are_enough(make_block: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = linux._by_syscall, []

    def unprivileged(flags: int) -> int:
        tried.append(flags & 1)
        if not flags & 1:
            raise OSError(errno.EPERM, "Operation not permitted")
        return real(flags)

    monkeypatch.setattr(linux, "_by_syscall", unprivileged)
    assert choose_tracker([make_block(4)]).method == "userfaultfd-wp"
    assert tried == [0, 1]


@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="needs access to /dev/userfaultfd")
async def test_the_device_is_as_good_as_the_call(make_block: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_by_syscall", refuse(errno.EPERM))
    ram = make_block(4)
    tracker = choose_tracker([ram])
    assert tracker.method == "userfaultfd-wp"
    await tracker.start()
    ram.pages[2, 0] = 1
    assert await dirty_pages(tracker) == [2]
    tracker.stop()


def test_a_kernel_without_the_feature_or_the_scan_names_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(linux.MemoryUnavailable, match=r"Linux 6\.7"):
        linux.open_userfaultfd(1 << 60)
    monkeypatch.setattr(linux, "_PAGEMAP_SCAN", 0xC0606611)
    with pytest.raises(linux.MemoryUnavailable, match=r"PAGEMAP_SCAN.*Linux 6\.7"):
        linux.probe_tracking()


def test_a_kernel_without_userfaultfd_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_by_syscall", refuse(errno.ENOSYS))
    with pytest.raises(linux.MemoryUnavailable, match="has no userfaultfd"):
        linux.open_userfaultfd()


def test_a_kernel_with_larger_pages_is_not_tracked_by_it(make_block: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "PAGESIZE", 65536)
    assert choose_tracker([make_block(16)]).method == "compare"


async def test_a_start_that_the_kernel_refuses_is_undone(make_block: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, start: int, length: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    ram = make_block(4)
    tracker = uffd_tracker(ram)
    monkeypatch.setattr(tracking, "write_protect", refused)
    with pytest.raises(GuestFailed, match="Cannot allocate memory"):
        await tracker.start()
    assert "uw" not in vm_flags(ram.address)
