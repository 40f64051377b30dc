"""Rows of QEMU's own test matrix that no other file here has: no listener, and cancel after each status.

The other rows are named in the docstrings of test_to_qemu, test_from_qemu, test_lifecycle, test_tls and
test_transports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
from tests.processes.cli.hosted import hosting
from tests.processes.cli.hosted import status as migration
from tests.qemu import peers
from tests.qemu.bootsector import assert_no_gap, boot_sector, parse_counts
from tests.qemu.harness import Qemu
from tests.qemu.test_parked import receive_from
from trimig import MiB

pytestmark = pytest.mark.qemu

SIZE = 4 * MiB
#: No migration completes at this rate within a test; the first pass takes four seconds.
SLOW = 1 * MiB
NO_LISTENER = "unix:/nonexistent/socket"


async def closed_port() -> str:
    """A TCP address without a listener."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    return f"tcp:127.0.0.1:{port}"


@asynccontextmanager
async def place(kind: str) -> AsyncIterator[str]:
    """A destination, good or bad: a QEMU, or a guest of trimig."""
    if kind == "qemu":
        async with peers.target(SIZE) as (_, uri):
            yield uri
    else:
        with peers.machine(SIZE, running=False) as there:
            async with peers.arriving(there) as arrival:
                yield arrival.uri
                arrival.scope.cancel()  # if no source has connected
            assert there.run_state != "running"


async def goes(guest: trimig.AppGuest, kind: str, monitor: trimig.Monitor) -> None:
    """The same guest and monitor, and a new destination: the guest arrives, every byte as it was, and runs."""
    if kind == "qemu":
        async with peers.target(SIZE) as (vm, uri):
            await trimig.migrate(guest, uri, peers.settings(), monitor=monitor)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
    else:
        with peers.machine(SIZE, running=False) as there:
            async with peers.arriving(there) as arrival:
                await trimig.migrate(guest, arrival.uri, peers.settings(), monitor=monitor)
                await arrival.summary()
            assert there.run_state == "running"
            assert np.array_equal(peers.memory(there), peers.memory(guest))
    assert monitor.status is trimig.Status.COMPLETED


async def cancelled_in(guest: trimig.AppGuest, kind: str, monitor: trimig.Monitor, *at: str) -> None:
    """An attempt that is cancelled at each of the statuses *at*."""

    def cancel(event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] in at:
            reached.append(event.data["status"])
            monitor.cancel("the test")

    reached: list[str] = []
    remove = monitor.add_listener(cancel)
    config = peers.settings(bandwidth=0 if "pre-switchover" in at else SLOW)
    capabilities = dataclasses.replace(config.capabilities, pause_before_switchover=True)
    async with place(kind) as uri:
        with pytest.raises(trimig.MigrationCancelled, match="the test"):
            await trimig.migrate(guest, uri, dataclasses.replace(config, capabilities=capabilities), monitor=monitor)
    remove()
    assert reached == list(at)
    assert monitor.status is trimig.Status.CANCELLED


@pytest.mark.parametrize("kind", ["qemu", "trimig"])
@pytest.mark.parametrize("status", ["none", "setup", "active", "pre-switchover", "cancelling", "cancelled", "failed"])
async def test_cancel_after_each_status_and_then_a_new_target(status: str, kind: str) -> None:
    """F10, F11, A.1 row 24, A.2 cancel after each status: T→Q and T→T; the guest runs on, and the next one succeeds."""
    monitor = trimig.Monitor()
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        before = peers.memory(guest).copy()
        if status == "failed":
            with pytest.raises(trimig.TransportFailed):
                await trimig.migrate(guest, NO_LISTENER, peers.settings(), monitor=monitor)
        elif status != "none":
            at = {"cancelling": ["active", "cancelling"], "cancelled": ["active"]}.get(status, [status])
            await cancelled_in(guest, kind, monitor, *at)
        if status in ("none", "failed", "cancelled"):
            monitor.cancel("there is nothing to cancel")
            assert monitor.status.value == status
        assert guest.run_state == "running"
        assert np.array_equal(peers.memory(guest), before)
        await goes(guest, kind, monitor)


@pytest.mark.parametrize("kind", ["qemu", "trimig"])
async def test_cancel_after_completed_takes_nothing_back(kind: str) -> None:
    """A.2 cancel after completed: T→Q and T→T; the destination keeps the guest, and the source's stays paused."""
    monitor = trimig.Monitor()
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        await goes(guest, kind, monitor)
        monitor.cancel("too late")
        assert monitor.status is trimig.Status.COMPLETED
        assert monitor.owner is trimig.Ownership.DESTINATION
        assert guest.run_state != "running"


