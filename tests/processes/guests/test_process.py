"""The guest in a process of its own: driven, moved, proved, killed; nothing of it stays behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from trimig.errors import ConfigError, GuestFailed, Owner, RemoteProtocolError, StateError
from trimig.guest import DeviceSection, Guest
from trimig.guests.worker import guest as worker_guest
from trimig.guests.workload.guest import MiB, WorkloadGuest
from trimig.guests.workload.state import verify, words_of
from trimig.memory import MemoryUnavailable, snapshot_of
from trimig.memory.linux import TRACKING_FEATURES
from trimig.monitor import blockers
from trimig.testing import virtual_link

SIZE = 4 * MiB


@pytest.fixture(autouse=True)
def no_descriptor_and_no_process_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@contextlib.asynccontextmanager
async def a_guest(**changes: Any) -> AsyncIterator[WorkloadGuest]:
    options = {"size": SIZE, "hot": MiB, "dirty_rate": 40 * MiB, "seed": 11, **changes}
    async with WorkloadGuest.open(**options) as guest:
        yield guest


async def written(guest: WorkloadGuest, more: int) -> None:
    """Wait until the guest has made *more* writes."""
    goal = (await guest.stats()).writes + more
    with trio.fail_after(20):
        while (await guest.stats()).writes < goal:  # noqa: ASYNC110 - there is no event to wait for: it is not our process
            await trio.sleep(0.002)


async def gone(pid: int) -> None:
    """Wait for the end of a process that need not be a child of ours."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


async def test_stopped_guest_is_ready_and_waits() -> None:
    """As QEMU's -S: nothing is written until it is resumed; it can be saved as it stands."""
    async with WorkloadGuest.open(size=1 << 20, hot=1 << 18, stopped=True) as guest:
        assert guest.run_state == "prelaunch"
        assert await guest.save_devices()
        before = (await guest.stats()).writes
        await guest.resume()
        assert guest.run_state == "running"
        await guest.pause()
        assert (await guest.stats()).writes >= before


async def test_a_paused_guest_writes_nothing_and_goes_on_where_it_was() -> None:
    async with a_guest() as guest:
        assert isinstance(guest, Guest)
        assert guest.run_state == "running"
        await written(guest, 300)
        await guest.pause()
        assert guest.run_state == "paused"
        before, stats = guest.block.pages.copy(), await guest.stats()
        assert not stats.running
        await trio.sleep(0.02)
        assert (guest.block.pages == before).all()
        assert (await guest.stats()).writes == stats.writes
        await guest.pause()  # harmless
        await guest.resume()
        await guest.resume()  # harmless
        await written(guest, 300)
        await guest.pause()
        result = await guest.verify()
        assert result.ok
        assert result.pages_checked == SIZE // 4096
        assert result.writes >= 600


async def test_a_moved_guest_proves_every_write_on_the_other_side() -> None:
    async with a_guest() as source, a_guest(running=False, seed=99, hot=0, dirty_rate=0) as target:
        assert target.run_state == "inmigrate"
        tracker = source.dirty_tracker()
        assert tracker.method == "userfaultfd-wp"
        await tracker.start()
        target.block.pages[:] = source.block.pages
        for _ in range(20):
            await written(source, 20)
            dirty = (await tracker.sync())["ram"]
            target.block.pages[dirty] = source.block.pages[dirty]
        await source.pause()
        dirty = (await tracker.sync())["ram"]
        target.block.pages[dirty] = source.block.pages[dirty]
        assert not (await tracker.sync())["ram"].any()
        tracker.stop()
        sections = await source.save_devices()
        assert [section.idstr for section in sections] == ["trimig-workload"]
        await target.load_devices(sections)
        assert verify(target.state, words_of(target.block.pages)).ok  # from here
        assert (await target.verify()).ok  # and there
        target.set_owner(trimig.Owner.HERE)
        await target.activate("running")
        assert target.run_state == "running"
        await written(target, 300)
        await target.pause()
        result = await target.verify()
        assert result.ok
        assert result.writes >= source.state.writes + 300


async def test_the_proof_notices_one_page_that_did_not_arrive() -> None:
    async with a_guest() as guest:
        await guest.pause()
        old = guest.block.pages[:256].copy()
        await guest.resume()
        await written(guest, 300)
        await guest.pause()
        guest.block.pages[77] = old[77]
        result = await guest.verify()
        assert (result.ok, result.wrong_page) == (False, 77)
        assert result.found_write is not None


