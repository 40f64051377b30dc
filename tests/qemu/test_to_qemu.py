"""trimig as the source of a real QEMU: every byte, refusals, kills, cancels, and the next attempt."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
import trimig.guests
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.qemu.installed import SPOKEN
from tests.qemu.peers import LISTEN, PAGE, SMALL
from trimig import MiB

pytestmark = pytest.mark.qemu

BIG = 64 * MiB


class Ghost(trimig.Device):
    """A device that no QEMU has."""

    vmstate = trimig.VMState("ghost", fields=(trimig.Field("chains", "uint32"),))

    def __init__(self) -> None:
        super().__init__()
        self.chains = 7


@pytest.mark.parametrize("return_path", [True, False])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_64_mib_of_mixed_pages_arrive_byte_for_byte(tmp_path: Path, scheme: str, *, return_path: bool) -> None:
    """A.1 rows 1, 6, B1, B2, K1, K5, L1, L2, L4, M3, M5, M8, M9: random, repeated, zero and almost zero pages."""
    address = LISTEN if scheme == "tcp" else f"unix:{tmp_path}/socket"
    async with peers.target(BIG, uri=address) as (vm, uri):
        vm.ram[BIG // 2 :] = 0xEE  # zero pages must replace the old contents of the destination's memory
        with peers.source(BIG) as guest:
            monitor = trimig.Monitor()
            events = monitor.events()
            summary = await trimig.migrate(guest, uri, peers.settings(return_path=return_path), monitor=monitor)
            assert await vm.wait_status("running", "paused") == "running"
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert guest.run_state == "paused"
        assert summary.confirmed is summary.prepared is return_path
        assert bool(summary.warnings) is not return_path
        assert summary.normal_pages + summary.zero_pages == BIG // PAGE
        assert vm.main_statuses() == ["setup", "active", "completed"]
        assert peers.statuses([e async for e in events]) == ["setup", "active", "device", "handover", "completed"]
        assert monitor.owner is trimig.Ownership.DESTINATION


@pytest.mark.parametrize("return_path", [True, False])
async def test_paused_guest_arrives_paused(*, return_path: bool) -> None:
    """M2, M3: the run state of the source is the run state of the destination."""
    async with peers.target() as (vm, uri):
        with peers.source() as guest:
            await guest.pause()
            await trimig.migrate(guest, uri, peers.settings(return_path=return_path))
            await vm.wait_migration_status("completed")
            await vm.wait_status("paused")
            assert np.array_equal(vm.ram, peers.memory(guest))


async def test_writers_are_caught_at_one_instant() -> None:
    """A.1 row 1, L5, L6: each write makes the same change in two far pages; at the destination the two are equal.

    Two tasks write as long as the guest runs; bandwidth and downtime limit force several passes.
    """
    size = 16 * MiB
    half = size // PAGE // 2
    async with peers.target(size) as (vm, uri):
        with peers.source(size) as guest:
            pages = guest.ram[0].pages
            pages[half:] = pages[:half]
            written = [0, 0]
            monitor = trimig.Monitor()

            async def write(lane: int) -> None:
                with contextlib.suppress(trimig.NotOwner):  # after the handover
                    while True:
                        async with guest.running():
                            written[lane] += 1
                            page = (written[lane] * 2 + lane) % 128
                            pages[page, :4] = np.frombuffer(written[lane].to_bytes(4, "big"), np.uint8)
                            await trio.lowlevel.checkpoint()  # the other lane may run in between
                            pages[half + page] = pages[page]
                        await trio.sleep(0.003)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, 0)
                nursery.start_soon(write, 1)
                config = peers.settings(bandwidth=32 * MiB, downtime_limit=20)
                summary = await trimig.migrate(guest, uri, config, monitor=monitor)
                last = tuple(written)
                await trio.sleep(0.01)
                assert tuple(written) == last  # no write is possible any more
                nursery.cancel_scope.cancel()
            await vm.wait_status("running")
            arrived = vm.ram.reshape(-1, PAGE)
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert np.array_equal(arrived[:half], arrived[half:])
            assert summary.iterations > 1
            assert summary.normal_pages + summary.zero_pages > size // PAGE
            for lane in (0, 1):
                page = (last[lane] * 2 + lane) % 128
                assert int.from_bytes(arrived[page, :4].tobytes(), "big") == last[lane]


async def test_state_of_the_device_is_the_one_at_the_pause() -> None:
    """M5: the clock of the machine is migrated; QEMU passes it on to the next trimig."""
    ran = 3_600_000_000_000  # one hour, in ns
    async with peers.target() as (vm, uri):
        with peers.source(timer=False) as guest:
            guest.add_device(trimig.guests.TimerState(cpu_clock_offset=ran))
            await guest.pause()
            await trimig.migrate(guest, uri)
            await vm.wait_migration_status("completed")
        with peers.machine(running=False, timer=False) as back:
            timer = trimig.guests.TimerState()
            back.add_device(timer)
            async with peers.arriving(back) as arrival:
                await vm.migrate(arrival.uri)
                await arrival.summary()
            assert timer.cpu_clock_offset == ran


@pytest.mark.parametrize(
    ("fault", "return_path"),
    [(fault, True) for fault in ("machine", "block", "size", "device")] + [("block", False), ("size", False)],
)
async def test_what_qemu_refuses_runs_on_here_and_goes_elsewhere(fault: str, return_path: bool) -> None:
    """L9, L12, T7: QEMU exits, without a message (gap G13) before 10.0; the guest runs, and another destination gets it.

    Without return path the source notices a refusal only while bytes still flow (gap G3): one at the beginning of a
    stream that is longer than the sockets' buffers. The device stands at the stream's end.
    """
    size = SMALL if return_path else 32 * MiB
    options: dict[str, dict[str, Any]] = {"machine": {"name": "pc"}, "block": {"block": "pc.ram"}}
    async with peers.target(size * 2 if fault == "size" else size) as (vm, uri):
        with peers.source(size, **options.get(fault, {})) as guest:
            if fault == "device":
                guest.add_device(Ghost())
            with pytest.raises((trimig.TransportFailed, trimig.PeerFailed)) as caught:
                await trimig.migrate(guest, uri, peers.settings(return_path=return_path))
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
            assert await vm.wait_exit() == 1
            words = {"machine": "'pc'", "block": "pc.ram", "size": "m0", "device": "ghost"}
            assert words[fault] in vm.stderr_text()
            if fault == "size":
                await peers.accepted(guest)


async def test_without_a_listener_nothing_has_happened_and_it_is_tried_again() -> None:
    """B16, A.1 row 17: two refused connections in a row, over tcp and unix, then a QEMU; same guest, same monitor."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    monitor = trimig.Monitor()
    with peers.source() as guest:
        before = peers.memory(guest).copy()
        for uri in (f"tcp:127.0.0.1:{port}", "unix:/nonexistent/socket"):
            with pytest.raises(trimig.TransportFailed) as caught:
                await trimig.migrate(guest, uri, peers.settings(), monitor=monitor)
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
            assert monitor.info()["error-desc"] == str(caught.value)
        async with peers.target() as (vm, uri):
            await trimig.migrate(guest, uri, peers.settings(), monitor=monitor)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, before)
        assert "error-desc" not in monitor.info()


