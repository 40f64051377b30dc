"""Rows 36, 37, 40 and 41 of qemu-tests.md A.1: the second connection of postcopy-preempt, with a QEMU on the other end that has it.

Rows 40 and 41 use X.509, because Python's ssl has no PSK before 3.13.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.bootsector import assert_no_gap, boot_sector, parse_counts
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.peers import NEEDS_PREEMPT
from tests.qemu.test_postcopy import MiB, after_pages, config, count_on, in_postcopy
from tests.qemu.test_postcopy_rows import TLS_LISTEN, cut_and_recover_from, cut_and_recover_to, named
from tests.qemu.test_tls import x509
from tests.transport.pki import ID, Pki
from trimig import Status

pytestmark = [pytest.mark.qemu, NEEDS_PREEMPT]

SIZE = 16 * MiB
PREEMPT = {"postcopy-ram": True, "postcopy-preempt": True}
ROWS = pytest.mark.parametrize(
    ("tls", "recovery"), [(False, False), (False, True), (True, False), (True, True)], ids=["36", "37", "40", "41"]
)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def preempt(**options: int) -> trimig.Config:
    """Postcopy with a second connection; the options are those of :func:`config`."""
    return config(**options).with_options(capabilities=["postcopy-preempt"])


async def touch(vm: Qemu, addresses: range) -> None:
    """Read the guest's memory as its processor would: missing pages are requested."""
    for address in addresses:
        await vm.qmp.execute("human-monitor-command", {"command-line": f"xp /1xb {address:#x}"})


@ROWS
async def test_to_qemu(pki: Pki, *, tls: bool, recovery: bool) -> None:
    ours = preempt(background=8 * MiB)
    extra: list[str] = []
    listen = peers.LISTEN
    if tls:
        ours, extra, listen = ours.with_options(tls=pki.make("client")), x509(pki.make("server"), "server"), TLS_LISTEN
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        async with Qemu.start("none", "16M", incoming="defer", extra=extra) as vm:
            await vm.set_capabilities(PREEMPT)
            if tls:
                await vm.set_parameters({"tls-creds": ID})
            uri = named(await vm.incoming(listen))
            monitor = trimig.Monitor()

            async def steer() -> None:
                await after_pages(monitor, 500)
                await in_postcopy(monitor, 0.1)
                await touch(vm, range(SIZE - MiB, SIZE, 64 << 10))
                assert monitor.info()["ram"]["postcopy-requests"] > 0
                if recovery:
                    await cut_and_recover_to(vm, monitor, listen)
                    await monitor.wait_status(Status.POSTCOPY_ACTIVE)
                    await touch(vm, range(SIZE // 2, SIZE // 2 + MiB, 64 << 10))

            summary = await peers.while_migrating(guest, uri, ours, monitor, steer)
            await vm.wait_migration_status("completed")
            assert summary.confirmed
            assert np.array_equal(vm.ram, peers.memory(guest))


@ROWS
async def test_from_qemu(pki: Pki, *, tls: bool, recovery: bool) -> None:
    ours = preempt()
    extra: list[str] = []
    parameters: dict[str, Any] = {"max-bandwidth": 10 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 10 * MiB}
    listen = peers.LISTEN
    if tls:
        ours, extra, listen = ours.with_options(tls=pki.make("server")), x509(pki.make("client"), "client"), TLS_LISTEN
        parameters["tls-creds"] = ID
    with trimig.ParkedGuest() as guest:
        async with (
            peers.arriving(guest, ours, uri=listen) as arrival,
            Qemu.start("none", "16M", extra=extra) as vm,
        ):
            vm.ram[:] = random_ram(SIZE, seed=4)
            await vm.migrate(named(arrival.uri), capabilities=PREEMPT, parameters=parameters, wait=False)
            await arrival.wait_pages(300)
            await vm.qmp.execute("migrate-start-postcopy")
            if recovery:
                await cut_and_recover_from(vm, arrival.monitor, listen)
            await vm.wait_migration_status("completed")
            assert (await arrival.summary()).confirmed
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)


async def test_a_counting_guest_asks_for_its_pages_on_the_second_connection(tmp_path: Path) -> None:
    """Row 36 with a machine that computes: out of a QEMU, parked, and into another, which faults."""
    ours = preempt(bandwidth=MiB, background=MiB)
    with trio.fail_after(peers.LIMIT), trimig.ParkedGuest(tmp_path / "guest") as parked:
        async with (
            peers.arriving(parked, ours) as arrival,
            Qemu.start("pc", "16M", boot=boot_sector()) as vm,
        ):
            await count_on(vm, 5)
            slow = {"max-bandwidth": MiB, "downtime-limit": 1}
            await vm.migrate(arrival.uri, capabilities=PREEMPT, parameters=slow, wait=False)
            await vm.wait_migration_status("active")
            await vm.qmp.execute("migrate-start-postcopy")
            await vm.wait_migration_status("completed")
            await arrival.summary()
            before = vm.serial_text()

        async with Qemu.start("pc", "16M", boot=boot_sector(), incoming="defer") as vm:
            await vm.set_capabilities(PREEMPT)
            uri = await vm.incoming(peers.LISTEN)
            monitor = trimig.Monitor()
            with await trimig.ParkedGuest.load(tmp_path / "guest") as guest:
                await peers.while_migrating(guest, uri, ours, monitor, functools.partial(after_pages, monitor, 1))
            await vm.wait_status("running")
            after = await count_on(vm, 5)
        assert monitor.info()["ram"]["postcopy-requests"] > 0
        assert_no_gap(parse_counts(before + after))
