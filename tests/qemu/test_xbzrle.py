"""XBZRLE between trimig and each installed QEMU, through several passes of a guest that writes one byte of each page."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.bootsector import assert_no_gap, boot_sector, parse_counts
from tests.qemu.harness import Qemu
from tests.qemu.installed import versions
from tests.qemu.peers import LISTEN, PAGE
from trimig import MiB, Status
from trimig.stream import export_raw, inspect_stream

pytestmark = pytest.mark.qemu

SIZE: Final = 16 * MiB
#: Pages that the guest of trimig writes all the time.
HOT: Final = 512
MACHINE: Final = "pc-i440fx-7.2"
VERSIONS: Final = versions()
#: One version in the ordinary run, all of them in the full one.
SOME: Final = [pytest.param(v, marks=() if v == VERSIONS[-1] else (pytest.mark.full,)) for v in VERSIONS]


def able(config: trimig.Config, *, postcopy: bool = False) -> trimig.Config:
    """*config* with the capability, and a downtime limit that no pass reaches before the bound of passes."""
    capabilities = dataclasses.replace(config.capabilities, xbzrle=True, postcopy_ram=postcopy)
    return dataclasses.replace(config, capabilities=capabilities)


@contextlib.asynccontextmanager
async def writing(guest: trimig.AppGuest) -> AsyncIterator[None]:
    """The guest adds one to the first byte of each hot page, as long as it runs."""
    pages = guest.ram[0].pages

    def write() -> None:
        pages[:HOT, 0] += 1

    async with peers.writing(guest, write, 0.002):
        yield


def passes_at_least(count: int, **options: Any) -> trimig.Config:
    """XBZRLE with *count* passes."""
    settings = peers.settings(downtime_limit=0, max_iterations=count, on_bound="switchover", bandwidth=64 * MiB)
    return able(settings, **options)


# -- to QEMU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
async def test_differences_reach_qemu(version: str) -> None:
    """A.1 row 2, S1, G6: every byte, after six passes in which most pages went as differences."""
    async with peers.target(SIZE, version=version) as (vm, uri):
        with peers.source(SIZE) as guest:
            monitor = trimig.Monitor()
            async with writing(guest):
                summary = await trimig.migrate(guest, uri, passes_at_least(6), monitor=monitor)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert summary.iterations == 6
        assert summary.encoded_pages >= 5 * HOT
        assert summary.encoded_bytes < 30 * summary.encoded_pages
        shown = monitor.info()["xbzrle-cache"]
        assert shown["pages"] >= summary.encoded_pages
        assert set(shown) == {
            "cache-size", "bytes", "pages", "cache-miss", "cache-miss-rate", "encoding-rate", "overflow",
        }  # fmt: skip


@pytest.mark.parametrize("version", SOME)
async def test_differences_of_all_kinds_reach_qemu(version: str) -> None:
    """A.1 row 2, D14: runs of every length, pages to and from zero, overflows, and a cache that is too small and changes."""
    async with peers.target(SIZE, version=version) as (vm, uri):
        # Between two passes the guest writes what the next one finds. The kernel would find that it is not sent yet.
        with peers.source(SIZE, dirty_tracking="compare") as guest:
            monitor = trimig.Monitor()
            chance = np.random.default_rng(11)

            def write(event: trimig.Event) -> None:
                if event.name != "MIGRATION_PASS" or guest.run_state != "running":
                    return
                if event.data["pass"] in (4, 7):
                    monitor.set_parameters(xbzrle_cache_size=PAGE << int(chance.integers(9, 12)))
                pages = guest.ram[0].pages
                for page in chance.integers(0, 1024, 700).tolist():
                    at, count = int(chance.integers(0, PAGE)), int(2 ** chance.uniform(0, 12))
                    kind = chance.integers(0, 6)
                    new = 0 if kind == 0 else chance.integers(0, 256, min(count, PAGE - at), np.uint8)
                    if kind == 1:
                        pages[page] = 0
                    pages[page, at : at + count] = new

            monitor.add_listener(write)
            summary = await trimig.migrate(guest, uri, passes_at_least(8), monitor=monitor)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
        shown = monitor.info()["xbzrle-cache"]
        assert shown["overflow"] > 0
        assert shown["cache-miss"] > 0
        assert summary.encoded_pages > 500


@pytest.mark.parametrize("version", SOME)
async def test_cancelled_half_way_and_again(version: str) -> None:
    """F10, T7: the second attempt begins with an empty cache and an empty destination."""
    with peers.source(SIZE) as guest:
        async with writing(guest):
            async with peers.target(SIZE, version=version) as (vm, uri):
                monitor = trimig.Monitor()

                async def cancel() -> None:
                    await peers.passed(monitor, 4)
                    monitor.cancel("the test")

                with pytest.raises(trimig.MigrationCancelled):
                    await peers.while_migrating(guest, uri, passes_at_least(1000), monitor, cancel)
                assert monitor.statistics().encoded_pages > 0
                assert await vm.wait_exit() == 1
            async with peers.target(SIZE, version=version) as (vm, uri):
                summary = await trimig.migrate(guest, uri, passes_at_least(4), monitor=monitor)
                await vm.wait_status("running")
                assert np.array_equal(vm.ram, peers.memory(guest))
                assert summary.encoded_pages >= 3 * HOT


@pytest.mark.parametrize("cut", [False, True], ids=["", "cut"])
@pytest.mark.parametrize("version", SOME)
async def test_postcopy_after_differences(version: str, *, cut: bool) -> None:
    """S1, A.1 row 2: QEMU takes XBZRLE with postcopy-ram; behind the switch, and after a recovery, each page comes whole."""
    async with Qemu.start("none", "16M", incoming="defer", version=version) as vm:
        await vm.set_capabilities({"postcopy-ram": True})
        uri = await vm.incoming(LISTEN)
        with peers.source(SIZE) as guest:
            monitor = trimig.Monitor()
            config = passes_at_least(1000, postcopy=True)
            parameters = config.parameters.replace(max_postcopy_bandwidth=(512 << 10) if cut else 0)
            config = dataclasses.replace(config, parameters=parameters)

            async def switch() -> None:
                await peers.passed(monitor, 4)
                monitor.start_postcopy()
                if cut:
                    await monitor.wait_status(Status.POSTCOPY_ACTIVE)
                    monitor.pause("the test cuts it")
                    await vm.wait_migration_status("postcopy-paused")
                    await vm.qmp.execute("migrate-recover", {"uri": LISTEN})
                    await monitor.wait_status(Status.POSTCOPY_PAUSED)
                    monitor.recover(await vm.incoming_uri(LISTEN))

            async with writing(guest):
                summary = await peers.while_migrating(guest, uri, config, monitor, switch)
            await vm.wait_migration_status("completed")
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert summary.encoded_pages > HOT
        assert "postcopy-active" in vm.migration_statuses()


# -- from QEMU ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def counting(version: str, *capabilities: str) -> AsyncIterator[Qemu]:
    """A QEMU whose guest writes one byte in each of 128 pages all the time, and checks them.

    At that bandwidth the first two passes, which have no differences, take so long that the third has all of these pages.
    """
    async with Qemu.start(MACHINE, "16M", version=version, boot=boot_sector(idle=False)) as vm:
        await vm.wait_serial(lambda text: text.count("\n") >= 3)
        await vm.set_capabilities(dict.fromkeys(("xbzrle", "return-path", "events", *capabilities), True))
        await vm.set_parameters({"max-bandwidth": 2 * MiB, "downtime-limit": 1})
        yield vm


async def differences(vm: Qemu) -> None:
    """Wait until QEMU has sent a difference for each page that its guest writes, or migrates no more."""
    while True:
        info = await vm.query_migrate()
        if info["status"] not in ("setup", "active") or info.get("xbzrle-cache", {}).get("pages", 0) >= 128:
            return
        await trio.sleep(0.01)


async def goes_on(version: str, guest: trimig.ParkedGuest, before: str) -> None:
    """Another QEMU gets the guest; it counts on, and finds every page as it wrote it."""
    async with Qemu.start(MACHINE, "16M", version=version, incoming="defer", boot=boot_sector(idle=False)) as vm:
        uri = await vm.incoming(LISTEN)
        await trimig.migrate(guest, uri, able(peers.settings()))
        text = await vm.wait_serial(lambda text: text.count("\n") >= 5)
        counts = parse_counts(before + text)
        assert not any(count % 256 for count in counts)
        assert_no_gap([count // 256 for count in counts])


def whole(guest: trimig.ParkedGuest, vm: Qemu) -> None:
    """Every byte of the main memory is QEMU's."""
    (block,) = [block for block in guest.ram if block.name == "m0"]
    assert np.array_equal(np.asarray(block.pages).reshape(-1), vm.ram)


