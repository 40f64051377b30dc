"""Capabilities and parameters over QMP, also while a migration runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.qmp.driver import hosted, pair
from trimig.config import CAPABILITY_NAMES, PARAMETER_NAMES
from trimig.status import Status
from trimig.testing import LazyScriptedGuest, ScriptedGuest


async def test_capabilities_are_listed_in_order() -> None:
    """C1: without ``block``, which trimig does not have."""
    async with hosted() as talk:
        found = await talk.say("query-migrate-capabilities")
        assert [row["capability"] for row in found] == [name for name in CAPABILITY_NAMES if name != "block"]


@pytest.mark.parametrize("bad", ["block", "x-colo", "no-such"])
async def test_rejected_list_of_capabilities_changes_nothing(bad: str) -> None:
    """C3, C6, gap G10: in QEMU 2.11 the other members of a rejected list take effect all the same."""
    async with hosted() as talk:
        before = await talk.say("query-migrate-capabilities")
        rows = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover", bad)]
        await talk.refused("migrate-set-capabilities", {"capabilities": rows})
        assert await talk.say("query-migrate-capabilities") == before
        await talk.say("migrate-set-capabilities", {"capabilities": rows[:2]})
        states = {row["capability"]: row["state"] for row in await talk.say("query-migrate-capabilities")}
        assert states["events"] is states["pause-before-switchover"] is True


async def test_capabilities_of_a_listening_destination(tmp_path: Path) -> None:
    """C2: as in QEMU they may be set until a source has connected, and apply to that source; later they are refused."""
    async with pair(tmp_path, ScriptedGuest(blocks={"ram": 256})) as (source, destination, uri):
        await destination.capabilities(pause_before_switchover=True)
        assert destination.machine.incoming.config.capabilities.pause_before_switchover
        await source.say("migrate-set-parameters", {"max-bandwidth": 10_000})
        await source.say("migrate", {"uri": uri})
        await destination.until(Status.ACTIVE, incoming=True)
        row = {"capabilities": [{"capability": "events", "state": False}]}
        assert "in progress" in await destination.refused("migrate-set-capabilities", row)
        assert "in progress" in await source.refused("migrate-set-capabilities", row)
        assert source.machine.config.capabilities.events


async def test_parameters_are_all_there_and_change_alone() -> None:
    """D1, D2, D12."""
    async with hosted() as talk:
        before = await talk.say("query-migrate-parameters")
        assert before.keys() == set(PARAMETER_NAMES) - {"block-bitmap-mapping"}
        await talk.say("migrate-set-parameters", {"downtime-limit": 5, "tls-creds": None})
        assert await talk.say("query-migrate-parameters") == {**before, "downtime-limit": 5, "tls-creds": ""}
        assert await talk.say("migrate-set-parameters", {}) == {}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("compress-level", [0, 9], [10, -1, "1"]),  # D3
        ("compress-threads", [1, 255], [0, 256]),  # D4
        ("decompress-threads", [1], [0]),
        ("cpu-throttle-initial", [1, 99], [0, 100]),  # D5
        ("cpu-throttle-increment", [1, 99], [0, 100]),
        ("max-bandwidth", [0, 2**63, -1], ["1", 1.5, True, None]),  # D6
        ("downtime-limit", [0, 2_000_000], [2_000_001, -1, True]),  # D7
        ("x-checkpoint-delay", [0, 2**32 - 1], [2**32]),  # D8
        ("x-multifd-channels", [1], [0]),  # D9
        ("x-multifd-page-count", [1, 10000], [0, 10001]),
        ("xbzrle-cache-size", [4096], [4095, 5000]),  # D10
        ("multifd-compression", ["none"], ["bogus", 1]),
        ("bogus", [], [1]),
    ],
)
async def test_ranges_of_parameters(name: str, good: list[Any], bad: list[Any]) -> None:
    """D3-D11: a bad value is refused, and the other values of its list are not changed either."""
    async with hosted() as talk:
        for value in good:
            await talk.say("migrate-set-parameters", {name: value})
        before = await talk.say("query-migrate-parameters")
        for value in bad:
            await talk.refused("migrate-set-parameters", {"announce-rounds": 77, name: value})
            assert await talk.say("query-migrate-parameters") == before


async def test_legacy_commands() -> None:
    """E1, E2, E3: older QEMUs' commands set the same parameters, with the same checks."""
    async with hosted() as talk:

        async def parameter(name: str) -> Any:
            return (await talk.say("query-migrate-parameters"))[name]

        await talk.say("migrate_set_speed", {"value": 12345})
        assert await parameter("max-bandwidth") == 12345
        for seconds, shown in ((0.3, 300), (2000, 2_000_000), (0.0004, 0)):
            await talk.say("migrate_set_downtime", {"value": seconds})
            assert await parameter("downtime-limit") == shown
        for wrong in (-1, 2001, float("nan")):
            assert "0 to 2000 seconds" in await talk.refused("migrate_set_downtime", {"value": wrong})
        await talk.say("migrate-set-cache-size", {"value": 8192})
        assert await talk.say("query-migrate-cache-size") == 8192 == await parameter("xbzrle-cache-size")
        for value in (4095, 5000):
            await talk.refused("migrate-set-cache-size", {"value": value})
        assert await parameter("downtime-limit") == 0


