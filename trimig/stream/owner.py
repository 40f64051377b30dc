"""The owner of a saved guest: a small record beside its file, on the disk before a decision is sent.

Without it, a crash or a lost answer during ``trimig send`` would leave a file that looks as if it had never been sent,
and the next attempt could run the guest a second time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..channel.offload import offload
from ..errors import Ownership, StateError

_SUFFIX: Final = ".owner"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRecord:
    """The record of a saved guest that was sent."""

    owner: Ownership
    #: The address that the guest was sent to, and the host that sent it.
    destination: str
    host: str
    #: ISO 8601, with time zone.
    time: str

    @staticmethod
    def now(owner: Ownership, destination: str) -> OwnerRecord:
        """A record with the present time and this host."""
        time = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        return OwnerRecord(owner=owner, destination=destination, host=socket.gethostname(), time=time)


def record_path(file: Path) -> Path:
    """The path of the record of *file*. A file has one record, also if a symbolic link names it."""
    real = Path(os.path.realpath(file))
    return real.with_name(real.name + _SUFFIX)


def read_record(file: Path) -> OwnerRecord | None:
    """The record of *file*; None if there is none: the guest was never sent, or came back.

    Raises:
        StateError: the record is damaged, so the owner is not known.
        OSError: it cannot be read.
    """
    path = record_path(file)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
        return OwnerRecord(
            owner=Ownership(found["owner"]),
            destination=str(found["destination"]),
            host=str(found["host"]),
            time=str(found["time"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path} is damaged, so it cannot be told who owns the guest in {file}", owner=Ownership.UNKNOWN
        ) from error


def write_record(file: Path, record: OwnerRecord | None) -> None:
    """Write *record* for *file*, or remove it; on the disk when this returns.

    Raises:
        OSError: the record cannot be written; the previous one is still in force.
    """
    path = record_path(file)
    if record is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    else:
        text = (
            json.dumps(
                dataclasses.asdict(record) | {"owner": record.owner.value, "file": path.name.removesuffix(_SUFFIX)}
            )
            + "\n"
        )
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


async def record_decision(file: Path, destination: str) -> None:
    """Record that the decision is about to be sent: from now on the owner is not known, until the answer comes.

    **Cancellation:** written, or not; :func:`write_record` sets it right.
    """
    await offload(write_record, file, OwnerRecord.now(Ownership.UNKNOWN, destination))


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Lock *file*, so that no other process hosts, sends, replaces or settles it meanwhile.

    Raises:
        StateError: another process does.
        OSError: there is no such file.
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"{file} is held by another trimig (send, settle, receive or run); end that one first"
            ) from None
        if not os.path.samestat(os.fstat(fd), os.stat(file)):
            raise StateError(f"{file} was replaced by another process in this moment")
        yield
    finally:
        os.close(fd)
