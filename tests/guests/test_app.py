"""The application as guest: the gate, pause and resume, throttling, devices, memory."""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from trimig.errors import ConfigError, GuestFailed, NotOwner, Owner, RemoteProtocolError, StateError
from trimig.guest import DeviceSection, Guest, SheddingGuest
from trimig.guests.app import AppGuest
from trimig.guests.device import Device
from trimig.testing import virtual_link
from trimig.wire.devices.vmstate import Field, VMState


class Clock(Device):
    vmstate = VMState("clock", version=1, fields=(Field("ticks", "uint64"),))

    def __init__(self, ticks: int = 0, *, instance_id: int = 0) -> None:
        super().__init__(instance_id=instance_id)
        self.ticks = ticks

    def post_load(self, version_id: int) -> None:
        if self.ticks > 1000:
            raise ValueError("too many ticks")


def test_it_is_a_guest() -> None:
    assert isinstance(AppGuest(), Guest)


def test_run_states_of_a_sender_and_of_a_receiver() -> None:
    assert AppGuest().run_state == "running"
    assert AppGuest(running=False).run_state == "inmigrate"


async def test_pause_waits_for_every_holder_and_admits_no_other(autojump_clock: trio.testing.MockClock) -> None:
    guest = AppGuest()
    log: list[str] = []

    async def holder(name: str, seconds: float) -> None:
        async with guest.running():
            log.append(f"{name} in")
            await trio.sleep(seconds)
            log.append(f"{name} out")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(holder, "a", 1)
        nursery.start_soon(holder, "b", 2)
        await trio.sleep(0.5)
        log.sort()
        nursery.start_soon(guest.pause)
        await trio.sleep(0.1)
        nursery.start_soon(holder, "late", 1)
        await trio.sleep(10)
        assert log == ["a in", "b in", "a out", "b out"]
        assert guest.run_state == "paused"
        await guest.resume()
        await trio.sleep(0.5)
        assert log[4:] == ["late in"]
    assert log[4:] == ["late in", "late out"]
    assert guest.run_state == "running"


async def test_nothing_is_written_between_pause_and_resume(autojump_clock: trio.testing.MockClock) -> None:
    with AppGuest() as guest:
        ram = guest.add_ram("table", 4096)

        async def mutate() -> None:
            while True:
                async with guest.running():
                    ram.pages[0, 0] += 1
                    await trio.sleep(0.001)
                    ram.pages[0, 1] += 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(mutate)
            for _ in range(50):
                await trio.sleep(0.0007)
                await guest.pause()
                before = bytes(ram.view)
                assert before[0] == before[1]
                await trio.sleep(1)
                assert bytes(ram.view) == before
                await guest.resume()
            nursery.cancel_scope.cancel()


async def test_a_task_inside_may_enter_again_while_a_pause_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    guest = AppGuest()

    async def nested() -> None:
        async with guest.running():
            await trio.sleep(1)
            async with guest.running():
                await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(nested)
        await trio.sleep(0.5)
        with trio.fail_after(10):
            await guest.pause()
    assert guest.run_state == "paused"


async def test_a_cancelled_pause_leaves_the_guest_running(autojump_clock: trio.testing.MockClock) -> None:
    paused = []

    async def on_pause() -> None:
        paused.append(1)

    guest = AppGuest(on_pause=on_pause)
    async with guest.running(), trio.open_nursery() as nursery:
        nursery.start_soon(guest.pause)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert guest.run_state == "running"
    assert paused == []
    with trio.fail_after(1):
        async with guest.running():
            pass
        await guest.pause()
    assert paused == [1]


async def test_a_cancelled_pause_does_not_open_what_another_one_has_closed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """rule C7: the application's own pause gives up while a migration pauses the guest, in either order."""
    for first in (True, False):
        guest = AppGuest()
        scopes = (trio.CancelScope(), trio.CancelScope())

        async def pausing(guest: AppGuest, scope: trio.CancelScope) -> None:
            with scope:
                await guest.pause()

        async with trio.open_nursery() as nursery, guest.running():
            for scope in scopes:
                nursery.start_soon(pausing, guest, scope)
                await trio.testing.wait_all_tasks_blocked()
            scopes[0 if first else 1].cancel()
            await trio.testing.wait_all_tasks_blocked()
        assert guest.run_state == "paused"
        with trio.move_on_after(1) as scope:
            async with guest.running():
                pytest.fail("it is paused")
        assert scope.cancelled_caught


