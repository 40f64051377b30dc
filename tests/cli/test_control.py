"""The control commands against a scripted guest: the commands they send, their output, and the restored settings.

The same commands against real processes are in ``tests/qemu/test_control.py``.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from tests.cli.scripted import ACTIVE, ADDRESS, DONE, MB, PAGE, TOTAL, Invoke, Scripted, ram, step
from trimig import cli, qmp
from trimig.cli.remote import client as remote
from trimig.cli.remote.options import read_settings
from trimig.cli.remote.state import Settings, State
from trimig.cli.remote.tracker import Tracker

# -- one word ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_state", "info", "owner", "code"),
    [
        ("running", {}, "source", 0),
        ("running", {"status": "active"}, "source", 0),
        ("finish-migrate", {"status": "active"}, "unknown", 3),
        ("finish-migrate", {"status": "pre-switchover"}, "source", 0),
        ("finish-migrate", {"status": "device"}, "unknown", 3),
        ("finish-migrate", {"status": "device", "owner": "source"}, "source", 0),
        ("postmigrate", {"status": "completed"}, "destination", 0),
        ("finish-migrate", {"status": "postcopy-paused"}, "destination", 0),
        ("running", {"status": "failed", "error-desc": "no route to host"}, "source", 0),
        ("paused", {"status": "failed", "owner": "unknown"}, "unknown", 3),
        ("postmigrate", {"status": "failed", "owner": "destination"}, "destination", 4),
        ("inmigrate", {"status": "setup"}, "source", 0),
    ],
)
def test_status_says_run_state_migration_and_owner(
    invoke: Invoke, run_state: str, info: dict[str, Any], owner: str, code: int
) -> None:
    """The owner is the one that trimig reports; for a QEMU it is derived, or unknown if that is impossible."""
    result = invoke(Scripted(run_state=run_state, info=info), "status")
    assert result.exit_code == code
    assert result.stdout.startswith(f"guest: {run_state}; migration: {info.get('status', 'none')}; owner: {owner}")
    assert ("this side waits for a guest here" in result.stdout) == (run_state == "inmigrate")
    assert ("no route to host" in result.stdout) == ("error-desc" in info)
    record = json.loads(invoke(Scripted(run_state=run_state, info=info), "status", "--json").stdout)
    assert (record["run_state"], record["owner"]) == (run_state, owner)


def test_info_is_a_table_of_members_or_the_answer_itself(invoke: Invoke) -> None:
    listening = {**DONE, "socket-address": [{"type": "inet", "host": "127.0.0.1", "port": "4444"}]}
    lines = [line.split(None, 1) for line in invoke(Scripted(info=listening), "info").stdout.splitlines()]
    table = {name: value.strip() for name, value in lines}
    assert table["downtime"] == "45 ms"
    assert table["ram.total"] == "100000000 (95.4 MiB)"
    assert table["ram.dirty-sync-count"] == "3"
    assert table["socket-address"] == "tcp:127.0.0.1:4444"
    assert json.loads(invoke(Scripted(info=listening), "info", "--json").stdout) == listening
    assert invoke(Scripted(), "info").stdout == "there has been no migration\n"


@pytest.mark.parametrize(
    ("guest", "code", "text"),
    [
        (Scripted(), 0, "there is no migration to cancel"),
        (Scripted(info=ACTIVE), 0, "cancelled (guest: running"),
        (Scripted(info=ACTIVE, cancelled=DONE), 1, "too late to cancel: the migration has completed"),
        (
            Scripted(
                info=step("device"),
                script=[step("device"), step("device"), step("failed", owner="unknown")],
                refuses={"migrate_cancel": "too late to cancel: the decision has been sent"},
            ),
            3,
            "the decision has been sent",
        ),
    ],
)
def test_cancel_says_what_became_of_the_guest(invoke: Invoke, guest: Scripted, code: int, text: str) -> None:
    result = invoke(guest, "cancel")
    assert (result.exit_code, text in result.stdout) == (code, True)


def test_set_knows_the_types_of_the_other_side(invoke: Invoke) -> None:
    guest = Scripted()
    words = [
        "-c",
        "events",
        "-c",
        "return-path=off",
        "-p",
        "max-bandwidth=32M",
        "-p",
        "downtime-limit=50",
        "-p",
        "cpu-throttle-tailslow=on",
    ]
    result = invoke(guest, "set", *words)
    assert result.exit_code == 0
    assert guest.capabilities["events"] is True
    assert guest.capabilities["return-path"] is False
    assert guest.parameters["max-bandwidth"] == 32 << 20
    assert guest.parameters["downtime-limit"] == 50
    assert guest.parameters["cpu-throttle-tailslow"] is True
    assert "-p downtime-limit=50\n" in result.stdout
    # Without arguments the command shows all settings, in a form that the command accepts.
    shown = invoke(guest, "set").stdout.splitlines()
    assert {"-c events=on", "-c auto-converge=on", "-p max-bandwidth=33554432"} <= set(shown)


def test_set_is_all_or_nothing(invoke: Invoke) -> None:
    """D11: a refused parameter makes the command restore the capabilities as well."""
    guest = Scripted(refuses={"migrate-set-parameters": "Parameter 'downtime_limit' expects an integer"})
    result = invoke(guest, "set", "-c", "events", "-p", "downtime-limit=9999999")
    assert result.exit_code == 1
    assert result.stderr.strip() == (
        f"trimig: {ADDRESS} refuses migrate-set-parameters: Parameter 'downtime_limit' expects an integer"
    )
    assert guest.capabilities["events"] is False


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-c", "events=maybe"], "a capability is on or off"),
        (["-p", "downtime-limit"], "NAME=VALUE"),
        (["-p", "downtime-limit=soon"], "expects a whole number"),
        (["-p", "max-bandwidth=fast"], "max-bandwidth"),
        (["-p", "cpu-throttle-tailslow=7"], "on or off"),
    ],
)
def test_setting_that_makes_no_sense_is_wrong_usage(invoke: Invoke, words: list[str], text: str) -> None:
    guest = Scripted()
    result = invoke(guest, "set", *words)
    assert (result.exit_code, text in result.stderr) == (2, True)
    assert not any("set" in name for name in guest.names)


def test_setting_that_is_not_listed_is_left_to_the_other_side() -> None:
    changes = read_settings(["x-new=on"], ["x-limit=5", "x-name=five"], Settings())
    assert changes == Settings(capabilities={"x-new": True}, parameters={"x-limit": 5, "x-name": "five"})


def test_continue_and_postcopy_are_the_commands_of_qmp(invoke: Invoke) -> None:
    """F13, F14, F16: the refusal is the other side's own sentence."""
    guest = Scripted(info=step("pre-switchover"))
    assert invoke(guest, "continue").exit_code == 0
    assert ("migrate-continue", {"state": "pre-switchover"}) in guest.executed
    assert invoke(guest, "postcopy").exit_code == 0
    assert "migrate-start-postcopy" in guest.names
    refusing = Scripted(
        info=step("pre-switchover"), refuses={"migrate-continue": "Migration not in expected state: active"}
    )
    result = invoke(refusing, "continue")
    assert (result.exit_code, "not in expected state: active" in result.stderr) == (1, True)


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 0, "microseconds": 123456}}


