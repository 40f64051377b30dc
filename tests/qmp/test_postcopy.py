"""Postcopy over QMP: the switch, the pause, the recovery, and the refused commands of each status."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.qmp.driver import Talk, hosted, pair
from trimig import Ownership
from trimig.status import Status
from trimig.testing import LazyScriptedGuest, ScriptedGuest

PAGES = 600


@asynccontextmanager
async def able(tmp_path: Path, *, background: int = 40 << 20) -> AsyncIterator[tuple[Talk, Talk, str]]:
    """Two machines with postcopy on, and so little bandwidth that a pass takes a while."""
    source = ScriptedGuest(blocks={"ram": PAGES})
    target = LazyScriptedGuest(
        blocks={"ram": PAGES}, content="zero", run_state="inmigrate", touches=[PAGES - 1, 7, PAGES // 2]
    )
    async with pair(tmp_path, source, target) as (here, there, uri):
        for talk in (here, there):
            await talk.capabilities(postcopy_ram=True)
        limits = {"max-bandwidth": 4 << 20, "downtime-limit": 1, "max-postcopy-bandwidth": background}
        await here.say("migrate-set-parameters", limits)
        yield here, there, uri


async def test_switch_to_postcopy(tmp_path: Path) -> None:
    """F19, G10, H1: the guest runs at the destination before its memory arrives; the statuses are QEMU's."""
    async with able(tmp_path) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.until(Status.ACTIVE)
        await source.say("migrate-start-postcopy")
        await destination.until(Status.POSTCOPY_ACTIVE, incoming=True)
        assert await destination.state() == "running"
        assert await source.over() is Status.COMPLETED
        ram = (await source.query())["ram"]
        assert ram["postcopy-requests"] > 0
        assert ram["precopy-bytes"] + ram["downtime-bytes"] + ram["postcopy-bytes"] == ram["transferred"]
        assert ram["precopy-bytes"] > 0
        assert 0 < ram["downtime-bytes"] < ram["postcopy-bytes"]
        names = source.names()
        assert [name for name in names if name != "MIGRATION_PASS"] == [
            "setup", "active", "STOP", "postcopy-active", "completed",
        ]  # fmt: skip
        # One pass is counted before the memory is sent, one after the stop of the guest, and at least one between.
        assert names.index("MIGRATION_PASS") < names.index("active")
        assert names[names.index("STOP") + 1] == "MIGRATION_PASS"
        assert names.count("MIGRATION_PASS") >= 3
        await destination.until(Status.COMPLETED, incoming=True)
        assert destination.names() == ["setup", "active", "postcopy-active", "RESUME", "completed"]
        assert destination.guest.digest() == source.guest.digest()
        await source.say("migrate-start-postcopy")  # F18: too late, and accepted without effect


async def test_pause_before_the_switch_to_postcopy(tmp_path: Path) -> None:
    """N2, H1: active, pre-switchover, postcopy-active; the guest does not run at the destination before the
    continue."""
    async with able(tmp_path) as (source, destination, uri):
        await source.capabilities(postcopy_ram=True, pause_before_switchover=True)
        await source.say("migrate", {"uri": uri})
        await source.say("migrate-start-postcopy")
        await source.until(Status.PRE_SWITCHOVER)
        assert [name for name in source.names() if name != "MIGRATION_PASS"] == [
            "setup", "active", "STOP", "pre-switchover",
        ]  # fmt: skip
        assert not destination.guest.executed
        await source.say("migrate-continue", {"state": "pre-switchover"})
        assert await source.over() is Status.COMPLETED
        names = [name for name in source.names() if name != "MIGRATION_PASS"]
        assert names[names.index("pre-switchover") :] == ["pre-switchover", "postcopy-active", "completed"]
        assert destination.guest.digest() == source.guest.digest()


async def test_asked_for_before_the_first_pass(tmp_path: Path) -> None:
    """F20: the request is kept until its migration ends."""
    async with able(tmp_path) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.say("migrate-start-postcopy")
        await source.until(Status.POSTCOPY_ACTIVE)
        assert (await source.query())["ram"]["dirty-sync-count"] <= 3
        assert await source.over() is Status.COMPLETED
        assert destination.guest.executed


async def test_pause_and_recover(tmp_path: Path) -> None:
    """O6: migrate-pause on either side, migrate-recover, and migrate with resume; twice, and a cancel in between."""
    async with able(tmp_path, background=1 << 20) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.say("migrate-start-postcopy")
        for pauser in (source, destination):
            await source.until(Status.POSTCOPY_ACTIVE)
            await destination.until(Status.POSTCOPY_ACTIVE, incoming=True)
            await pauser.say("migrate-pause")
            await source.until(Status.POSTCOPY_PAUSED)
            await destination.until(Status.POSTCOPY_PAUSED, incoming=True)
            assert (await source.query())["status"] == (await destination.query())["status"] == "postcopy-paused"
            assert "needed there" in await source.refused("migrate_cancel")  # gaps G7 and G8: QEMU loses the guest here
            assert "destination's" in await source.refused("cont")
            assert "in progress" in await source.refused("migrate", {"uri": uri})
            again = f"unix:{tmp_path}/again-{pauser is source}"
            await destination.say("migrate-recover", {"uri": again})
            await source.say("migrate", {"uri": again, "resume": True})
        await source.until(Status.COMPLETED)
        await destination.until(Status.COMPLETED, incoming=True)
        assert destination.names().count("postcopy-recover") == source.names().count("postcopy-recover") == 2
        assert destination.guest.digest() == source.guest.digest()


