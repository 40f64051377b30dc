"""Groups of exceptions become one error, at one place, with the owner from the status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from ..errors import (
    ConfigError,
    GuestFailed,
    HandoverUncertain,
    InternalError,
    LocalProtocolError,
    MigrationError,
    NotConverging,
    Ownership,
    PeerFailed,
    RemoteProtocolError,
    StateError,
    TransportFailed,
)

#: The more telling error outranks the other: a guest that failed explains why the connection was closed, not vice versa.
_RANK: tuple[type[MigrationError], ...] = (
    HandoverUncertain,
    GuestFailed,
    PeerFailed,
    RemoteProtocolError,
    NotConverging,
    ConfigError,
    StateError,
    LocalProtocolError,
    TransportFailed,
    InternalError,
)


class Outcome:
    """How a block ended: the exception that left it, held until the unwinding has been done.

    The nursery of an attempt runs inside :meth:`watch`. What it raises is neither handled nor lost there: the caller
    unwinds in shields, and then raises it, or the one domain error that stands for it. That is what ``try``/``finally``
    would do, except that the error is raised outside of the handler, so that it does not stand inside its own context.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep the exception that leaves the block."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - raised by the caller, after the unwinding
            self.failure = error


def leaves(error: BaseException) -> Iterator[BaseException]:
    """All exceptions in a group, groups inside it opened; a bare exception is its own leaf."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def domain_error(error: BaseException, owner: Ownership) -> MigrationError | None:
    """The one error to raise for *error*, or None if it must pass as it is.

    None means: nothing but cancellation (the scopes outside absorb it), or an interrupt of the program that is not ours
    to interpret.
    """
    real = [leaf for leaf in leaves(error) if not isinstance(leaf, trio.Cancelled)]
    if not real or any(not isinstance(leaf, Exception) for leaf in real):
        return None
    known = [_known(leaf) for leaf in real]
    known.sort(key=_rank)
    first, *others = known
    first.owner = owner
    first.others = tuple(others)
    return first


def _known(leaf: BaseException) -> MigrationError:
    if isinstance(leaf, MigrationError):
        return leaf
    found: MigrationError
    if isinstance(leaf, OSError | trio.BrokenResourceError | trio.ClosedResourceError):
        found = TransportFailed(str(leaf) or type(leaf).__name__)
    else:
        found = InternalError(
            f"{type(leaf).__name__}: {leaf} (a fault of trimig or of the guest's code; please report)"
        )
    found.__cause__ = leaf
    return found


def _rank(error: MigrationError) -> int:
    return next((rank for rank, kind in enumerate(_RANK) if isinstance(error, kind)), len(_RANK))
