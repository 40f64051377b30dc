"""multifd with trimig as the destination: data channels of each installed QEMU, byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.bootsector import boot_sector
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.installed import versions
from tests.qemu.test_tls import TCP, x509
from tests.transport.pki import ID, Pki
from trimig import MiB

pytestmark = pytest.mark.qemu

SIZE = 16 * MiB
MULTIFD = {"multifd": True, "return-path": True}
POSTCOPY = [version for version in versions() if tuple(map(int, version.split("."))) >= (11, 1)]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def config(*, channels: int = 2, compression: str = "none", capabilities: tuple[str, ...] = ()) -> trimig.Config:
    parameters = [f"multifd-channels={channels}", f"multifd-compression={compression}"]
    return peers.settings().with_options(capabilities=["multifd", *capabilities], parameters=parameters)


@dataclasses.dataclass(frozen=True)
class Way:
    """One row of the matrix."""

    version: str
    channels: int = 2
    compression: str = "none"
    tls: bool = False

    def __str__(self) -> str:
        return f"{self.version}-{self.channels}-{self.compression}{'-tls' if self.tls else ''}"


def ways() -> Iterator[Any]:
    """A few in the ordinary run, and all with ``-m full``."""
    few = {Way(version) for version in versions()}
    few |= {Way("7.2", 2, "zstd", True), Way("10.0", 4, "zlib"), Way("11.1", 3, "zstd", True)} & {
        Way(version, channels, compression, tls)
        for version in versions() for channels in (2, 3, 4) for compression in ("zlib", "zstd") for tls in (False, True)
    }  # fmt: skip
    for version in versions():
        for channels in (1, 2, 4, 16):
            for compression in ("none", "zlib", "zstd"):
                for tls in (False, True):
                    way = Way(version, channels, compression, tls)
                    if way not in few:
                        yield pytest.param(way, marks=pytest.mark.full, id=str(way))
    for way in sorted(few, key=str):
        yield pytest.param(way, id=str(way))


@pytest.mark.parametrize("way", list(ways()))
async def test_every_byte_arrives(pki: Pki, way: Way) -> None:
    """S13, D9, A.1 rows 22 to 27: mixed memory into memory that was not empty."""
    ours = config(channels=way.channels, compression=way.compression)
    extra: list[str] = []
    parameters: dict[str, Any] = {"multifd-channels": way.channels, "multifd-compression": way.compression}
    parameters["max-bandwidth"] = 0
    if way.tls:
        ours = ours.with_options(tls=pki.make("server", "localhost", "127.0.0.1"))
        extra, parameters["tls-creds"] = x509(pki.make("client"), "client"), ID
    async with Qemu.start("none", "16M", version=way.version, extra=extra) as vm:
        peers.mix(vm.ram, seed=3)
        with peers.machine(SIZE, running=False) as guest:
            peers.memory(guest)[SIZE // 2 :] = 0xEE
            async with peers.arriving(guest, ours, uri=TCP) as arrival:
                await vm.migrate(arrival.uri, capabilities=MULTIFD, parameters=parameters)
                summary = await arrival.summary()
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert summary.confirmed
            assert arrival.monitor.counters.multifd_bytes > SIZE // 8
            assert guest.run_state == "running"


@pytest.mark.parametrize("version", versions())
async def test_a_guest_that_writes_through_several_passes(tmp_path: Path, version: str) -> None:
    """Pages come again on other channels; into a parked guest, over a unix socket."""
    with trimig.ParkedGuest() as guest:
        async with Qemu.start("pc", "32M", version=version, boot=boot_sector()) as vm:
            with trio.fail_after(peers.LIMIT):
                await vm.wait_serial(lambda text: text.count("\n") >= 3)
            vm.ram[8 * MiB : 24 * MiB] = random_ram(16 * MiB, seed=5)  # neither the guest nor its firmware is there
            async with peers.arriving(guest, config(channels=3), uri=f"unix:{tmp_path}/socket") as arrival:
                slow = {"max-bandwidth": 40 * MiB, "downtime-limit": 20, "multifd-channels": 3}
                info = await vm.migrate(arrival.uri, capabilities=MULTIFD, parameters=slow)
                await arrival.summary()
            assert info["ram"]["dirty-sync-count"] >= 2
            block = next(block for block in guest.ram if block.name == "m0")
            assert np.array_equal(np.asarray(block.pages).reshape(-1), vm.ram)


@pytest.mark.parametrize("preempt", [False, True])
@pytest.mark.parametrize("version", POSTCOPY)
async def test_postcopy_follows(version: str, *, preempt: bool) -> None:
    """newer.md part 3.5: precopy on the data channels, and the rest on the main connection."""
    capabilities = ("postcopy-ram", *(["postcopy-preempt"] if preempt else []))
    theirs = MULTIFD | dict.fromkeys(capabilities, True)
    slow = {"max-bandwidth": 20 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 0}
    with trimig.ParkedGuest() as guest:
        async with (
            peers.arriving(guest, config(capabilities=capabilities)) as arrival,
            Qemu.start("none", "16M", version=version) as vm,
        ):
            vm.ram[:] = random_ram(SIZE, seed=4)
            await vm.migrate(arrival.uri, capabilities=theirs, parameters=slow, wait=False)
            await arrival.wait_pages(500)
            await vm.qmp.execute("migrate-start-postcopy")
            await vm.wait_migration_status("completed")
            assert (await arrival.summary()).confirmed
            assert "postcopy-active" in vm.migration_statuses()
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)


@pytest.mark.parametrize("version", versions())
async def test_cancelled_half_way_and_again(version: str) -> None:
    async with Qemu.start("none", "16M", version=version) as vm:
        vm.ram[:] = random_ram(SIZE, seed=6)
        with peers.machine(SIZE, running=False) as guest:
            async with peers.arriving(guest, config()) as arrival:
                await vm.migrate(arrival.uri, capabilities=MULTIFD, parameters={"max-bandwidth": 4 * MiB}, wait=False)
                await arrival.wait_pages(300)
                await vm.qmp.execute("migrate_cancel")
                await vm.wait_migration_status("cancelled")
                error = await arrival.error()
            assert isinstance(error, trimig.TransportFailed), error
            async with peers.arriving(guest, config()) as arrival:
                await vm.migrate(arrival.uri, parameters={"max-bandwidth": 0})
                await arrival.summary()
            assert np.array_equal(vm.ram, peers.memory(guest))


@pytest.mark.parametrize(
    ("theirs", "channels", "words"),
    [
        ({"return-path": True}, 2, "the capability multifd is on here and off at the source"),
        (MULTIFD, 3, "2 of 3 data channels have come"),
        (MULTIFD, 1, "multifd-channels is 1 here"),
    ],
    ids=["off there", "more here", "fewer here"],
)
async def test_settings_that_differ_are_told_on_both_sides(theirs: dict[str, bool], channels: int, words: str) -> None:
    """L16, U3: within seconds; the guest runs at the source."""
    async with Qemu.start("none", "16M") as vm:
        vm.ram[:] = random_ram(SIZE, seed=7)
        with peers.machine(SIZE, running=False) as guest:
            async with peers.arriving(guest, config(channels=channels)) as arrival:
                await vm.migrate(arrival.uri, capabilities=theirs, wait=False)
                error = await arrival.error()
                await vm.wait_migration_status("failed")
            assert words in str(error)
        await vm.wait_status("running")


async def test_a_parked_guest_keeps_the_uuid_for_its_way_on() -> None:
    """A QEMU compares it with its own, whatever validate-uuid says."""
    uuid = ["-uuid", "00112233-4455-6677-8899-aabbccddeeff"]
    ours = config().with_options(parameters=["max-bandwidth=0"])
    with trimig.ParkedGuest() as guest:
        async with Qemu.start("none", "16M", extra=uuid, version="7.2") as vm:
            vm.ram[:] = random_ram(SIZE, seed=8)
            async with peers.arriving(guest, ours) as arrival:
                await vm.migrate(arrival.uri, capabilities=MULTIFD)
                await arrival.summary()
            before = vm.ram.copy()
        assert guest.uuid == uuid[1]
        async with Qemu.start("none", "16M", extra=uuid, incoming="defer", version="7.2") as vm:
            await vm.set_capabilities(MULTIFD)
            await trimig.migrate(guest, await vm.incoming(TCP), ours)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, before)


async def test_the_uuid_of_another_machine() -> None:
    """multifd.md part 2: it is compared in any case; the channels of such a source are not taken."""
    async with Qemu.start("none", "16M", extra=["-uuid", "00112233-4455-6677-8899-aabbccddeeff"]) as vm:
        with peers.machine(SIZE, running=False) as guest:
            guest.uuid = "00112233-4455-6677-8899-aabbccddee00"
            async with peers.arriving(guest, config()) as arrival:
                await vm.migrate(arrival.uri, capabilities=MULTIFD, wait=False)
                error = await arrival.error()
                await vm.wait_migration_status("failed")
            assert "of the machine with the UUID 00112233-4455-6677-8899-aabbccddeeff" in str(error)
            guest.uuid = "00112233-4455-6677-8899-aabbccddeeff"
            await vm.wait_status("running")
            async with peers.arriving(guest, config()) as arrival:
                await vm.migrate(arrival.uri)
                await arrival.summary()