@pytest.mark.parametrize("version", VERSIONS)
async def test_differences_of_qemu(version: str) -> None:
    """A.1 row 2, S1: every byte, and the guest goes on elsewhere. trimig need not have the capability.

    A QEMU whose guest wrote nothing during a pass completes before the differences; then it is tried again.
    """
    async with counting(version) as vm:
        for _ in range(12):
            with trimig.ParkedGuest() as guest:
                cache = await _moved(vm, guest)
                if cache["pages"] >= 128:
                    assert cache["bytes"] < 100 * cache["pages"]
                    await goes_on(version, guest, vm.serial_text())
                    return
            await vm.set_parameters({"downtime-limit": 1})
            await vm.qmp.execute("cont")
    raise AssertionError("each attempt completed before the differences")


async def _moved(vm: Qemu, guest: trimig.ParkedGuest) -> dict[str, int]:
    """One migration; QEMU's figures of the cache."""
    async with peers.arriving(guest) as arrival:
        await vm.migrate(arrival.uri, wait=False)
        await differences(vm)
        await vm.set_parameters({"downtime-limit": 2000})
        info = await vm.wait_migration_status("completed")
        await arrival.summary()
        await vm.wait_status("postmigrate")
    whole(guest, vm)
    cache: dict[str, int] = info["xbzrle-cache"]
    return cache


