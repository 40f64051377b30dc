"""The newer rows of QEMU's matrix about multifd (qemu-tests.md A.2), in both directions.

These are levels of the compression, zero pages that a QEMU sends in other ways, and postcopy behind multifd: with
compression, TLS, the preempt channel, recovery and cancel. The rows with a shared secret use X.509, because Python's ssl has no PSK
before 3.13.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.installed import versions
from tests.qemu.test_multifd_receiver import POSTCOPY, config
from tests.qemu.test_postcopy import after_pages, in_postcopy
from tests.qemu.test_postcopy_rows import TLS_LISTEN, cut_and_recover_from, cut_and_recover_to, named
from tests.qemu.test_tls import x509
from tests.transport.pki import ID, Pki
from trimig import MiB, Status
from trimig.config.peer import PEERS

pytestmark = pytest.mark.qemu

SIZE = 16 * MiB
NEW = [version for version in versions() if tuple(map(int, version.split("."))) >= (9, 0)]
each = pytest.mark.parametrize("version", POSTCOPY)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@dataclasses.dataclass(frozen=True)
class Row:
    """A migration that begins with multifd and ends with postcopy."""

    compression: str = "none"
    tls: bool = False
    preempt: bool = False
    recovery: bool = False

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Beside multifd."""
        return ("postcopy-ram", *(["postcopy-preempt"] if self.preempt else []))

    @property
    def theirs(self) -> dict[str, bool]:
        """For a QEMU."""
        return {"multifd": True, **dict.fromkeys(self.capabilities, True)}

    def ours(self, version: str | None = None) -> trimig.Config:
        """For trimig; *version* is that of the destination."""
        slow = ["max-bandwidth=16M", "downtime-limit=1", "max-postcopy-bandwidth=8M"]
        found = config(compression=self.compression, capabilities=self.capabilities).with_options(parameters=slow)
        return found if version is None else dataclasses.replace(found, peer=PEERS[f"qemu-{version}"])

    @property
    def parameters(self) -> dict[str, Any]:
        """For a QEMU."""
        tls = {"tls-creds": ID} if self.tls else {}
        return {"multifd-channels": 2, "multifd-compression": self.compression, **tls}


ROWS = {
    "zstd": Row(compression="zstd"),
    "tls": Row(tls=True),
    "preempt": Row(preempt=True),
    "recovery tls": Row(tls=True, recovery=True),
    "preempt recovery tls": Row(tls=True, preempt=True, recovery=True),
}
#: The last one has all but the compression, so the ordinary run has these two.
_FEW = ("zstd", "preempt recovery tls")
rows = pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=() if name in _FEW else pytest.mark.full) for name, row in ROWS.items()]
)


@each
@rows
async def test_postcopy_behind_multifd_to_qemu(version: str, row: Row, pki: Pki) -> None:
    """A.2, multifd+postcopy: T→Q."""
    ours, extra, listen = row.ours(version), list[str](), peers.LISTEN
    if row.tls:
        ours, extra, listen = ours.with_options(tls=pki.make("client")), x509(pki.make("server"), "server"), TLS_LISTEN
    monitor = trimig.Monitor()
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        async with Qemu.start("none", "16M", incoming="defer", version=version, extra=extra) as vm:
            await vm.set_capabilities(row.theirs)
            await vm.set_parameters(row.parameters)
            uri = named(await vm.incoming(listen))

            async def steer() -> None:
                await after_pages(monitor, 1000)
                if row.recovery:
                    await in_postcopy(monitor, 0.2)
                    await cut_and_recover_to(vm, monitor, listen)

            summary = await peers.while_migrating(guest, uri, ours, monitor, steer)
            await vm.wait_migration_status("completed")
            assert summary.confirmed
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert ("postcopy-paused" in vm.migration_statuses()) is row.recovery
            assert monitor.info()["ram"]["multifd-bytes"] > 0


@each
@rows
async def test_postcopy_behind_multifd_from_qemu(version: str, row: Row, pki: Pki) -> None:
    """A.2, multifd+postcopy: Q→T."""
    ours, extra, listen = row.ours(), list[str](), peers.LISTEN
    if row.tls:
        ours, extra, listen = ours.with_options(tls=pki.make("server")), x509(pki.make("client"), "client"), TLS_LISTEN
    slow = {"max-bandwidth": 10 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 10 * MiB}
    with trimig.ParkedGuest() as guest:
        async with (
            peers.arriving(guest, ours, uri=listen) as arrival,
            Qemu.start("none", "16M", version=version, extra=extra) as vm,
        ):
            vm.ram[:] = random_ram(SIZE, seed=4)
            able = {"return-path": True, **row.theirs}
            await vm.migrate(named(arrival.uri), capabilities=able, parameters=row.parameters | slow, wait=False)
            await arrival.wait_pages(500)
            await vm.qmp.execute("migrate-start-postcopy")
            if row.recovery:
                await cut_and_recover_from(vm, arrival.monitor, listen)
            await vm.wait_migration_status("completed")
            summary = await arrival.summary()
            assert summary.confirmed
            assert summary.multifd_bytes
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)


