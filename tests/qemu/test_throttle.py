"""Auto-converge to each installed QEMU: the steps, the hold before the switchover, and the guest behind it."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.installed import versions
from trimig import MiB, Status

pytestmark = pytest.mark.qemu

VERSIONS = versions()


@pytest.mark.parametrize(
    "version", [pytest.param(v, marks=() if v == VERSIONS[-1] else (pytest.mark.full,)) for v in VERSIONS]
)
async def test_throttled_guest_is_held_and_arrives(version: str) -> None:
    """A.1 row 22, S3, G7, L10, N1: first 5 %, then more, at most 95 %; pre-switchover; `migrate-continue`."""
    settings = peers.settings(bandwidth=4 * MiB, downtime_limit=1)
    config = dataclasses.replace(
        settings,
        capabilities=dataclasses.replace(settings.capabilities, auto_converge=True, pause_before_switchover=True),
        parameters=settings.parameters.replace(cpu_throttle_initial=5, cpu_throttle_increment=60, max_cpu_throttle=95),
    )
    seen: list[int] = []
    monitor = trimig.Monitor()

    def heard(event: trimig.Event) -> None:
        if event.name == "THROTTLE":
            seen.append(event.data["percent"])
            if len(seen) == 2:
                monitor.set_parameters(downtime_limit=30_000)  # it may end now

    monitor.add_listener(heard)
    async with peers.target(version=version) as (vm, uri):
        with peers.source() as guest:
            pages = guest.ram[0].pages

            async def write() -> None:
                with contextlib.suppress(trimig.NotOwner):  # after the handover
                    while True:
                        async with guest.running():
                            pages[:, 0] += 1
                            await trio.sleep(0.01)

            async def go_on() -> None:
                await monitor.wait_status(Status.PRE_SWITCHOVER)
                assert monitor.info()["cpu-throttle-percentage"] == seen[-1] == 65
                monitor.resume()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await peers.while_migrating(guest, uri, config, monitor, go_on)
                nursery.cancel_scope.cancel()
            await vm.wait_status("running")
            assert np.array_equal(vm.ram, peers.memory(guest))
            assert guest.throttle_percent == 0
    assert seen == [5, 65, 0]
    assert "cpu-throttle-percentage" not in monitor.info()
