"""trimig as the destination of a real QEMU: every byte, refusals with a message to the source, cancels on both
sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
import trimig.guests
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.qemu.peers import LISTEN, PAGE, SMALL
from tests.qemu.relay import Relay
from trimig import MiB

pytestmark = pytest.mark.qemu

BIG = 64 * MiB
RETURN_PATH = {"return-path": True}


async def took(vm: Qemu, *, run_state: str = "running") -> None:
    """Another trimig receives the guest of *vm*, whole."""
    with peers.machine(len(vm.ram), running=False) as guest:
        async with peers.arriving(guest) as arrival:
            await vm.migrate(arrival.uri, capabilities=RETURN_PATH, parameters={"max-bandwidth": 0})
            await arrival.summary()
        assert np.array_equal(vm.ram, peers.memory(guest))
        assert guest.run_state == run_state


@pytest.mark.parametrize("return_path", [True, False])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_64_mib_of_mixed_pages_arrive_byte_for_byte(tmp_path: Path, scheme: str, *, return_path: bool) -> None:
    """A.1 rows 1, 6, B7, J2, J5, P1: into memory that was not empty; QEMU completes, and sees trimig as a QEMU."""
    async with Qemu.start("none", "64M") as vm:
        peers.mix(vm.ram, seed=2)
        with peers.machine(BIG, running=False) as guest:
            peers.memory(guest)[BIG // 2 :] = 0xEE
            address = LISTEN if scheme == "tcp" else f"unix:{tmp_path}/socket"
            async with peers.arriving(guest, uri=address) as arrival:
                events = arrival.monitor.events()
                info = await vm.migrate(arrival.uri, capabilities={"return-path": return_path})
                summary = await arrival.summary()
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert guest.run_state == "running"
        await vm.wait_status("postmigrate")
        assert vm.main_statuses() == ["setup", "active", "completed"]
        assert peers.statuses([e async for e in events]) == ["active", "handover", "completed"]
        assert summary.confirmed is return_path
        assert summary.prepared is False  # QEMU does not ask for the proof
        assert (summary.normal_pages, summary.zero_pages) == (info["ram"]["normal"], info["ram"]["duplicate"])
        assert summary.normal_pages + summary.zero_pages == BIG // PAGE


async def test_a_limited_source_sends_many_sections() -> None:
    """P1, L7: QEMU ends a PART section with each window of its limit; pages of one block go on in the next one."""
    async with Qemu.start("none", "16M", extra=("-trace", "savevm_section_start")) as vm:
        peers.mix(vm.ram, seed=3)
        with peers.machine(16 * MiB, running=False) as guest:
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, capabilities=RETURN_PATH, parameters={"max-bandwidth": 24 * MiB})
                await arrival.summary()
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert vm.stderr_text().count("savevm_section_start ram") >= 4


async def test_twice_in_a_row_and_there_and_back() -> None:
    """A guest goes from QEMU to trimig to QEMU to trimig; then the first QEMU is continued and sends its copy again."""
    async with Qemu.start("none", "1M") as first:
        peers.mix(first.ram, seed=4)
        with peers.machine(running=False) as here:
            async with peers.arriving(here) as arrival:
                await first.migrate(arrival.uri, capabilities=RETURN_PATH)
                await arrival.summary()
            peers.memory(here)[: 4 * PAGE] = 0x77
            async with peers.target() as (second, uri):
                await trimig.migrate(here, uri, peers.settings())
                await second.wait_status("running")
                second.ram[8 * PAGE :][:PAGE] = 0x33
                with peers.machine(running=False) as back:
                    async with peers.arriving(back) as arrival:
                        await second.migrate(arrival.uri, capabilities=RETURN_PATH)
                        await arrival.summary()
                    expected = first.ram.copy()
                    expected[: 4 * PAGE] = 0x77
                    expected[8 * PAGE :][:PAGE] = 0x33
                    assert np.array_equal(peers.memory(back), expected)
        await first.qmp.execute("cont")
        await took(first)


async def test_paused_guest_arrives_paused() -> None:
    """P9, M2, M3: the guest arrives paused, and the caller can resume it."""
    async with Qemu.start("none", "1M") as vm:
        await vm.qmp.execute("stop")
        with peers.machine(running=False) as guest:
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, capabilities=RETURN_PATH)
                await arrival.summary()
            assert guest.run_state == "paused"
            await guest.resume()
            assert guest.run_state == "running"


@pytest.mark.parametrize("was", ["running", "paused"])
@pytest.mark.parametrize(
    ("options", "words", "section"),
    [
        ({"block": "pc.ram"}, "unknown RAM block 'm0'", "ram"),
        ({"size": 2 * SMALL}, "RAM block 'm0' has", "ram"),
        ({"timer": False}, "unknown device 'timer'", "timer"),
    ],
)
async def test_refused_guest_stays_with_qemu(options: dict[str, Any], words: str, section: str, was: str) -> None:
    """J5, K4, P4, gap G13: a typed error with the place in trimig, SHUT 1 to QEMU; QEMU's guest is as it was.

    QEMU leaves a guest that was paused in "postmigrate" instead, and does not migrate it again before a client
    has sent "cont" (gap G19). That is QEMU's behaviour, and "cont" works.
    """
    async with Qemu.start("none", "1M") as vm:
        peers.mix(vm.ram, seed=5)
        if was == "paused":
            await vm.qmp.execute("stop")
        with peers.machine(running=False, **options) as guest:
            async with peers.arriving(guest) as arrival, Relay(arrival.uri) as relay:
                await vm.migrate(relay.uri, capabilities=RETURN_PATH, wait=False)
                error = await arrival.error()
                await vm.wait_migration_status("failed")
                assert relay.back.delivered == 16  # PONG 1 and SHUT 1
            assert isinstance(error, trimig.RemoteProtocolError)
            assert words in str(error)
            assert error.section == section
            assert error.offset is not None
            assert error.owner is trimig.Ownership.SOURCE
            assert arrival.monitor.info()["error-desc"] == str(error)
            assert guest.run_state == "inmigrate"
        if was == "paused":
            assert await vm.wait_status("postmigrate", "paused", "running") != "running"
            await vm.qmp.execute("cont")
        await vm.wait_status("running")
        await took(vm)


async def test_a_qemu_with_another_machine_is_not_waited_for() -> None:
    """J5, P4: the wrong name comes before the return path. The connection is dropped, and the right source can still
    come."""
    async with Qemu.start("none", "1M") as right, Qemu.start("microvm", "1M") as wrong:
        peers.mix(right.ram, seed=5)
        with peers.machine(running=False) as guest:
            async with peers.arriving(guest) as arrival:
                async with Relay(arrival.uri) as relay:
                    await wrong.migrate(relay.uri, capabilities=RETURN_PATH, wait=False)
                    assert "machine 'microvm', this one is 'none'" in await arrival.dropped()
                    await wrong.wait_migration_status("failed")
                    assert relay.back.delivered == 0
                assert guest.run_state == "inmigrate"
                await right.migrate(arrival.uri, capabilities=RETURN_PATH)
                await arrival.summary()
            assert np.array_equal(right.ram, peers.memory(guest))
        await wrong.wait_status("running")


class Unwilling(trimig.AppGuest):
    """The guest arrives, and cannot be started."""

    async def activate(self, run_state: str) -> None:
        await trio.lowlevel.checkpoint()
        raise trimig.GuestFailed(f"no room to be {run_state}")


async def test_guest_that_cannot_be_brought_to_life_stays_with_qemu() -> None:
    """J5, K4: the commit has been read, and the guest is returned with SHUT 1: only QEMU runs it."""
    async with Qemu.start("none", "1M") as vm:
        with Unwilling("none", running=False) as guest:
            guest.add_ram("m0", SMALL)
            guest.add_device(trimig.guests.TimerState())
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, capabilities=RETURN_PATH, wait=False)
                error = await arrival.error()
            assert isinstance(error, trimig.GuestFailed)
            assert error.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "inmigrate"
        await vm.wait_migration_status("failed")
        await vm.wait_status("running")
        await took(vm)


@pytest.mark.parametrize("return_path", [True, False])
async def test_migrate_cancel_at_qemu_is_one_typed_error_here(*, return_path: bool) -> None:
    """F10, P4: while QEMU sends. The same guest object, and this process, then take the next attempt."""
    async with Qemu.start("none", "16M") as vm:
        peers.mix(vm.ram, seed=6)
        with peers.machine(16 * MiB, running=False) as guest:
            async with peers.arriving(guest) as arrival:
                limit = {"max-bandwidth": 4 * MiB}
                await vm.migrate(arrival.uri, capabilities={"return-path": return_path}, parameters=limit, wait=False)
                await arrival.wait_pages(16)
                await vm.qmp.execute("migrate_cancel")
                error = await arrival.error()
            assert isinstance(error, trimig.TransportFailed | trimig.RemoteProtocolError)
            assert error.owner is trimig.Ownership.SOURCE
            assert arrival.monitor.status is trimig.Status.FAILED
            assert guest.run_state == "inmigrate"
            await vm.wait_migration_status("cancelled")
            await vm.wait_status("running")
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, parameters={"max-bandwidth": 0})
                await arrival.summary()
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert guest.run_state == "running"


@pytest.mark.parametrize("how", ["monitor", "scope"])
@pytest.mark.parametrize("return_path", [True, False])
async def test_cancelled_receiver_leaves_qemu_running(how: str, *, return_path: bool) -> None:
    """T3: trimig is cancelled in the middle of the RAM; QEMU gets an error, runs on, and finds another destination."""
    async with Qemu.start("none", "16M") as vm:
        peers.mix(vm.ram, seed=7)
        with peers.machine(16 * MiB, running=False) as guest:
            async with peers.arriving(guest) as arrival:
                limit = {"max-bandwidth": 4 * MiB}
                await vm.migrate(arrival.uri, capabilities={"return-path": return_path}, parameters=limit, wait=False)
                await arrival.wait_pages(16)
                if how == "monitor":
                    arrival.monitor.cancel("the test")
                    assert isinstance(await arrival.error(), trimig.MigrationCancelled)
                else:
                    arrival.scope.cancel()
                    await arrival.done.wait()
                    assert arrival.outcome is None
                    assert arrival.scope.cancelled_caught
            assert arrival.monitor.status is trimig.Status.CANCELLED
            assert arrival.monitor.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "inmigrate"
        await vm.wait_migration_status("failed")
        await vm.wait_status("running")
        await took(vm)


async def test_cancelled_while_it_listens() -> None:
    """T3: no source has connected; the socket is gone afterwards, and the same address is free again."""
    with peers.machine(running=False) as guest:
        async with peers.arriving(guest) as arrival:
            arrival.monitor.cancel("the test")
            assert isinstance(await arrival.error(), trimig.MigrationCancelled)
        async with Qemu.start("none", "1M") as vm:
            await vm.migrate(arrival.uri, wait=False)
            assert "error-desc" in await vm.wait_migration_status("failed")
            await vm.wait_status("running")
            async with peers.arriving(guest, uri=arrival.uri) as again:
                await vm.migrate(again.uri)
                await again.summary()
            assert guest.run_state == "running"


async def test_qemu_dies_while_it_sends() -> None:
    """T1: the guest died with QEMU; trimig raises a typed error, and no guest runs with half of its memory."""
    with peers.machine(16 * MiB, running=False) as guest:
        async with peers.arriving(guest) as arrival:
            async with Qemu.start("none", "16M") as vm:
                peers.mix(vm.ram, seed=8)
                await vm.migrate(arrival.uri, parameters={"max-bandwidth": 4 * MiB}, wait=False)
                await arrival.wait_pages(16)
            error = await arrival.error()
        assert isinstance(error, trimig.TransportFailed | trimig.RemoteProtocolError)
        assert error.owner is trimig.Ownership.SOURCE
        assert guest.run_state == "inmigrate"