async def test_bandwidth_is_changed_while_memory_is_sent(tmp_path: Path) -> None:
    """D13, D16: a migration that would take minutes ends at once when the limit is lifted, and a refused change
    has no effect on it."""
    async with pair(tmp_path, ScriptedGuest(blocks={"ram": 1024})) as (source, _, uri):
        await source.say("migrate-set-parameters", {"max-bandwidth": 10_000})
        await source.say("migrate", {"uri": uri})
        await source.until(Status.ACTIVE)
        await source.refused("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": -1})
        await trio.sleep(0.2)
        assert (await source.query())["status"] == "active"
        await source.say("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 1000})
        assert source.machine.outgoing.config.parameters.downtime_limit == 1000
        assert await source.over() is Status.COMPLETED


async def test_next_migration_gets_what_was_set_meanwhile(tmp_path: Path) -> None:
    async with hosted() as talk:
        await talk.say("migrate-set-parameters", {"downtime-limit": 42})
        await talk.say("migrate", {"uri": f"unix:{tmp_path}/absent"})
        await talk.over()
        assert talk.machine.outgoing.config.parameters.downtime_limit == 42


async def test_whole_lists_of_newer_qemus_are_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    """As libvirt does: read every parameter, and set every parameter again."""
    async with hosted() as talk:
        await talk.say("migrate-set-capabilities", {"capabilities": await talk.say("query-migrate-capabilities")})
        await talk.say("migrate-set-parameters", await talk.say("query-migrate-parameters"))
        assert "no effect" not in caplog.text
        await talk.say("migrate-set-parameters", {"x-checkpoint-delay": 8, "direct-io": True})
        assert "the parameter x-checkpoint-delay has no effect yet" in caplog.text
        assert "the parameter direct-io has no effect yet" in caplog.text
        assert "mode" in await talk.refused("migrate-set-parameters", {"mode": "cpr-reboot"})


async def test_after_a_lost_postcopy_capabilities_may_change(tmp_path: Path) -> None:
    """The table of idle statuses decides, also after `postcopy-lost`."""
    async with hosted() as talk:
        for monitor in (talk.machine.outgoing, talk.machine.incoming):
            monitor._core._status = Status.POSTCOPY_LOST
        await talk.capabilities(events=True)
        assert talk.machine.config.capabilities.events


async def test_a_second_connection_is_asked_for_before_the_first_can_come(tmp_path: Path) -> None:
    """A listening side would ignore postcopy-preempt, so turning it on or off there is refused."""
    target = LazyScriptedGuest(content="zero", run_state="inmigrate")
    async with hosted(target, waiting=True) as talk:
        await talk.capabilities(postcopy_ram=True, postcopy_preempt=True)
        await talk.say("migrate-incoming", {"uri": f"unix:{tmp_path}/s"})
        rows = {"capabilities": [{"capability": "postcopy-preempt", "state": False}]}
        assert "before the incoming migration starts" in await talk.refused("migrate-set-capabilities", rows)
        await talk.capabilities(events=True, postcopy_preempt=True)
