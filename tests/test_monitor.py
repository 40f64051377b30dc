"""What a caller watches and steers by, without an engine: the tests move the monitor through its statuses by hand."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from trimig.config import Capabilities, Config, Parameters
from trimig.errors import ConfigError, Ownership, StateError
from trimig.monitor.core import MonitorCore
from trimig.monitor.monitor import EVENT_BACKLOG, Downtime, Event, Summary
from trimig.status import IDLE, IN_POSTCOPY, TERMINAL, Role, Status

S = Status
SRC, DST = Role.SOURCE, Role.DESTINATION

#: A way to each status of a source, from none.
_GONE = (S.SETUP, S.ACTIVE, S.DEVICE, S.HANDOVER, S.POSTCOPY_ACTIVE)
PATHS: dict[Status, tuple[Status, ...]] = {
    S.NONE: (),
    S.SETUP: (S.SETUP,),
    S.ACTIVE: (S.SETUP, S.ACTIVE),
    S.PRE_SWITCHOVER: (S.SETUP, S.ACTIVE, S.PRE_SWITCHOVER),
    S.DEVICE: (S.SETUP, S.ACTIVE, S.DEVICE),
    S.HANDOVER: (S.SETUP, S.ACTIVE, S.DEVICE, S.HANDOVER),
    S.UNCERTAIN: (S.SETUP, S.ACTIVE, S.DEVICE, S.HANDOVER, S.UNCERTAIN),
    S.COMPLETED: (S.SETUP, S.ACTIVE, S.DEVICE, S.HANDOVER, S.COMPLETED),
    S.FAILED: (S.SETUP, S.ACTIVE, S.FAILED),
    S.CANCELLING: (S.SETUP, S.ACTIVE, S.CANCELLING),
    S.CANCELLED: (S.SETUP, S.ACTIVE, S.CANCELLING, S.CANCELLED),
    S.POSTCOPY_ACTIVE: _GONE,
    S.POSTCOPY_PAUSED: (*_GONE, S.POSTCOPY_PAUSED),
    S.POSTCOPY_RECOVER: (*_GONE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER),
    S.POSTCOPY_UNCERTAIN: (*_GONE[:-1], S.POSTCOPY_UNCERTAIN),
    S.POSTCOPY_LOST: (*_GONE, S.POSTCOPY_PAUSED, S.POSTCOPY_LOST),
}
ALL = list(Status)


def brought_to(status: Status, role: Role = SRC, monitor: MonitorCore | None = None) -> MonitorCore:
    """A monitor in *status*."""
    monitor = monitor or MonitorCore()
    path = PATHS[status] if role is SRC else tuple(s for s in PATHS[status] if s is not S.DEVICE)
    for step in path:
        if step is S.SETUP:
            monitor.begin(role, Config())
        else:
            monitor.advance(step)
    return monitor


# -- statuses ------------------------------------------------------------------------------------------------------


async def test_new_monitor() -> None:
    monitor = MonitorCore()
    assert (monitor.status, monitor.role, monitor.owner) == (S.NONE, None, Ownership.SOURCE)
    assert (monitor.config, monitor.addresses, monitor.cancel_reason) == (Config(), (), None)
    assert repr(monitor) == "<trimig.Monitor none>"
    assert monitor.statistics().elapsed == 0
    assert monitor.info() == {}


@pytest.mark.parametrize("status", ALL)
async def test_owner_follows_the_status(status: Status) -> None:
    expected = dict.fromkeys((S.HANDOVER, S.UNCERTAIN, S.POSTCOPY_UNCERTAIN), Ownership.UNKNOWN)
    gone = (S.COMPLETED, S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER, S.POSTCOPY_LOST)
    expected |= dict.fromkeys(gone, Ownership.DESTINATION)
    monitor = brought_to(status)
    assert monitor.owner is expected.get(status, Ownership.SOURCE)
    assert monitor.statistics().owner is monitor.owner
    assert repr(monitor) == f"<trimig.Monitor {'source ' if status is not S.NONE else ''}{status.value}>"


@pytest.mark.parametrize("status", ALL)
async def test_new_attempt_begins_where_nothing_is_under_way(status: Status) -> None:
    """F1, T7: refused in every other status, and the attempt under way is not touched."""
    monitor = brought_to(status)
    if status in IDLE:
        monitor.begin(DST, Config())
        assert (monitor.status, monitor.role) == (S.SETUP, DST)
        return
    counters = monitor.counters
    with pytest.raises(StateError, match=rf"in progress \({status.value}\)") as caught:
        monitor.begin(DST, Config())
    assert caught.value.status == status.value
    assert (monitor.status, monitor.role, monitor.counters) == (status, SRC, counters)


async def test_new_attempt_starts_from_zero(autojump_clock: trio.testing.MockClock) -> None:
    """F7: zero counters, no old error, no old cancel, no old address."""
    monitor = brought_to(S.ACTIVE)
    counters = monitor.counters
    counters.count_bytes = lambda: 5
    counters.normal, counters.iteration, counters.error = 6, 7, "old"
    counters.expected_downtime, counters.dirty_tracking = 1.0, "compare"
    monitor.listening("tcp:127.0.0.1:1")
    monitor.warn("old")
    monitor.cancel("old")
    monitor.advance(S.CANCELLED)
    await trio.sleep(5)
    begun = monitor.begin(SRC, Config(parameters=Parameters(downtime_limit=7)))
    assert monitor.counters is begun
    assert begun == type(begun)(started=trio.current_time())
    assert (monitor.cancel_reason, monitor.addresses) == (None, ())
    assert monitor.config.parameters.downtime_limit == 7
    assert monitor.info() == {"status": "setup", "owner": "source"}
    monitor.advance(S.FAILED)
    assert "error-desc" not in monitor.info()


async def test_illegal_change_is_refused_and_nothing_is_told() -> None:
    """H3."""
    monitor = brought_to(S.SETUP)
    told = monitor.events()
    with pytest.raises(StateError, match="cannot go from setup to completed"):
        monitor.advance(S.COMPLETED)
    assert monitor.status is S.SETUP
    monitor.advance(S.FAILED)
    assert [event.data["status"] async for event in told] == ["failed"]


# -- cancel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ALL)
async def test_cancel_in_every_status(status: Status) -> None:
    """F9, F10: nothing where nothing can be undone; refused once the decision has been sent (gap G2)."""
    monitor = brought_to(status)
    asked: list[str] = []
    monitor.control(asked.append, None)
    if status is S.HANDOVER or status in IN_POSTCOPY:
        with pytest.raises(StateError, match="too late to cancel") as caught:
            monitor.cancel("no more")
        assert caught.value.status == status.value
        assert (monitor.status, asked, monitor.cancel_reason) == (status, [], None)
    elif status in (S.SETUP, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE):
        monitor.cancel("no more")
        assert (monitor.status, asked, monitor.cancel_reason) == (S.CANCELLING, ["no more"], "no more")
        monitor.cancel("again")
        assert (asked, monitor.cancel_reason) == (["no more"], "no more")
    else:
        monitor.cancel("no more")
        assert (monitor.status, asked, monitor.cancel_reason) == (status, [], None)


async def test_cancel_before_the_engine_listens_is_kept() -> None:
    monitor = brought_to(S.SETUP)
    monitor.cancel("at once")
    assert (monitor.status, monitor.cancel_reason) == (S.CANCELLING, "at once")


async def test_destination_too_late_to_cancel() -> None:
    monitor = brought_to(S.HANDOVER, DST)
    assert monitor.owner is Ownership.DESTINATION
    with pytest.raises(StateError, match="too late"):
        monitor.cancel("no more")


@pytest.mark.parametrize("status", ALL)
async def test_resume_in_every_status(status: Status) -> None:
    """F13, F14: goes on from pre-switchover; refused everywhere else, naming the status, and nothing is changed."""
    monitor = brought_to(status)
    if status is S.PRE_SWITCHOVER:
        monitor.resume()
        assert monitor.status is S.DEVICE
        return
    with pytest.raises(StateError, match=f"the status is {status.value}") as caught:
        monitor.resume()
    assert caught.value.status == status.value
    assert monitor.status is status


# -- postcopy ------------------------------------------------------------------------------------------------------


async def test_postcopy_can_be_asked_for() -> None:
    """F16, F17, F18, F20: not without the capability, not without a migration; kept until it is used, and no longer."""
    monitor = MonitorCore()
    with pytest.raises(StateError, match="no outgoing migration"):
        monitor.start_postcopy()
    monitor.begin(SRC, Config())
    with pytest.raises(StateError, match="postcopy-ram must be on"):
        monitor.start_postcopy()
    monitor.advance(S.FAILED)
    able = Config(capabilities=Capabilities(postcopy_ram=True))
    monitor.begin(SRC, able)
    monitor.start_postcopy()
    assert monitor.postcopy_wanted
    monitor.advance(S.FAILED)
    monitor.start_postcopy()
    monitor.begin(SRC, able)
    assert not monitor.postcopy_wanted


async def test_destination_cannot_start_postcopy() -> None:
    monitor = MonitorCore()
    monitor.begin(DST, Config(capabilities=Capabilities(postcopy_ram=True)))
    with pytest.raises(StateError, match="no outgoing migration"):
        monitor.start_postcopy()


@pytest.mark.parametrize("status", ALL)
async def test_pause_recover_and_abandon_in_every_status(status: Status) -> None:
    """O6: refused but where they have a meaning, naming the status."""
    monitor = brought_to(status)
    reasons: list[str] = []
    monitor.interrupt(reasons.append)
    if status in (S.POSTCOPY_ACTIVE, S.POSTCOPY_RECOVER):
        monitor.pause("enough")
        assert reasons == ["enough"]
    else:
        with pytest.raises(StateError, match=f"the status is {status.value}"):
            monitor.pause()
    if status in (S.POSTCOPY_PAUSED, S.POSTCOPY_UNCERTAIN):
        monitor.recover("tcp:127.0.0.1:1")
        with pytest.raises(StateError, match="no paused"):
            monitor.recover("tcp:127.0.0.1:2")
        assert monitor.take_recovery() == "tcp:127.0.0.1:1"
        assert monitor.take_recovery() is None
        monitor.abandon("enough")
        assert monitor.given_up == "enough"
        return
    with pytest.raises(StateError, match=f"the status is {status.value}"):
        monitor.recover("tcp:127.0.0.1:1")
    with pytest.raises(StateError, match=f"the status is {status.value}"):
        monitor.abandon()
    assert (monitor.take_recovery(), monitor.given_up, monitor.status) == (None, None, status)


# -- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ALL)
async def test_parameters_may_change_in_every_status(status: Status) -> None:
    """D2, D16: only what is given changes, and the engine hears of it."""
    monitor = brought_to(status)
    heard: list[int] = []
    monitor.control(None, lambda: heard.append(monitor.config.parameters.max_bandwidth))
    before = monitor.config
    returned = monitor.set_parameters(max_bandwidth=5_000_000, downtime_limit=250)
    assert returned is monitor.config.parameters
    assert returned == before.parameters.replace(max_bandwidth=5_000_000, downtime_limit=250)
    assert monitor.config.capabilities == before.capabilities
    assert heard == [5_000_000]
    assert monitor.status is status


@pytest.mark.parametrize(
    "changes",
    [
        {"downtime_limit": 2_000_001},
        {"downtime_limit": 100, "max_bandwidth": -1},
        {"max_bandwidth": 1000, "no_such": 1},
        {"max_bandwidth": "fast", "downtime_limit": 100},
    ],
)
async def test_one_bad_value_leaves_all_parameters_unchanged(changes: dict[str, Any]) -> None:
    """D11, D7: all or nothing, and the engine hears nothing."""
    monitor = brought_to(S.ACTIVE)
    heard: list[int] = []
    monitor.control(None, lambda: heard.append(1))
    before = monitor.config
    with pytest.raises(ConfigError):
        monitor.set_parameters(**changes)
    assert (monitor.config, heard) == (before, [])


# -- watch and events ----------------------------------------------------------------------------------------------


async def test_watch_shows_each_interval_and_each_change(autojump_clock: trio.testing.MockClock) -> None:
    monitor = brought_to(S.SETUP)
    seen: list[tuple[float, Status]] = []
    start = trio.current_time()

    async def watch() -> None:
        async for picture in monitor.watch(every=1.0):
            seen.append((round(trio.current_time() - start, 3), picture.status))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.sleep(0.25)
        monitor.advance(S.ACTIVE)
        await trio.sleep(2.5)
        monitor.emit("MIGRATION_PASS", **{"pass": 2})
        await trio.sleep(0.25)
        monitor.advance(S.FAILED)
    assert seen == [
        (0.0, S.SETUP), (0.25, S.ACTIVE), (1.25, S.ACTIVE), (2.25, S.ACTIVE), (3.0, S.FAILED)
    ]  # fmt: skip


async def test_watch_of_a_finished_attempt_shows_its_end_once() -> None:
    monitor = brought_to(S.COMPLETED)
    assert [picture.status async for picture in monitor.watch()] == [S.COMPLETED]


async def test_watch_begun_before_the_attempt(autojump_clock: trio.testing.MockClock) -> None:
    monitor = MonitorCore()
    pictures = monitor.watch(every=10)
    assert (await anext(pictures)).status is S.NONE
    monitor.begin(SRC, Config())
    assert (await anext(pictures)).status is S.SETUP
    monitor.cancel("x")
    monitor.advance(S.CANCELLED)
    assert [picture.status async for picture in pictures] == [S.CANCELLED]


async def test_cancelled_watch_may_be_used_again(autojump_clock: trio.testing.MockClock) -> None:
    monitor = brought_to(S.ACTIVE)
    pictures = monitor.watch(every=1.0)
    await anext(pictures)
    with trio.move_on_after(0.5):
        await anext(pictures)
    assert (await anext(pictures)).elapsed == pytest.approx(1.0)


async def test_elapsed_stands_still_at_the_end(autojump_clock: trio.testing.MockClock) -> None:
    monitor = brought_to(S.ACTIVE)
    await trio.sleep(2)
    assert monitor.statistics().elapsed == pytest.approx(2.0)
    monitor.advance(S.FAILED)
    await trio.sleep(3)
    assert monitor.statistics().elapsed == pytest.approx(2.0)


@pytest.mark.parametrize("wanted", [S.ACTIVE, S.DEVICE, S.FAILED])
async def test_wait_status(wanted: Status) -> None:
    monitor = MonitorCore()
    got: list[Status] = []

    async def wait() -> None:
        got.append(await monitor.wait_status(wanted))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        for step in PATHS[wanted]:
            assert got == []
            if step is S.SETUP:
                monitor.begin(SRC, Config())
            else:
                monitor.advance(step)
            await trio.testing.wait_all_tasks_blocked()
    assert got == [wanted]


async def test_wait_status_ends_with_the_attempt() -> None:
    """A status that does not come any more is not waited for."""
    monitor = brought_to(S.CANCELLED)
    assert await monitor.wait_status(S.ACTIVE) is S.CANCELLED


async def test_wait_status_is_a_checkpoint_even_if_it_is_there() -> None:
    monitor = brought_to(S.ACTIVE)
    with trio.testing.assert_checkpoints():
        assert await monitor.wait_status(S.ACTIVE) is S.ACTIVE


@pytest.mark.parametrize("status", [s for s in ALL if s in TERMINAL])
async def test_events_are_all_changes_in_order(status: Status) -> None:
    """H1: one event per change, the last of them the end."""
    monitor = MonitorCore()
    told = monitor.events()
    brought_to(status, monitor=monitor)
    events = [event async for event in told]
    assert [event.name for event in events] == ["MIGRATION"] * len(PATHS[status])
    assert [event.data["status"] for event in events] == [s.value for s in PATHS[status]]
    assert events[-1].data["owner"] == monitor.owner.value


async def test_events_of_each_kind() -> None:
    monitor = brought_to(S.SETUP, DST)
    told = monitor.events()
    monitor.listening("tcp:127.0.0.1:4444", "unix:/run/x")
    monitor.listening()
    monitor.warn("the guest has no clock")
    monitor.advance(S.FAILED)
    events = [event async for event in told]
    assert [(event.name, dict(event.data)) for event in events] == [
        ("LISTENING", {"addresses": ["tcp:127.0.0.1:4444", "unix:/run/x"]}),
        ("WARNING", {"text": "the guest has no clock"}),
        ("MIGRATION", {"status": "failed", "owner": "source"}),
    ]
    assert monitor.addresses == ()
    assert monitor.counters.warnings == ["the guest has no clock"]


async def test_event_is_a_record_of_its_own() -> None:
    monitor = brought_to(S.SETUP)
    told = monitor.events()
    monitor.emit("MIGRATION_PASS", **{"pass": 1})
    event = await anext(told)
    with pytest.raises(TypeError):
        event.data["pass"] = 2  # type: ignore[index] # that it cannot is the point


async def take(told: AsyncIterator[Event], count: int) -> list[Event]:
    return [await anext(told) for _ in range(count)]


async def test_reader_that_does_not_read_loses_the_oldest() -> None:
    """A reader that stops cannot stall a migration or fill the memory."""
    monitor = brought_to(S.ACTIVE)
    slow, quick = monitor.events(), monitor.events()
    for number in range(EVENT_BACKLOG + 10):
        monitor.emit("MIGRATION_PASS", **{"pass": number})
        assert (await anext(quick)).data["pass"] == number
    assert [event.data["pass"] for event in await take(slow, 2)] == [10, 11]
    monitor.advance(S.FAILED)
    rest = [event async for event in slow]
    assert (len(rest), rest[-1].name) == (EVENT_BACKLOG - 1, "MIGRATION")


async def test_cancelled_reader_of_events_loses_nothing() -> None:
    monitor = brought_to(S.ACTIVE)
    told = monitor.events()
    with trio.CancelScope() as scope:
        scope.cancel(reason="the test")
        await anext(told)
    monitor.advance(S.FAILED)
    assert [event.data["status"] async for event in told] == ["failed"]


# -- info ----------------------------------------------------------------------------------------------------------

RUNNING = {"status", "owner", "total-time", "setup-time", "expected-downtime", "ram"}
#: Members of query-migrate on the source (config.md 6.1), `owner` being our own.
SHAPES: dict[Status, set[str]] = {
    S.NONE: set(),
    S.SETUP: {"status", "owner"},
    S.ACTIVE: RUNNING,
    S.PRE_SWITCHOVER: RUNNING,
    S.DEVICE: RUNNING,
    S.HANDOVER: RUNNING,
    S.CANCELLING: RUNNING,
    S.COMPLETED: {"status", "owner", "total-time", "setup-time", "downtime", "ram"},
    S.FAILED: {"status", "owner"},
    S.UNCERTAIN: {"status", "owner"},
    S.CANCELLED: {"status", "owner"},
    S.POSTCOPY_ACTIVE: RUNNING,
    S.POSTCOPY_PAUSED: RUNNING,
    S.POSTCOPY_RECOVER: RUNNING,
    S.POSTCOPY_UNCERTAIN: RUNNING,
    S.POSTCOPY_LOST: {"status", "owner"},
}


@pytest.mark.parametrize("status", ALL)
async def test_info_has_the_members_of_its_status(status: Status) -> None:
    """G1, G2, G3."""
    info = brought_to(status).info()
    assert set(info) == SHAPES[status]
    if info:
        assert info["status"] == status.qmp


@pytest.mark.parametrize("status", [S.FAILED, S.UNCERTAIN, S.ACTIVE, S.CANCELLED, S.POSTCOPY_PAUSED, S.POSTCOPY_LOST])
async def test_info_tells_the_error_where_it_has_one(status: Status) -> None:
    """G9."""
    monitor = brought_to(status)
    monitor.counters.error = "the connection broke"
    if status in (S.FAILED, S.UNCERTAIN, S.POSTCOPY_PAUSED, S.POSTCOPY_LOST):
        assert monitor.info()["error-desc"] == "the connection broke"
    else:
        assert "error-desc" not in monitor.info()


async def test_info_counts_ram(autojump_clock: trio.testing.MockClock) -> None:
    """G4, G5, G12, G13: every member of the table, from the counters; ms and bytes."""
    monitor = brought_to(S.SETUP)
    c = monitor.counters
    await trio.sleep(0.25)
    c.setup_done = trio.current_time()
    monitor.advance(S.ACTIVE)
    c.count_bytes = lambda: 500_000
    c.total, c.remaining, c.normal, c.duplicate = 1 << 20, 40_960, 100, 30
    c.dirty_sync_count, c.bandwidth, c.pages_per_second, c.dirty_rate = 2, 1e6, 120.4, 81920.0
    c.shown_downtime, c.dirty_tracking = 0.0412, "compare"
    await trio.sleep(1)
    ram = {
        "transferred": 500_000,
        "remaining": 40_960,
        "total": 1 << 20,
        "duplicate": 30,
        "skipped": 0,
        "normal": 100,
        "normal-bytes": 409_600,
        "dirty-pages-rate": 20,
        "mbps": 8.0,
        "dirty-sync-count": 2,
        "postcopy-requests": 0,
        "page-size": 4096,
        "multifd-bytes": 0,
        "pages-per-second": 120,
        "precopy-bytes": 500_000,
        "downtime-bytes": 0,
        "postcopy-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    }
    assert monitor.info() == {
        "status": "active",
        "owner": "source",
        "dirty-tracking": "compare",
        "total-time": 1250,
        "setup-time": 250,
        "expected-downtime": 41,
        "ram": ram,
    }
    c.count_bytes = lambda: 750_000
    c.transferred_at_pause, c.downtime = 500_000, 0.03
    for step in (S.DEVICE, S.HANDOVER, S.COMPLETED):
        monitor.advance(step)
    await trio.sleep(100)
    assert monitor.info() == {
        "status": "completed",
        "owner": "destination",
        "dirty-tracking": "compare",
        "total-time": 1250,
        "setup-time": 250,
        "downtime": 30,
        "ram": {
            **ram,
            "transferred": 750_000,
            "remaining": 0,
            "dirty-pages-rate": 0,
            "mbps": 6.0,
            "downtime-bytes": 250_000,
        },
    }


@pytest.mark.parametrize("expected", [None, math.inf])
async def test_expected_downtime_starts_at_the_limit(expected: float | None) -> None:
    """G15."""
    monitor = brought_to(S.ACTIVE)
    monitor.counters.shown_downtime = expected
    assert monitor.info()["expected-downtime"] == monitor.config.parameters.downtime_limit


async def test_info_in_cancelling_out_of_setup_has_no_setup_time() -> None:
    """config.md 6.1: setup-time is 0 there."""
    monitor = brought_to(S.SETUP)
    monitor.cancel("x")
    assert monitor.info()["setup-time"] == 0


@pytest.mark.parametrize(
    "status", [s for s in ALL if s not in (S.PRE_SWITCHOVER, S.DEVICE, S.UNCERTAIN, S.POSTCOPY_UNCERTAIN)]
)
async def test_info_of_a_destination(status: Status) -> None:
    """G10; config.md 6.2: the status, and where it listens; no RAM statistics."""
    monitor = brought_to(status, DST)
    expected = {} if status is S.NONE else {"status": status.qmp, "owner": monitor.owner.value}
    assert monitor.info() == expected
    monitor.listening("tcp:127.0.0.1:4444")
    address = {"type": "inet", "host": "127.0.0.1", "port": "4444"}
    assert monitor.info() == {**expected, "socket-address": [address]}


# -- records -------------------------------------------------------------------------------------------------------


def test_downtime_is_the_sum_of_its_parts() -> None:
    parts = Downtime(pause=1, ram=2, devices=4, prepare=8, commit=16, resume=32)
    assert parts.total == 63
    assert Downtime().total == 0


@pytest.mark.parametrize(("total_time", "throughput"), [(2.0, 4096 * 150 / 2), (0.0, 0.0)])
def test_throughput_counts_every_copy_of_a_page(total_time: float, throughput: float) -> None:
    summary = Summary(
        role=SRC,
        confirmed=True,
        prepared=True,
        total_time=total_time,
        setup_time=0,
        downtime=0,
        downtime_parts=Downtime(),
        iterations=1,
        bytes_transferred=1,
        normal_pages=100,
        zero_pages=50,
        ram_bytes=4096,
        dirty_tracking="marks",
    )
    assert summary.throughput == throughput