def test_events_end_with_the_migration(invoke: Invoke) -> None:
    feed = [event("MIGRATION", status="active"), event("STOP"), event("MIGRATION", status="completed"), event("RESUME")]
    guest = Scripted(capabilities={"events": True}, feed=feed)
    result = invoke(guest, "events", "--until-end", "--json")
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == feed[:3]
    guest.feed = [event("MIGRATION", status="failed")]
    result = invoke(guest, "events", "--until-end")
    assert (result.exit_code, result.stdout.split(None, 1)[1]) == (1, "MIGRATION failed\n")


def test_events_end_with_the_guest(invoke: Invoke) -> None:
    assert invoke(Scripted(feed=[event("SHUTDOWN", guest=False)]), "events").exit_code == 0
    result = invoke(Scripted(feed=[event("STOP")]), "events")
    assert (result.exit_code, "has closed the connection" in result.stderr) == (1, True)


def test_events_say_that_they_are_off(invoke: Invoke) -> None:
    result = invoke(Scripted(feed=[event("SHUTDOWN", guest=False)]), "events")
    assert result.exit_code == 0
    assert "the capability 'events' is off" in result.stderr
    assert "trimig set -c events" in result.stderr
    on = Scripted(capabilities={"events": True}, feed=[event("SHUTDOWN", guest=False)])
    assert invoke(on, "events").stderr == ""


