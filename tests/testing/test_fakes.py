"""The scripted guest, its tracker and devices, the referee, and the failing wrappers."""

from __future__ import annotations

import numpy as np
import pytest
import trio
from trio.testing import MockClock, assert_checkpoints

from trimig.errors import GuestFailed, RemoteProtocolError, StateError
from trimig.guest import PAGE_SIZE, DeviceProtocol, DirtyTracker, Guest, RamBlock
from trimig.testing import (
    Calls,
    FailingGuest,
    FailingStream,
    FakeDevice,
    OwnerReferee,
    ScriptedGuest,
    Violation,
    Write,
    virtual_link,
)


def dirty_pages(marks: object) -> list[tuple[str, int]]:
    assert isinstance(marks, dict)
    return [(block, int(page)) for block, bitmap in marks.items() for page in np.flatnonzero(bitmap)]


def test_fakes_fit_the_interfaces_of_a_guest() -> None:
    guest: Guest = ScriptedGuest(blocks={"a": 2, "b": 3})
    wrapped: Guest = FailingGuest(guest, Calls())
    device: DeviceProtocol = FakeDevice()
    tracker: DirtyTracker = wrapped.dirty_tracker()
    assert isinstance(guest, Guest)
    assert isinstance(wrapped, Guest)
    assert isinstance(guest.ram[0], RamBlock)
    assert (tracker.method, device.version_id) == ("marks", 1)
    assert [(b.name, b.length, b.pages.shape) for b in guest.ram] == [
        ("a", 2 * PAGE_SIZE, (2, PAGE_SIZE)),
        ("b", 3 * PAGE_SIZE, (3, PAGE_SIZE)),
    ]
    assert guest.ram[0].pages.flags.writeable
    assert guest.ram[0].absent() is None


def test_content_follows_the_seed() -> None:
    assert ScriptedGuest(seed=1).digest() == ScriptedGuest(seed=1).digest() != ScriptedGuest(seed=2).digest()
    assert not ScriptedGuest(content="zero").ram[0].pages.any()
    mixed = ScriptedGuest(blocks={"ram": 6}, content="mixed").ram[0].pages
    assert [bool(page.any()) for page in mixed] == [False, True, True, False, True, True]


def test_digest_sees_one_byte_of_ram_and_one_of_a_device() -> None:
    device = FakeDevice(size=9)
    guest = ScriptedGuest(devices=[device])
    before = guest.digest()
    guest.ram[0].pages[7, -1] ^= 1
    changed = guest.digest()
    device.data[8] ^= 1
    assert len({before, changed, guest.digest()}) == 3


async def test_script_runs_in_guest_time_and_stops_with_the_guest(autojump_clock: MockClock) -> None:
    guest = ScriptedGuest(blocks={"ram": 4}, content="zero", script=[Write(3.0, "ram", 2, 7), Write(1.0, "ram", 1, 9)])
    tracker = guest.dirty_tracker()
    with assert_checkpoints():
        await tracker.start()
    await trio.sleep(2)
    assert dirty_pages(await tracker.sync()) == [("ram", 1)]
    await guest.pause()
    await trio.sleep(1000)
    assert dirty_pages(await tracker.sync()) == []
    await guest.resume()
    await trio.sleep(0.5)
    assert dirty_pages(await tracker.sync()) == []
    await trio.sleep(1)
    assert guest.ram[0].pages[2, 0] == 7, "looking at memory brings it up to date"
    assert dirty_pages(await tracker.sync()) == [("ram", 2)]
    assert guest.guest_time == pytest.approx(3.5)
    tracker.stop()
    tracker.stop()
    assert guest.tracking == 0


async def test_rate_dirties_the_working_set_and_obeys_the_throttle(autojump_clock: MockClock) -> None:
    guest = ScriptedGuest(blocks={"a": 2, "b": 8}, rate=10, working_set=4)
    tracker = guest.dirty_tracker()
    await tracker.start()
    await trio.sleep(10)
    marks = dirty_pages(await tracker.sync())
    assert set(marks) == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert guest.writes == 100
    await guest.throttle(90)
    await trio.sleep(10)
    await tracker.sync()
    assert guest.writes == 110
    tracker.stop()


async def test_a_leap_in_time_does_not_make_the_guest_write_for_ever(autojump_clock: MockClock) -> None:
    guest = ScriptedGuest(rate=1e6)
    guest.update()
    autojump_clock.jump(3600)
    guest.update()
    assert guest.writes == 3_600_000_000