@pytest.mark.parametrize("how", ["monitor", "scope"])
@pytest.mark.parametrize("status", ["setup", "active", "device"])
async def test_cancelled_after_each_status_it_never_happened(status: str, how: str) -> None:
    """F10, F11, A.1 row 24, "cancel after each status": run state, memory and pass counts as before; then a new QEMU."""
    size = 8 * MiB
    with peers.source(size) as guest:
        before = peers.memory(guest).copy()
        async with peers.target(size) as (vm, uri):
            monitor = trimig.Monitor()
            events = monitor.events()
            scope = trio.CancelScope()
            # Slow enough that "active" cannot be over before the cancel takes effect.
            config = peers.settings(bandwidth=0 if status == "device" else 4 * MiB)

            def cancel() -> None:
                if how == "monitor":
                    monitor.cancel("the test")
                else:
                    scope.cancel()

            async with trio.open_nursery():
                monitor.add_listener(lambda event: cancel() if event.data.get("status") == status else None)
                if how == "monitor":
                    with pytest.raises(trimig.MigrationCancelled, match="the test"):
                        await trimig.migrate(guest, uri, config, monitor=monitor)
                else:
                    with scope:
                        await trimig.migrate(guest, uri, config, monitor=monitor)
                    assert scope.cancelled_caught
            assert monitor.status is trimig.Status.CANCELLED
            assert guest.run_state == "running"
            assert np.array_equal(peers.memory(guest), before)
            seen = peers.statuses([event async for event in events])
            assert seen == [*["setup", "active", "device"][: len(seen) - 2], "cancelling", "cancelled"]
            assert seen[-3] == status
            assert monitor.info()["status"] == "cancelled"
            if status != "setup":
                # QEMU had the beginning of a stream: it gives up, and has not run.
                assert await vm.wait_exit() == 1
                assert not any(event["event"] == "RESUME" for event in vm.qmp.events)
        await peers.accepted(guest)


