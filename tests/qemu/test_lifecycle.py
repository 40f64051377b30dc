"""With a real QEMU: held before the switchover on either side, cancelled there, and UUIDs that must agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.qemu.peers import SMALL
from trimig.status import Status

pytestmark = pytest.mark.qemu

HERE, THERE = "00112233-4455-6677-8899-aabbccddeeff", "ffffffff-4455-6677-8899-aabbccddeeff"
BOTH_HAVE = {"return-path": True}


def with_capabilities(**capabilities: bool) -> trimig.Config:
    """The usual settings and some further capabilities."""
    config = peers.settings()
    return dataclasses.replace(config, capabilities=dataclasses.replace(config.capabilities, **capabilities))


# -- pause before the switchover -----------------------------------------------------------------------------------


async def test_held_at_our_side_and_then_taken_by_a_qemu() -> None:
    """N1, N3, F14: QEMU waits as long as the source waits, and gets everything at the end."""
    async with peers.target() as (vm, uri):
        with peers.source() as guest:
            monitor = trimig.Monitor()
            events = monitor.events()

            async def go_on() -> None:
                assert await monitor.wait_status(Status.PRE_SWITCHOVER) is Status.PRE_SWITCHOVER
                assert guest.run_state == "paused"
                assert await vm.query_status() == "inmigrate"
                monitor.resume()

            config = with_capabilities(pause_before_switchover=True)
            await peers.while_migrating(guest, uri, config, monitor, go_on)
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert peers.statuses([e async for e in events]) == [
            "setup", "active", "pre-switchover", "device", "handover", "completed"
        ]  # fmt: skip


async def test_cancelled_while_it_is_held_and_then_taken() -> None:
    """N4, A.1 cancel in this status: the guest runs at the source again, and another QEMU receives it."""
    async with peers.target() as (vm, uri):
        with peers.source() as guest:
            monitor = trimig.Monitor()

            async def cancel() -> None:
                await monitor.wait_status(Status.PRE_SWITCHOVER)
                monitor.cancel("not today")

            with pytest.raises(trimig.MigrationCancelled):
                await peers.while_migrating(
                    guest, uri, with_capabilities(pause_before_switchover=True), monitor, cancel
                )
            assert guest.run_state == "running"
            assert await vm.wait_exit() != 0  # QEMU's way of saying that nothing came
            await peers.accepted(guest)


@pytest.mark.parametrize("ending", ["continued", "cancelled"])
async def test_held_at_the_side_of_a_qemu(ending: str) -> None:
    """N1, N3, N4: QEMU's own pause, longer than trimig's stall timeout; then it goes on, or is cancelled."""
    async with Qemu.start("none", "1M") as vm:
        peers.mix(vm.ram, seed=5)
        with peers.machine(running=False) as guest:
            config = dataclasses.replace(with_capabilities(pause_before_switchover=True), stall_timeout=0.5)
            async with peers.arriving(guest, config) as arrival:
                await vm.set_capabilities({**BOTH_HAVE, "pause-before-switchover": True})
                await vm.qmp.execute("migrate", {"uri": arrival.uri})
                await vm.wait_migration_status("pre-switchover")
                with pytest.raises(TimeoutError):
                    await waited(arrival)
                if ending == "continued":
                    await vm.qmp.execute("migrate-continue", {"state": "pre-switchover"})
                    await arrival.summary()
                    assert np.array_equal(vm.ram, peers.memory(guest))
                    assert guest.run_state == "running"
                else:
                    await vm.qmp.execute("migrate_cancel")
                    assert isinstance(await arrival.error(), trimig.TransportFailed)
                    assert guest.run_state != "running"
                    await vm.wait_status("running")


async def waited(arrival: peers.Arrival) -> None:
    """TimeoutError if the receiver still waits after more than its stall timeout."""
    with trio.move_on_after(1.0):
        await arrival.done.wait()
        return
    raise TimeoutError


# -- UUIDs ---------------------------------------------------------------------------------------------------------

ROWS = pytest.mark.parametrize(
    ("here", "there", "passes"),
    [(HERE, HERE, True), (HERE, THERE, False), (None, THERE, True), (HERE, None, True)],
    ids=["equal", "different", "none at the source", "none at the destination"],
)


def uuid_of(vm: str | None) -> tuple[str, ...]:
    """QEMU's arguments."""
    return () if vm is None else ("-uuid", vm)


@ROWS
async def test_uuid_from_trimig_to_qemu(here: str | None, there: str | None, *, passes: bool) -> None:
    """A.1 rows 18 to 21: QEMU compares the UUID that trimig sends, in its order of bytes."""
    async with Qemu.start("none", f"{SMALL >> 20}M", incoming="defer", extra=uuid_of(there)) as vm:
        uri = await vm.incoming(peers.LISTEN)
        with peers.source() as guest:
            guest.uuid = here
            config = with_capabilities(validate_uuid=True)
            if passes:
                await trimig.migrate(guest, uri, config)
                await vm.wait_status("running")
                assert np.array_equal(vm.ram, peers.memory(guest))
                return
            with pytest.raises(trimig.TrimigError) as caught:
                await trimig.migrate(guest, uri, config)
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
            assert await vm.wait_exit() != 0
            assert HERE in vm.stderr_text()


@ROWS
async def test_uuid_from_qemu_to_trimig(here: str | None, there: str | None, *, passes: bool) -> None:
    """A.1 rows 18 to 21: trimig compares the UUID that QEMU sends."""
    async with Qemu.start("none", "1M", extra=uuid_of(here)) as vm:
        peers.mix(vm.ram, seed=6)
        with peers.machine(running=False) as guest:
            guest.uuid = there
            async with peers.arriving(guest) as arrival:
                await vm.set_capabilities({**BOTH_HAVE, "validate-uuid": True})
                await vm.qmp.execute("migrate", {"uri": arrival.uri})
                if passes:
                    await arrival.summary()
                    assert np.array_equal(vm.ram, peers.memory(guest))
                    return
                reason = await arrival.dropped()
                assert HERE in reason
                assert THERE in reason
                await vm.wait_migration_status("failed")
                await vm.wait_status("running")
                arrival.scope.cancel("another source could still come")
            assert guest.run_state == "inmigrate"
