"""Kinds of guests that ``trimig run --guest KIND:…`` hosts, and those that installed distributions add.

A distribution adds a kind by an entry point of the group ``trimig.guests``. Its name is the kind's name, and its value
is a :class:`GuestKind`::

    [project.entry-points."trimig.guests"]
    robot = "robots.hosting:KIND"

An entry point is imported only when its kind is asked for or listed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Final, Protocol, runtime_checkable

from ..config.peer import PeerProfile
from ..errors import ConfigError
from ..expected import expect
from ..guest import Guest
from ..monitor.statistics import Event

#: The group of the entry points.
GROUP: Final = "trimig.guests"
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRequest:
    """The guest that a kind is asked for."""

    #: The text behind ``KIND:``, empty without one.
    text: str
    #: An incoming migration will fill the guest: its run state must be ``"inmigrate"``.
    waiting: bool = False
    #: The guest does not run before :meth:`trimig.Guest.resume` is called: its run state must be ``"prelaunch"`` or
    #: ``"paused"``.
    stopped: bool = False
    #: The machine's name on the wire; empty for the guest's own.
    name: str = ""
    #: The kind of peer that the migrations are for.
    peer: PeerProfile


class HandoverRecord(Protocol):
    """A record, outside of this process, of where the guest is. The host calls it during each outgoing migration."""

    @property
    def decide(self) -> Callable[[str], Awaitable[None]]:
        """Called with the destination's URI before the commit is sent; an error keeps the guest here."""

    def on_event(self, event: Event) -> None:
        """Called with each event of the outgoing migration."""


@runtime_checkable
class ArrivalRecord(HandoverRecord, Protocol):
    """A :class:`HandoverRecord` that is also told how the guest arrives."""

    def on_incoming_event(self, event: Event) -> None:
        """Called with each event of the incoming migration."""


def _no_record(_request: GuestRequest) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestKind:
    """A kind of guest.

    Raises:
        ConfigError: *name* has not the form of a name.
    """

    #: Lower-case letters, digits and hyphens, at most 32.
    name: str
    #: The form of the text behind ``--guest``, such as ``robot:FILE``.
    syntax: str
    #: One line, for ``trimig run --help``.
    summary: str
    #: Opens the guest, which ends with the context. ConfigError for a text that cannot be understood.
    open: Callable[[GuestRequest], AbstractAsyncContextManager[Guest]]
    #: The record of the guest's place that the host keeps up to date; None for a guest without one.
    record: Callable[[GuestRequest], HandoverRecord | None] = _no_record

    def __post_init__(self) -> None:
        expect("name", self.name, str, "a str")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} is no name of a kind of guest: lower-case letters, digits and hyphens")


def installed_names() -> Sequence[str]:
    """The names of the kinds that installed distributions add, sorted. Nothing is imported."""
    return sorted(metadata.entry_points(group=GROUP).names)


def installed_kind(name: str) -> GuestKind:
    """The kind *name* of an installed distribution.

    Raises:
        ConfigError: there is none, there are several, its module cannot be imported, or the entry point is no
            :class:`GuestKind` of that name. The message names the distribution.
    """
    found = list(metadata.entry_points(group=GROUP, name=name))
    if not found:
        raise ConfigError(f"no installed distribution has a kind of guest {name!r}", name="guest")
    if len(found) > 1:
        owners = " and ".join(sorted(_distribution(point) for point in found))
        raise ConfigError(f"the kind of guest {name!r} comes from {owners}: uninstall one of them", name="guest")
    where = f"the kind of guest {name!r} of the distribution {_distribution(found[0])}"
    try:
        kind: object = found[0].load()
    except Exception as error:  # raised by the distribution's code
        raise ConfigError(f"{where} cannot be imported: {error!r}", name="guest") from error
    if not isinstance(kind, GuestKind):
        raise ConfigError(
            f"{where} is a {type(kind).__name__}, and no trimig.guests.GuestKind: {found[0].value}", name="guest"
        )
    if kind.name != name:
        raise ConfigError(f"{where} calls itself {kind.name!r}: {found[0].value}", name="guest")
    return kind


def _distribution(point: metadata.EntryPoint) -> str:
    return "(unknown)" if point.dist is None else f"{point.dist.name} {point.dist.version}"
