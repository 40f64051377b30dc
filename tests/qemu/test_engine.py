"""The engine with a real QEMU on the other end: both directions, lost answers, cuts at the decision, cancels, kills."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
import trimig.guests
from tests.qemu.harness import RAM_BLOCK, Qemu, random_ram
from tests.qemu.relay import Relay

pytestmark = pytest.mark.qemu

LIMIT = 60
SIZE = 16 << 20
LISTEN = "tcp:127.0.0.1:0"


def machine(*, running: bool, size: int = SIZE, name: str = "none", block: str = RAM_BLOCK) -> trimig.AppGuest:
    """A guest that a ``-M none`` QEMU takes for one of its own."""
    guest = trimig.AppGuest(name, running=running)
    guest.add_ram(block, size)
    guest.add_device(trimig.guests.TimerState())
    return guest


def filled(**options: object) -> trimig.AppGuest:
    """A running one with random memory, an eighth of it zero."""
    guest = machine(running=True, **options)  # type: ignore[arg-type]  # passed through as they are
    pages = guest.ram[0].pages
    pages.reshape(-1)[:] = random_ram(guest.ram[0].length, seed=3)
    pages[::8] = 0
    return guest


def memory(guest: trimig.AppGuest) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """All of its RAM, flat."""
    return guest.ram[0].pages.reshape(-1)


def config(*, return_path: bool = True, **options: object) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(return_path=return_path),
        parameters=trimig.Parameters(max_bandwidth=0),
        **options,  # type: ignore[arg-type]  # passed through as they are
    )


@asynccontextmanager
async def destination(*, paused: bool = False) -> AsyncIterator[tuple[Qemu, str]]:
    """A QEMU that waits for a migration, and where."""
    with trio.fail_after(LIMIT):
        async with Qemu.start("none", f"{SIZE >> 20}M", incoming="defer", paused=paused) as vm:
            yield vm, await vm.incoming(LISTEN)


async def receiving(
    guest: trimig.AppGuest, drive: Callable[[str], Awaitable[object]], settings: trimig.Config
) -> trimig.Summary | trimig.MigrationError:
    """Receive into *guest* while *drive* does something with the address; how it ended."""
    monitor = trimig.Monitor()
    ended: list[trimig.Summary | trimig.MigrationError] = []

    async def receive() -> None:
        try:
            ended.append(await trimig.receive(guest, LISTEN, settings, monitor=monitor))
        except trimig.MigrationError as error:
            ended.append(error)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            while not monitor.addresses:
                await monitor.wait_changed()
            await drive(monitor.addresses[0])
    return ended[0]


@pytest.mark.parametrize("return_path", [True, False])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_to_qemu_every_byte(tmp_path: Path, scheme: str, *, return_path: bool) -> None:
    """B1, B2, K1, L1-L4, M3, M5, M8: QEMU runs what trimig sent, and all of RAM is equal."""
    with trio.fail_after(LIMIT):
        async with Qemu.start("none", f"{SIZE >> 20}M", incoming="defer") as vm:
            uri = await vm.incoming(LISTEN if scheme == "tcp" else f"unix:{tmp_path}/m")
            with filled() as guest:
                summary = await trimig.migrate(guest, uri, config(return_path=return_path))
                await vm.wait_status("running")
                assert np.array_equal(vm.ram, memory(guest))
            assert summary.confirmed is summary.prepared is return_path
            assert guest.run_state == "paused"
            assert vm.migration_statuses()[-1] == "completed"


async def test_to_qemu_while_the_guest_writes() -> None:
    """L5, L6: several passes over memory that changes; what arrives is one consistent state."""
    async with destination() as (vm, uri):
        with filled() as guest:
            pages = guest.ram[0].pages

            async def write() -> None:
                for number in range(1 << 30):
                    async with guest.running():
                        pages[number % 512] = number % 251
                    await trio.sleep(0.0005)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                settings = trimig.Config(parameters=trimig.Parameters(max_bandwidth=32 << 20, downtime_limit=20))
                summary = await trimig.migrate(guest, uri, settings)
                nursery.cancel_scope.cancel()
            await vm.wait_status("running")
            assert summary.iterations > 1
            assert np.array_equal(vm.ram, memory(guest))


async def test_to_qemu_of_a_paused_guest_arrives_paused() -> None:
    """M2, M3, P9."""
    async with destination() as (vm, uri):
        with filled() as guest:
            await guest.pause()
            await trimig.migrate(guest, uri, config())
            await vm.wait_status("paused")
            assert guest.run_state == "paused"


@pytest.mark.parametrize("return_path", [True, False])
async def test_from_qemu_every_byte(*, return_path: bool) -> None:
    """B7, J2, J5, P1, P5: trimig takes what QEMU sent; QEMU says completed only after it was told so."""
    async with Qemu.start("none", f"{SIZE >> 20}M") as vm:
        vm.ram[:] = random_ram(SIZE, seed=4)
        vm.ram[1 << 20 : 2 << 20] = 0
        with machine(running=False) as guest:

            async def drive(uri: str) -> None:
                await vm.migrate(uri, capabilities={"return-path": return_path})

            summary = await receiving(guest, drive, config())
            assert isinstance(summary, trimig.Summary)
            assert np.array_equal(vm.ram, memory(guest))
            assert guest.run_state == "running"
            assert await vm.query_status() == "postmigrate"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "pc"}, "machine 'none'"),
        ({"block": "pc.ram"}, "unknown RAM block 'm0'"),
        ({"size": SIZE // 2}, "RAM block 'm0' has"),
    ],
)
async def test_refused_source_qemu_runs_on_and_finds_another(options: dict[str, object], words: str) -> None:
    """J5, P4, G13 of states.md: the reason is here, SHUT 1 goes there, both processes live on, and it can be repeated."""
    async with Qemu.start("none", f"{SIZE >> 20}M") as vm:
        vm.ram[:] = random_ram(SIZE, seed=4)

        async def refused(uri: str) -> None:
            await vm.migrate(uri, capabilities={"return-path": True}, wait=False)
            await vm.wait_migration_status("failed")

        async def good(uri: str) -> None:
            await vm.migrate(uri, capabilities={"return-path": True})

        with machine(running=False, **options) as guest:  # type: ignore[arg-type]  # passed through as they are
            error = await receiving(guest, refused, config())
            assert isinstance(error, trimig.RemoteProtocolError)
            assert words in str(error)
            assert error.owner is trimig.Ownership.SOURCE
        assert await vm.query_status() == "running"
        with machine(running=False) as guest:
            assert isinstance(await receiving(guest, good, config()), trimig.Summary)
            assert np.array_equal(vm.ram, memory(guest))


async def test_qemu_cancels_and_the_receiver_lives_on() -> None:
    """P4, T3: migrate_cancel at the source is one typed error here; the same process then receives the second attempt."""
    async with Qemu.start("none", f"{SIZE >> 20}M") as vm:
        vm.ram[:] = random_ram(SIZE, seed=4)

        async def cancelled(uri: str) -> None:
            await vm.migrate(uri, capabilities={"return-path": True}, parameters={"max-bandwidth": 2 << 20}, wait=False)
            await vm.wait_migration_status("active")
            await vm.qmp.execute("migrate_cancel")
            await vm.wait_migration_status("cancelled")

        async def again(uri: str) -> None:
            await vm.migrate(uri, parameters={"max-bandwidth": 0})

        with machine(running=False) as guest:
            error = await receiving(guest, cancelled, config())
            assert isinstance(error, trimig.TransportFailed)
            assert await vm.query_status() == "running"
            assert isinstance(await receiving(guest, again, config()), trimig.Summary)
            assert np.array_equal(vm.ram, memory(guest))


async def test_nobody_listens_then_somebody_does() -> None:
    """B16, T7: a refused connection leaves the guest running, with the reason; the second attempt succeeds."""
    with filled() as guest:
        with pytest.raises(trimig.TransportFailed, match="connection refused"):
            await trimig.migrate(guest, "tcp:127.0.0.1:1", config())
        assert guest.run_state == "running"
        async with destination() as (vm, uri):
            await trimig.migrate(guest, uri, config())
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, memory(guest))


@pytest.mark.parametrize("status", ["setup", "active", "device"])
async def test_cancel_after_each_status_then_a_new_target(status: str) -> None:
    """F10, G4 of states.md: the guest runs on here, that QEMU gives up, and a new one gets it."""
    with filled() as guest:
        async with destination() as (vm, uri):
            monitor = trimig.Monitor()
            settings = trimig.Config(parameters=trimig.Parameters(max_bandwidth=0 if status == "device" else 4 << 20))
            events = monitor.events()
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    async for event in events:
                        if event.name == "MIGRATION" and event.data["status"] == status:
                            monitor.cancel("the test")

                nursery.start_soon(cancel)
                with pytest.raises(trimig.MigrationCancelled, match="the test"):
                    await trimig.migrate(guest, uri, settings, monitor=monitor)
                nursery.cancel_scope.cancel()
            assert monitor.status is trimig.Status.CANCELLED
            assert guest.run_state == "running"
            if status != "setup":
                assert await vm.wait_exit() == 1
        async with destination() as (vm, uri):
            await trimig.migrate(guest, uri, config())
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, memory(guest))


async def test_qemu_killed_while_it_receives() -> None:
    """L9, T1: the guest runs on here."""
    async with destination() as (vm, uri):
        with filled() as guest:
            monitor = trimig.Monitor()
            async with trio.open_nursery() as nursery:

                async def kill() -> None:
                    await monitor.wait_status(trimig.Status.ACTIVE)
                    await trio.sleep(0.05)
                    os.kill(vm.pid, signal.SIGKILL)

                nursery.start_soon(kill)
                settings = trimig.Config(parameters=trimig.Parameters(max_bandwidth=8 << 20))
                with pytest.raises(trimig.TransportFailed) as caught:
                    await trimig.migrate(guest, uri, settings, monitor=monitor)
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"


async def stream_length(guest: trimig.AppGuest) -> int:
    """Bytes of the whole stream of a paused *guest*, which every attempt sends in the same way."""
    async with destination() as (_, uri), Relay(uri) as relay:
        await trimig.migrate(guest, relay.uri, config())
        return relay.forward.received


#: Bytes of the description that follow the decision: type, length, and QEMU's text for timer and globalstate.
DESCRIPTION = 5 + 486


@pytest.mark.parametrize("last", [0, 1, 2, 7, 100, DESCRIPTION - 1, DESCRIPTION, DESCRIPTION + 1, DESCRIPTION + 2])
async def test_cut_around_the_decision(last: int) -> None:
    """T1, T2, G1, G2 of states.md: the connection is cut with *last* bytes of the stream undelivered.

    QEMU itself, as a source, would resume its guest on such a cut in every case. Here the end-of-file byte stands
    DESCRIPTION bytes before the end. All of it has left this side in each case, so the truth is unknown here, the guest
    stays paused, and whether QEMU runs depends on that one byte.
    """
    with filled() as guest:
        await guest.pause()
        total = await stream_length(guest)
        await guest.resume()
        async with destination() as (vm, uri), Relay(uri) as relay:
            await guest.pause()
            relay.back.drop_from = 16  # PONG 1 and the PONG of prepare pass, SHUT does not

            async def arm() -> None:
                await trio.lowlevel.checkpoint()
                relay.forward.hold_last = last

            async def cut() -> None:
                await relay.forward.wait_until(lambda d: d.received >= total and d.delivered >= total - last)
                await trio.sleep(0.1)
                relay.cut()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut)
                with pytest.raises(trimig.HandoverUncertain) as caught:
                    await trimig.migrate(guest, relay.uri, config(), commit=arm)
            assert caught.value.owner is trimig.Ownership.UNKNOWN
            assert guest.run_state == "paused"
            if last <= DESCRIPTION:
                await vm.wait_migration_status("completed")
                await caught.value.settle(trimig.Ownership.DESTINATION)
                assert guest.run_state == "paused"
            else:
                assert await vm.wait_exit() == 1
                await caught.value.settle(trimig.Ownership.SOURCE)


async def test_lost_answer_of_a_running_guest_is_settled() -> None:
    """T2, G1 of states.md: QEMU runs the guest, its SHUT is lost: paused here until somebody says so."""
    async with destination() as (vm, uri), Relay(uri) as relay:
        with filled() as guest:
            relay.back.drop_from = 16
            with pytest.raises(trimig.HandoverUncertain) as caught:
                await trimig.migrate(guest, relay.uri, config(handover_timeout=1.0))
            await vm.wait_status("running")
            assert guest.run_state == "paused"
            await caught.value.settle(trimig.Ownership.DESTINATION)
            assert guest.run_state == "paused"


async def test_decision_held_back_and_released() -> None:
    """A slow network is not an error: QEMU waits in inmigrate, the source in handover, and then it is done."""
    async with destination() as (vm, uri), Relay(uri) as relay:
        with filled() as guest:
            monitor = trimig.Monitor()

            async def arm() -> None:
                await trio.lowlevel.checkpoint()
                relay.forward.hold_last = DESCRIPTION + 1

            async with trio.open_nursery() as nursery:

                async def release() -> None:
                    await monitor.wait_status(trimig.Status.HANDOVER)
                    await trio.sleep(0.2)
                    assert await vm.query_status() == "inmigrate"
                    with pytest.raises(trimig.StateError, match="too late to cancel"):
                        monitor.cancel("too late")
                    relay.forward.release()

                nursery.start_soon(release)
                await trimig.migrate(guest, relay.uri, config(), monitor=monitor, commit=arm)
            await vm.wait_status("running")
