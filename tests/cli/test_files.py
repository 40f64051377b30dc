"""Files as arguments of commands: no saved guest is overwritten, and only regular files are replaced."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import trimig.stream
from tests.guests.saved import stream
from trimig import cli
from trimig.errors import Ownership


def invoke(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.main, [str(word) for word in words])


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A saved guest; its block is ``ram``."""
    path = tmp_path / "guest"
    path.write_bytes(stream())
    return path


WRITERS = ["receive", "export", "holes", "merge"]


def written(command: str, guest: Path, out: Path, *more: str) -> Result:
    """The command that writes *out*."""
    export = ("export", guest, "--format", "raw", "--block", "ram")
    words: dict[str, tuple[object, ...]] = {
        "receive": ("receive", f"file:{guest}", "--save", out),
        "export": (*export, "--out", out),
        "holes": (*export, "--out", guest.with_name("memory"), "--holes", out),
        "merge": ("merge", guest, guest, "--out", out),
    }
    return invoke(*words[command], *more)


def identity(name: Path) -> tuple[int, ...]:
    """What a replaced file would change. The time of the last access is not in it: following a link sets it."""
    found = os.lstat(name)
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("command", WRITERS)
def test_what_is_no_file_is_never_replaced(
    command: str, kind: str, guest: Path, tmp_path: Path, *, linked: bool
) -> None:
    """``--out /dev/null --force`` as root once replaced /dev/null by a file."""
    out = tmp_path / "other"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(out)
        elif kind == "socket":
            listener.bind(str(out))
        else:
            linked, out = True, Path("/dev/null")
        name = out
        if linked:
            name = tmp_path / "link"
            name.symlink_to(out)
        before = identity(name)
        result = written(command, guest, name, "--force")
        assert (result.exit_code, "only a file can be replaced" in result.stderr) == (2, True), result.stderr
        assert identity(name) == before
        assert not stat.S_ISREG(os.stat(name).st_mode)
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("command", WRITERS)
def test_a_link_that_leads_nowhere_is_not_replaced_without_force(command: str, guest: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    result = written(command, guest, tmp_path / "link")
    assert (result.exit_code, "is a symbolic link; --force" in result.stderr) == (2, True), result.stderr
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("name", ["guest", "link"])
def test_a_guest_is_not_written_over_by_its_own_memory(name: str, guest: Path, tmp_path: Path) -> None:
    (tmp_path / "link").hardlink_to(guest)
    result = written("export", guest, tmp_path / name, "--force")
    assert (result.exit_code, "is the stream itself" in result.stderr) == (2, True), result.stderr
    assert guest.read_bytes() == stream()
    result = written("export", guest, tmp_path / "memory", "--holes", str(tmp_path / "memory"))
    assert (result.exit_code, "is what --out names" in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("uri", ["file:{}", "file:{},offset=1M"])
def test_a_guest_is_not_sent_onto_its_own_file(uri: str, guest: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("guest")
    for name in ("guest", "link"):
        result = invoke("send", guest, uri.format(tmp_path / name))
        assert (result.exit_code, "is FILE itself" in result.stderr) == (2, True), result.stderr
        assert guest.read_bytes() == stream()
        assert not (tmp_path / "guest.owner").exists()


def test_the_map_of_holes_is_private_and_replaced_on_demand_only(guest: Path, tmp_path: Path) -> None:
    holes = tmp_path / "holes"
    assert written("holes", guest, holes).exit_code == 0
    assert (json.loads(holes.read_text())["holes"], stat.S_IMODE(holes.stat().st_mode)) == ([], 0o600)
    assert "exists; --force replaces it" in written("holes", guest, holes).stderr
    assert written("holes", guest, holes, "--force").exit_code == 0


DIRECTORY_TAKERS = [
    ("inspect", "{}"),
    ("export", "{}", "--format", "raw", "--block", "ram", "--out", "out"),
    ("merge", "{}", "{}", "--out", "out"),
    ("send", "{}", "tcp:127.0.0.1:1"),
    ("settle", "{}", "--owner", "source"),
    ("run", "--guest", "parked:{}", "--qmp", "unix:qmp"),
]


@pytest.mark.parametrize("words", DIRECTORY_TAKERS, ids=lambda words: words[0])
def test_a_directory_in_place_of_a_file_is_named(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*(word.format(tmp_path) for word in words))
    assert result.exit_code in (1, 2)
    assert str(tmp_path) in result.stderr
    assert "s a directory" in result.stderr


NAME_TAKERS = [
    *(words for words in DIRECTORY_TAKERS if words[0] != "run"),
    ("receive", "tcp:127.0.0.1:0", "--save", "{}"),
    ("receive", "tcp:127.0.0.1:0", "--save", "out", "--config", "{}"),
    ("export", "guest", "--format", "raw", "--block", "ram", "--out", "{}"),
    ("export", "guest", "--format", "raw", "--block", "ram", "--out", "out", "--holes", "{}"),
    ("merge", "guest", "guest", "--out", "{}"),
]


@pytest.mark.parametrize("words", NAME_TAKERS, ids=" ".join)
def test_an_empty_name_is_wrong_usage(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name, as from an unset variable of a shell."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*(word.format("") for word in words))
    assert (result.exit_code, "an empty name" in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("command", ["export", "holes", "merge"])
def test_a_file_that_another_trimig_holds_is_not_replaced(command: str, guest: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    out.write_bytes(stream())
    with trimig.stream.locked(out):
        result = written(command, guest, out, "--force")
    assert (result.exit_code, f"{out} is held by another trimig" in result.stderr) == (1, True), result.stderr
    assert out.read_bytes() == stream()


def test_an_export_is_not_taken_for_the_guest_that_had_its_name(guest: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    out.write_bytes(stream())
    trimig.stream.write_record(out, trimig.stream.OwnerRecord.now(Ownership.DESTINATION, "tcp:b:1"))
    assert written("export", guest, out, "--force").exit_code == 0
    assert trimig.stream.read_record(out) is None


def test_a_guest_sent_into_a_file_does_not_replace_one_whose_owner_is_not_known(guest: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    out.write_bytes(b"x")
    trimig.stream.write_record(out, trimig.stream.OwnerRecord.now(Ownership.UNKNOWN, "tcp:b:1"))
    result = invoke("send", guest, f"file:{out}")
    assert (result.exit_code, "no answer came" in result.stderr) == (3, True), result.stderr
    assert out.read_bytes() == b"x"


def test_a_guest_sent_into_a_file_gets_a_record_of_its_own(guest: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    out.write_bytes(stream())
    trimig.stream.write_record(out, trimig.stream.OwnerRecord.now(Ownership.DESTINATION, "tcp:b:1"))
    result = invoke("send", guest, f"file:{out}")
    assert result.exit_code == 0, result.stderr
    assert trimig.stream.read_record(out) is None
    assert trimig.stream.read_record(guest) is not None