@each
async def test_cancelled_with_postcopy_allowed_to_qemu(version: str) -> None:
    """A.2, multifd+postcopy/tcp/plain/cancel: T→Q; a new QEMU gets the guest after it."""
    row = Row()
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        async with Qemu.start("none", "16M", incoming="defer", version=version) as vm:
            await vm.set_capabilities(row.theirs)
            monitor = trimig.Monitor()
            uri = await vm.incoming(peers.LISTEN)
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def cancel() -> None:
                    async for picture in monitor.watch(0.01):
                        if picture.normal_pages > 1000:
                            break
                    scope.cancel()

                nursery.start_soon(cancel)
                with scope:
                    await trimig.migrate(guest, uri, row.ours(version), monitor=monitor)
            assert monitor.status is Status.CANCELLED
            assert guest.run_state == "running"
        fast = row.ours(version).with_options(parameters=["max-bandwidth=0"])
        async with Qemu.start("none", "16M", incoming="defer", version=version) as vm:
            await vm.set_capabilities(row.theirs)
            assert (await trimig.migrate(guest, await vm.incoming(peers.LISTEN), fast)).confirmed
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))


@each
async def test_cancelled_with_postcopy_allowed_from_qemu(version: str) -> None:
    """The same: Q→T."""
    row = Row()
    async with Qemu.start("none", "16M", version=version) as vm:
        vm.ram[:] = random_ram(SIZE, seed=6)
        able = {"return-path": True, **row.theirs}
        with trimig.ParkedGuest() as guest:
            async with peers.arriving(guest, config(capabilities=row.capabilities)) as arrival:
                await vm.migrate(arrival.uri, capabilities=able, parameters={"max-bandwidth": 4 * MiB}, wait=False)
                await arrival.wait_pages(300)
                await vm.qmp.execute("migrate_cancel")
                await vm.wait_migration_status("cancelled")
                assert isinstance(await arrival.error(), trimig.TransportFailed)
            async with peers.arriving(guest, config(capabilities=row.capabilities)) as arrival:
                await vm.migrate(arrival.uri, parameters={"max-bandwidth": 0})
                await arrival.summary()
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)


@pytest.mark.parametrize("version", NEW)
@pytest.mark.parametrize("zeros", ["legacy", "none"])
async def test_zero_pages_of_a_qemu_elsewhere(version: str, zeros: str) -> None:
    """A.2, zero-page/legacy and zero-page/none: on the main connection, or as other pages."""
    parameters = {"multifd-channels": 2, "max-bandwidth": 0, "zero-page-detection": zeros}
    async with Qemu.start("none", "16M", version=version) as vm:
        peers.mix(vm.ram, seed=3)
        with peers.machine(SIZE, running=False) as guest:
            peers.memory(guest)[:] = 0xEE
            async with peers.arriving(guest, config()) as arrival:
                await vm.migrate(
                    arrival.uri, capabilities={"multifd": True, "return-path": True}, parameters=parameters
                )
                summary = await arrival.summary()
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert (summary.zero_pages == 0) is (zeros == "none")


@pytest.mark.parametrize(
    "version", [pytest.param(v, marks=() if v == versions()[-1] else pytest.mark.full) for v in versions()]
)
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_levels(version: str, compression: str) -> None:
    """A.2, zlib and zstd with level 2: what is sent is smaller at a higher level, and arrives; T→Q and Q→T."""
    sizes = []
    text = b"".join(b"the page %d of the text\n" % number for number in range(MiB // 8))
    for level in (1, 9):
        parameters = [f"multifd-{compression}-level={level}", "max-bandwidth=0"]
        ours = dataclasses.replace(config(compression=compression), peer=PEERS[f"qemu-{version}"])
        theirs = {"multifd-channels": 2, "multifd-compression": compression, f"multifd-{compression}-level": 2}
        with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
            peers.memory(guest)[:] = np.resize(np.frombuffer(text, np.uint8), SIZE)
            async with Qemu.start("none", "16M", incoming="defer", version=version) as vm:
                await vm.set_capabilities({"multifd": True})
                await vm.set_parameters(theirs)
                uri = await vm.incoming(peers.LISTEN)
                summary = await trimig.migrate(guest, uri, ours.with_options(parameters=parameters))
                sizes.append(summary.multifd_bytes)
                await vm.wait_status("running")
                assert np.array_equal(vm.ram, peers.memory(guest))
            with peers.machine(SIZE, running=False) as back:
                async with Qemu.start("none", "16M", version=version) as vm:
                    vm.ram[:] = peers.memory(guest)
                    theirs[f"multifd-{compression}-level"] = level
                    async with peers.arriving(back, config(compression=compression)) as arrival:
                        able = {"multifd": True, "return-path": True}
                        await vm.migrate(arrival.uri, capabilities=able, parameters=theirs)
                        await arrival.summary()
                assert np.array_equal(peers.memory(back), peers.memory(guest))
    assert sizes[1] < sizes[0]
