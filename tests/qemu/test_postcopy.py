"""Postcopy with a real QEMU on the other end, in both directions, whole and after lost connections."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

import trimig
from tests.qemu.bootsector import assert_no_gap, boot_sector, parse_counts
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.peers import LIMIT, LISTEN, arriving, memory, source, wait_lost, while_migrating
from trimig import Status

pytestmark = pytest.mark.qemu

SIZE = 64 << 20
MiB = 1 << 20


def config(*, bandwidth: int = 40 * MiB, background: int = 0, **options: object) -> trimig.Config:
    """Postcopy is possible, and precopy too slow to complete before the switch."""
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True),
        parameters=trimig.Parameters(max_bandwidth=bandwidth, downtime_limit=10, max_postcopy_bandwidth=background),
        **options,  # type: ignore[arg-type]  # handed on as they are
    )


async def after_pages(monitor: trimig.Monitor, count: int) -> None:
    """Start postcopy when that many pages have been sent."""
    async for picture in monitor.watch(0.01):
        if picture.normal_pages + picture.zero_pages >= count:
            break
    monitor.start_postcopy()


@pytest.mark.parametrize("pages", [0, 5000])
async def test_to_qemu(pages: int) -> None:
    """F19, F20: the memory that follows is the same, byte for byte; row 34 of QEMU's matrix."""
    with trio.fail_after(LIMIT), source(SIZE) as guest:
        async with Qemu.start("none", "64M", incoming="defer") as vm:
            await vm.set_capabilities({"postcopy-ram": True})
            uri = await vm.incoming(LISTEN)
            monitor = trimig.Monitor()
            summary = await while_migrating(
                guest, uri, config(), monitor, functools.partial(after_pages, monitor, pages)
            )
            await vm.wait_migration_status("completed")
            await vm.wait_status("running")
            assert "postcopy-active" in vm.migration_statuses()
            assert np.array_equal(vm.ram, memory(guest))
        assert monitor.status is Status.COMPLETED
        assert summary.confirmed
        assert guest.run_state == "paused"


async def test_from_qemu() -> None:
    """P3: a QEMU's memory follows its devices into a parked guest, which is complete at the end."""
    with trimig.ParkedGuest() as guest:
        async with arriving(guest, config()) as arrival, Qemu.start("none", "64M") as vm:
            vm.ram[:] = random_ram(SIZE, seed=7)
            vm.ram[MiB : 4 * MiB] = 0
            await vm.migrate(
                arrival.uri,
                capabilities={"postcopy-ram": True},
                parameters={"max-bandwidth": 20 * MiB, "downtime-limit": 1},
                wait=False,
            )
            await arrival.wait_pages(2000)
            await vm.qmp.execute("migrate-start-postcopy")
            await vm.wait_migration_status("completed")
            summary = await arrival.summary()
            assert summary.confirmed
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)
            assert "postcopy-active" in vm.migration_statuses()


# -- lost connections --------------------------------------------------------------------------------------------------


async def in_postcopy(monitor: trimig.Monitor, share: float) -> None:
    """Wait until that share of the rest at the switch has been sent."""
    await monitor.wait_status(Status.POSTCOPY_ACTIVE)
    before = monitor.statistics()
    async for picture in monitor.watch(0.005):
        sent = picture.normal_pages + picture.zero_pages - before.normal_pages - before.zero_pages
        if sent * 4096 >= share * before.remaining:
            break


async def test_recovery_towards_qemu_twice() -> None:
    """O6, row 35: the connection is cut in the middle, twice; no page is lost, and no page comes twice."""
    with trio.fail_after(LIMIT), source(SIZE) as guest:
        async with Qemu.start("none", "64M", incoming="defer") as vm:
            await vm.set_capabilities({"postcopy-ram": True})
            uri = await vm.incoming(LISTEN)
            monitor = trimig.Monitor()

            async def cut_twice() -> None:
                await after_pages(monitor, 3000)
                for _ in range(2):
                    await in_postcopy(monitor, 0.2)
                    monitor.pause("the test cuts it")
                    await vm.wait_migration_status("postcopy-paused")
                    await vm.qmp.execute("migrate-recover", {"uri": LISTEN})
                    await monitor.wait_status(Status.POSTCOPY_PAUSED)
                    monitor.recover(await vm.incoming_uri(LISTEN))
                    await monitor.wait_status(Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE)

            await while_migrating(guest, uri, config(background=40 * MiB), monitor, cut_twice)
            await vm.wait_migration_status("completed")
            assert vm.migration_statuses().count("postcopy-recover") == 2
            assert np.array_equal(vm.ram, memory(guest))