@pytest.mark.parametrize(
    "status", ["none", "setup", "active", "pre-switchover", "cancelling", "cancelled", "completed", "failed"]
)
async def test_cancel_at_qemu_after_each_status_and_then_a_new_target(status: str) -> None:
    """F10, A.1 row 24, A.2 cancel after each status: Q→T. ``setup`` is right after ``migrate``, or a moment later."""
    async with Qemu.start("none", "4M") as vm:
        peers.mix(vm.ram, seed=11)
        await vm.set_capabilities({"return-path": True, "pause-before-switchover": status == "pre-switchover"})
        with peers.machine(SIZE, running=False) as guest, trio.fail_after(peers.LIMIT):
            if status == "failed":
                await vm.migrate(NO_LISTENER, wait=False)
                await vm.wait_migration_status("failed")
            elif status == "completed":
                async with peers.arriving(guest) as arrival:
                    await vm.migrate(arrival.uri, parameters={"max-bandwidth": 0})
                    await arrival.summary()
            elif status != "none":
                await cancelled_at_qemu(vm, guest, status)
            if status in ("none", "failed", "cancelled", "completed"):
                await vm.qmp.execute("migrate_cancel")
                assert (await vm.query_migrate()).get("status", "none") == status
            if status != "completed":
                await vm.wait_status("running")
                assert guest.run_state == "inmigrate"
                async with peers.arriving(guest) as arrival:
                    await vm.set_capabilities({"pause-before-switchover": False})
                    await vm.migrate(arrival.uri, parameters={"max-bandwidth": 0})
                    await arrival.summary()
            await vm.wait_status("postmigrate")
            assert guest.run_state == "running"
            assert np.array_equal(vm.ram, peers.memory(guest))


async def cancelled_at_qemu(vm: Qemu, guest: trimig.AppGuest, status: str) -> None:
    """An attempt that is cancelled at QEMU's side."""
    async with peers.arriving(guest) as arrival:
        limit = 0 if status == "pre-switchover" else SLOW
        await vm.migrate(arrival.uri, parameters={"max-bandwidth": limit}, wait=False)
        if status == "pre-switchover":
            await vm.wait_migration_status("pre-switchover")
        elif status != "setup":
            await vm.wait_migration_status("active")
            await arrival.wait_pages(1)
        await vm.qmp.execute("migrate_cancel")
        if status == "cancelling":
            await vm.qmp.execute("migrate_cancel")
        await vm.wait_migration_status("cancelled", fail_on=())
        if status == "setup":
            arrival.scope.cancel()  # QEMU may not have connected
        else:
            assert (await arrival.error()).owner is trimig.Ownership.SOURCE


async def test_trimig_finds_no_listener_and_then_trimig() -> None:
    """B16, A.1 row 17: T→T; status failed with the reason, the guest runs on, the retry works."""
    monitor = trimig.Monitor()
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        for uri in (await closed_port(), NO_LISTENER):
            with pytest.raises(trimig.TransportFailed) as caught:
                await trimig.migrate(guest, uri, peers.settings(), monitor=monitor)
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert monitor.status is trimig.Status.FAILED
            assert monitor.info()["error-desc"] == str(caught.value)
            assert guest.run_state == "running"
        await goes(guest, "trimig", monitor)


async def test_qemu_finds_no_listener_and_then_trimig() -> None:
    """B16, A.1 row 17: Q→T; QEMU's own outcome, and then its guest arrives at trimig."""
    async with Qemu.start("none", "4M") as vm:
        peers.mix(vm.ram, seed=12)
        with peers.machine(SIZE, running=False) as guest, trio.fail_after(peers.LIMIT):
            for uri in (await closed_port(), NO_LISTENER):
                await vm.migrate(uri, wait=False)
                await vm.wait_migration_status("failed")
                await vm.wait_status("running")
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, parameters={"max-bandwidth": 0})
                await arrival.summary()
            assert guest.run_state == "running"
            assert np.array_equal(vm.ram, peers.memory(guest))


async def test_parked_guest_that_is_hosted_goes_on_in_a_qemu(tmp_path: Path) -> None:
    """A real machine's guest in ``trimig run --guest parked:FILE``: QMP sends it to a QEMU, where it counts on."""
    file = tmp_path / "guest"
    with trio.fail_after(peers.LIMIT):
        async with Qemu.start("pc", "16M", boot=boot_sector()) as vm:
            await vm.wait_serial(lambda text: text.count("\n") >= 3)
            with trimig.ParkedGuest(file) as parked:
                await receive_from(vm, parked, return_path=True)
            before = vm.serial_text()
        words = ("--guest", f"parked:{file}")
        async with (
            Qemu.start("pc", "16M", boot=boot_sector(), incoming="defer") as vm,
            hosting(f"unix:{tmp_path}/qmp", *words) as (_, client),
        ):
            uri = await vm.incoming(peers.LISTEN)
            await client.execute("migrate", {"uri": uri})
            found = await migration(client, "completed", "failed")
            assert (found["status"], found["owner"]) == ("completed", "destination")
            await vm.wait_status("running")
            text = await vm.wait_serial(lambda text: text.count("\n") >= 5)
    assert_no_gap(parse_counts(before + text))
