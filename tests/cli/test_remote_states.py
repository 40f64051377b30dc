"""The conclusions of the commands with ``--qmp`` from the statuses of any QEMU."""

from __future__ import annotations

from typing import Any, Final

import pytest

from trimig.cli.remote.state import State


@pytest.mark.parametrize(
    ("status", "run_state", "ended", "owner"),
    [
        ("none", "running", True, "source"),
        ("setup", "running", False, "source"),
        ("active", "running", False, "source"),
        ("active", "finish-migrate", False, "unknown"),
        ("pre-switchover", "finish-migrate", False, "source"),
        ("device", "finish-migrate", False, "unknown"),
        ("cancelling", "finish-migrate", False, "source"),
        ("failing", "finish-migrate", False, "source"),
        ("failing", "running", False, "source"),
        ("postcopy-device", "finish-migrate", False, "unknown"),
        ("postcopy-active", "finish-migrate", False, "destination"),
        ("postcopy-paused", "finish-migrate", False, "destination"),
        ("postcopy-recover-setup", "finish-migrate", False, "destination"),
        ("postcopy-recover", "finish-migrate", False, "destination"),
        ("colo", "running", False, "source"),
        ("a-status-of-tomorrow", "running", False, "source"),
        ("a-status-of-tomorrow", "finish-migrate", False, "unknown"),
        ("completed", "postmigrate", True, "destination"),
        ("failed", "running", True, "source"),
        ("cancelled", "running", True, "source"),
    ],
)
def test_only_four_statuses_are_final(status: str, run_state: str, owner: str, *, ended: bool) -> None:
    state = State(run_state=run_state, info={"status": status})
    assert state.ended is ended
    assert state.owner == owner


OF_TRIMIG: Final = {"owner": "destination"}


@pytest.mark.parametrize(
    ("run_state", "info", "end"),
    [
        ("postmigrate", OF_TRIMIG, "owner: destination (the other side)"),
        ("finish-migrate", {**OF_TRIMIG, "ram": {}}, "owner: destination (the other side)"),
        ("running", {**OF_TRIMIG, "ram": {}}, "owner: destination (this side)"),
        ("postmigrate", {"ram": {}}, "owner: destination (the other side)"),
        ("running", {}, "owner: destination (this side)"),
        ("running", {"ram": {}}, "owner: destination"),  # a QEMU source after `cont`, so neither is certain
    ],
)
def test_a_handover_says_whether_this_side_has_the_guest(run_state: str, info: dict[str, Any], end: str) -> None:
    state = State(run_state=run_state, info={"status": "completed", **info})
    assert state.sentence.endswith(end)
    assert state.record()["owner"] == "destination"


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "this side waits for a guest here"),
        (
            {"socket-address": [{"type": "inet", "host": "::1", "port": "4"}]},
            "this side waits for a guest at tcp:[::1]:4",
        ),
        (
            {"status": "failed", "error-desc": "it broke"},
            "nothing listens here until trimig incoming gives an address",
        ),
    ],
)
def test_a_side_that_waits_says_whether_it_listens(info: dict[str, object], words: str) -> None:
    assert words in State(run_state="inmigrate", info=info).sentence