@pytest.mark.parametrize("yanked", ["source", "destination"])
async def test_a_yank_in_postcopy_pauses_and_loses_nothing(yanked: str, tmp_path: Path) -> None:
    """On either side; a second yank, without a connection, has no effect."""
    async with able(tmp_path, background=1 << 20) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.say("migrate-start-postcopy")
        await source.until(Status.POSTCOPY_ACTIVE)
        await destination.until(Status.POSTCOPY_ACTIVE, incoming=True)
        talk = source if yanked == "source" else destination
        for _ in range(2):
            await talk.say("yank", {"instances": [{"type": "migration"}]})
            await source.until(Status.POSTCOPY_PAUSED)
            await destination.until(Status.POSTCOPY_PAUSED, incoming=True)
        again = f"unix:{tmp_path}/again"
        await destination.say("migrate-recover", {"uri": again})
        await source.say("migrate", {"uri": again, "resume": True})
        await source.until(Status.COMPLETED)
        await destination.until(Status.COMPLETED, incoming=True)
        assert destination.guest.digest() == source.guest.digest()


async def test_after_the_end_of_an_attempt_a_switch_is_accepted_and_does_nothing(tmp_path: Path) -> None:
    """F18, as QEMU: after every kind of end, also after a failed start."""
    async with hosted() as talk:
        await talk.capabilities(postcopy_ram=True)
        await talk.refused("migrate", {"uri": "tcp:nonsense"})
        assert (await talk.query())["status"] == "failed"
        assert await talk.say("migrate-start-postcopy") == {}
        await talk.say("migrate", {"uri": f"unix:{tmp_path}/absent"})
        assert await talk.over() is Status.FAILED
        assert await talk.say("migrate-start-postcopy") == {}


async def test_refused_where_nothing_is_in_postcopy(tmp_path: Path) -> None:
    """F16, F17: QEMU's words."""
    async with hosted() as talk:
        assert "Enable postcopy" in await talk.refused("migrate-start-postcopy")
        await talk.capabilities(postcopy_ram=True)
        assert "Start a migration" in await talk.refused("migrate-start-postcopy")
        assert "postcopy-active" in await talk.refused("migrate-pause")
        assert "postcopy is paused" in await talk.refused("migrate-recover", {"uri": f"unix:{tmp_path}/x"})
        assert "no paused migration" in await talk.refused("migrate", {"uri": f"unix:{tmp_path}/x", "resume": True})


async def test_guest_that_cannot_is_refused_the_capability(tmp_path: Path) -> None:
    """C5, S7: a waiting destination needs support by the host and the guest; the error gives the reason."""
    rows = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
    async with hosted(waiting=True) as talk:
        assert "Python's global lock" in await talk.refused("migrate-set-capabilities", rows)


async def test_address_that_cannot_be_listened_at_leaves_it_paused(tmp_path: Path) -> None:
    async with able(tmp_path, background=1 << 20) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.say("migrate-start-postcopy")
        await destination.until(Status.POSTCOPY_ACTIVE, incoming=True)
        await destination.say("migrate-pause")
        await destination.until(Status.POSTCOPY_PAUSED, incoming=True)
        text = await destination.refused("migrate-recover", {"uri": f"unix:{tmp_path}/no/such/place"})
        assert "no/such/place" in text
        assert destination.machine.incoming.status is Status.POSTCOPY_PAUSED
        await destination.say("migrate-recover", {"uri": f"unix:{tmp_path}/place"})
        await source.until(Status.POSTCOPY_PAUSED)
        await source.say("migrate", {"uri": f"unix:{tmp_path}/place", "resume": True})
        assert await source.over() is Status.COMPLETED


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_end_of_a_machine_in_a_paused_postcopy(tmp_path: Path, side: str) -> None:
    """The process ends without waiting for a connection that will not come; the guest stays paused."""
    async with able(tmp_path, background=1 << 20) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.say("migrate-start-postcopy")
        await destination.until(Status.POSTCOPY_ACTIVE, incoming=True)
        await destination.say("migrate-pause")
        await source.until(Status.POSTCOPY_PAUSED)
        talk = source if side == "source" else destination
        monitor = talk.machine.outgoing if side == "source" else talk.machine.incoming
        with trio.fail_after(10):
            await talk.machine.shutdown("the test ends it")
        assert monitor.status is Status.POSTCOPY_LOST
        assert monitor.owner is Ownership.DESTINATION
        assert not source.guest.running
        assert destination.guest.running is (side == "source")
        assert (await talk.query())["status"] == "failed"
        if side == "destination":
            assert "never came" in (await destination.query())["error-desc"]


async def test_a_guest_without_its_memory_is_not_started(tmp_path: Path) -> None:
    """Management tools send `cont` to every paused guest."""
    async with able(tmp_path, background=1 << 20) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.say("migrate-start-postcopy")
        await destination.until(Status.POSTCOPY_ACTIVE, incoming=True)
        await destination.say("migrate-pause")
        await destination.until(Status.POSTCOPY_PAUSED, incoming=True)
        destination.machine.incoming.abandon("the test")
        await destination.until(Status.POSTCOPY_LOST, incoming=True)
        assert "never came" in await destination.refused("cont")
        assert not destination.guest.running
        await source.until(Status.POSTCOPY_PAUSED)
        source.machine.outgoing.abandon("the test")