def test_events_until_the_end_need_the_capability(invoke: Invoke) -> None:
    """H2: without the capability no event would ever announce the end."""
    result = invoke(Scripted(), "events", "--until-end")
    assert (result.exit_code, "trimig set -c events" in result.stderr) == (1, True)


def test_absent_peer_is_one_sentence(tmp_path: Path) -> None:
    for words in (["status"], ["migrate", "tcp:127.0.0.1:1"], ["migrate", "--dry-run"], ["events"]):
        result = CliRunner().invoke(cli.main, [*words, "--qmp", f"unix:{tmp_path}/absent"])
        assert result.exit_code == 1
        assert result.stderr.startswith("trimig: ")
        assert len(result.stderr.splitlines()) == 1
        assert "absent" in result.stderr


@pytest.mark.parametrize("words", [["status"], ["migrate", "tcp:127.0.0.1:1", "--wait"]])
def test_server_that_does_not_greet_is_not_waited_for(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU with a client on that socket accepts the connection, and sends nothing."""
    monkeypatch.setattr(remote, "CONNECT_LIMIT", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        result = CliRunner().invoke(cli.main, [*words, "--qmp", f"unix:{tmp_path}/silent"])
    assert (result.exit_code, "one client at a time" in result.stderr) == (1, True)


# -- migrate -----------------------------------------------------------------------------------------------------------


def test_migrate_returns_when_it_has_been_accepted(invoke: Invoke) -> None:
    guest = Scripted()
    result = invoke(guest, "migrate", "tcp:b:4444", "-p", "downtime-limit=20")
    assert (result.exit_code, "has begun" in result.stdout) == (0, True)
    assert guest.executed.index(("migrate", {"uri": "tcp:b:4444"})) > guest.names.index("migrate-set-parameters")
    assert guest.parameters["downtime-limit"] == 20  # stays, as in QEMU


def test_migrate_and_wait_reports(invoke: Invoke) -> None:
    guest = Scripted(script=[step("setup"), ACTIVE, DONE])
    result = invoke(guest, "migrate", "tcp:b:4444", "--wait")
    assert result.exit_code == 0
    assert "migrated to tcp:b:4444 in 1 s" in result.stdout
    assert "downtime 45 ms, 3 passes" in result.stdout
    guest = Scripted(script=[step("setup"), ACTIVE, DONE])
    result = invoke(guest, "migrate", "tcp:b:4444", "--wait", "--json")
    record = json.loads(result.stdout)
    assert (record["migration"], record["owner"], record["downtime_ms"]) == ("completed", "destination", 45)
    progress = [json.loads(line) for line in result.stderr.splitlines()]
    assert [p["phase"] for p in progress if p["event"] == "progress"][:2] == ["connecting", "first copy"]


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        ({"status": "failed", "error-desc": "Connection refused"}, 1, "has failed: Connection refused; the guest is"),
        ({"status": "failed"}, 1, "no reason is given"),
        ({"status": "failed", "owner": "unknown"}, 3, "it is not certain who owns the guest"),
        ({"status": "cancelled"}, 1, "cancelled by another client"),
    ],
)
def test_migrate_and_wait_tells_failures_apart(invoke: Invoke, end: dict[str, Any], code: int, text: str) -> None:
    result = invoke(Scripted(script=[ACTIVE, end]), "migrate", "tcp:b:4444", "--wait")
    assert (result.exit_code, text in result.stderr) == (code, True)


def interrupt_at(command: str, count: int = 2) -> Callable[[str, int], None]:
    """Ctrl-C at the *count*-th call of *command*."""

    def before(name: str, times: int) -> None:
        if (name, times) == (command, count):
            signal.raise_signal(signal.SIGINT)

    return before


def test_ctrl_c_cancels_there_and_says_what_became_of_the_guest(invoke: Invoke) -> None:
    guest = Scripted(script=[ACTIVE], before=interrupt_at("query-migrate"))
    result = invoke(guest, "migrate", "tcp:b:4444", "--wait")
    assert result.exit_code == 130
    assert "cancelled by SIGINT; the guest is running" in result.stderr
    assert guest.names.count("migrate_cancel") == 1


def test_ctrl_c_that_comes_too_late_is_a_migration_that_is_done(invoke: Invoke) -> None:
    """The cancel is refused after the commit; the outcome decides."""
    guest = Scripted(
        script=[ACTIVE, step("device", owner="unknown"), step("device", owner="unknown"), DONE],
        before=interrupt_at("query-migrate"),
        refuses={"migrate_cancel": "too late to cancel"},
    )
    result = invoke(guest, "migrate", "tcp:b:4444", "--wait")
    assert (result.exit_code, "SIGINT came too late" in result.stdout) == (0, True)


def test_time_limit_cancels_like_a_signal(invoke: Invoke) -> None:
    guest = Scripted(script=[ACTIVE])
    result = invoke(guest, "migrate", "tcp:b:4444", "--wait", "--timeout", "0.1")
    assert (result.exit_code, "cancelled by --timeout 0.1" in result.stderr) == (1, True)


def test_lost_connection_leaves_the_owner_open(invoke: Invoke) -> None:
    """The migration goes on: exit code 3, and a hint which side to ask."""

    def break_off(name: str, count: int) -> None:
        if (name, count) == ("query-migrate", 2):
            raise trio.BrokenResourceError("closed")

    result = invoke(Scripted(script=[ACTIVE], before=break_off), "migrate", "tcp:b:4444", "--wait")
    assert (result.exit_code, "trimig status --qmp" in result.stderr) == (3, True)


@pytest.mark.parametrize("words", [[], ["tcp:b:1", "--timeout", "3"], ["--dry-run", "--wait"], ["x", "--seconds", "0"]])
def test_words_that_do_not_go_together_are_wrong_usage(invoke: Invoke, words: list[str]) -> None:
    guest = Scripted()
    assert invoke(guest, "migrate", *words).exit_code == 2
    assert guest.executed == []


def test_progress_never_steps_back() -> None:
    """Passes, the share of the first copy and the bytes only grow, in whatever order the answers come."""
    tracker = Tracker({"downtime-limit": 300, "max-bandwidth": 0})
    infos = [
        step("setup"),
        step("active", ram=ram(sync=1, pages=10000, remaining=50 * MB)),
        step("active", ram=ram(sync=1, pages=9000, remaining=60 * MB)),
        step("active", ram=ram(sync=2, pages=20000, remaining=30 * MB)),
        step("active", ram=ram(sync=1, pages=20000, remaining=40 * MB)),
        step("device", ram=ram(sync=3, pages=21000, remaining=0)),
        DONE,
    ]
    shown = [p for info in infos for p in tracker.pictures(State(run_state="running", info=info))]
    for kind in ("iteration", "copied", "sent"):
        figures = [getattr(p, kind) for p in shown]
        assert figures == sorted(figures), kind
    phases = [p.phase for p in shown]
    assert phases == sorted(phases, key=["connecting", "first copy", "later passes", "switchover", "completed"].index)
    # Each finished pass is shown once, with the memory that was dirtied in it.
    assert [(p.iteration, p.remaining) for p in shown if p.passed] == [(1, 30 * MB), (2, 0)]


# -- dry run -----------------------------------------------------------------------------------------------------------


def passes(dirtied: int) -> list[dict[str, Any]]:
    """A first copy and passes of that many pages each."""
    whole = TOTAL // PAGE
    sent = [(1, whole // 2, 0)] + [(n, whole + (n - 2) * dirtied, dirtied) for n in (2, 3, 4)]
    return [
        step("active", ram=ram(sync=n, pages=pages, remaining=left * PAGE if n > 1 else TOTAL - pages * PAGE))
        for n, pages, left in sent
    ]


class Watched(Scripted):
    """Checks the settings and the destination of the memory at the moment the stream begins."""

    def migrate(self, uri: str) -> Any:
        self.sink = uri
        self.locked = {**self.capabilities}, {**self.parameters}
        return super().migrate(uri)


def test_dry_run_predicts_and_leaves_everything_as_it_was(invoke: Invoke) -> None:
    guest = Watched(script=[{}, *passes(100)])
    before = {**guest.capabilities}, {**guest.parameters}
    result = invoke(guest, "migrate", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["verdict"] == "converges"
    assert record["total_time_ms"]["low"] <= record["total_time_ms"]["likely"] <= record["total_time_ms"]["high"]
    assert len(record["measured"]["passes"]) == 3
    # Locked during the run, and restored afterwards.
    capabilities, parameters = guest.locked
    assert capabilities["pause-before-switchover"]
    assert not capabilities["return-path"]
    assert not capabilities["auto-converge"]  # would slow the guest down
    assert (parameters["downtime-limit"], parameters["max-bandwidth"]) == (0, 1 << 27)
    assert (guest.capabilities, guest.parameters) == before
    assert guest.info["status"] == "cancelled"
    # The command passes a descriptor of the sink, so the process needs no access to a file; an unused one is closed.
    assert guest.sink == "fd:trimig-dry-run"
    assert guest.names.index("getfd") < guest.names.index("migrate")
    assert ("closefd", {"fdname": "trimig-dry-run"}) in guest.executed


def test_dry_run_without_descriptors_uses_a_port_of_this_machine(invoke: Invoke) -> None:
    """A relay of a unix socket passes no descriptors."""
    guest = Watched(script=[{}, *passes(100)], refuses={"getfd": "No file descriptor supplied via SCM_RIGHTS"})
    result = invoke(guest, "migrate", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert guest.sink.startswith("tcp:127.0.0.1:")


def test_dry_run_predicts_for_the_bandwidth_and_limit_that_are_given(invoke: Invoke) -> None:
    words = ["migrate", "--dry-run", "-p", "max-bandwidth=1M", "-p", "downtime-limit=1"]
    guest = Watched(script=[{}, *passes(5000)])
    result = invoke(guest, *words)
    assert result.exit_code == 0
    assert result.stdout.startswith("does not converge: ")
    assert "would help   a bandwidth of" in result.stdout
    assert "would help   a downtime-limit of" in result.stdout
    assert (guest.parameters["downtime-limit"], guest.parameters["max-bandwidth"]) == (300, 1 << 27)
    # At 1 MiB/s ten seconds would show only the first copy, so the measurement runs faster.
    tuned = [values["max-bandwidth"] for name, values in guest.executed if "max-bandwidth" in values]
    assert tuned == [1 << 20, TOTAL // 4, 1 << 27]


def test_dry_run_of_an_idle_guest_is_held_by_the_second_lock(invoke: Invoke) -> None:
    """N4: the migration is in pre-switchover, and is cancelled at once."""
    idle = step("pre-switchover", ram=ram(sync=2, pages=TOTAL // PAGE, remaining=0))
    guest = Watched(script=[{}, idle])
    result = invoke(guest, "migrate", "--dry-run")
    assert result.exit_code == 0
    assert "stopped for a moment" in result.stdout
    assert "migrate-continue" not in guest.names
    assert guest.info["status"] == "cancelled"


def test_interrupted_dry_run_puts_everything_back(invoke: Invoke) -> None:
    guest = Watched(script=[{}, ACTIVE], before=interrupt_at("query-migrate", 3))
    before = {**guest.capabilities}, {**guest.parameters}
    result = invoke(guest, "migrate", "--dry-run")
    assert result.exit_code == 130
    assert (guest.capabilities, guest.parameters) == before
    assert guest.info["status"] == "cancelled"


def test_failed_dry_run_puts_everything_back(invoke: Invoke) -> None:
    failed = {"status": "failed", "error-desc": "Permission denied"}
    guest = Watched(script=[{}, failed])
    before = {**guest.capabilities}, {**guest.parameters}
    result = invoke(guest, "migrate", "--dry-run")
    assert (result.exit_code, "Permission denied" in result.stderr) == (1, True)
    assert (guest.capabilities, guest.parameters) == before


def test_settings_that_cannot_be_put_back_are_named(invoke: Invoke) -> None:
    def refuse(name: str, count: int) -> None:
        if (name, count) == ("migrate-set-parameters", 2):
            raise qmp.CommandFailed("not now")

    result = invoke(Watched(script=[{}, *passes(100)], before=refuse), "migrate", "--dry-run")
    assert result.exit_code == 1
    assert "could not be put back" in result.stderr
    assert "-c return-path=on" in result.stderr
    assert "-p downtime-limit=300" in result.stderr


@pytest.mark.parametrize(
    ("run_state", "status"),
    [("inmigrate", "none"), ("running", "active"), ("postmigrate", "completed"), ("paused", "none")],
)
def test_dry_run_needs_a_running_guest_that_is_not_being_migrated(invoke: Invoke, run_state: str, status: str) -> None:
    guest = Scripted(run_state=run_state, info={"status": status})
    assert invoke(guest, "migrate", "--dry-run").exit_code == 1
    assert not any("set" in name or name == "migrate" for name in guest.names)