async def test_a_page_dirtied_but_not_reported_would_be_seen_by_comparing_everything() -> None:
    async with a_guest(dirty_rate=200 * MiB) as guest:
        tracker = guest.dirty_tracker()
        await tracker.start()
        await guest.pause()
        await tracker.sync()
        before = guest.block.pages.copy()
        await guest.resume()
        reported = np.zeros(len(before), dtype=np.bool_)
        for _ in range(30):
            await trio.sleep(0.001)
            reported |= (await tracker.sync())["ram"]
        await guest.pause()
        reported |= (await tracker.sync())["ram"]
        changed = (guest.block.pages != before).any(axis=1)
        assert changed.any()
        assert (reported == changed).all()  # nothing lost, and nothing reported in vain
        tracker.stop()


async def test_where_the_worker_cannot_make_a_userfaultfd_memory_is_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(pid: int | None = None) -> None:
        raise MemoryUnavailable(1, "set the sysctl vm.unprivileged_userfaultfd to 1")

    monkeypatch.setattr(worker_guest, "probe_tracking", refused)
    async with a_guest() as guest:
        assert "vm.unprivileged_userfaultfd" in caplog.text
        tracker = guest.dirty_tracker()
        assert tracker.method == "compare"
        await tracker.start()
        await written(guest, 50)
        await guest.pause()
        assert (await tracker.sync())["ram"].any()
        assert (snapshot_of(tracker, guest.block) == guest.block.pages).all()
        tracker.stop()
    with pytest.raises(GuestFailed, match=r"vm\.unprivileged_userfaultfd"):
        async with a_guest(dirty_tracking="userfaultfd"):
            pytest.fail("it was opened")


async def test_the_choice_is_logged_and_can_be_forced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trimig.memory")
    async with a_guest(running=False, dirty_tracking="compare") as guest:
        assert guest.dirty_tracker().method == "compare"
    assert [record.message for record in caplog.records] == ["dirty tracking by compare"]


async def test_throttling_reaches_the_worker() -> None:
    async with a_guest() as guest:
        await guest.throttle(99)
        assert (await guest.stats()).throttle == 99
        await guest.throttle(0)
        await written(guest, 100)
        with pytest.raises(ValueError, match="0 to 99"):
            await guest.throttle(100)


async def test_an_idle_guest_can_be_moved_too() -> None:
    async with a_guest(dirty_rate=0, hot=0) as guest:
        await guest.pause()
        await guest.save_devices()
        result = await guest.verify()
        assert result.ok
        assert result.writes == 0


async def test_an_empty_receiver_does_not_run_and_its_memory_stays_absent() -> None:
    async with a_guest(running=False) as guest:
        guest.set_owner(trimig.Owner.HERE)
        with pytest.raises(GuestFailed, match="has not been loaded"):
            await guest.activate("running")
        assert guest.run_state == "inmigrate"
        with pytest.raises(GuestFailed, match="no state"):
            await guest.save_devices()
        assert guest.block.absent().all()


async def test_a_journal_of_another_size_is_refused_and_the_guest_lives_on() -> None:
    async with a_guest(running=False) as target:
        async with a_guest(size=2 * SIZE) as source:
            await source.pause()
            with pytest.raises(RemoteProtocolError, match="pages there"):
                await target.load_devices(await source.save_devices())
        with pytest.raises(RemoteProtocolError):
            await target.load_devices([DeviceSection(idstr="trimig-workload", version_id=1, payload=b"short")])
        assert not (await target.stats()).running


async def test_devices_of_a_running_guest_cannot_be_saved() -> None:
    async with a_guest() as guest:
        with pytest.raises(GuestFailed, match="runs"):
            await guest.save_devices()


