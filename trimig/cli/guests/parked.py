"""``parked:FILE``: a guest that was received from a QEMU and is kept in a file."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import trio

import trimig
from trimig import stream
from trimig.guests import GuestKind, GuestRequest

from .. import saved
from ..output import say


def _path(request: GuestRequest) -> Path:
    if not request.text:
        raise trimig.ConfigError("parked: needs a file: parked:FILE")
    return Path(request.text)


@contextlib.asynccontextmanager
async def _open(request: GuestRequest) -> AsyncIterator[trimig.Guest]:
    """The guest in the file, or the guest that will be saved there."""
    path = _path(request)
    if request.waiting:
        if await trio.Path(path).exists():
            raise trimig.ConfigError(f"{path} exists; the guest that arrives would replace the one in it")
        with saved.replacing(path), trimig.ParkedGuest(path, peer=request.peer) as parked:
            try:
                parked.check_store()
            except trimig.GuestFailed as error:
                raise trimig.ConfigError(str(error)) from error
            yield parked
        return
    with stream.locked(path):
        if (record := stream.read_record(path)) is not None:
            raise _sent_away(path, record)
        with saved.naming(path):
            loaded = await trimig.ParkedGuest.load(path)
        with loaded as parked:
            yield parked


def _sent_away(path: Path, record: stream.OwnerRecord) -> trimig.NotOwner:
    unknown = record.owner is trimig.Ownership.UNKNOWN
    what = (
        f"no answer came: see whether it runs there, then say it with trimig settle {path}"
        if unknown
        else "so it is there now; a copy of the file, without its .owner, is another guest"
    )
    return trimig.NotOwner(
        f"{path} was sent to {record.destination} at {record.time}, and {what}",
        guest_owner=trimig.Owner.UNKNOWN if unknown else trimig.Owner.ELSEWHERE,
    )


class OwnerFile:
    """Keeps the record beside the file of a hosted guest correct while the guest is migrated.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._destination: str | None = None

    async def decide(self, uri: str) -> None:
        """Record that the commit for *uri* is about to be sent: until the answer comes, the owner is unknown.

        **Cancellation:** the record may be written; a later event corrects it.
        """
        self._destination = uri
        await stream.record_decision(self._path, uri)

    def on_incoming_event(self, event: trimig.Event) -> None:
        """Handle an event of the incoming migration, which has brought the guest into the file."""
        saved.Arrival(self._path).on_event(event)

    def on_event(self, event: trimig.Event) -> None:
        """Handle an event of the migration; after the commit, the record gets the owner."""
        if event.name != "MIGRATION" or self._destination is None:
            return
        try:
            if event.data["owner"] == trimig.Ownership.DESTINATION.value:
                stream.write_record(self._path, stream.OwnerRecord.now(trimig.Ownership.DESTINATION, self._destination))
            elif event.data["owner"] == trimig.Ownership.SOURCE.value:
                stream.write_record(self._path, None)
            else:
                return
        except OSError as error:
            say(f"warning: {stream.record_path(self._path)} could not be written: {error.strerror}")
            return
        self._destination = None


def _record(request: GuestRequest) -> OwnerFile:
    return OwnerFile(_path(request))


KIND: Final = GuestKind(
    name="parked",
    syntax="parked:FILE",
    summary="A guest that trimig receive has saved, or, with --incoming, one that will be saved in FILE.",
    open=_open,
    record=_record,
)
