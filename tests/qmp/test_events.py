"""Events: their names, their order, and the events without the capability ``events``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qmp.driver import pair, unreachable
from trimig.status import Status


async def test_order_of_a_migration(tmp_path: Path) -> None:
    """H1, H4, states.md part 9. H7: a client that acts upon ``completed`` on the destination finds the guest
    running."""
    async with pair(tmp_path) as (source, destination, uri):
        seen: list[str] = []

        def told(event: object) -> None:
            if isinstance(event, dict) and event.get("data", {}).get("status") == "completed":
                seen.append(destination.machine.run_state)

        destination.machine.subscribe(told)
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.COMPLETED
        names = source.names()
        assert [name for name in names if name != "MIGRATION_PASS"] == [
            "setup",
            "active",
            "STOP",
            "completed",
        ]
        passes = [event["data"]["pass"] for event in source.events if event["event"] == "MIGRATION_PASS"]
        assert passes == list(range(1, len(passes) + 1))
        assert len(passes) >= 2
        assert (destination.names(), seen) == (["setup", "active", "RESUME", "completed"], ["running"])
        for event in source.events:
            assert event["timestamp"].keys() == {"seconds", "microseconds"}


async def test_pause_before_the_switchover_comes_behind_stop(tmp_path: Path) -> None:
    async with pair(tmp_path) as (source, _, uri):
        await source.capabilities(pause_before_switchover=True)
        await source.say("migrate", {"uri": uri})
        await source.until(Status.PRE_SWITCHOVER)
        await source.say("migrate-continue", {"state": "pre-switchover"})
        assert await source.over() is Status.COMPLETED
        names = [name for name in source.names() if name != "MIGRATION_PASS"]
        assert names == ["setup", "active", "STOP", "pre-switchover", "device", "completed"]


async def test_nothing_is_told_without_the_capability(tmp_path: Path) -> None:
    """H2, B14: except for STOP and RESUME, and ``setup`` of an incoming migration."""
    async with pair(tmp_path) as (source, destination, uri):
        await source.capabilities(events=False)
        await destination.capabilities(events=False)
        await source.refused("migrate", {"uri": "tcp:foo"})
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.COMPLETED
        assert (source.names(), destination.names()) == (["STOP"], ["setup", "RESUME"])


async def test_one_end_is_told_however_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H3, gap G11: a cancel that comes too late gives no second end."""
    async with pair(tmp_path) as (source, _, uri):
        await source.capabilities(pause_before_switchover=True)
        await source.say("migrate", {"uri": uri})
        await source.until(Status.PRE_SWITCHOVER)
        await source.say("migrate-continue", {"state": "pre-switchover"})
        await source.say("migrate_cancel")
        assert await source.over() is Status.CANCELLED
        ends = [name for name in source.names() if name in ("completed", "failed", "cancelled")]
        assert ends == ["cancelled"]
        assert source.names()[-2:] == ["RESUME", "cancelled"]
        unreachable(monkeypatch)
        await source.say("migrate", {"uri": uri})
        await source.say("migrate_cancel")
        assert await source.over() is Status.CANCELLED
        assert source.names()[-3:] == ["setup", "cancelling", "cancelled"]
