"""S of issue 4 with real processes: the other side is killed by SIGKILL in every status that this side goes through.

The owner follows from how far the stream came: before the package the source, behind it the destination. No side hangs, and
no guest runs twice: the one in the killed process is gone with it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio

import trimig
from trimig.errors import Ownership
from trimig.guests.workload.guest import MiB, WorkloadGuest
from trimig.status import Status

SIZE: Final = 8 * MiB
LIMIT: Final = 60
#: In the killed process. Says "ready", and lives until it is killed or done.
CHILD: Final = """
import sys, trio, trimig
from tests.processes.engine.test_postcopy_killed import settings, opened

async def main(role, uri):
    monitor = trimig.Monitor()
    def soon(event):
        if event.data.get("status") == "setup":
            monitor.start_postcopy()
    async with opened(running=role == "source") as guest:
        if role == "source":
            monitor.add_listener(soon)
            print("ready", flush=True)
            await trimig.migrate(guest, uri, settings(), monitor=monitor)
        else:
            async with trio.open_nursery() as nursery:
                async def tell():
                    while not monitor.addresses:
                        await monitor.wait_changed()
                    print("ready", flush=True)
                nursery.start_soon(tell)
                await trimig.receive(guest, uri, settings(), monitor=monitor)

trio.run(main, *sys.argv[1:])
"""


def settings(*, preempt: bool = False) -> trimig.Config:
    """Slow enough that there is something left to be lost in each status."""
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True, postcopy_preempt=preempt),
        parameters=trimig.Parameters(max_bandwidth=20 * MiB, downtime_limit=1, max_postcopy_bandwidth=4 * MiB),
        handover_timeout=5,
        teardown_grace=1,
        recovery_retry=True,
        recovery_timeout=1,
    )


@asynccontextmanager
async def opened(*, running: bool) -> AsyncIterator[WorkloadGuest]:
    """A small guest that writes."""
    async with WorkloadGuest.open(size=SIZE, hot=4 * MiB, dirty_rate=40 * MiB, running=running) as guest:
        yield guest


class Other:
    """The process that is to be killed."""

    def __init__(self, role: str, uri: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, role, uri],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[3],
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout

    def wait_ready(self) -> None:
        """Until it listens, or is about to connect."""
        assert self._out.readline() == b"ready\n"

    def kill(self) -> None:
        """At once, and it is gone when this returns. Idempotent."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Kill it, and leave nothing."""
        self.kill()
        self._out.close()


def killing(monitor: trimig.Monitor, other: Other, status: Status) -> None:
    """Kill *other* when *monitor* enters *status*, before anything else is done in it."""

    def listener(event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == status.value:
            other.kill()

    monitor.add_listener(listener)


async def pause_it(monitor: trimig.Monitor) -> None:
    """To get to the statuses behind a pause."""
    await monitor.wait_status(Status.POSTCOPY_ACTIVE)
    await trio.sleep(0.02)
    monitor.pause("the test cuts it")


@pytest.mark.parametrize(
    "status",
    [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.HANDOVER, Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED,
     Status.POSTCOPY_RECOVER],
)  # fmt: skip
async def test_the_destination_is_killed(status: Status, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/socket"
    other = Other("destination", uri)
    try:
        other.wait_ready()
        monitor = trimig.Monitor()
        monitor.add_listener(lambda event: monitor.start_postcopy() if event.data.get("status") == "setup" else None)
        killing(monitor, other, status)
        with trio.fail_after(LIMIT):
            async with opened(running=True) as guest, trio.open_nursery() as nursery:
                if status in (Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER):
                    nursery.start_soon(pause_it, monitor)
                with pytest.raises(trimig.TrimigError) as caught:
                    await trimig.migrate(guest, uri, settings(), monitor=monitor)
                nursery.cancel_scope.cancel()
                owner = caught.value.owner
                assert owner is monitor.owner
                if status in (Status.SETUP, Status.ACTIVE, Status.DEVICE):
                    assert owner is Ownership.SOURCE
                elif status is Status.HANDOVER:
                    assert owner in (Ownership.SOURCE, Ownership.UNKNOWN)
                else:
                    assert isinstance(caught.value, trimig.PostcopyLost)
                    assert owner is Ownership.DESTINATION
                assert (guest.run_state == "running") is (owner is Ownership.SOURCE)
                if isinstance(caught.value, trimig.HandoverUncertain):
                    await caught.value.settle(Ownership.SOURCE)  # nothing is left of the destination
                if monitor.owner is Ownership.SOURCE:
                    await guest.pause()
                    proof = await guest.verify()
                    assert proof.ok, str(proof)
    finally:
        other.close()


@pytest.mark.parametrize(
    "status", [Status.ACTIVE, Status.HANDOVER, Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER]
)
async def test_the_source_is_killed(status: Status, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/socket"
    monitor = trimig.Monitor()
    other: Other | None = None
    try:
        with trio.fail_after(LIMIT):
            async with opened(running=False) as guest, trio.open_nursery() as nursery:

                async def connect() -> None:
                    nonlocal other
                    while not monitor.addresses:
                        await monitor.wait_changed()
                    other = Other("source", uri)
                    killing(monitor, other, status)

                nursery.start_soon(connect)
                if status in (Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER):
                    nursery.start_soon(pause_it, monitor)
                with pytest.raises(trimig.TrimigError) as caught:
                    await trimig.receive(guest, uri, settings(), monitor=monitor)
                nursery.cancel_scope.cancel()
                assert guest.run_state != "running"
                if status is Status.ACTIVE:
                    assert caught.value.owner is Ownership.SOURCE
                    return
                assert isinstance(caught.value, trimig.PostcopyLost)
                (runs,) = caught.value.missing.values()
                assert sum(end - first for first, end in runs) > 0
    finally:
        if other is not None:
            other.close()
