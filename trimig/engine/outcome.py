"""Groups of exceptions become one error, at one place, with the owner and the class from the status."""

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

#: The more telling error outranks the other: a guest that failed explains why the connection was closed, not vice versa.
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


def bare(error: BaseException) -> BaseException:
    """The one exception of *error* that leaves a call: a caller never gets a group.

    For what :func:`domain_error` lets pass: an interrupt of the program goes before the cancellation it came with.
    """
    found = list(leaves(error))
    return next((leaf for leaf in found if not isinstance(leaf, trio.Cancelled)), found[0])


def lost_by_cancellation(failure: BaseException | None, status: Status) -> PostcopyLost | None:
    """The error for a call that was cancelled while it waited for a recovery: Cancelled would say that it never happened."""
    if status is not Status.POSTCOPY_LOST or failure is None:
        return None
    if all(isinstance(leaf, trio.Cancelled) for leaf in leaves(failure)):
        return PostcopyLost("the call was cancelled while the connection was lost")
    return None


def judged(error: TrimigError, status: Status) -> TrimigError:
    """*error* in the class that the final status demands: a guest that is at the destination without all of its memory
    is never reported by an error that means "as it was"."""
    if status is Status.POSTCOPY_LOST and not isinstance(error, PostcopyLost):
        lost = PostcopyLost(str(error))
        lost.others = (error, *error.others)
        lost.__cause__ = error
        return lost
    return error


def domain_error(error: BaseException, owner: Ownership) -> TrimigError | None:
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


def _known(leaf: BaseException) -> TrimigError:
    if isinstance(leaf, TrimigError) and not isinstance(leaf, StateError):
        return leaf
    found: TrimigError
    if isinstance(leaf, OSError | trio.BrokenResourceError | trio.ClosedResourceError):
        found = TransportFailed(str(leaf) or type(leaf).__name__)
    else:
        found = InternalError(
            f"{type(leaf).__name__}: {leaf} (a fault of trimig or of the guest's code; please report)"
        )
    found.__cause__ = leaf
    return found


def _rank(error: TrimigError) -> int:
    return next((rank for rank, kind in enumerate(_RANK) if isinstance(error, kind)), len(_RANK))


def add_to_message(error: TrimigError, clause: str) -> None:
    """Let the message of *error* end with *clause*: what else is known of the reason."""
    error.args = (f"{error}; {clause}", *error.args[1:])


def source_ended(reason: str) -> PeerFailed:
    """The error where the source, a trimig, has said why it ends the migration."""
    return PeerFailed(f"the source ended the migration: {reason}", code=0)
