"""The exit code of each command for each error, in one table; the help lists the codes."""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner

import trimig
from tests.cli.calls import CALLS
from tests.guests.saved import stream as saved_stream
from trimig import cli, errors, stream
from trimig.cli.commands.run import _Host, _other_side
from trimig.cli.errors import error_record
from trimig.cli.exit_codes import SENTENCE
from trimig.errors import Ownership
from trimig.status import owner

#: One error of each class, and its exit code in every command.
ERRORS: Final[list[tuple[Exception, int]]] = [
    (trimig.MigrationError("it failed"), 1),
    (trimig.ConfigError("unknown option", name="x"), 2),
    (trimig.StateError("not now"), 1),
    (trimig.NotOwner("it was handed over"), 1),
    (trimig.NotOwner("it is not known", guest_owner=trimig.Owner.UNKNOWN), 3),
    (trimig.LocalProtocolError("not sendable"), 1),
    (trimig.RemoteProtocolError("bad magic", offset=4), 1),
    (trimig.TransportFailed("connection refused"), 1),
    (trimig.PeerFailed("refused", code=1), 1),
    (trimig.GuestFailed("no pause"), 1),
    (trimig.NotConverging("too fast"), 1),
    (trimig.MigrationCancelled("by hand"), 1),
    (trimig.GuestNotResumed("it stands still"), 5),
    (trimig.HandoverUncertain("no answer"), 3),
    (trimig.PostcopyLost("no more memory"), 4),
    (trimig.InternalError("a fault"), 1),
    (FileNotFoundError(2, "No such file or directory", "/x"), 1),
    (KeyError("x"), 1),
    (ExceptionGroup("two", [ValueError("a"), ValueError("b")]), 1),
]


def every_class(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for below in root.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from every_class(below)


def test_table_has_every_error() -> None:
    assert {type(error) for error, _ in ERRORS} >= set(every_class(trimig.TrimigError)) - {trimig.TrimigError}


class _Monitor:
    def __init__(self, role: trimig.Role, status: trimig.Status) -> None:
        self.status = status
        self.owner = owner(role, status)


@pytest.mark.parametrize("status", trimig.Status)
@pytest.mark.parametrize("role", trimig.Role)
def test_of_a_hosted_guest(role: trimig.Role, status: trimig.Status) -> None:
    """`trimig run` ends with the exit code of its last migration, outgoing or incoming."""
    host = _Host(config=trimig.Config(), as_json=False)
    parts = {
        name: _Monitor(side, status if side is role else trimig.Status.NONE)
        for name, side in (("outgoing", trimig.Role.SOURCE), ("incoming", trimig.Role.DESTINATION))
    }
    machine: Any = types.SimpleNamespace(**parts)
    host._machine = machine
    unknown = owner(role, status) is Ownership.UNKNOWN
    assert host._code() == (3 if unknown else 4 if status is trimig.Status.POSTCOPY_LOST else 0)
    other = "destination" if role is trimig.Role.SOURCE else "source"
    assert _other_side(machine) == (other if unknown else None)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "stream"
    path.write_bytes(saved_stream())
    return path


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"docs"}))  # which does nothing that could fail
def test_each_error_in_each_command(command: str, guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised at the place where the command does its work."""
    words = [word.format(stream=guest, target=guest.parent / "t", out=guest.parent / "o") for word in CALLS[command]]
    if command == "run":
        words[words.index("nonsense")] = "process:size=1M"
    if command == "demo":
        words = ["--size", "1M"]
    for error, code in ERRORS:

        def fail(*_args: Any, error: Exception = error, **_kwargs: Any) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("trimig.cli.runner.trio.run", fail)
            if command == "settle":
                patch.setattr(stream, "locked", contextlib.contextmanager(fail))
            result = CliRunner().invoke(cli.main, [command, *words, "--json"])
        assert result.exit_code == code, (type(error).__name__, result.stderr)
        assert json.loads(result.stdout)["exit_code"] == code
        assert "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith("trimig: ")


def test_owner_of_an_error_decides_where_its_class_says_nothing() -> None:
    error = trimig.StateError("what it was is not known")
    error.owner = Ownership.UNKNOWN
    assert error_record(error)[0] == 3


def test_codes_are_in_the_help_and_on_the_page() -> None:
    text = " ".join(CliRunner().invoke(cli.main, ["--help"]).stdout.split())
    assert SENTENCE in text
    page = CliRunner().invoke(cli.main, ["docs", "operating"]).stdout
    for code in (
        "0 | done",
        "1 | failed",
        "2 | usage",
        "3 | owner unknown",
        "4 | the destination",
        "5 | the guest is here",
        "130 | c",
    ):
        assert f"| {code}" in page


def test_guest_that_was_handed_over_is_sent_again_only_by_force(guest: Path) -> None:
    stream.write_record(guest, stream.OwnerRecord.now(Ownership.DESTINATION, "tcp:b:1"))
    words = ["send", str(guest), f"file:{guest.parent / 'out'}", "-c", "return-path=off"]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 1
    assert "was handed over to tcp:b:1" in result.stderr
    assert "--force" in result.stderr
    assert not (guest.parent / "out").exists()
    result = CliRunner().invoke(cli.main, [*words, "--force"])
    assert result.exit_code == 0, result.stderr
    assert "there may be two of this guest" in result.stderr


@pytest.mark.parametrize(
    ("owner", "code", "words"),
    [(Ownership.DESTINATION, 1, "it is there now"), (Ownership.UNKNOWN, 3, "trimig settle")],
)
def test_guest_that_is_elsewhere_is_not_hosted(guest: Path, owner: Ownership, code: int, words: str) -> None:
    stream.write_record(guest, stream.OwnerRecord.now(owner, "tcp:b:1"))
    result = CliRunner().invoke(cli.main, ["run", "--guest", f"parked:{guest}", "--qmp", f"unix:{guest.parent}/qmp"])
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr


def test_force_does_not_help_where_the_owner_is_not_known(guest: Path) -> None:
    stream.write_record(guest, stream.OwnerRecord.now(Ownership.UNKNOWN, "tcp:b:1"))
    result = CliRunner().invoke(cli.main, ["send", str(guest), "tcp:h:1", "--force"])
    assert (result.exit_code, "trimig settle" in result.stderr) == (3, True)
    result = CliRunner().invoke(cli.main, ["settle", str(guest), "--owner", "source"])
    assert result.exit_code == 0
    result = CliRunner().invoke(cli.main, ["settle", str(guest), "--owner", "source"])
    assert (result.exit_code, "nothing to settle" in result.stderr) == (1, True)
