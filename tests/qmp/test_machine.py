"""The machine: its run states, the permission to run the guest, its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.qmp.driver import Talk, hosted, pair, unreachable
from trimig import Config
from trimig.qmp import CommandFailed
from trimig.status import Status
from trimig.testing import ScriptedGuest


def big(**options: object) -> ScriptedGuest:
    """A guest whose migration takes a while at the rates of the tests."""
    return ScriptedGuest(blocks={"ram": 256}, **options)  # type: ignore[arg-type]  # passed through


async def slowly(talk: Talk) -> None:
    await talk.say("migrate-set-parameters", {"max-bandwidth": 10_000})


async def test_run_states_of_a_guest_at_rest() -> None:
    async with hosted() as talk:
        assert await talk.state() == "running"
        await talk.say("stop")
        await talk.say("stop")
        assert await talk.state() == "paused"
        await talk.say("cont")
        await talk.say("cont")
        assert await talk.state() == "running"
        assert talk.names() == ["STOP", "RESUME"]


async def test_run_states_of_a_migration_with_a_pause(tmp_path: Path) -> None:
    """The run states of states.md part 10, and their changes: no client can change them during the handover."""
    async with pair(tmp_path, ScriptedGuest(delays={"save": 0.05})) as (source, destination, uri):
        assert (await source.state(), await destination.state()) == ("running", "inmigrate")
        await source.capabilities(pause_before_switchover=True)
        await source.say("migrate", {"uri": uri})
        await source.until(Status.PRE_SWITCHOVER)
        assert await source.state() == "finish-migrate"
        assert "not finalized" in await source.refused("cont")
        assert "not finalized" in await source.refused("stop")
        await source.say("migrate-continue", {"state": "pre-switchover"})
        assert await source.state() == "finish-migrate"
        assert "not finalized" in await source.refused("cont")
        assert await source.over() is Status.COMPLETED
        assert (await source.state(), await destination.state()) == ("postmigrate", "running")
        assert not source.guest.running


async def test_guest_that_was_handed_over_does_not_run_again(tmp_path: Path) -> None:
    """QEMU lets ``cont`` start the guest again in postmigrate, even if the destination runs it; trimig refuses."""
    async with pair(tmp_path) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.COMPLETED
        assert "the destination's" in await source.refused("cont")
        assert await source.say("stop") == {}
        assert "Can't migrate the vm" in await source.refused("migrate", {"uri": uri})
        assert "certain which side" in await source.refused("x-trimig-settle", {"owner": "source"})
        assert not source.guest.running
        assert destination.guest.running


@pytest.mark.parametrize(
    ("owner", "state", "runs"), [("source", "running", True), ("destination", "postmigrate", False)]
)
async def test_uncertain_handover_is_settled_by_word_of_the_client(
    tmp_path: Path, owner: str, state: str, runs: bool
) -> None:
    """Gaps G1 and G2: QEMU resumes its guest when the answer is lost, and two guests run. In trimig the guest stays
    paused. Neither cont, cancel nor migrate change that, until a client settles the owner."""
    other = ScriptedGuest(run_state="inmigrate", delays={"activate": 0.5})
    async with pair(tmp_path, None, other, Config(handover_timeout=0.1)) as (source, _, uri):
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.UNCERTAIN
        info = await source.query()
        assert (info["status"], info["owner"]) == ("failed", "unknown")
        assert "answer is missing" in info["error-desc"]
        assert "x-trimig-settle" in await source.refused("cont")
        assert "x-trimig-settle" in await source.refused("migrate", {"uri": uri})
        assert await source.say("migrate_cancel") == {}
        assert await source.state() == "paused"
        with pytest.raises(CommandFailed, match="does not accept value"):
            await source.say("x-trimig-settle", {"owner": "unknown"})
        await source.say("x-trimig-settle", {"owner": owner})
        assert await source.state() == state
        assert source.guest.running is runs
        assert "certain" in await source.refused("x-trimig-settle", {"owner": "source"})


async def test_stop_and_cont_while_memory_is_sent(tmp_path: Path) -> None:
    async with pair(tmp_path, big()) as (source, destination, uri):
        await slowly(source)
        await source.say("migrate", {"uri": uri})
        await source.until(Status.ACTIVE)
        await source.say("stop")
        assert await source.state() == "paused"
        await source.say("cont")
        assert await source.state() == "running"
        await source.say("stop")
        await source.say("migrate-set-parameters", {"max-bandwidth": 0})
        assert await source.over() is Status.COMPLETED
        assert await source.state() == "postmigrate"
        assert await destination.state() == "paused"


async def test_resume_that_meets_the_switchover_undoes_it(tmp_path: Path) -> None:
    """Gap G11: the state changes between a check and the action. ``cont`` was allowed, and takes so long that the
    switchover begins meanwhile: if both succeeded, the guest would run on both sides."""
    async with pair(tmp_path, ScriptedGuest(delays={"resume": 0.3})) as (source, destination, uri):
        await source.say("stop")
        source.nursery.start_soon(source.say, "cont")
        await trio.testing.wait_all_tasks_blocked()
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.CANCELLED
        await trio.sleep(0.4)
        assert await source.state() == "running"
        assert not destination.guest.running


@pytest.mark.parametrize("first", ["stop", "cont"])
async def test_stop_and_cont_before_the_guest_has_come(tmp_path: Path, first: str) -> None:
    """As in QEMU, ``stop`` and ``cont`` decide whether the guest runs on arrival, also while a source is connected."""
    async with pair(tmp_path, big()) as (source, destination, uri):
        await destination.say("cont" if first == "stop" else "stop")
        assert await destination.state() == "inmigrate"
        await slowly(source)
        await source.say("migrate", {"uri": uri})
        await destination.until(Status.ACTIVE, incoming=True)
        await destination.say(first)
        await source.say("migrate-set-parameters", {"max-bandwidth": 0})
        assert await source.over() is Status.COMPLETED
        assert await destination.over() is Status.NONE
        assert await destination.state() == ("paused" if first == "stop" else "running")


async def test_guest_that_is_just_arriving_is_not_told_to_stop(tmp_path: Path) -> None:
    other = ScriptedGuest(run_state="inmigrate", delays={"activate": 0.2})
    async with pair(tmp_path, None, other) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await destination.until(Status.HANDOVER, incoming=True)
        assert "arriving in this moment" in await destination.refused("stop")
        assert await source.over() is Status.COMPLETED


async def test_end_cancels_the_migration_and_leaves_the_guest_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable(monkeypatch)
    async with hosted() as talk:
        await talk.capabilities(events=True)
        await talk.say("migrate", {"uri": "tcp:127.0.0.1:1"})
        assert await talk.say("quit") == {}
        for call in talk.afterwards:
            call()
        assert await talk.state() == "shutdown"
        for name, arguments in (("migrate", {"uri": "tcp:127.0.0.1:1"}), ("cont", {})):
            assert "ending" in await talk.refused(name, arguments)
        await talk.machine.shutdown("quit")
        assert not talk.guest.running
        assert talk.names() == ["setup", "SHUTDOWN", "cancelling", "cancelled", "STOP"]
        assert talk.events[1]["data"] == {"guest": False, "reason": "host-qmp-quit"}


async def test_quit_of_a_client_that_does_not_wait_for_the_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with hosted() as talk:
        await talk.say("quit")
        await talk.machine.ended.wait()
        assert trio.current_time() >= 1


async def test_end_waits_for_a_decision_that_was_sent(tmp_path: Path) -> None:
    other = ScriptedGuest(run_state="inmigrate", delays={"activate": 0.2})
    async with pair(tmp_path, None, other) as (source, destination, uri):
        await source.say("migrate", {"uri": uri})
        await source.until(Status.HANDOVER)
        assert "too late to cancel" in await source.refused("migrate_cancel")
        await source.machine.shutdown("quit")
        assert source.machine.outgoing.status is Status.COMPLETED
        assert destination.guest.running
        assert not source.guest.running


async def test_what_the_machine_is_called() -> None:
    uuid = "00112233-4455-6677-8899-aabbccddeeff"
    async with hosted(None, None, name="vm", uuid=uuid, version="9") as talk:
        assert await talk.say("query-name") == {"name": "vm"}
        assert await talk.say("query-uuid") == {"UUID": uuid}
        version = await talk.say("query-version")
        assert version == {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "trimig 9"}


async def test_unknown_command() -> None:
    async with hosted() as talk:
        with pytest.raises(CommandFailed, match="The command bogus has not been found") as caught:
            await talk.say("bogus")
        assert caught.value.error_class == "CommandNotFound"
