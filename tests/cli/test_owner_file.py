"""The owner record of a guest that ``trimig run`` hosts from a file: what each event of a migration makes of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import trimig
from trimig import Ownership, stream
from trimig.cli.guests.parked import OwnerFile

URI = "tcp:there:4444"


def event(owner: Ownership, name: str = "MIGRATION") -> trimig.Event:
    return trimig.Event(name=name, data={"owner": owner.value}, time=0.0)


def owner_of(path: Path) -> Ownership | None:
    """The owner in the record; None without a record."""
    record = stream.read_record(path)
    return None if record is None else record.owner


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "guest"


async def test_record_has_the_owner_once_it_is_known(path: Path) -> None:
    file = OwnerFile(path)
    await file.decide(URI)
    assert owner_of(path) is Ownership.UNKNOWN
    file.on_event(event(Ownership.UNKNOWN))
    file.on_event(event(Ownership.DESTINATION, "STOP"))
    assert owner_of(path) is Ownership.UNKNOWN
    file.on_event(event(Ownership.DESTINATION))
    record = stream.read_record(path)
    assert record is not None
    assert (record.owner, record.destination) == (Ownership.DESTINATION, URI)


async def test_guest_that_stays_has_no_record_and_may_be_sent_again(path: Path) -> None:
    file = OwnerFile(path)
    await file.decide(URI)
    file.on_event(event(Ownership.SOURCE))
    assert owner_of(path) is None
    # What comes later belongs to no decision.
    file.on_event(event(Ownership.DESTINATION))
    assert owner_of(path) is None
    await file.decide(URI)
    assert owner_of(path) is Ownership.UNKNOWN


def test_event_before_a_decision_writes_nothing(path: Path) -> None:
    OwnerFile(path).on_event(event(Ownership.DESTINATION))
    assert owner_of(path) is None


@pytest.mark.parametrize("owner", [Ownership.DESTINATION, Ownership.SOURCE])
async def test_record_that_cannot_be_written_is_a_warning_and_the_next_event_tries_again(
    path: Path, capsys: pytest.CaptureFixture[str], owner: Ownership
) -> None:
    file = OwnerFile(path)
    await file.decide(URI)
    away = path.parent.rename(path.parent.with_name("away"))
    file.on_event(event(owner))
    assert capsys.readouterr().err == f"trimig: warning: {path}.owner could not be written: No such file or directory\n"
    away.rename(path.parent)
    assert owner_of(path) is Ownership.UNKNOWN
    file.on_event(event(owner))
    assert owner_of(path) is (owner if owner is Ownership.DESTINATION else None)


async def test_disk_that_fails_leaves_the_previous_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await stream.record_decision(path, URI)

    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        stream.write_record(path, stream.OwnerRecord.now(Ownership.DESTINATION, URI))
    assert owner_of(path) is Ownership.UNKNOWN
    assert [entry.name for entry in path.parent.iterdir()] == ["guest.owner"]