@pytest.mark.parametrize("when", ["active", "prepare", "after the decision"])
async def test_qemu_is_killed(when: str) -> None:
    """L9, T1, row "kill of either process": until the commit the source's guest runs on; after it no side may guess.

    In the last two cases a signal stops QEMU first, so that QEMU certainly has not answered. After the commit the
    caller, who knows that QEMU is dead, settles the owner, and the source's guest runs again.
    """
    stop_at: dict[str, Callable[[], None]] = {}

    async def at(point: str) -> None:
        await trio.lowlevel.checkpoint()
        if point in stop_at:
            stop_at.pop(point)()

    with peers.source(8 * MiB, on_pause=functools.partial(at, "prepare")) as guest:
        async with peers.target(8 * MiB) as (vm, uri):
            monitor = trimig.Monitor()
            config = peers.settings(bandwidth=16 * MiB if when == "active" else 0)
            stop_at[when] = functools.partial(os.kill, vm.pid, signal.SIGSTOP)

            async def kill() -> None:
                status = {"active": trimig.Status.ACTIVE, "prepare": trimig.Status.DEVICE}
                await monitor.wait_status(status.get(when, trimig.Status.HANDOVER))
                await trio.sleep(0.05)
                os.kill(vm.pid, signal.SIGKILL)

            decide = functools.partial(at, "after the decision")
            with pytest.raises(trimig.TrimigError) as caught:
                await peers.while_migrating(guest, uri, config, monitor, kill, commit=decide)
            assert await vm.wait_exit() == -signal.SIGKILL
            if when == "after the decision":
                assert isinstance(caught.value, trimig.HandoverUncertain)
                assert caught.value.owner is trimig.Ownership.UNKNOWN
                assert guest.run_state == "paused"
                await caught.value.settle(trimig.Ownership.SOURCE)
            else:
                assert isinstance(caught.value, trimig.TransportFailed)
                assert caught.value.owner is trimig.Ownership.SOURCE
            assert monitor.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
        await peers.accepted(guest)


async def test_a_fence_that_kills_the_destination_settles_it_at_once() -> None:
    """T2: the caller's fence is called instead of a question to the user; it kills QEMU, and the source's guest
    runs."""
    with peers.source() as guest:
        async with peers.target() as (vm, uri):

            async def decide() -> None:
                await trio.lowlevel.checkpoint()
                os.kill(vm.pid, signal.SIGSTOP)

            async def fence() -> trimig.Ownership:
                os.kill(vm.pid, signal.SIGKILL)
                await vm.wait_exit()
                return trimig.Ownership.SOURCE

            monitor = trimig.Monitor()
            with pytest.raises(trimig.TransportFailed, match="the fence gave the guest back"):
                await trimig.migrate(
                    guest, uri, peers.settings(handover_timeout=0.3), monitor=monitor, commit=decide, fence=fence
                )
            assert guest.run_state == "running"
            assert monitor.owner is trimig.Ownership.SOURCE
        await peers.accepted(guest)


@pytest.mark.parametrize("version", [SPOKEN])
async def test_info_has_the_members_of_qemus_query_migrate_in_each_status(version: str) -> None:
    """G2, G4, G5, G9: of the version that trimig speaks. The same migration runs once by QEMU and once by trimig, and
    is compared in every status that can be observed."""
    size = 8 * MiB
    ours: dict[str, set[str]] = {}
    theirs: dict[str, set[str]] = {}
    limited = {"max-bandwidth": 4 * MiB}
    refused = "tcp:127.0.0.1:1"
    async with Qemu.start("none", "8M", version=version) as vm:
        peers.mix(vm.ram, seed=1)
        theirs["none"] = peers.members(await vm.query_migrate())
        async with peers.target(size, version=version) as (_, uri):
            await vm.migrate(uri, parameters=limited, wait=False)
            theirs["active"] = peers.members(await vm.wait_migration_status("active"))
            await vm.qmp.execute("migrate_cancel")
            theirs["cancelled"] = peers.members(await vm.wait_migration_status("cancelled"))
        await vm.migrate(refused, wait=False)
        theirs["failed"] = peers.members(await vm.wait_migration_status("failed"))
        async with peers.target(size, version=version) as (destination, uri):
            theirs["completed"] = peers.members(await vm.migrate(uri, parameters={"max-bandwidth": 0}))
            theirs["arrived"] = peers.members(await destination.wait_migration_status("completed"))
    monitor = trimig.Monitor()
    with peers.source(size) as guest:
        ours["none"] = peers.members(monitor.info())
        async with peers.target(size, version=version) as (_, uri):

            async def cancel() -> None:
                await monitor.wait_status(trimig.Status.ACTIVE)
                await trio.sleep(0.05)
                ours["active"] = peers.members(monitor.info())
                monitor.cancel("the test")

            with pytest.raises(trimig.MigrationCancelled):
                await peers.while_migrating(guest, uri, peers.settings(bandwidth=4 * MiB), monitor, cancel)
            ours["cancelled"] = peers.members(monitor.info())
        with pytest.raises(trimig.TransportFailed):
            await trimig.migrate(guest, refused, monitor=monitor)
        ours["failed"] = peers.members(monitor.info())
        with peers.machine(size, running=False) as other:
            async with peers.arriving(other) as arrival:
                await trimig.migrate(guest, arrival.uri, peers.settings(), monitor=monitor)
                await arrival.summary()
            ours["completed"] = peers.members(monitor.info())
            ours["arrived"] = peers.members(arrival.monitor.info())
    assert ours == theirs
