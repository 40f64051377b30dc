"""Turns a group of exceptions into one error. The status decides the owner in it, and in postcopy its class."""

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
    NotConverging,
    Ownership,
    PeerFailed,
    PostcopyLost,
    RemoteProtocolError,
    StateError,
    TransportFailed,
    TrimigError,
)
from ..status import Status

#: Of several errors the first in this order is raised. A cause stands before its effects: a guest that has failed explains
#: a closed connection, and a closed connection does not explain a failed guest.
_RANK: tuple[type[TrimigError], ...] = (
    HandoverUncertain,
    GuestFailed,
    PeerFailed,
    RemoteProtocolError,
    NotConverging,
    ConfigError,
    LocalProtocolError,
    TransportFailed,
    InternalError,
)


class Outcome:
    """Keeps the exception that left a block until the unwinding has been done.

    The nursery of an attempt runs inside :meth:`watch`. The caller unwinds in shields, and then raises the exception, or
    the domain error that :func:`domain_error` makes of it. ``try``/``finally`` would do almost the same, but would raise
    the domain error inside the handler: then its context would be the exception from which it was made.
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
    """All exceptions in a group and in the groups inside it; for an exception that is no group, the exception."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def bare(error: BaseException) -> BaseException:
    """One exception out of the group *error*, because a caller must never get a group.

    Used if :func:`domain_error` returns None. An interrupt of the program (KeyboardInterrupt) is preferred to a
    cancellation.
    """
    found = list(leaves(error))
    return next((leaf for leaf in found if not isinstance(leaf, trio.Cancelled)), found[0])


def lost_by_cancellation(failure: BaseException | None, status: Status) -> PostcopyLost | None:
    """The error for a call that was cancelled while it waited for a recovery; None for other calls.

    Cancelled would be wrong here, because it says that the migration never happened.
    """
    if status is not Status.POSTCOPY_LOST or failure is None:
        return None
    if all(isinstance(leaf, trio.Cancelled) for leaf in leaves(failure)):
        return PostcopyLost("the call was cancelled while the connection was lost")
    return None


def judged(error: TrimigError, status: Status) -> TrimigError:
    """*error*, or after a lost postcopy a PostcopyLost in its place.

    The guest is then at the destination without all of its memory. Most other classes say that the source has it.
    """
    if status is Status.POSTCOPY_LOST and not isinstance(error, PostcopyLost):
        lost = PostcopyLost(str(error))
        lost.complete(error, *error.others)
        lost.__cause__ = error
        return lost
    return error


def domain_error(error: BaseException, owner: Ownership) -> TrimigError | None:
    """The one error to raise for *error*; None if *error* itself must be raised.

    The result is None for a cancellation, which the scopes outside absorb, and for an interrupt of the program, which
    trimig does not interpret.
    """
    real = [leaf for leaf in leaves(error) if not isinstance(leaf, trio.Cancelled)]
    if not real or any(not isinstance(leaf, Exception) for leaf in real):
        return None
    known = [_known(leaf) for leaf in real]
    known.sort(key=_rank)
    first, *others = known
    first.complete(*others, owner=owner)
    return first


def _known(leaf: BaseException) -> TrimigError:
    if isinstance(leaf, TrimigError) and not isinstance(leaf, StateError):
        return leaf
    found: TrimigError
    if isinstance(leaf, OSError | trio.BrokenResourceError | trio.ClosedResourceError):
        found = TransportFailed(str(leaf) or type(leaf).__name__)
    else:
        found = InternalError(
            f"{type(leaf).__name__}: {leaf} (a fault of trimig, or of the guest's code or a hook that it called: the traceback of "
            "__cause__ ends in the code that raised it; please report a fault of trimig)"
        )
    found.__cause__ = leaf
    return found


def _rank(error: TrimigError) -> int:
    return next((rank for rank, kind in enumerate(_RANK) if isinstance(error, kind)), len(_RANK))


def add_to_message(error: TrimigError, clause: str) -> None:
    """Add *clause* to the end of the message of *error*."""
    error.args = (f"{error}; {clause}", *error.args[1:])


def source_ended(reason: str) -> PeerFailed:
    """The error for a source that has sent the reason why it ends the migration. Only a trimig sends one."""
    return PeerFailed(f"the source ended the migration: {reason}", code=0)
