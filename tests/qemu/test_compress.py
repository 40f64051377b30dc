"""Compression between trimig and QEMU 7.2, the last installed one that has it, through several passes of a busy guest."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
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
from tests.qemu.peers import LISTEN, PAGE
from trimig import MiB, Status
from trimig.channel.offload import limiter
from trimig.stream import export_raw, inspect_stream

pytestmark = pytest.mark.qemu

SIZE: Final = 16 * MiB
VERSION: Final = "7.2"
#: Pages that the guest of trimig writes all the time.
HOT: Final = 512
MACHINE: Final = "pc-i440fx-7.2"


def compressing(
    passes: int, *, capabilities: dict[str, bool] | None = None, bandwidth: int = 64 * MiB, **parameters: Any
) -> trimig.Config:
    """Compression with that many passes."""
    settings = peers.settings(downtime_limit=0, max_iterations=passes, on_bound="switchover", bandwidth=bandwidth)
    return dataclasses.replace(
        settings,
        capabilities=dataclasses.replace(settings.capabilities, compress=True, **(capabilities or {})),
        parameters=settings.parameters.replace(**parameters),
    )


@contextlib.asynccontextmanager
async def target(*capabilities: str) -> AsyncIterator[tuple[Qemu, str]]:
    """A QEMU with the capability that waits for a guest."""
    with trio.fail_after(peers.LIMIT):
        async with Qemu.start("none", "16M", version=VERSION, incoming="defer") as vm:
            await vm.set_capabilities(dict.fromkeys(("compress", *capabilities), True))
            yield vm, await vm.incoming(LISTEN)


@contextlib.asynccontextmanager
async def writing(guest: trimig.AppGuest) -> AsyncIterator[None]:
    """The guest writes lines of text into each hot page, as long as it runs."""
    pages, numbers = guest.ram[0].pages, itertools.count(1)

    def write() -> None:
        pages[:HOT] = np.resize(np.frombuffer(b"%12d\n" % next(numbers), np.uint8), PAGE)
        pages[:HOT:7, :8] = 0

    async with peers.writing(guest, write, 0.005):
        yield


# -- to QEMU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"compress_level": 9, "compress_threads": 2, "compress_wait_thread": False},
        pytest.param({"compress_level": 0, "compress_threads": 1}, marks=pytest.mark.full),
        pytest.param({"compress_level": 6, "compress_threads": 255}, marks=pytest.mark.full),
        pytest.param({"compress_threads": 1, "compress_wait_thread": False}, marks=pytest.mark.full),
    ],
    ids=str,
)
async def test_compressed_pages_reach_qemu(parameters: dict[str, Any]) -> None:
    """Q5, S5: every byte, after five passes; the member `compression` has the names of QEMU's."""
    async with target() as (vm, uri):
        with peers.source(SIZE) as guest:
            monitor = trimig.Monitor()
            async with writing(guest):
                summary = await trimig.migrate(guest, uri, compressing(5, **parameters), monitor=monitor)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert summary.iterations == 5
        shown = monitor.info()["compression"]
        assert set(shown) == {"pages", "busy", "busy-rate", "compressed-size", "compression-rate"}
        assert shown["pages"] > HOT
        if not parameters:
            assert shown["pages"] >= 4 * HOT
            assert shown["compression-rate"] > 10
        assert limiter().borrowed_tokens == 0


async def test_cancelled_half_way_and_again() -> None:
    """F10, T7: no thread works any more; another QEMU gets the guest."""
    with peers.source(SIZE) as guest:
        async with writing(guest):
            async with target() as (vm, uri):
                monitor = trimig.Monitor()

                async def cancel() -> None:
                    await peers.passed(monitor, 3)
                    monitor.cancel("the test")

                with pytest.raises(trimig.MigrationCancelled):
                    await peers.while_migrating(guest, uri, compressing(1000), monitor, cancel)
                assert limiter().borrowed_tokens == 0
                assert await vm.wait_exit() == 1
            async with target() as (vm, uri):
                await trimig.migrate(guest, uri, compressing(3), monitor=monitor)
                await vm.wait_status("running")
                assert np.array_equal(vm.ram, peers.memory(guest))