async def test_one_resume_after_the_other(autojump_clock: trio.testing.MockClock) -> None:
    """No task is inside while the hook runs, and a pause waits for it."""
    calls: list[str] = []

    async def on_resume() -> None:
        calls.append("resume")
        await trio.sleep(1)
        calls.append("resumed")

    guest = AppGuest(on_resume=on_resume)
    await guest.pause()
    async with trio.open_nursery() as nursery:
        for call in (guest.resume, guest.resume, guest.pause):
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
    assert calls == ["resume", "resumed"]
    assert guest.run_state == "paused"


async def test_a_guest_that_goes_while_it_is_being_resumed_does_not_run(autojump_clock: trio.testing.MockClock) -> None:
    """The destination's guest has been refused meanwhile: its source runs it."""

    async def on_resume() -> None:
        guest.set_owner(Owner.ELSEWHERE)

    guest = AppGuest(running=False, on_resume=on_resume)
    guest.set_owner(Owner.HERE)
    with pytest.raises(NotOwner):
        await guest.resume()
    assert guest.run_state == "inmigrate"
    with pytest.raises(NotOwner):
        async with guest.running():
            pytest.fail("it is not here")


@pytest.mark.parametrize("postcopy", [False, True])
async def test_a_guest_that_has_run_since_it_was_stopped_is_not_handed_over(*, postcopy: bool) -> None:
    """Its writes since then have not been sent: it stands still again, and yet the migration is taken back."""
    source, target = AppGuest("g"), trimig.LazyAppGuest("g", running=False)
    for guest in (source, target):
        guest.add_ram("ram", 64 * 4096)
    config = trimig.Config(capabilities=trimig.Capabilities(postcopy_ram=postcopy))
    monitor = trimig.Monitor()

    def switch(event: trimig.Event) -> None:
        if postcopy and event.data.get("status") == "setup":
            monitor.start_postcopy()

    async def commit() -> None:
        await source.resume()
        async with source.running():
            source.ram[0].pages[5, 0] = 9
        await source.pause()

    async def receive() -> None:
        with pytest.raises(trimig.MigrationError):
            await trimig.receive(target, other, config)

    monitor.add_listener(switch)
    for hook in (commit, None):
        one, other = virtual_link()
        async with trio.open_nursery() as nursery:
            if hook is not None:
                nursery.start_soon(receive)
                with pytest.raises(GuestFailed, match="was resumed while its last pages"):
                    await trimig.migrate(source, one, config, monitor=monitor, commit=hook)
                assert (source.owner, source.run_state) == (Owner.HERE, "running")
            else:
                nursery.start_soon(trimig.receive, target, other, config)
                await trimig.migrate(source, one, config, monitor=monitor)
    assert (source.owner, target.owner) == (Owner.ELSEWHERE, Owner.HERE)
    assert target.ram[0].pages[5, 0] == 9
    source.close()
    target.close()


async def test_a_cancelled_entry_has_not_entered(autojump_clock: trio.testing.MockClock) -> None:
    guest = AppGuest()
    await guest.pause()
    with trio.move_on_after(1) as scope:
        async with guest.running():
            pytest.fail("it was paused")
    assert scope.cancelled_caught
    await guest.resume()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with guest.running():
            pytest.fail("it was cancelled")
    with trio.fail_after(1):
        await guest.pause()


async def test_an_error_inside_leaves_the_gate(autojump_clock: trio.testing.MockClock) -> None:
    guest = AppGuest()
    with pytest.raises(ZeroDivisionError):
        async with guest.running():
            raise ZeroDivisionError
    with trio.fail_after(1):
        await guest.pause()


async def test_pausing_from_inside_is_an_error_and_not_a_deadlock() -> None:
    guest = AppGuest()
    async with guest.running():
        with pytest.raises(GuestFailed, match="inside"):
            await guest.pause()
    assert guest.run_state == "running"


