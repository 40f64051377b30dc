"""``--guest SPEC``: makes the guest that ``trimig run`` hosts."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import trio

import trimig
from trimig import stream

from .output import say

_PARAM: Final = "--guest"
_SIZES: Final = ("size", "dirty-rate", "hot")


def default_hot(size: int) -> int:
    """The default size of the working set of a worker with so many bytes."""
    return min(32 << 20, size // 8)


def _bad(text: str) -> click.BadParameter:
    return click.BadParameter(text, param_hint=_PARAM)


@contextlib.asynccontextmanager
async def open_guest(
    spec: str, *, waiting: bool, stopped: bool, name: str, peer: trimig.PeerProfile
) -> AsyncIterator[trimig.Guest]:
    """The guest of *spec*, while the context is open.

    Args:
        waiting: an incoming migration will fill the guest.
        stopped: the guest does not run yet.
        name: the machine's name on the wire; empty for the guest's own.
        peer: the kind of peer that a parked guest is saved for.

    Raises:
        click.BadParameter: *spec* cannot be understood, or its guest does not exist.

    **Cancellation:** the guest is ended.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "process":
        options = _process_options(rest if colon else "")
        if name:
            options["name"] = name
        async with trimig.WorkloadGuest.open(running=not waiting, stopped=stopped, **options) as guest:
            yield guest
    elif kind == "parked" and rest:
        async with _from_file(Path(rest), waiting=waiting, peer=peer) as parked:
            yield parked
    elif kind == "app" and rest:
        async with _from_python(rest, running=not (waiting or stopped)) as found:
            yield found
    else:
        raise _bad(f"{spec!r} is not process[:size=256M,…], app:pkg.mod:factory or parked:FILE")


@contextlib.asynccontextmanager
async def _from_file(path: Path, *, waiting: bool, peer: trimig.PeerProfile) -> AsyncIterator[trimig.Guest]:
    """The guest in *path*, or the guest that will be saved there."""
    if waiting:
        if await trio.Path(path).exists():
            raise _bad(f"{path} exists; the guest that arrives would replace the one in it")
        with trimig.ParkedGuest(path, peer=peer) as parked:
            yield parked
        return
    with stream.locked(path):
        if (record := stream.read_record(path)) is not None:
            raise _sent_away(path, record)
        with await trimig.ParkedGuest.load(path) as parked:
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


def owner_file(spec: str, *, waiting: bool) -> OwnerFile | None:
    """The record for the guest of *spec*; None for a guest without a file."""
    kind, _, rest = spec.partition(":")
    return OwnerFile(Path(rest)) if kind == "parked" and rest and not waiting else None


def _process_options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key == "seed" and equals and value.isdigit():
            options["seed"] = int(value)
            continue
        if key not in _SIZES or not equals:
            raise _bad(f"{part!r} is not one of {', '.join(f'{name}=SIZE' for name in _SIZES)}, seed=NUMBER")
        try:
            options[key.replace("-", "_")] = trimig.parse_size(value)
        except trimig.ConfigError as error:
            raise _bad(f"{key}: {error}") from None
    if "size" in options:
        options.setdefault("hot", default_hot(options["size"]))
    return options


@contextlib.asynccontextmanager
async def _from_python(text: str, *, running: bool) -> AsyncIterator[trimig.Guest]:
    """A guest of the application: an object, or a factory (a function, also async, or a context manager)."""
    module_name, colon, path = text.partition(":")
    if not colon or not module_name or not path:
        raise _bad(f"app:{text} needs a module and a name in it: app:pkg.mod:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's module is in the working directory
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise _bad(f"app:{text}: {error}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise _bad(f"app:{text}: {module_name} has no {path}") from None
    async with contextlib.AsyncExitStack() as stack:
        try:
            if callable(found) and not isinstance(found, trimig.Guest):
                found = found(**_arguments(found, {"running": running}))
            if inspect.isawaitable(found):
                found = await found
            if hasattr(found, "__aenter__"):
                found = await stack.enter_async_context(found)
            elif hasattr(found, "__enter__"):
                found = stack.enter_context(found)
        except Exception as error:  # raised by the user's code
            raise _bad(f"app:{text} failed: {error!r}") from error
        if not isinstance(found, trimig.Guest):
            raise _bad(f"app:{text} gave {type(found).__name__!r}, which is no guest (see trimig.Guest)")
        yield found


def _arguments(function: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of *offered* that *function* takes by name."""
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in offered.items() if name in names}
