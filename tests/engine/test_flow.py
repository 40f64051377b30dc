"""An undisturbed migration: the order of what happens, what a monitor shows meanwhile, and the figures at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Destination, Pair, config, played, running, told, waiting
from trimig.engine.sections.ram import RamSection
from trimig.engine.source.switchover import PING_PREPARE
from trimig.guest import PAGE_SIZE
from trimig.status import Status
from trimig.testing import FakeDevice, VirtualLink, Write
from trimig.wire import encoder as wire

RAM_MEMBERS = {
    "transferred", "remaining", "total", "duplicate", "skipped", "normal", "normal-bytes", "dirty-pages-rate", "mbps",
    "dirty-sync-count", "postcopy-requests", "page-size", "multifd-bytes", "pages-per-second", "precopy-bytes",
    "downtime-bytes", "postcopy-bytes", "dirty-sync-missed-zero-copy",
}  # fmt: skip


async def test_events_of_both_sides_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """L4, L11, M4, M9, P1: statuses, stop and resume, passes, as they follow each other."""
    pair = Pair()
    here: list[tuple[str, Any]] = []
    there: list[tuple[str, Any]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told, pair.here, here)
        nursery.start_soon(told, pair.there, there)
        await trio.testing.wait_all_tasks_blocked()
        await pair.both()
    here = [told for told in here if told[0] != "PHASE"]
    there = [told for told in there if told[0] != "PHASE"]
    assert here == [
        ("MIGRATION", "setup"),
        ("MIGRATION_PASS", 1),
        ("MIGRATION", "active"),
        ("MIGRATION_PASS", 2),
        ("PASS", 1),
        ("MIGRATION", "device"),
        ("STOP", None),
        ("MIGRATION_PASS", 3),
        ("MIGRATION", "handover"),
        ("MIGRATION", "completed"),
    ]
    assert there == [
        ("MIGRATION", "setup"),
        ("MIGRATION", "active"),
        ("MIGRATION", "handover"),
        ("RESUME", None),
        ("MIGRATION", "completed"),
    ]
    assert pair.source.events() == ["claim", "track", "sync", "pause", "sync", "save", "untrack", "release"]
    assert pair.target.events() == ["claim", "load", "activate", "release"]


async def test_phases_of_the_source_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """Each begins when the one before has ended, and the parts of the downtime are the phases in which the guest stands still."""
    pair = Pair()
    phases: list[Mapping[str, Any]] = []
    pair.here.add_listener(lambda event: phases.append(event.data) if event.name == "PHASE" else None)
    there: list[tuple[str, str]] = []
    pair.there.add_listener(
        lambda event: there.append((event.data["phase"], event.data["step"])) if event.name == "PHASE" else None
    )
    sent, _ = await pair.both()
    assert there == [(n, s) for n in ("connect", "announce", "ram", "devices", "activate") for s in ("begin", "end")]
    names = ["connect", "announce", "precopy", "drain", "pause", "rest", "devices", "prepare", "commit", "follow"]
    assert [(told["phase"], told["step"]) for told in phases] == [(n, s) for n in names for s in ("begin", "end")]
    seconds = {told["phase"]: told["seconds"] for told in phases if told["step"] == "end"}
    parts = sent.downtime_parts
    assert (parts.pause, parts.ram, parts.devices, parts.prepare) == tuple(
        seconds[name] for name in ("pause", "rest", "devices", "prepare")
    )


async def test_guest_that_runs_arrives_running_with_its_last_state(autojump_clock: trio.testing.MockClock) -> None:
    """M3, K5, T1: what was written until the stop is there, and the destination runs on."""
    pair = Pair(
        running(pages=16, rate=10, script=[Write(0.1, "ram", 0, 7)]), link=VirtualLink(rate=100_000, window=8192)
    )
    await pair.both()
    assert pair.source.writes > 0
    assert (pair.source.run_state, pair.target.run_state) == ("paused", "running")
    assert pair.source.digest() == pair.target.digest()
    assert pair.target.ram[0].pages[0, 100] == 7


@pytest.mark.parametrize("run_state", ["paused", "prelaunch", "shutdown"])
async def test_guest_that_stands_still_arrives_as_it_was(
    autojump_clock: trio.testing.MockClock, run_state: str
) -> None:
    """M2, P9: neither paused nor resumed on the way."""
    pair = Pair(running(run_state=run_state))
    await pair.both()
    assert pair.target.run_state == pair.source.run_state == run_state
    assert not {"pause", "resume"} & {*pair.source.events(), *pair.target.events()}


async def test_autostart_off_leaves_a_running_guest_paused(autojump_clock: trio.testing.MockClock) -> None:
    """P9: as with -S; the caller starts the guest."""
    pair = Pair(config_there=config(autostart=False))
    await pair.both()
    assert pair.target.run_state == "paused"
    assert not pair.target.executed


@pytest.mark.parametrize(("before", "after"), [("running", "paused"), ("paused", "running")])
async def test_run_state_is_that_of_the_moment_of_the_stop(
    autojump_clock: trio.testing.MockClock, before: str, after: str
) -> None:
    """M2, M3: a user may pause or resume the guest while its memory is sent."""
    pair = Pair(running(run_state=before, pages=16), link=VirtualLink(rate=100_000, window=8192))

    async def user() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await (pair.source.pause() if after == "paused" else pair.source.resume())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(user)
        await pair.both()
    assert pair.source.run_state == "paused"
    assert pair.target.run_state == after
    assert pair.source.digest() == pair.target.digest()


# -- info ----------------------------------------------------------------------------------------------------------


async def test_members_of_info_in_every_status_of_a_source(autojump_clock: trio.testing.MockClock) -> None:
    """G1, G2, G3, G4, G5, G15: the presence table of query-migrate."""
    pair = Pair(running(pages=64, rate=1), link=VirtualLink(rate=1_000_000, window=8192))
    assert pair.here.info() == {}
    seen: dict[str, dict[str, Any]] = {}

    def noting(event: trimig.Event) -> None:
        if event.name == "MIGRATION":
            seen[event.data["status"]] = pair.here.info()

    pair.here.add_listener(noting)
    await pair.both()
    running_members = {
        "status", "owner", "dirty-tracking", "total-time", "setup-time", "expected-downtime", "convergence", "ram",
    }  # fmt: skip
    assert {name: set(info) for name, info in seen.items()} == {
        "setup": {"status", "owner"},
        "active": running_members,
        "device": running_members,
        "handover": running_members,
        "completed": running_members - {"expected-downtime", "convergence"} | {"downtime"},
    }
    assert [seen[s]["status"] for s in ("device", "handover", "completed")] == ["device", "device", "completed"]
    assert [seen[s]["owner"] for s in ("device", "handover", "completed")] == ["source", "unknown", "destination"]
    assert all(set(info["ram"]) == RAM_MEMBERS for info in seen.values() if "ram" in info)
    assert seen["active"]["expected-downtime"] == pair.config_here.parameters.downtime_limit
    assert seen["completed"]["downtime"] == pair.here.info()["downtime"] > 0
    ram = seen["completed"]["ram"]
    assert (ram["remaining"], ram["dirty-pages-rate"], ram["skipped"], ram["page-size"]) == (0, 0, 0, 4096)
    assert (ram["total"], ram["normal-bytes"]) == (64 * 4096, ram["normal"] * 4096)
    assert ram["normal"] + ram["duplicate"] >= 64
    assert ram["transferred"] == pair.link.sent("a->b") == ram["precopy-bytes"] + ram["downtime-bytes"]
    assert ram["postcopy-bytes"] == 0


async def test_all_of_a_guest_that_stands_still_counts_as_downtime(autojump_clock: trio.testing.MockClock) -> None:
    """config.md part 7, as QEMU counts."""
    pair = Pair(running(run_state="paused"))
    await pair.both()
    ram = pair.here.info()["ram"]
    assert (ram["precopy-bytes"], ram["postcopy-bytes"]) == (0, 0)
    assert ram["downtime-bytes"] == ram["transferred"] > 0


async def test_members_of_info_after_a_failure_and_a_cancel(autojump_clock: trio.testing.MockClock) -> None:
    """G9, T5: failed has its reason, cancelled has none."""
    pair = Pair(target=waiting(pages=5))
    error, _ = await pair.both()
    assert pair.here.info() == {
        "status": "failed", "owner": "source", "error-desc": str(error), "dirty-tracking": "marks",
    }  # fmt: skip
    pair = Pair()
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await pair.here.wait_status(Status.ACTIVE)
            pair.here.cancel("enough")
            assert pair.here.info()["status"] == "cancelling"

        nursery.start_soon(stop)
        error, _ = await pair.both()
    assert isinstance(error, trimig.MigrationCancelled)
    assert error.reason == "enough"
    assert pair.here.info() == {"status": "cancelled", "owner": "source", "dirty-tracking": "marks"}


async def test_info_of_a_destination(autojump_clock: trio.testing.MockClock) -> None:
    """G10: the status and nothing of RAM."""
    pair = Pair()
    await pair.both()
    assert pair.there.info() == {"status": "completed", "owner": "destination"}
    pair = Pair(target=waiting(pages=5))
    _, error = await pair.both()
    assert pair.there.info() == {"status": "failed", "owner": "source", "error-desc": str(error)}


# -- figures -------------------------------------------------------------------------------------------------------


async def test_figures_of_a_summary(autojump_clock: trio.testing.MockClock) -> None:
    """G12, G13, L11: times on the clock of the run, pages and bytes as they were sent; the pause is split."""
    delays = {"pause": 0.25, "save": 0.125}
    pair = Pair(
        running(content="mixed", pages=6, delays=delays),
        waiting(pages=6, delays={"load": 0.5, "activate": 1.0}),
        link=VirtualLink(),
    )
    here, there = await pair.both()
    assert (here.confirmed, here.prepared, there.confirmed, there.prepared) == (True,) * 4
    assert (here.zero_pages, here.normal_pages, here.ram_bytes) == (2, 4, 6 * 4096)
    assert (there.zero_pages, there.normal_pages, there.ram_bytes) == (2, 4, 6 * 4096)
    assert here.bytes_transferred == there.bytes_transferred == pair.link.sent("a->b")
    assert (here.iterations, here.dirty_tracking, here.warnings) == (1, "marks", ())
    parts = here.downtime_parts
    assert (parts.pause, parts.ram, parts.devices) == pytest.approx((0.25, 0, 0.125))
    assert (parts.prepare, parts.commit) == pytest.approx((0.5, 1.0))
    assert here.downtime == pytest.approx(parts.total) == pytest.approx(1.875)
    assert there.downtime_parts.resume == pytest.approx(1.0)
    assert here.total_time == pytest.approx(1.875)
    assert pair.here.info()["downtime"] == 1875
    assert here.throughput == pytest.approx(6 * 4096 / 1.875)


async def test_setup_time_is_what_comes_before_the_first_page(autojump_clock: trio.testing.MockClock) -> None:
    """L4, G12."""
    pair = Pair()

    async def late() -> trio.abc.Stream:
        await trio.sleep(3)
        return pair.link.a

    from trimig.channel.connections import Connections
    from trimig.engine.source import migrate_stream
    from trimig.monitor.monitor import core_of

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.receive)
        summary = await migrate_stream(pair.source, Connections(first=late), pair.config_here, core_of(pair.here))
    assert summary.setup_time == pytest.approx(3)
    assert pair.here.info()["setup-time"] == 3000


# -- return path ---------------------------------------------------------------------------------------------------


async def test_return_path_is_opened_and_the_prepare_step_proved(autojump_clock: trio.testing.MockClock) -> None:
    """K1, L1, L2: commands 1 and 2 directly behind the configuration; the second PING before the end of file."""
    pair = Pair()
    await pair.both()
    sent = pair.link.recorded("a->b")
    opening = wire.file_header() + wire.configuration("scripted") + wire.command(1) + wire.ping(1)
    assert sent.startswith(opening)
    behind = sent[sent.index(wire.ping(PING_PREPARE)) :]
    assert behind.startswith(wire.ping(PING_PREPARE) + wire.end_of_stream() + b"\x06")
    # PONG 1, the mark and its answer, the proof of prepare, SHUT.
    assert len(pair.link.recorded("b->a")) == 8 + 16 + 8 + 8


async def test_without_a_return_path_nothing_is_asked_and_a_warning_says_so(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """K1, gap G3."""
    pair = Pair(config_here=config(return_path=False))
    here, there = await pair.both()
    sent = pair.link.recorded("a->b")
    assert b"\x08\x00\x01\x00\x00" not in sent
    assert wire.ping(1) not in sent
    assert wire.ping(PING_PREPARE) not in sent
    assert pair.link.sent("b->a") == 0
    assert (here.confirmed, here.prepared, there.confirmed, there.prepared) == (False,) * 4
    assert "no return path" in here.warnings[0]
    assert (pair.source.run_state, pair.target.run_state) == ("paused", "running")


async def test_status_waits_for_the_answer(autojump_clock: trio.testing.MockClock) -> None:
    """K9, M8: sent is not arrived."""
    pair = Pair(target=waiting(delays={"activate": 5}))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.both)
        await pair.there.wait_status(Status.HANDOVER)
        await trio.sleep(4)
        assert pair.here.status is Status.HANDOVER
        assert pair.here.owner is trimig.Ownership.UNKNOWN
        with pytest.raises(trimig.StateError, match="too late"):
            pair.here.cancel("no")
    assert await pair.here.wait_status() is Status.COMPLETED


async def test_long_silence_of_the_destination_is_no_failure(autojump_clock: trio.testing.MockClock) -> None:
    """T3: while memory is sent, a destination has nothing to say; only a peer that is due is timed."""
    pair = Pair(running(pages=64, content="random"), config_here=config(max_bandwidth=10_000, stall_timeout=2.0))
    here, _ = await pair.both()
    assert here.total_time > 20
    assert pair.target.running


# -- several attempts ----------------------------------------------------------------------------------------------


async def test_one_guest_cannot_be_in_two_migrations(autojump_clock: trio.testing.MockClock) -> None:
    """F1: refused at once, the one under way is untouched, and the stream given to the refused one is closed."""
    pair = Pair(running(pages=64), link=VirtualLink(rate=100_000, window=8192))
    other = VirtualLink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.both)
        await pair.here.wait_status(Status.ACTIVE)
        with pytest.raises(trimig.StateError, match="outgoing"):
            await trimig.migrate(pair.source, other.a)
        with pytest.raises(trimig.StateError, match="incoming"):
            await trimig.receive(pair.target, other.b)
        assert other.closed
        with pytest.raises(trimig.StateError, match="in progress"):
            await trimig.migrate(running(), VirtualLink().a, monitor=pair.here)
    assert pair.target.running


async def test_monitor_serves_one_attempt_after_another(autojump_clock: trio.testing.MockClock) -> None:
    """F7, T7: counters begin at zero, and an old error is gone."""
    pair = Pair(target=waiting(pages=5))
    await pair.both()
    assert "error-desc" in pair.here.info()
    link = VirtualLink()
    target = waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trimig.receive, target, link.b)
        summary = await trimig.migrate(pair.source, link.a, config(), monitor=pair.here)
    assert summary.normal_pages == 4
    assert "error-desc" not in pair.here.info()
    assert pair.here.info()["ram"]["transferred"] == link.sent("a->b")


async def test_there_and_back(autojump_clock: trio.testing.MockClock) -> None:
    """T7: the copy that stayed behind is filled again."""
    pair = Pair(running(devices=[FakeDevice("clock", size=8)], rate=10))
    await pair.both()
    await trio.sleep(1)
    link = VirtualLink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trimig.receive, pair.source, link.b)
        await trimig.migrate(pair.target, link.a, config())
    pair.referee.check()
    assert pair.referee.running() == ("source",)
    assert pair.source.digest() == pair.target.digest()


async def test_source_that_finds_no_listener(autojump_clock: trio.testing.MockClock) -> None:
    """B16: failed before a byte; the guest runs on, and was never stopped."""
    guest, monitor = running(), trimig.Monitor()
    with pytest.raises(trimig.TransportFailed):
        await trimig.migrate(guest, "unix:/nonexistent/socket", monitor=monitor)
    assert guest.events() == ["claim", "release"]
    assert monitor.info()["status"] == "failed"
    assert "/nonexistent/socket" in monitor.info()["error-desc"]


async def test_reader_is_gone_when_the_source_returns(autojump_clock: trio.testing.MockClock) -> None:
    """K11, K12, L14: bytes behind SHUT are not read, and no task waits for more."""
    pair = Pair()

    async def script(there: Destination) -> None:
        await there.prepare()
        await there.until(b'"page_size"')
        await there.say(b"\0\1\0\4\0\0\0\0" + b"what is this?")
        await there.until_closed()

    tasks = trio.lowlevel.current_statistics().tasks_living
    async with played(pair, script):
        summary = await pair.migrate()
    assert summary.confirmed
    assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_pages_without_memory_are_sent_and_get_none(autojump_clock: trio.testing.MockClock) -> None:
    """A guest that has used little of its memory is not made to need all of it by its migration."""
    with trimig.AppGuest("scripted", running=True, dirty_tracking="marks") as source, contextlib.ExitStack() as stack:
        block = source.add_ram("ram", 64 * 4096)
        block.pages[5] = 7
        target = stack.enter_context(trimig.AppGuest("scripted", running=False))
        arrived = target.add_ram("ram", 64 * 4096)
        link = VirtualLink()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimig.receive, target, link.b)
            summary = await trimig.migrate(source, link.a)
        assert (summary.zero_pages, summary.normal_pages) == (63, 1)
        assert int(block.absent().sum()) == int(arrived.absent().sum()) == 63
        assert arrived.pages[5, 0] == 7


async def test_tasks_of_a_section_run_from_before_the_first_page_to_the_end(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section may send on connections of its own, as multifd does."""
    pair, sent, ends = Pair(running(pages=64)), list[int](), list[Status]()

    async def run() -> None:
        sent.append(pair.link.sent("a->b"))
        try:
            await trio.sleep_forever()
        finally:
            ends.append(pair.here.status)

    monkeypatch.setattr(RamSection, "tasks", {"probe": run})
    await pair.both()
    assert pair.target.run_state == "running"
    assert len(sent) == 1
    assert sent[0] < PAGE_SIZE
    assert ends == [Status.COMPLETED]


async def test_a_status_that_shows_an_error_is_never_without_one(autojump_clock: trio.testing.MockClock) -> None:
    """A poll of query-migrate in the moment of the status finds the reason, too."""
    pair = Pair(running(pages=64), waiting(pages=32))
    shown: dict[str, list[str | None]] = {"here": [], "there": []}
    for name, monitor in (("here", pair.here), ("there", pair.there)):

        def noting(event: trimig.Event, name: str = name, monitor: trimig.Monitor = monitor) -> None:
            if event.name == "MIGRATION" and event.data["status"] in {"failed", "uncertain"}:
                shown[name].append(monitor.info().get("error-desc"))

        monitor.add_listener(noting)
    here, there = await pair.both()
    assert shown["there"] == [str(there)]
    assert len(shown["here"]) == 1
    assert shown["here"][0]
    assert str(here).startswith(shown["here"][0])