async def test_hooks_run_while_no_task_is_inside_and_both_calls_are_idempotent() -> None:
    log = []

    class Mine(AppGuest):
        async def on_pause(self) -> None:
            log.append(f"pausing {self.run_state}")

        async def on_resume(self) -> None:
            log.append(f"resuming {self.run_state}")

    guest = Mine()
    await guest.resume()
    await guest.pause()
    await guest.pause()
    await guest.resume()
    await guest.resume()
    assert log == ["pausing running", "resuming paused"]


async def test_a_hook_that_fails_is_a_failed_guest_in_the_state_it_had() -> None:
    fail = True

    async def hook() -> None:
        if fail:
            raise KeyError("device busy")

    guest = AppGuest(on_pause=hook, on_resume=hook)
    with pytest.raises(GuestFailed, match="device busy"):
        await guest.pause()
    assert guest.run_state == "running"
    with trio.fail_after(1):
        async with guest.running():
            pass
    fail = False
    await guest.pause()
    fail = True
    with pytest.raises(GuestFailed, match="device busy"):
        await guest.resume()
    assert guest.run_state == "paused"
    fail = False
    await guest.resume()
    assert guest.run_state == "running"


async def test_wait_running(autojump_clock: trio.testing.MockClock) -> None:
    guest = AppGuest(running=False)
    with trio.move_on_after(5) as scope:
        await guest.wait_running()
    assert scope.cancelled_caught
    guest.set_owner(trimig.Owner.HERE)
    await guest.activate("running")
    with trio.fail_after(1):
        await guest.wait_running()


async def test_activate_takes_over_the_run_state_of_the_source() -> None:
    guest = AppGuest(running=False)
    guest.set_owner(trimig.Owner.HERE)
    await guest.activate("paused")
    assert guest.run_state == "paused"
    await guest.activate("running")
    assert guest.run_state == "running"
    with pytest.raises(GuestFailed, match="runs"):
        await guest.activate("paused")


async def test_a_throttled_guest_is_inside_for_its_share_only(autojump_clock: trio.testing.MockClock) -> None:
    guest = AppGuest()
    await guest.throttle(75)
    assert guest.throttle_percent == 75
    inside = 0.0

    async def work() -> None:
        nonlocal inside
        while True:
            async with guest.running():
                await trio.sleep(0.01)
                inside += 0.01

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.sleep(10)
        assert 2.4 <= inside <= 2.6
        inside = 0.0
        await guest.throttle(0)
        await trio.sleep(10)
        assert 9.9 <= inside <= 10.1
        nursery.cancel_scope.cancel()


async def test_the_end_of_throttling_wakes_the_tasks_that_wait(autojump_clock: trio.testing.MockClock) -> None:
    guest = AppGuest()
    await guest.throttle(99)
    async with guest.running():
        await trio.sleep(100)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def enter() -> None:
            with trio.fail_after(10):
                async with guest.running():
                    pass

        await trio.sleep(5)
        await guest.throttle(0)


async def test_hook_of_the_throttle_gets_the_share() -> None:
    """S3: a guest without the hook leaves it to the gate."""
    shares: list[float] = []

    async def shed(share: float) -> None:
        await trio.lowlevel.checkpoint()
        shares.append(share)

    with AppGuest(on_throttle=shed) as guest:
        assert isinstance(guest, SheddingGuest)
        assert await guest.on_throttle(0.5)
        assert await guest.on_throttle(0.0)
        assert shares == [0.5, 0.0]
    with AppGuest() as plain:
        assert not await plain.on_throttle(0.5)


@pytest.mark.parametrize("percent", [-1, 100])
async def test_a_throttle_out_of_range_is_refused(percent: int) -> None:
    with pytest.raises(ValueError, match="0 to 99"):
        await AppGuest().throttle(percent)


def test_a_guest_has_one_migration_at_a_time() -> None:
    guest = AppGuest()
    guest.claim("migrating to tcp:b:4444")
    with pytest.raises(StateError, match="migrating to tcp:b:4444"):
        guest.claim("receiving")
    with pytest.raises(StateError, match="RAM cannot be added"):
        guest.add_ram("late", 4096)
    with pytest.raises(StateError, match="device cannot be added"):
        guest.add_device(Clock())
    guest.release()
    guest.claim("receiving")
    guest.release()