async def test_a_killed_worker_is_reported_by_signal_at_every_call() -> None:
    async with a_guest() as guest:
        tracker = guest.dirty_tracker()
        await tracker.start()
        os.kill(guest.pid, signal.SIGKILL)
        await guest.wait_lost()
        assert (guest.owner, guest.run_state) == (Owner.HERE, "internal-error")
        assert guest.lost is not None
        assert "its worker has died" in guest.lost
        assert blockers.reasons(guest) == (guest.lost,)
        with pytest.raises(StateError, match="the migration is blocked: its worker has died"):
            await trimig.migrate(guest, "tcp:127.0.0.1:1")
        assert guest.owner is Owner.HERE
        with pytest.raises(GuestFailed, match=r"signal 9 \(SIGKILL\)"):
            await guest.pause()
        for call in (guest.resume, guest.verify, guest.save_devices, tracker.sync):
            with pytest.raises(GuestFailed, match=r"signal 9 \(SIGKILL\)"):
                await call()
        tracker.stop()


async def test_a_worker_that_fails_is_reported_with_status_and_last_words() -> None:
    async with a_guest(running=False) as guest:
        with pytest.raises(GuestFailed, match=r"exit status 1 .*OSError: .*Bad file descriptor"):
            await guest._worker.call("ram", 999, 4096)


async def test_a_worker_that_does_not_answer_is_a_failure_in_time_and_can_be_used_again() -> None:
    async with a_guest(call_timeout=0.3) as guest:
        os.kill(guest.pid, signal.SIGSTOP)
        with pytest.raises(GuestFailed, match=r"did not answer 'pause' within 300 ms"):
            await guest.pause()
        os.kill(guest.pid, signal.SIGCONT)
        with trio.fail_after(20):
            await guest.resume()  # passes over the late answer
        await written(guest, 10)


async def test_a_worker_that_may_run_later_is_not_handed_over() -> None:
    """rule C7: it was told to run, the call was cancelled, and the guest goes to another host: it would run twice."""
    async with a_guest() as guest:
        await guest.pause()
        os.kill(guest.pid, signal.SIGSTOP)
        with trio.move_on_after(0.02) as scope:
            await guest.resume()
        assert scope.cancelled_caught
        with pytest.raises(GuestFailed, match="started in the moment"):
            guest.set_owner(Owner.UNKNOWN)
        assert guest.owner is Owner.HERE
        os.kill(guest.pid, signal.SIGCONT)
        await guest.pause()  # its answer shows that it does not run
        guest.set_owner(Owner.UNKNOWN)
        assert not (await guest.stats()).running


async def test_a_worker_that_does_not_answer_at_the_destination_is_killed() -> None:
    """The source takes its guest back: a worker that was told to run must not do so later."""
    config = trimig.Config(handover_timeout=20.0)
    async with a_guest() as source, a_guest(running=False, call_timeout=0.5) as target:
        monitor = trimig.Monitor()

        def stop(event: trimig.Event) -> None:
            if event.name == "MIGRATION" and event.data["status"] == "handover":
                os.kill(target.pid, signal.SIGSTOP)

        monitor.add_listener(stop)
        one, other = virtual_link()

        async def receive() -> None:
            with pytest.raises(GuestFailed, match="did not answer 'resume'"):
                await trimig.receive(target, other, config, monitor=monitor)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                with pytest.raises(trimig.PeerFailed):
                    await trimig.migrate(source, one, config)
        assert (source.owner, target.owner) == (Owner.HERE, Owner.ELSEWHERE)
        assert (await source.stats()).running
        with pytest.raises(ProcessLookupError):
            os.kill(target.pid, 0)


async def test_a_worker_that_refuses_to_run_is_kept() -> None:
    async with a_guest(running=False) as guest:
        guest.set_owner(Owner.HERE)
        with pytest.raises(GuestFailed, match="refused 'resume'"):
            await guest.resume()
        guest.set_owner(Owner.ELSEWHERE)
        assert not (await guest.stats()).running


async def test_cancelled_calls_leave_requests_and_replies_in_step_and_no_descriptor() -> None:
    async with a_guest() as guest:
        before = len(os.listdir("/proc/self/fd"))
        os.kill(guest.pid, signal.SIGSTOP)
        for _ in range(3):
            with trio.move_on_after(0.02) as scope:
                await guest._worker.call_receiving("track", TRACKING_FEATURES)
            assert scope.cancelled_caught
            with trio.move_on_after(0.02) as scope:
                await guest.verify()
            assert scope.cancelled_caught
        os.kill(guest.pid, signal.SIGCONT)
        assert (await guest.stats()).running
        await guest.pause()
        assert not (await guest.stats()).running
        assert len(os.listdir("/proc/self/fd")) == before
        with trio.CancelScope() as scope:
            scope.cancel()
            await guest.resume()
        assert scope.cancelled_caught
        await guest.resume()
        assert guest.run_state == "running"