async def test_busy_guest_writes_at_each_sync_and_at_the_pause_without_time() -> None:
    guest = ScriptedGuest(blocks={"ram": 64}, dirty_per_sync=1)
    tracker = guest.dirty_tracker()
    await tracker.start()
    before = guest.digest()
    assert [len(dirty_pages(await tracker.sync())) for _ in range(3)] == [1, 1, 1]
    await guest.pause()
    assert [len(dirty_pages(await tracker.sync())) for _ in range(2)] == [1, 0]
    assert guest.digest() != before
    tracker.stop()


async def test_marks_name_exactly_the_pages_that_changed(autojump_clock: MockClock) -> None:
    """The marks and the changes of the memory agree, over many syncs."""
    guest = ScriptedGuest(blocks={"ram": 16}, rate=7, dirty_per_sync=1, seed=3)
    tracker = guest.dirty_tracker()
    await tracker.start()
    shadow = guest.ram[0].pages.copy()
    for _ in range(20):
        await trio.sleep(0.3)
        marks = await tracker.sync()
        pages = guest.ram[0].pages
        changed = np.flatnonzero((pages != shadow).any(axis=1))
        assert list(changed) == list(np.flatnonzero(marks["ram"]))
        shadow = pages.copy()
    tracker.stop()


async def test_journal_holds_what_took_effect_and_when(autojump_clock: MockClock) -> None:
    guest = ScriptedGuest(devices=[FakeDevice()], delays={"pause": 2.0})
    guest.claim("migration out")
    with pytest.raises(StateError, match="migration out"):
        guest.claim("another")
    await guest.pause()
    sections = await guest.save_devices()
    await guest.load_devices(sections)
    await guest.resume()
    guest.release()
    assert guest.events() == ["claim", "pause", "save", "load", "resume", "release"]
    assert [entry.time for entry in guest.journal] == [0, 2, 2, 2, 2, 2]
    assert (guest.claimed, guest.executed, guest.misuse) == (None, True, [])


@pytest.mark.parametrize("call", ["pause", "resume"])
async def test_a_cancelled_call_before_its_effect_changed_nothing(call: str) -> None:
    guest = ScriptedGuest(run_state="paused" if call == "resume" else "running")
    before = guest.run_state
    with trio.CancelScope() as scope:
        scope.cancel()
        await getattr(guest, call)()
    assert scope.cancelled_caught
    assert (guest.run_state, guest.events(), guest.executed) == (before, [], False)


async def test_device_state_moves_between_guests() -> None:
    source = ScriptedGuest(devices=[FakeDevice("x", seed=1), FakeDevice("x", instance_id=1, size=40)], seed=5)
    target = ScriptedGuest(devices=[FakeDevice("x"), FakeDevice("x", instance_id=1, size=40)], run_state="prelaunch")
    await source.pause()
    target.ram[0].pages[:] = source.ram[0].pages
    await target.load_devices(await source.save_devices())
    assert target.digest() == source.digest()
    await target.activate("running")
    assert (target.running, target.executed, source.executed) == (True, True, False)


async def test_guest_without_devices_of_its_own_keeps_sections_as_bytes() -> None:
    source = ScriptedGuest(devices=[FakeDevice()])
    parked = ScriptedGuest(devices=None, run_state="prelaunch")
    await source.pause()
    sections = await source.save_devices()
    await parked.load_devices(sections)
    assert (parked.devices, tuple(await parked.save_devices())) == (None, tuple(sections))


async def test_bad_device_state_is_refused_with_a_typed_error() -> None:
    guest = ScriptedGuest(devices=[FakeDevice(size=8)], run_state="prelaunch")
    device = FakeDevice(size=8)
    assert device.measure(memoryview(bytes(9)), 1) == 8
    assert device.measure(memoryview(bytes(7)), 1) is None
    for payload, version in ((bytes(7), 1), (bytes(8), 2)):
        with pytest.raises(RemoteProtocolError):
            device.load(payload, version)
    other = ScriptedGuest(devices=[FakeDevice("unknown")], run_state="paused")
    with pytest.raises(RemoteProtocolError, match="no such device"):
        await guest.load_devices(await other.save_devices())
    refusing = FakeDevice(load_error=GuestFailed("out of order"))
    with pytest.raises(GuestFailed):
        refusing.load(refusing.save(), 1)


async def test_state_of_a_running_guest_is_noted_as_misuse() -> None:
    guest = ScriptedGuest()
    await guest.save_devices()
    await guest.load_devices([])
    assert len(guest.misuse) == 2
    with pytest.raises(AssertionError, match="running guest"):
        OwnerReferee(only=guest).check()


# The referee