async def test_compressed_pages_and_then_differences() -> None:
    """S5, S1: xbzrle and compress together, as QEMU has it: the first pass is compressed, and later ones are differences."""
    async with target("xbzrle") as (vm, uri):
        with peers.source(SIZE) as guest:
            monitor = trimig.Monitor()
            async with writing(guest):
                await trimig.migrate(guest, uri, compressing(6, capabilities={"xbzrle": True}), monitor=monitor)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
        shown = monitor.info()
        assert shown["compression"]["pages"] > HOT
        assert shown["xbzrle-cache"]["pages"] > HOT


async def test_postcopy_after_compressed_pages() -> None:
    """C4: QEMU 7.2 allows both; behind the switch trimig sends the pages as they are."""
    async with target("postcopy-ram") as (vm, uri):
        with peers.source(SIZE) as guest:
            monitor = trimig.Monitor()

            async def switch() -> None:
                await peers.passed(monitor, 3)
                monitor.start_postcopy()

            async with writing(guest):
                config = compressing(1000, capabilities={"postcopy_ram": True})
                await peers.while_migrating(guest, uri, config, monitor, switch)
            await vm.wait_migration_status("completed")
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert "postcopy-active" in vm.migration_statuses()
        assert monitor.status is Status.COMPLETED
        assert monitor.info()["compression"]["pages"] > HOT


async def test_qemu_without_the_capability_is_a_typed_error() -> None:
    """S5: QEMU refuses the first such page, and the guest runs on here."""
    async with peers.target(SIZE, version=VERSION) as (vm, uri):
        with peers.source(SIZE) as guest:
            with pytest.raises((trimig.TransportFailed, trimig.PeerFailed)) as caught:
                await trimig.migrate(guest, uri, compressing(3))
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
            assert await vm.wait_exit() == 1


# -- from QEMU ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def counting(*capabilities: str, parameters: dict[str, int] | None = None) -> AsyncIterator[Qemu]:
    """A QEMU whose guest writes one byte in each of 128 pages all the time, and checks them.

    At that bandwidth the guest has written all of them again when they have been sent.
    """
    async with Qemu.start(MACHINE, "16M", version=VERSION, boot=boot_sector()) as vm:
        await vm.wait_serial(lambda text: text.count("\n") >= 3)
        await vm.set_capabilities(dict.fromkeys(("compress", "return-path", "events", *capabilities), True))
        await vm.set_parameters({"max-bandwidth": 128 << 10, "downtime-limit": 1, **(parameters or {})})
        yield vm


async def passes(vm: Qemu, number: int) -> None:
    """Wait until QEMU is in the pass of that number, or stops its guest."""
    while True:
        info = await vm.query_migrate()
        if info["status"] not in ("setup", "active") or info.get("ram", {}).get("dirty-sync-count", 0) >= number:
            return
        await trio.sleep(0.02)


async def goes_on(guest: trimig.ParkedGuest, before: str, config: trimig.Config) -> None:
    """Another QEMU gets the guest; it counts on, and finds every page as it wrote it."""
    async with Qemu.start(MACHINE, "16M", version=VERSION, incoming="defer", boot=boot_sector()) as vm:
        await vm.set_capabilities({"compress": config.capabilities.compress})
        await trimig.migrate(guest, await vm.incoming(LISTEN), config)
        text = await vm.wait_serial(lambda text: text.count("\n") >= 5)
        assert_no_gap(parse_counts(before + text))


def whole(guest: trimig.ParkedGuest, vm: Qemu) -> None:
    """Every byte of the main memory is QEMU's."""
    (block,) = [block for block in guest.ram if block.name == "m0"]
    assert np.array_equal(np.asarray(block.pages).reshape(-1), vm.ram)