async def test_calls_of_several_tasks_do_not_mix() -> None:
    async with a_guest() as guest, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(guest.stats)
            nursery.start_soon(guest.throttle, 5)
        await guest.pause()


async def test_leaving_kills_even_a_stopped_worker_and_every_later_call_says_closed() -> None:
    async with a_guest(running=False) as guest:
        os.kill(guest.pid, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, 0)
    with pytest.raises(StateError, match="closed"):
        await guest.pause()
    guest.close()


async def test_an_opening_that_is_cancelled_leaves_nothing() -> None:
    for after in (0, 0.001, 0.05):
        with trio.move_on_after(after) as scope:
            async with a_guest():
                await trio.sleep(math.inf)
        assert scope.cancelled_caught


async def test_a_body_that_fails_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        async with a_guest(running=False):
            raise ZeroDivisionError


async def test_the_worker_ends_by_itself_when_its_line_is_cut() -> None:
    async with a_guest() as guest:
        guest._worker._socket.close()
        await gone(guest.pid)
        assert guest._worker._process.wait() == 0


HOST = """
import subprocess, sys, trio
from trimig.guests.workload.guest import WorkloadGuest
async def main():
    async with WorkloadGuest.open(size=1 << 20, hot=1 << 18) as guest:
        other = 0
        if sys.argv[1] == "kept":  # another process has our end of the line too, so it has no end of file
            fd = guest._worker._socket.fileno()
            other = subprocess.Popen(["sleep", "60"], pass_fds=[fd], stdout=subprocess.DEVNULL).pid
        print(guest.pid, other, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("line", ["cut", "kept"])
async def test_the_worker_dies_with_its_host_even_if_its_line_stays_open(line: str) -> None:
    host = subprocess.Popen(  # noqa: ASYNC220 - from this thread on purpose: it is to be killed, not awaited
        [sys.executable, "-c", HOST, line],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert host.stdout is not None
    with host.stdout:
        worker, other = map(int, host.stdout.readline().split())
    host.kill()
    host.wait()
    try:
        await gone(worker)
    finally:
        if other:
            os.kill(other, signal.SIGKILL)


async def test_ctrl_c_in_the_terminal_is_not_for_the_worker() -> None:
    async with a_guest() as guest:
        assert os.getpgid(guest.pid) != os.getpgrp()
        os.kill(guest.pid, signal.SIGINT)
        await written(guest, 10)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"size": 4097}, "multiple of 4096"),
        ({"size": 0}, "multiple of 4096"),
        ({"hot": 2 * SIZE}, "hot pages"),
        ({"hot": 0}, "without hot pages"),
        ({"dirty_rate": -1}, "dirty rate"),
        ({"dirty_tracking": "marks"}, "marks"),
        ({"seed": -1}, "seed"),
    ],
)
async def test_bad_options_are_refused_before_anything_is_started(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        async with a_guest(**options):
            pytest.fail("it was opened")


async def test_a_worker_that_cannot_be_started_is_a_failed_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(GuestFailed, match="could not be started"):
        async with a_guest():
            pytest.fail("it was opened")


async def test_a_worker_that_dies_ends_the_migration_at_once() -> None:
    """The pass would take hours, and no call is made to the worker in it."""
    config = trimig.Config(parameters=trimig.Parameters(max_bandwidth=4096))
    async with a_guest() as guest:
        near, far = virtual_link()
        monitor = trimig.Monitor()
        failures: list[GuestFailed] = []

        async def migrate() -> None:
            with pytest.raises(GuestFailed, match=r"its worker has died .*signal 9 \(SIGKILL\)") as caught:
                await trimig.migrate(guest, near, config, monitor=monitor)
            failures.append(caught.value)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(migrate)
                while not monitor.counters.normal:  # noqa: ASYNC110 - the first batch has no event
                    await trio.sleep(0.002)
                os.kill(guest.pid, signal.SIGKILL)
        assert monitor.status is trimig.Status.FAILED
        assert guest.run_state == "internal-error"
        assert failures
        await far.aclose()
