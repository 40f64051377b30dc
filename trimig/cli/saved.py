"""What the commands share that write a guest into a file: the lock and the record of the file that had the name before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import trimig
from trimig import stream
from trimig.errors import Ownership

from .output import say


def how_to_settle(file: Path, destination: str) -> str:
    """The sentence that says how the owner of the guest in *file* is settled."""
    return (
        f"Look whether it runs at {destination} (for a QEMU: query-status, or whether the process lives), then run: "
        f"trimig settle {file} --owner source|destination"
    )


def unsettled(file: Path, record: stream.OwnerRecord) -> trimig.HandoverUncertain:
    """The error for a file whose guest may run at its destination."""
    return trimig.HandoverUncertain(
        f"{file} was sent to {record.destination} at {record.time} and no answer came, so the guest may be running "
        f"there. {how_to_settle(file, record.destination)}"
    )


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Add *file* to the error of the stream in it."""
    try:
        yield
    except trimig.RemoteProtocolError as error:
        raise trimig.RemoteProtocolError(
            f"{file}: {error.reason}", offset=error.offset, section=error.section
        ) from error
    except trimig.TransportFailed as error:
        raise trimig.TransportFailed(f"{file}: {error}") from error


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[None]:
    """Hold *file*, if it exists, while another guest is written that gets its name.

    Raises:
        trimig.StateError: another process hosts, sends or settles the guest in it, or its record is damaged.
        trimig.HandoverUncertain: the owner of the guest in it is not known.
        OSError: the file or its record cannot be read.
    """
    with contextlib.ExitStack() as stack:
        if file.is_file():
            stack.enter_context(stream.locked(file))
        check_settled(file)
        yield


def check_settled(file: Path) -> None:
    """Refuse to lose the guest in *file*, if there is one whose owner is not known.

    Raises:
        trimig.HandoverUncertain: the owner of the guest in it is not known.
        trimig.StateError: its record is damaged.
        OSError: the record cannot be read.
    """
    record = stream.read_record(file)
    if record is not None and record.owner is Ownership.UNKNOWN:
        raise unsettled(file, record)


def forget_record(file: Path) -> None:
    """Remove the record of the guest that had the name *file* before. The caller holds the new file."""
    try:
        if stream.record_path(file).exists():
            stream.write_record(file, None)
    except OSError as error:
        say(
            f"warning: {stream.record_path(file)} is about the guest that was in {file} before, and could not be "
            f"removed: {error.strerror}"
        )


class Arrival:
    """Forgets the record of the guest that had a file's name before, when another guest has arrived in the file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_event(self, event: trimig.Event) -> None:
        """Handle an event of the incoming migration. At its end the guest still holds the file."""
        if event.name == "MIGRATION" and event.data["status"] == trimig.Status.COMPLETED.value:
            forget_record(self._path)