@pytest.mark.parametrize("threads", [2, pytest.param(1, marks=pytest.mark.full)])
async def test_compressed_pages_of_qemu(threads: int) -> None:
    """Q5, S5: every byte, after several passes; the guest goes on elsewhere, sent compressed again."""
    options = compressing(5, decompress_threads=threads)
    with trimig.ParkedGuest() as guest:
        async with peers.arriving(guest, options) as arrival, counting(parameters={"compress-level": 1}) as vm:
            await vm.migrate(arrival.uri, wait=False)
            await passes(vm, 5)
            await vm.set_parameters({"downtime-limit": 2000})
            info = await vm.wait_migration_status("completed")
            await arrival.summary()
            await vm.wait_status("postmigrate")
            whole(guest, vm)
            before = vm.serial_text()
        assert info["ram"]["dirty-sync-count"] > 5
        assert info["compression"]["pages"] >= 3 * 128
        await goes_on(guest, before, compressing(5))


@pytest.mark.full
async def test_compressed_pages_and_then_differences_of_qemu() -> None:
    """Q5, S1: xbzrle and compress together; QEMU compresses in the first pass only."""
    with trimig.ParkedGuest() as guest:
        async with peers.arriving(guest) as arrival, counting("xbzrle") as vm:
            await vm.migrate(arrival.uri, wait=False)
            info = await vm.wait_migration_status("completed")
            await arrival.summary()
            await vm.wait_status("postmigrate")
            whole(guest, vm)
            before = vm.serial_text()
        assert info["compression"]["pages"] > 0
        assert info["xbzrle-cache"]["pages"] > 0
        await goes_on(guest, before, compressing(3, capabilities={"xbzrle": True}))


async def test_random_memory_of_qemu() -> None:
    """Q5: pages that zlib makes longer, in a guest that stands still."""
    async with Qemu.start("none", "16M", version=VERSION) as vm:
        peers.mix(vm.ram, seed=12)
        with peers.machine(SIZE, running=False) as guest:
            async with peers.arriving(guest) as arrival:
                info = await vm.migrate(
                    arrival.uri, capabilities={"compress": True, "return-path": True}, parameters={"max-bandwidth": 0}
                )
                await arrival.summary()
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert info["compression"]["pages"] > SIZE // PAGE // 2
        assert info["compression"]["compressed-size"] > info["compression"]["pages"] * PAGE // 2


async def test_qemu_switches_to_postcopy_and_compresses_on() -> None:
    """Q5: compressed pages also behind the switch; each is placed whole."""
    options = dataclasses.replace(peers.settings(), capabilities=trimig.Capabilities(postcopy_ram=True))
    slowly = {"max-bandwidth": 64 << 10}
    with trimig.ParkedGuest() as guest:
        async with peers.arriving(guest, options) as arrival, counting("postcopy-ram", parameters=slowly) as vm:
            await vm.migrate(arrival.uri, wait=False)
            await vm.wait_migration_status("active")
            await vm.qmp.execute("migrate-start-postcopy")  # in the first pass: most of the memory follows
            ahead = (await vm.query_migrate())["compression"]["pages"]
            info = await vm.wait_migration_status("completed")
            await arrival.summary()
            whole(guest, vm)
            before = vm.serial_text()
        assert "postcopy-active" in vm.migration_statuses()
        assert info["compression"]["pages"] > ahead
        await goes_on(guest, before, compressing(3))


async def test_a_file_with_compressed_pages(tmp_path: Path) -> None:
    """Q5: a stream that QEMU has saved while its guest ran: listed, exported and loaded."""
    file = tmp_path / "guest"
    async with counting() as vm:
        await vm.set_capabilities({"return-path": False})
        await vm.migrate(f"exec:cat > {file}.part && mv {file}.part {file}", wait=False)
        await passes(vm, 3)
        await vm.set_parameters({"downtime-limit": 2000})
        info = await vm.wait_migration_status("completed")
        assert info["compression"]["pages"] >= 128
        while not await trio.Path(file).exists():  # noqa: ASYNC110 - a file has no event
            await trio.sleep(0.01)
        memory = vm.ram.copy()
        before = vm.serial_text()
    report = await inspect_stream(file)
    assert report.sound
    assert not report.problems
    await export_raw(file, "m0", tmp_path / "raw")
    assert np.array_equal(np.fromfile(tmp_path / "raw", np.uint8), memory)
    with await trimig.ParkedGuest.load(file) as guest:
        await goes_on(guest, before, compressing(3))
