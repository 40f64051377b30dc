"""Features newer than QEMU 7.2, with each installed QEMU: PING 0x42 in postcopy, and the capability switchover-ack."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import trio

import trimig
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.installed import versions
from tests.qemu.peers import LIMIT, LISTEN, arriving, memory, settings, source, while_migrating
from tests.qemu.relay import Relay
from tests.qemu.test_postcopy import SIZE, after_pages, config
from trimig.status import Status

pytestmark = pytest.mark.qemu

MiB = 1 << 20
NEWER = [version for version in versions() if tuple(map(int, version.split("."))) >= (10, 0)]


@pytest.mark.parametrize("version", versions())
async def test_postcopy_towards_each_version(version: str) -> None:
    """F19: each answers both PINGs of the package, and gets its memory."""
    with trio.fail_after(LIMIT), source(SIZE) as guest:
        async with Qemu.start("none", "64M", version=version, incoming="defer") as vm:
            await vm.set_capabilities({"postcopy-ram": True})
            uri = await vm.incoming(LISTEN)
            monitor = trimig.Monitor()
            summary = await while_migrating(
                guest, uri, config(), monitor, functools.partial(after_pages, monitor, 3000)
            )
            await vm.wait_migration_status("completed")
            assert summary.confirmed
            assert "postcopy-active" in vm.migration_statuses()
            assert np.array_equal(vm.ram, memory(guest))


@pytest.mark.parametrize("version", [v for v in versions() if tuple(map(int, v.split("."))) >= (11, 1)])
@pytest.mark.parametrize("answered", [False, True])
async def test_a_connection_that_breaks_at_the_proof(version: str, *, answered: bool) -> None:
    """Gap G24: a source from 11.1 on that has not read the answer takes its guest back; trimig does not run it then."""
    with trio.fail_after(LIMIT), trimig.ParkedGuest() as guest:
        async with (
            arriving(guest, config(recovery_timeout=5.0)) as arrival,
            Relay(arrival.uri) as relay,
            Qemu.start("none", "64M", version=version) as vm,
        ):
            vm.ram[:] = random_ram(SIZE, seed=9)
            await vm.migrate(
                relay.uri,
                capabilities={"postcopy-ram": True},
                parameters={"max-bandwidth": 20 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 1 * MiB},
                wait=False,
            )
            await arrival.wait_pages(2000)
            if not answered:
                # PONG 1 and 2 come before the package; all later messages are lost.
                relay.back.drop_from = 16
                relay.back.changed()
            await vm.qmp.execute("migrate-start-postcopy")
            await arrival.monitor.wait_status(Status.POSTCOPY_ACTIVE)
            if answered:
                await vm.wait_migration_status("postcopy-active")
            relay.cut()
            await arrival.monitor.wait_status(Status.POSTCOPY_UNCERTAIN)
            assert arrival.monitor.owner is trimig.Ownership.UNKNOWN
            if answered:
                await vm.wait_migration_status("postcopy-paused")
                assert await vm.query_status() != "running"
            else:
                await vm.wait_migration_status("failed")
                await vm.wait_status("running")
            arrival.monitor.abandon("the test has seen it")
            with pytest.raises(trimig.HandoverUncertain):
                await arrival.summary()


@pytest.mark.parametrize("version", NEWER)
@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-10.0", "pc-i440fx-7.2"])
async def test_switchover_ack_through_trimig(version: str, machine: str) -> None:
    """From a QEMU, parked, and on to another one: no side waits for a message that does not come."""
    on = {"switchover-ack": True, "return-path": True}
    with trio.fail_after(LIMIT), trimig.ParkedGuest() as guest:
        plain = settings()
        options = dataclasses.replace(plain, capabilities=trimig.Capabilities(switchover_ack=True))
        async with arriving(guest, options) as arrival, Qemu.start(machine, "64M", version=version) as vm:
            await vm.migrate(arrival.uri, capabilities=on, wait=False)
            await vm.wait_migration_status("completed")
            assert (await arrival.summary()).confirmed
        async with Qemu.start(machine, "64M", version=version, incoming="defer") as vm:
            await vm.set_capabilities(on)
            uri = await vm.incoming(LISTEN)
            summary = await trimig.migrate(guest, uri, options)
            assert summary.confirmed
            await vm.wait_migration_status("completed")