@pytest.mark.parametrize("version", SOME)
async def test_qemu_cancels_half_way_and_begins_again(version: str) -> None:
    """F10, T7: cancelled behind some differences. The guest is held before the switchover, so that it cannot be over then."""
    async with counting(version, "pause-before-switchover") as vm:
        with trimig.ParkedGuest() as guest:
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, wait=False)
                await differences(vm)
                info = await vm.query_migrate()
                await vm.qmp.execute("migrate_cancel")
                await vm.wait_migration_status("cancelled", fail_on=())
                assert (await arrival.error()).owner is trimig.Ownership.SOURCE
        assert info["xbzrle-cache"]["pages"] > 0
        await vm.wait_status("running")
        await vm.set_capabilities({"pause-before-switchover": False})
        with trimig.ParkedGuest() as guest:
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, wait=False)
                await differences(vm)
                await vm.set_parameters({"downtime-limit": 2000})
                await vm.wait_migration_status("completed")
                await arrival.summary()
            await vm.wait_status("postmigrate")
            whole(guest, vm)
            await goes_on(version, guest, vm.serial_text())


@pytest.mark.parametrize("version", SOME)
async def test_qemu_switches_to_postcopy_after_differences(version: str) -> None:
    """S1, A.1 row 2. A QEMU whose guest wrote nothing during a pass completes before the switch; then it is tried again."""
    async with counting(version, "postcopy-ram") as vm:
        for _ in range(12):
            with trimig.ParkedGuest() as guest:
                if await _switched(vm, guest):
                    whole(guest, vm)
                    await goes_on(version, guest, vm.serial_text())
                    return
            await vm.qmp.execute("cont")
    raise AssertionError("each attempt completed before the switch")


async def _switched(vm: Qemu, guest: trimig.ParkedGuest) -> bool:
    """One migration that is asked for postcopy behind the first differences; whether it had not completed before."""
    options = dataclasses.replace(peers.settings(), capabilities=trimig.Capabilities(postcopy_ram=True))
    async with peers.arriving(guest, options) as arrival:
        await vm.migrate(arrival.uri, wait=False)
        while True:
            info = await vm.query_migrate()
            if info.get("xbzrle-cache", {}).get("pages", 0) >= 128 or info["status"] == "completed":
                break
            await trio.sleep(0.005)
        await vm.qmp.execute("migrate-start-postcopy")
        info = await vm.wait_migration_status("completed")
        await arrival.summary()
        await vm.wait_status("postmigrate")
    if not info["ram"]["postcopy-bytes"]:
        return False
    assert info["xbzrle-cache"]["pages"] >= 128
    return True


async def test_a_file_with_differences(tmp_path: Path) -> None:
    """A stream that QEMU has saved while its guest ran: listed, exported and loaded, each with the differences applied."""
    file = tmp_path / "guest"
    async with counting(VERSIONS[0]) as vm:
        await vm.set_capabilities({"return-path": False})
        await vm.migrate(f"exec:cat > {file}.part && mv {file}.part {file}", wait=False)
        await differences(vm)
        await vm.set_parameters({"downtime-limit": 2000})
        info = await vm.wait_migration_status("completed")
        assert info["xbzrle-cache"]["pages"] > 0
        while True:
            if await trio.Path(file).exists():
                break
            await trio.sleep(0.01)
        memory = vm.ram.copy()
        before = vm.serial_text()
    report = await inspect_stream(file)
    assert report.sound
    assert not report.problems
    await export_raw(file, "m0", tmp_path / "raw")
    assert np.array_equal(np.fromfile(tmp_path / "raw", np.uint8), memory)
    with await trimig.ParkedGuest.load(file) as guest:
        await goes_on(VERSIONS[0], guest, before)
