"""``--guest SPEC``: finds the kind of guest that ``trimig run`` hosts.

Each module of this package is one built-in kind of that name, with a :class:`trimig.guests.GuestKind` called ``KIND``; a
new one changes no other file. Installed distributions add kinds, see :mod:`trimig.guests.kinds`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import pkgutil
from collections.abc import AsyncIterator
from typing import Final

import click

import trimig
from trimig.guests import GuestKind, GuestRequest, installed_kind, installed_names

_PARAM: Final = "--guest"

#: The names of the built-in kinds.
BUILT_IN: Final = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> GuestKind:
    """The kind of that name. A built-in one comes first.

    Raises:
        trimig.ConfigError: there is no such kind, or it cannot be used.
    """
    if name in BUILT_IN:
        kind: GuestKind = importlib.import_module(f"{__name__}.{name}").KIND
        return kind
    known = sorted({*BUILT_IN, *installed_names()})
    if name not in known:
        near = difflib.get_close_matches(name, known)
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise trimig.ConfigError(f"there is no kind of guest {name!r}; there are {', '.join(known)}{guess}")
    return installed_kind(name)


def listed() -> list[tuple[str, str]]:
    """Every kind: the form of its text, and its summary or the reason why it cannot be used."""
    rows = []
    for name in (*BUILT_IN, *(name for name in installed_names() if name not in BUILT_IN)):
        try:
            kind = find(name)
        except trimig.ConfigError as error:
            rows.append((name, f"Cannot be used: {error}."))
        else:
            rows.append((kind.syntax, kind.summary))
    return rows


def resolve(
    spec: str, *, waiting: bool, stopped: bool, name: str, peer: trimig.PeerProfile
) -> tuple[GuestKind, GuestRequest]:
    """The kind of guest that *spec* names, and what is asked of it.

    Args:
        waiting: an incoming migration will fill the guest.
        stopped: the guest does not run yet.
        name: the machine's name on the wire; empty for the guest's own.
        peer: the kind of peer that a parked guest is saved for.

    Raises:
        click.BadParameter: there is no such kind, or it cannot be used.
    """
    kind, _, text = spec.partition(":")
    try:
        found = find(kind)
    except trimig.ConfigError as error:
        raise click.BadParameter(str(error), param_hint=_PARAM) from error
    return found, GuestRequest(text=text, waiting=waiting, stopped=stopped, name=name, peer=peer)


@contextlib.asynccontextmanager
async def opened(kind: GuestKind, request: GuestRequest) -> AsyncIterator[trimig.Guest]:
    """The guest that *kind* makes, while the context is open.

    Raises:
        click.BadParameter: the text cannot be understood, or its guest does not exist.
        trimig.GuestFailed: the kind has failed, or what it made is no guest.

    **Cancellation:** the guest is ended.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            guest: object = await stack.enter_async_context(kind.open(request))
        except trimig.ConfigError as error:
            raise click.BadParameter(str(error), param_hint=_PARAM) from error
        except (trimig.TrimigError, OSError):
            raise
        except Exception as error:  # raised by the code of another distribution
            raise trimig.GuestFailed(f"the kind of guest {kind.name!r} failed: {error!r}") from error
        if not isinstance(guest, trimig.Guest):
            raise trimig.GuestFailed(
                f"the kind of guest {kind.name!r} made a {type(guest).__name__}, which is no guest"
            )
        yield guest
