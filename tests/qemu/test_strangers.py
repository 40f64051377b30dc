"""A receiver among strangers while a real QEMU migrates to it, and multifd at one side only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio

import trimig
from tests.processes.engine.test_strangers import Strangers
from tests.qemu import peers
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.peers import NEEDS_PREEMPT
from tests.qemu.test_postcopy import MiB
from tests.qemu.test_postcopy_preempt import PREEMPT, preempt

pytestmark = pytest.mark.qemu

SIZE = 16 * MiB
MULTIFD = {"multifd": True, "return-path": True}


@asynccontextmanager
async def among_strangers(uri: str, *, opaque: bool = False) -> AsyncIterator[None]:
    """Strangers that connect before the block, and all the time; *opaque* as for :meth:`Strangers.crowd`."""
    strangers = Strangers(uri)
    try:
        await strangers.crowd(opaque=opaque)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(strangers.go_on)
            yield
            nursery.cancel_scope.cancel("the test is over")
    finally:
        strangers.close()


async def test_precopy_among_strangers() -> None:
    async with Qemu.start("none", "16M") as vm:
        vm.ram[:] = random_ram(SIZE, seed=4)
        with peers.machine(SIZE, running=False) as guest:
            async with peers.arriving(guest) as arrival, among_strangers(arrival.uri):
                await vm.migrate(
                    arrival.uri, capabilities={"return-path": True}, parameters={"max-bandwidth": 20 * MiB}
                )
                assert (await arrival.summary()).confirmed
            assert np.array_equal(vm.ram, peers.memory(guest))


@NEEDS_PREEMPT
@pytest.mark.parametrize("cut", [False, True])
async def test_preempt_among_strangers(*, cut: bool) -> None:
    """Both connections are found, and after a cut both again."""
    parameters = {"max-bandwidth": 10 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 4 * MiB}
    with trimig.ParkedGuest() as guest:
        async with peers.arriving(guest, preempt()) as arrival, Qemu.start("none", "16M") as vm:
            vm.ram[:] = random_ram(SIZE, seed=4)
            async with among_strangers(arrival.uri, opaque=True):
                await vm.migrate(arrival.uri, capabilities=PREEMPT, parameters=parameters, wait=False)
                await arrival.wait_pages(300)
                await vm.qmp.execute("migrate-start-postcopy")
                if cut:
                    await vm.wait_migration_status("postcopy-active")
                    await arrival.monitor.wait_status(trimig.Status.POSTCOPY_ACTIVE)
                    arrival.monitor.pause("the test cuts it")
                    await vm.wait_migration_status("postcopy-paused")
                    await peers.wait_lost(arrival.monitor)
                    arrival.monitor.recover(peers.LISTEN)
                    while not arrival.monitor.addresses:
                        await arrival.monitor.wait_changed()
                    again = arrival.monitor.addresses[0]
                    async with among_strangers(again, opaque=True):
                        await vm.qmp.execute("migrate", {"uri": again, "resume": True})
                        await vm.wait_migration_status("completed")
                else:
                    await vm.wait_migration_status("completed")
            assert (await arrival.summary()).confirmed
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)


@pytest.mark.parametrize("second", [False, True], ids=["one connection", "postcopy-preempt"])
async def test_multifd_at_the_source_only_is_said_on_both_sides(*, second: bool) -> None:
    """Also while a second connection is expected, which looks like a channel of multifd."""
    async with Qemu.start("none", "16M") as vm:
        vm.ram[:] = random_ram(SIZE, seed=4)
        with trimig.ParkedGuest() as guest:
            async with peers.arriving(guest, preempt() if second else None) as arrival:
                await vm.migrate(arrival.uri, capabilities=MULTIFD, wait=False)
                await vm.wait_migration_status("failed")
                error = await arrival.error()
        assert "turn multifd off at the source" in str(error)
        await vm.wait_status("running")


@pytest.mark.parametrize("size", [SIZE, peers.SMALL], ids=["memory that fills buffers", "memory that does not"])
async def test_multifd_at_the_destination_only_is_said(size: int) -> None:
    """The destination reads nothing before further connections have come. The source's guest is never stopped for
    that."""
    with trio.fail_after(peers.LIMIT), peers.source(size) as guest:
        async with Qemu.start("none", f"{size >> 20}M", incoming="defer") as vm:
            await vm.set_capabilities({"multifd": True})
            uri = await vm.incoming(peers.LISTEN)
            monitor = trimig.Monitor()
            statuses: list[str] = []
            monitor.add_listener(lambda event: statuses.append(event.name))
            with pytest.raises(trimig.TransportFailed, match=r"answered nothing for 30 s; .* turn multifd off there"):
                await trimig.migrate(guest, uri, peers.settings(), monitor=monitor)
        assert any("multifd" in text for text in monitor.counters.warnings)
        assert "STOP" not in statuses
        assert guest.run_state == "running"