async def test_referee_sees_two_guests_that_run_at_the_same_instant_only(autojump_clock: MockClock) -> None:
    source, target = ScriptedGuest(), ScriptedGuest(run_state="prelaunch")
    referee = OwnerReferee(source=source, destination=target)
    assert referee.running() == ("source",)
    await trio.sleep(5)
    await target.activate("running")
    await target.pause()
    assert referee.violations == [Violation(5.0, "both-run", ("source", "destination"))]
    with pytest.raises(AssertionError, match="both-run"):
        referee.check()


async def test_referee_accepts_a_migration_there_and_back() -> None:
    source, target = ScriptedGuest(), ScriptedGuest(run_state="prelaunch")
    referee = OwnerReferee(source=source, destination=target)
    for giver, taker in ((source, target), (target, source), (source, target)):
        await giver.pause()
        await taker.load_devices([])
        await taker.activate("running")
        assert len(referee.running()) == 1
    referee.check()
    assert [event for _, _, event in referee.history] == ["stop", "load", "start"] * 3


async def test_referee_sees_a_guest_that_goes_on_from_an_outrun_state() -> None:
    source, target = ScriptedGuest(), ScriptedGuest(run_state="prelaunch")
    referee = OwnerReferee(source=source, destination=target)
    await source.pause()
    await target.activate("running")
    await target.pause()
    await source.resume()
    assert [(v.kind, v.labels) for v in referee.violations] == [("stale-state", ("source", "destination"))]


async def test_referee_accepts_a_resume_after_a_failed_attempt() -> None:
    source, target = ScriptedGuest(), ScriptedGuest(run_state="prelaunch")
    referee = OwnerReferee(source=source, destination=target)
    await source.pause()
    await target.load_devices([])
    await source.resume()
    referee.check()


# Failing calls


async def test_call_n_fails_whichever_it_is_and_has_no_effect() -> None:
    for n, name in enumerate(["pause", "save_devices", "resume", "activate", "throttle", "load_devices"], 1):
        calls = Calls(fail_at=n, error=GuestFailed)
        guest = ScriptedGuest(run_state="prelaunch")
        wrapped = FailingGuest(guest, calls, label="g")

        async def everything(wrapped: FailingGuest = wrapped) -> None:
            await wrapped.pause()
            await wrapped.save_devices()
            await wrapped.resume()
            await wrapped.activate("paused")
            await wrapped.throttle(10)
            await wrapped.load_devices([])

        with pytest.raises(GuestFailed, match=rf"call {n}, g\.{name}"):
            await everything()
        assert calls.fired
        assert (len(calls.names), calls.names[-1], len(guest.events())) == (n, f"g.{name}", n - 1)


async def test_tracker_of_a_failing_guest_fails_but_stops() -> None:
    guest = ScriptedGuest()
    tracker = FailingGuest(guest, Calls(fail_at=2, error=MemoryError)).dirty_tracker()
    await tracker.start()
    with pytest.raises(MemoryError):
        await tracker.sync()
    tracker.stop()
    assert guest.tracking == 0


async def test_stream_call_fails_before_or_after_its_effect() -> None:
    for when, expected in (("before", b"2"), ("after", b"12")):
        a, b = virtual_link()
        calls = Calls(fail_at=1, error=trio.BrokenResourceError, when=when)  # type: ignore[arg-type]  # one of two
        stream = FailingStream(a, calls, label="a")
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"1")
        await stream.send_all(b"2")
        assert await b.receive_some() == expected
        assert calls.names == ["a.send_all", "a.send_all"]


async def test_hanging_call_ends_only_by_cancellation(autojump_clock: MockClock) -> None:
    a, _ = virtual_link()
    stream = FailingStream(a, Calls(fail_at=1, hang=True))
    with trio.move_on_after(1000) as scope:
        await stream.receive_some(1)
    assert (scope.cancelled_caught, trio.current_time()) == (True, 1000)


@pytest.mark.parametrize("hang", [False, True])
async def test_failing_close_has_closed_even_when_forced(hang: bool) -> None:
    a, _ = virtual_link()
    stream = FailingStream(a, Calls(fail_at=1, hang=hang))
    if hang:
        await trio.aclose_forcefully(stream)
    else:
        with pytest.raises(OSError, match="aclose"):
            await trio.aclose_forcefully(stream)
    assert a.closed


async def test_unarmed_or_excluded_calls_do_not_count() -> None:
    calls = Calls(fail_at=1, only=lambda name: name.endswith("resume"))
    guest = FailingGuest(ScriptedGuest(), calls)
    await guest.pause()
    calls.stop_counting()
    await guest.resume()
    assert calls.names == []
    calls.start_counting()
    with pytest.raises(OSError, match="call 1"):
        await guest.resume()
