"""Files that get their name when they are whole: what is refused at once, and what is left behind by anything else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from trimig.guests.parked.newfile import NewFile, check_target


@pytest.mark.parametrize("replace", [False, True])
def test_the_name_appears_with_the_whole_content(tmp_path: Path, file_system: str, *, replace: bool) -> None:
    file = NewFile(tmp_path / "out", replace=replace)
    file.write_at(0, b"content")
    names = os.listdir(tmp_path)
    assert (names == []) is (file_system == "without a name")
    assert "out" not in names
    file.start_writing_back(0, 7)
    file.sync()
    file.finish()
    file.discard()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


def test_room_that_is_set_aside_is_given_back(tmp_path: Path, file_system: str) -> None:
    file = NewFile(tmp_path / "out", replace=False)
    file.write_at(0, bytes(10000))
    file.reserve(10000, 8 << 20)
    found = os.fstat(file.fd)
    assert found.st_size == 10000
    file.finish()
    assert (tmp_path / "out").stat().st_size == 10000
    assert (tmp_path / "out").stat().st_blocks * 512 < 1 << 20
    with pytest.raises(OSError, match=r"File too large|No space left"):
        check_room(tmp_path / "huge")


def check_room(path: Path) -> None:
    """Set aside more than any disk has."""
    file = NewFile(path, replace=False)
    try:
        file.reserve(0, 1 << 62)
    finally:
        file.discard()


def test_a_discarded_file_leaves_nothing(tmp_path: Path, file_system: str) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    file = NewFile(tmp_path / "out", replace=False)
    file.write_at(0, b"content")
    file.discard()
    file.discard()
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_comes_up_meanwhile(tmp_path: Path, file_system: str, *, replace: bool) -> None:
    file = NewFile(tmp_path / "out", replace=replace)
    file.write_at(0, b"content")
    (tmp_path / "out").write_bytes(b"precious")
    if replace:
        file.finish()
    else:
        with pytest.raises(FileExistsError):
            file.finish()
    file.discard()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == (b"content" if replace else b"precious")


def test_a_link_is_replaced_and_not_what_it_names(tmp_path: Path, file_system: str) -> None:
    (tmp_path / "named").write_bytes(b"precious")
    for target in ("named", "nothing"):
        (tmp_path / "out").unlink(missing_ok=True)
        (tmp_path / "out").symlink_to(target)
        file = NewFile(tmp_path / "out", replace=True)
        file.write_at(0, b"content")
        file.finish()
        assert not (tmp_path / "out").is_symlink()
        assert (tmp_path / "out").read_bytes() == b"content"
    assert (tmp_path / "named").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["named", "out"]


@pytest.mark.parametrize("call", ["fsync", "link", "rename"])
def test_a_file_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str, call: str
) -> None:
    (tmp_path / "out").write_bytes(b"precious")

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = NewFile(tmp_path / "out", replace=True)
    file.write_at(0, b"content")
    if call == "link" and file_system == "hidden name":
        call = "rename"  # there it needs no link
    monkeypatch.setattr(os, call, broken)
    with pytest.raises(OSError, match="Input/output"):
        file.finish()
    monkeypatch.undo()
    file.discard()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_a_directory_that_cannot_be_synced_does_not_keep_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    real = os.fsync

    def broken(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    file = NewFile(tmp_path / "out", replace=False)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        file.finish()
    file.discard()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "replace", "error", "words"),
    [
        ("directory", False, IsADirectoryError, "Is a directory"),
        ("directory", True, IsADirectoryError, "Is a directory"),
        ("file", False, FileExistsError, "File exists"),
        ("dangling", False, FileExistsError, "a symbolic link to nothing"),
        ("link", False, FileExistsError, "File exists"),
        ("no/where", False, FileNotFoundError, "No such file"),
        ("file/below", True, NotADirectoryError, "Not a directory"),
        ("n" * 256, True, OSError, "name too long"),
        ("..", True, IsADirectoryError, "Is a directory"),
    ],
)
def test_a_name_that_will_not_do_is_refused_at_once(
    tmp_path: Path, file_system: str, name: str, error: type[OSError], words: str, *, replace: bool
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "link").symlink_to("file")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=words):
        check_target(tmp_path / name, replace=replace)
    assert sorted(os.listdir(tmp_path)) == before
    check_target(tmp_path / "new", replace=replace)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_that_is_being_written_is_not_taken_for_one_that_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    (tmp_path / "out").write_bytes(b"old")
    first = NewFile(tmp_path / "out", replace=True)
    first.write_at(0, b"first")
    real = os.rename

    def meanwhile(*names: Any, **more: Any) -> None:
        monkeypatch.undo()
        NewFile(tmp_path / "out", replace=True).discard()
        real(*names, **more)

    monkeypatch.setattr(os, "rename", meanwhile)
    first.finish()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"first"


def test_the_longest_name_of_large_letters_can_be_replaced(tmp_path: Path, file_system: str) -> None:
    """A name is limited in bytes, and so is the hidden one."""
    path = tmp_path / ("\U0001f600" * 63)
    for content in (b"first", b"second"):
        file = NewFile(path, replace=True)
        file.write_at(0, content)
        file.finish()
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]
