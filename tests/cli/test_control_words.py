"""Commands to a guest behind a QMP socket are passed on only in a matching status, and their reports are true."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

import trimig
from tests.cli.scripted import ACTIVE, DONE, PAGE, TOTAL, Invoke, Scripted, ram, step
from trimig.cli.remote.migrate import lost
from trimig.cli.remote.state import Refused
from trimig.status import Status


@pytest.mark.parametrize("command", ["continue", "postcopy", "pause"])
@pytest.mark.parametrize(
    "status", ["none", "failed", "cancelled", "completed", "cancelling", "device", "postcopy-paused"]
)
def test_word_that_comes_too_late_or_too_soon_is_an_error(invoke: Invoke, command: str, status: str) -> None:
    """A QEMU accepts some of these in any status, without effect."""
    guest = Scripted(info={} if status == "none" else {"status": status})
    result = invoke(guest, command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no migration" in result.stderr
    assert f"migration: {status}" in result.stderr
    assert set(guest.names) == {"query-status", "query-migrate"}


@pytest.mark.parametrize(
    ("command", "statuses"),
    [
        ("continue", ["pre-switchover"]),
        ("postcopy", ["setup", "active"]),
        ("pause", ["postcopy-active", "postcopy-recover"]),
    ],
)
def test_word_in_its_time_is_passed_on(invoke: Invoke, command: str, statuses: list[str]) -> None:
    for status in statuses:
        guest = Scripted(info={"status": status})
        result = invoke(guest, command)
        assert result.exit_code == 0, result.stderr
        assert len(guest.names) == len({"query-status", "query-migrate"}) * 2 + 1


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "this side waits for a guest"),
        ({"status": "setup"}, "this side waits for a guest"),
        ({"status": "active"}, "this side waits for a guest"),
        ({"status": "failed"}, "the last attempt has failed, and nothing listens here"),
        ({"status": "cancelled"}, "the last attempt has failed, and nothing listens here"),
    ],
)
def test_status_of_a_waiting_destination_is_true(invoke: Invoke, info: dict[str, Any], words: str) -> None:
    assert words in invoke(Scripted(run_state="inmigrate", info=info), "status").stdout


def test_status_says_that_it_does_not_converge(invoke: Invoke) -> None:
    why = {"converging": False, "reason": "55 MiB/s are dirtied", "advice": ["throttle the guest", "start postcopy"]}
    said = invoke(Scripted(info={**ACTIVE, "convergence": why}), "status").stdout
    assert "it does not converge: 55 MiB/s are dirtied; what would help: throttle the guest or start postcopy" in said
    assert (
        "converge" not in invoke(Scripted(info={**ACTIVE, "convergence": {**why, "converging": True}}), "status").stdout
    )


# -- held before the switchover ----------------------------------------------------------------------------------------


HELD = step("pre-switchover", ram=ram(sync=2, pages=TOTAL // PAGE, remaining=0))


def test_socket_is_free_for_the_continue(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU serves one client at a time, so the command leaves the socket while it waits for the continue."""
    monkeypatch.setattr("trimig.cli.remote.migrate._PAUSED_EVERY", 0.01)
    guest = Scripted(script=[step("setup"), ACTIVE, HELD, HELD, HELD, HELD, DONE])
    result = invoke(guest, "migrate", "tcp:b:4444", "--wait", "-c", "pause-before-switchover")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("waiting in pre-switchover; trimig continue --qmp") == 1
    assert guest.connections > 2


def test_signal_cancels_what_is_held(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal ends the wait between two polls."""
    monkeypatch.setattr("trimig.cli.remote.migrate._PAUSED_EVERY", 60.0)

    def left() -> None:
        if "migrate_cancel" not in guest.names:
            signal.raise_signal(signal.SIGINT)

    guest = Scripted(script=[step("setup"), ACTIVE, HELD], left=left)
    result = invoke(guest, "migrate", "tcp:b:4444", "--wait", "-c", "pause-before-switchover")
    assert result.exit_code == 130, result.stderr
    assert "migrate_cancel" in guest.names


def test_incoming_says_where_the_destination_listens(invoke: Invoke) -> None:
    address = {"type": "inet", "host": "127.0.0.1", "port": "4444"}
    guest = Scripted(run_state="inmigrate", info={"socket-address": [address]})
    result = invoke(guest, "incoming", "tcp:127.0.0.1:0")
    assert (result.exit_code, result.stdout) == (0, "the destination waits at tcp:127.0.0.1:4444\n")
    assert ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}) in guest.executed
    record = json.loads(invoke(guest, "incoming", "tcp:127.0.0.1:0", "--json").stdout)
    assert (record["address"], record["run_state"]) == ("tcp:127.0.0.1:4444", "inmigrate")


def test_incoming_of_a_guest_that_does_not_wait_is_an_error(invoke: Invoke) -> None:
    result = invoke(Scripted(refuses={"migrate-incoming": "'-incoming' was not specified"}), "incoming", "tcp:h:1")
    assert (result.exit_code, "'-incoming' was not specified" in result.stderr) == (1, True)


def test_paused_postcopy_is_not_cancelled_and_says_what_can_be_done(invoke: Invoke) -> None:
    guest = Scripted(info={"status": "postcopy-paused", "owner": "destination"}, run_state="running")
    result = invoke(guest, "cancel")
    assert result.exit_code == 1
    assert "trimig recover" in result.stderr
    assert "exit code 4" in result.stderr
    assert "migrate_cancel" not in guest.names


def test_status_says_where_a_paused_postcopy_waits(invoke: Invoke) -> None:
    address = {"type": "unix", "path": "/m"}
    guest = Scripted(info={"status": "postcopy-paused", "owner": "destination", "socket-address": [address]})
    assert "this side waits for the source at unix:/m" in invoke(guest, "status").stdout


def test_guest_that_has_arrived_waits_for_no_other(invoke: Invoke) -> None:
    guest = Scripted(info={"status": "completed", "owner": "destination"}, run_state="running")
    result = invoke(guest, "incoming", "tcp:h:1")
    assert (result.exit_code, "the guest has arrived there already" in result.stderr) == (1, True)
    assert "migrate-incoming" not in guest.names


@pytest.mark.parametrize("last", sorted({status.qmp for status in Status}))
def test_of_a_source_that_is_gone_only_a_cancel_tells_its_owner(last: str) -> None:
    """QMP shows a postcopy whose memory is lost as ``failed``, and the destination has that guest."""
    error = lost("unix:a", last, Refused("the connection has ended"))
    assert isinstance(error, Refused if last == "cancelled" else trimig.HandoverUncertain)
    assert ("the source has kept its guest" in str(error)) is (last == "cancelled")
