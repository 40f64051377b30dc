"""Streams whose end has a description or none, with real QEMUs on both sides."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import trio

import trimig
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.installed import versions
from tests.qemu.peers import LIMIT, LISTEN, arriving, settings
from tests.qemu.test_postcopy import SIZE, config

pytestmark = pytest.mark.qemu

MiB = 1 << 20


@pytest.mark.parametrize("version", versions())
async def test_parked_by_postcopy_and_sent_on_by_precopy(version: str) -> None:
    """The QEMU at the end does not wait for a description, also if postcopy was possible and not used."""
    for able in (False, True):
        with trio.fail_after(LIMIT), trimig.ParkedGuest() as guest:
            async with arriving(guest, config()) as arrival, Qemu.start("none", "64M", version=version) as vm:
                vm.ram[:] = random_ram(SIZE, seed=7)
                await vm.migrate(
                    arrival.uri,
                    capabilities={"postcopy-ram": True},
                    parameters={"max-bandwidth": 20 * MiB, "downtime-limit": 1},
                    wait=False,
                )
                await arrival.wait_pages(2000)
                await vm.qmp.execute("migrate-start-postcopy")
                await vm.wait_migration_status("completed")
                assert (await arrival.summary()).confirmed
                expected = vm.ram.copy()
            async with Qemu.start("none", "64M", version=version, incoming="defer") as vm:
                await vm.set_capabilities({"postcopy-ram": able})
                uri = await vm.incoming(LISTEN)
                plain = settings()
                capabilities = dataclasses.replace(plain.capabilities, postcopy_ram=able)
                options = dataclasses.replace(plain, capabilities=capabilities, handover_timeout=20.0)
                summary = await trimig.migrate(guest, uri, options)
                assert summary.confirmed
                await vm.wait_migration_status("completed")
                assert np.array_equal(vm.ram, expected)


@pytest.mark.parametrize("return_path", [True, False])
async def test_a_source_that_describes_nothing(*, return_path: bool) -> None:
    """``suppress-vmdesc``: accepted if no byte follows the end of file."""
    with trio.fail_after(LIMIT), trimig.ParkedGuest() as guest:
        async with (
            arriving(guest, settings()) as arrival,
            Qemu.start("pc", "64M", extra=["-M", "suppress-vmdesc=on"]) as vm,
        ):
            await vm.migrate(arrival.uri, capabilities={"return-path": return_path}, wait=False)
            await vm.wait_migration_status("completed")
            await arrival.summary()
            assert guest.sections
            assert guest.description is None