def test_names_are_checked_and_unique() -> None:
    with AppGuest() as guest:
        guest.add_ram("a", 4096)
        guest.add_device(Clock())
        guest.add_device(Clock(instance_id=1))
        with pytest.raises(ConfigError, match="already"):
            guest.add_ram("a", 4096)
        with pytest.raises(ConfigError, match="already"):
            guest.add_device(Clock())
        with pytest.raises(ConfigError, match="4096"):
            guest.add_ram("b", 100)
        assert [block.name for block in guest.ram] == ["a"]
    with pytest.raises(ConfigError, match="1 to 255"):
        AppGuest("")
    with pytest.raises(ConfigError, match="magic"):
        AppGuest(dirty_tracking="magic")


async def test_device_state_moves_in_the_order_of_registration() -> None:
    source, target = AppGuest(), AppGuest()
    for guest, ticks in ((source, (5, 6)), (target, (0, 0))):
        guest.add_device(Clock(ticks[0], instance_id=3))
        guest.add_device(Clock(ticks[1]))
    sections = await source.save_devices()
    assert [(section.idstr, section.instance_id) for section in sections] == [("clock", 3), ("clock", 0)]
    assert sections[0].description is not None
    await target.load_devices(sections)
    assert target.devices is not None
    assert [vars(device)["ticks"] for device in target.devices.values()] == [5, 6]


async def test_sections_that_do_not_match_the_devices_are_refused_before_any_is_loaded() -> None:
    source, target = AppGuest(), AppGuest()
    clocks = [Clock(), Clock(instance_id=1)]
    for at, clock in enumerate(clocks):
        source.add_device(Clock(9, instance_id=at))
        target.add_device(clock)
    one, two = await source.save_devices()
    alien = DeviceSection(idstr="rtc", version_id=1, payload=b"")
    for sections, what in (
        ([one], "missing"),
        ([one, two, one], "twice"),
        ([one, two, alien], "no device 'rtc'"),
    ):
        with pytest.raises(RemoteProtocolError, match=what):
            await target.load_devices(sections)
        assert [clock.ticks for clock in clocks] == [0, 0]


async def test_a_device_that_refuses_its_state_is_unchanged() -> None:
    source, target, clock = AppGuest(), AppGuest(), Clock(4)
    source.add_device(Clock(5000))
    target.add_device(clock)
    with pytest.raises(RemoteProtocolError, match="too many"):
        await target.load_devices(await source.save_devices())
    assert clock.ticks == 4


@pytest.mark.parametrize(
    ("asked", "method"), [("auto", "userfaultfd-wp"), ("userfaultfd", "userfaultfd-wp"), ("compare", "compare")]
)
async def test_writes_of_the_application_are_tracked(asked: str, method: str) -> None:
    with AppGuest(dirty_tracking=asked) as guest:
        one, two = guest.add_ram("one", 16 * 4096), guest.add_ram("two", 16 * 4096)
        tracker = guest.dirty_tracker()
        assert tracker.method == method
        await tracker.start()
        one.view[4096:4101] = b"hello"
        np.frombuffer(two.view, dtype=np.int64)[-1] = 7
        guest.mark_dirty("one", 0, 1)  # harmless
        dirty = {name: np.flatnonzero(pages).tolist() for name, pages in (await tracker.sync()).items()}
        assert dirty == {"one": [1], "two": [15]}
        tracker.stop()


async def test_marks_reach_the_tracker_of_the_attempt_that_runs() -> None:
    with AppGuest(dirty_tracking="marks") as guest:
        guest.add_ram("one", 16 * 4096)
        guest.mark_dirty("one", 0, 4096)
        for _ in range(2):
            tracker = guest.dirty_tracker()
            assert tracker.method == "marks"
            await tracker.start()
            guest.mark_dirty("one", 4096 * 3, 4097)
            assert np.flatnonzero((await tracker.sync())["one"]).tolist() == [3, 4]
            tracker.stop()
        guest.mark_dirty("one", 0, 1)
        for block, start, length in (("two", 0, 1), ("one", 16 * 4096, 1), ("one", -1, 1), ("one", 5, -1)):
            with pytest.raises(ValueError, match="not in a RAM block"):
                guest.mark_dirty(block, start, length)


def test_close_gives_the_memory_back_and_is_idempotent() -> None:
    guest = AppGuest()
    ram = guest.add_ram("a", 4096)
    guest.close()
    guest.close()
    assert guest.ram == ()
    with pytest.raises(StateError, match="closed"):
        _ = ram.view