async def test_recovery_from_qemu_twice() -> None:
    """O6, P12, row 35: a QEMU source is paused by trimig, and by itself; both times a new connection goes on."""
    with trimig.ParkedGuest() as guest:
        async with arriving(guest, config()) as arrival, Qemu.start("none", "64M") as vm:
            vm.ram[:] = random_ram(SIZE, seed=8)
            await vm.migrate(
                arrival.uri,
                capabilities={"postcopy-ram": True},
                parameters={"max-bandwidth": 20 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 20 * MiB},
                wait=False,
            )
            await arrival.wait_pages(2000)
            await vm.qmp.execute("migrate-start-postcopy")
            for ours in (True, False):
                await vm.wait_migration_status("postcopy-active")
                await in_postcopy_there(arrival.monitor, 1000)
                if ours:
                    arrival.monitor.pause("the test cuts it")
                else:
                    await vm.qmp.execute("migrate-pause")
                await wait_lost(arrival.monitor)
                await vm.wait_migration_status("postcopy-paused")
                arrival.monitor.recover(LISTEN)
                while not arrival.monitor.addresses:
                    await arrival.monitor.wait_changed()
                await vm.qmp.execute("migrate", {"uri": arrival.monitor.addresses[0], "resume": True})
                await arrival.monitor.wait_status(Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE)
            await vm.wait_migration_status("completed")
            summary = await arrival.summary()
            assert summary.confirmed
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)
            assert vm.migration_statuses().count("postcopy-recover") == 2


async def in_postcopy_there(monitor: trimig.Monitor, pages: int) -> None:
    """Wait until that many more pages have arrived."""
    await monitor.wait_status(Status.POSTCOPY_ACTIVE)
    before = monitor.statistics()
    async for picture in monitor.watch(0.005):
        if picture.normal_pages + picture.zero_pages - before.normal_pages - before.zero_pages >= pages:
            break


# -- a machine that computes -------------------------------------------------------------------------------------------


async def count_on(vm: Qemu, lines: int) -> str:
    """Let the guest print *lines* more."""
    have = vm.serial_text().count("\n")
    return await vm.wait_serial(lambda text: text.count("\n") >= have + lines)


async def test_a_counting_guest_goes_through_postcopy_twice(tmp_path: Path) -> None:
    """O8, P3, P12: out of a QEMU by postcopy, parked, saved, and into another by postcopy, which requests its pages."""
    with trio.fail_after(LIMIT), trimig.ParkedGuest(tmp_path / "guest") as parked:
        async with (
            arriving(parked, config()) as arrival,
            Qemu.start("pc", "16M", boot=boot_sector()) as vm,
        ):
            await count_on(vm, 5)
            await vm.migrate(
                arrival.uri,
                capabilities={"postcopy-ram": True},
                parameters={"max-bandwidth": MiB, "downtime-limit": 1},
                wait=False,
            )
            await vm.wait_migration_status("active")
            await vm.qmp.execute("migrate-start-postcopy")
            await vm.wait_migration_status("completed")
            await arrival.summary()
            before = vm.serial_text()

        async with Qemu.start("pc", "16M", boot=boot_sector(), incoming="defer") as vm:
            await vm.set_capabilities({"postcopy-ram": True})
            uri = await vm.incoming(LISTEN)
            monitor = trimig.Monitor()
            with await trimig.ParkedGuest.load(tmp_path / "guest") as guest:
                slow = config(bandwidth=MiB, background=MiB)
                summary = await while_migrating(guest, uri, slow, monitor, functools.partial(after_pages, monitor, 1))
            await vm.wait_status("running")
            after = await count_on(vm, 5)
        assert summary.confirmed
        assert monitor.info()["ram"]["postcopy-requests"] > 0
        assert_no_gap(parse_counts(before + after))


# -- large host pages --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def huge_memory(size: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """A memfd of 2 MiB pages, filled; skips if the host has no such pages free."""
    free = int(re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    if free * 2 * MiB < size:
        pytest.skip(f"{size // (2 * MiB)} huge pages are needed (sysctl vm.nr_hugepages), {free} are free")
    fd = os.memfd_create("trimig-test-huge", os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, size)
        view = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        view[:] = random_ram(size, seed=12)
        view[: 2 * MiB] = 0
        yield fd, view
    finally:
        os.close(fd)


async def test_from_a_qemu_with_huge_pages() -> None:
    """P12: QEMU's units are host pages of 2 MiB, trimig keeps its RAM in pages of 4 KiB; recovery with bitmaps, too."""
    with huge_memory(16 * MiB) as (fd, content), trimig.ParkedGuest() as guest:
        backend = f"memory-backend-file,id=m0,share=on,size=16M,mem-path=/proc/self/fd/{fd}"
        huge = ["-object", backend, "-machine", "memory-backend=m0"]
        async with (
            arriving(guest, config()) as arrival,
            Qemu.start("none", "16M", memory_file=False, extra=huge, pass_fds=[fd]) as vm,
        ):
            await vm.migrate(
                arrival.uri,
                capabilities={"postcopy-ram": True},
                # Slow enough that seconds are left for the cut, even if this process gets its event late.
                parameters={"max-bandwidth": MiB, "downtime-limit": 0, "max-postcopy-bandwidth": MiB},
                wait=False,
            )
            await vm.qmp.execute("migrate-start-postcopy")
            await vm.wait_migration_status("postcopy-active")
            await in_postcopy_there(arrival.monitor, 1)
            arrival.monitor.pause("the test cuts it")
            await vm.wait_migration_status("postcopy-paused")
            await wait_lost(arrival.monitor)
            await vm.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
            arrival.monitor.recover(LISTEN)
            while not arrival.monitor.addresses:
                await arrival.monitor.wait_changed()
            await vm.qmp.execute("migrate", {"uri": arrival.monitor.addresses[0], "resume": True})
            await vm.wait_migration_status("completed")
            assert (await arrival.summary()).confirmed
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), content)
