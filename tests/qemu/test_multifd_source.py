"""multifd with a QEMU as the destination, which places and compares every byte: rows 23 to 33 of qemu-tests.md A.1.

A QEMU with a machine type without a version synchronises as the newest type of its version does, so the profile names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.qemu.installed import versions
from tests.qemu.test_tls import x509
from tests.transport.pki import ID, Pki
from trimig import MiB
from trimig.config.peer import PEERS

pytestmark = pytest.mark.qemu

SIZE = 16 * MiB
VERSIONS = pytest.mark.parametrize("version", versions())


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def config(version: str, *, channels: int = 2, compression: str = "none", **parameters: Any) -> trimig.Config:
    """For a QEMU of that version without a machine type."""
    return trimig.Config(
        capabilities=trimig.Capabilities(multifd=True),
        parameters=trimig.Parameters(
            multifd_channels=channels, multifd_compression=compression, **{"max_bandwidth": 0, **parameters}
        ),
        peer=PEERS[f"qemu-{version}"],
    )


def both(ours: trimig.Config) -> trimig.Config:
    """With postcopy as well."""
    return ours.with_options(capabilities=["postcopy-ram"])


@asynccontextmanager
async def waiting(
    version: str, ours: trimig.Config, *, size: int = SIZE, extra: tuple[str, ...] = (), uri: str = peers.LISTEN
) -> AsyncIterator[tuple[Qemu, str]]:
    """A QEMU that waits for a migration with multifd, and its address."""
    with trio.fail_after(peers.LIMIT):
        async with Qemu.start("none", f"{size >> 20}M", incoming="defer", version=version, extra=list(extra)) as vm:
            await vm.set_capabilities({"multifd": True, "postcopy-ram": ours.capabilities.postcopy_ram})
            parameters: dict[str, Any] = {
                "multifd-channels": ours.parameters.multifd_channels,
                "multifd-compression": ours.parameters.multifd_compression,
            }
            if extra:
                parameters["tls-creds"] = ID
            await vm.set_parameters(parameters)
            yield vm, await vm.incoming(uri)


async def arrives(version: str, ours: trimig.Config, *, pki: Pki | None = None, uri: str = peers.LISTEN) -> None:
    """A guest of mixed pages, every byte of it."""
    extra: tuple[str, ...] = ()
    if pki is not None:
        ours, extra = ours.with_options(tls=pki.make("client")), tuple(x509(pki.make("server"), "server"))
        uri = "tcp:localhost:0"
    monitor = trimig.Monitor()
    with peers.source(SIZE) as guest:
        async with waiting(version, ours, extra=extra, uri=uri) as (vm, address):
            address = address.replace("127.0.0.1", "localhost") if pki is not None else address
            summary = await trimig.migrate(guest, address, ours, monitor=monitor)
            assert summary.confirmed
            assert await vm.wait_status("running", "paused") == "running"
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert summary.normal_pages + summary.zero_pages == SIZE // peers.PAGE
            assert monitor.info()["ram"]["multifd-bytes"] > MiB


@VERSIONS
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
async def test_every_byte_arrives(version: str, compression: str) -> None:
    """A.1 rows 25 and 26, S13."""
    await arrives(version, config(version, compression=compression))


@VERSIONS
@pytest.mark.parametrize("zeros", ["legacy", "none"])
async def test_zero_pages_elsewhere(version: str, zeros: str) -> None:
    """On the main connection, or as other pages."""
    await arrives(version, config(version, zero_page_detection=zeros))


@VERSIONS
async def test_with_tls_on_each_connection(version: str, pki: Pki) -> None:
    """A.1 row 29: the close_notify of each data channel as well."""
    await arrives(version, config(version), pki=pki)


@pytest.mark.full
@VERSIONS
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("channels", [1, 2, 4, 16])
async def test_the_whole_matrix(version: str, channels: int, compression: str, tls: bool, pki: Pki) -> None:
    """A.1 rows 23, 25, 26 and 29."""
    await arrives(version, config(version, channels=channels, compression=compression), pki=pki if tls else None)


@VERSIONS
async def test_a_guest_that_writes_through_several_passes(version: str) -> None:
    """A.1 row 23: each write makes the same change in two far pages; at the destination the two are equal."""
    half = SIZE // peers.PAGE // 2
    ours = config(version, channels=4, max_bandwidth=32 * MiB, downtime_limit=5)
    async with waiting(version, ours) as (vm, uri):
        with peers.source(SIZE) as guest:
            pages = guest.ram[0].pages
            pages[half:] = pages[:half]
            written = 0

            async def write() -> None:
                nonlocal written
                with contextlib.suppress(trimig.NotOwner):
                    while True:
                        async with guest.running():
                            written += 1
                            page = written % 256
                            # Zero pages become others, and others zero pages.
                            pages[page] = 0 if written % 3 == 0 else written % 256
                            pages[half + page] = pages[page]
                        await trio.sleep(0.002)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                summary = await trimig.migrate(guest, uri, ours)
                nursery.cancel_scope.cancel()
            await vm.wait_status("running")
            arrived = vm.ram.reshape(-1, peers.PAGE)
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert np.array_equal(arrived[:half], arrived[half:])
            assert summary.iterations > 1


@VERSIONS
async def test_cancelled_half_way_and_again(version: str) -> None:
    """A.1 row 24: no connection is left, the guest runs, and another QEMU gets it."""
    ours = config(version, max_bandwidth=8 * MiB)
    with peers.source(SIZE) as guest:
        before = peers.memory(guest).copy()
        async with waiting(version, ours) as (vm, uri):
            monitor = trimig.Monitor()

            async def cancel() -> None:
                async for picture in monitor.watch(0.01):
                    if picture.normal_pages > 500:
                        break
                monitor.cancel("the test")

            with pytest.raises(trimig.MigrationCancelled):
                await peers.while_migrating(guest, uri, ours, monitor, cancel)
            assert guest.run_state == "running"
            assert not any(event["event"] == "RESUME" for event in vm.qmp.events)
        assert np.array_equal(peers.memory(guest), before)
        await arrives_again(version, guest)


async def arrives_again(version: str, guest: trimig.AppGuest) -> None:
    """The same guest, in a new QEMU."""
    ours = config(version)
    async with waiting(version, ours, size=guest.ram[0].length) as (vm, uri):
        await trimig.migrate(guest, uri, ours)
        await vm.wait_status("running")
        assert np.array_equal(vm.ram, peers.memory(guest))


@VERSIONS
async def test_a_qemu_without_multifd(version: str) -> None:
    """U3: one sentence within seconds, and the guest runs."""
    ours = config(version)
    with peers.source(SIZE) as guest:
        async with peers.target(SIZE, version=version) as (_, uri):
            with trio.fail_after(10), pytest.raises(trimig.TrimigError, match="multifd") as caught:
                await trimig.migrate(guest, uri, ours)
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
        await arrives_again(version, guest)


@pytest.mark.parametrize("version", [v for v in versions() if tuple(map(int, v.split("."))) >= (8, 1)])
async def test_a_profile_that_does_not_fit(version: str) -> None:
    """T1, newer.md part 3.3: a QEMU of a newer scheme would run this small guest without its memory."""
    ours = config("7.2")
    with peers.source(2 * MiB) as guest:
        async with waiting(version, ours, size=2 * MiB) as (vm, uri):
            with pytest.raises(trimig.ConfigError, match="another peer profile than"):
                await trimig.migrate(guest, uri, ours)
            assert guest.run_state == "running"
            assert not any(event["event"] == "RESUME" for event in vm.qmp.events)
        await arrives_again(version, guest)


async def test_over_a_unix_socket(tmp_path: Any) -> None:
    """B2: the same over another transport."""
    await arrives("7.2", config("7.2", channels=3), uri=f"unix:{tmp_path}/socket")


async def test_postcopy_in_a_qemu_that_would_lose_the_guest() -> None:
    """multifd.md part 7: 7.2 accepts both, and aborts at the end; so it is refused before any page was sent."""
    ours = both(config("7.2"))
    with peers.source(SIZE) as guest:
        async with waiting("7.2", ours) as (_, uri):
            with pytest.raises(trimig.ConfigError, match="loses the guest in a QEMU before"):
                await trimig.migrate(guest, uri, ours)
            assert guest.run_state == "running"
        await arrives_again("7.2", guest)


@pytest.mark.parametrize("version", [v for v in versions() if tuple(map(int, v.split("."))) >= (11, 1)])
async def test_postcopy_after_multifd(version: str) -> None:
    """newer.md part 3.5: from 11.1 on the pages of precopy come on data channels, and the others on the main one."""
    ours = both(config(version, max_bandwidth=16 * MiB, downtime_limit=1))
    monitor = trimig.Monitor()

    async def switch() -> None:
        async for picture in monitor.watch(0.01):
            if picture.normal_pages > 1000:
                break
        monitor.start_postcopy()

    with peers.source(SIZE) as guest:
        async with waiting(version, ours) as (vm, uri):
            summary = await peers.while_migrating(guest, uri, ours, monitor, switch)
            await vm.wait_migration_status("completed")
            assert summary.confirmed
            assert "postcopy-active" in vm.migration_statuses()
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert monitor.info()["ram"]["multifd-bytes"] > MiB
