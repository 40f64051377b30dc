"""Calls into the guest's code: bounded in time, and with one kind of error whatever that code raises."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import trio

from .. import formats
from ..errors import GuestFailed, MigrationError, TrimigError

T = TypeVar("T")

#: What a guest's code may raise besides our own errors, and what then is the guest's failure. An AttributeError or an
#: AssertionError is a mistake in a program, and is reported as such.
GUEST_ERRORS: Final[tuple[type[Exception], ...]] = (
    OSError,
    RuntimeError,
    ValueError,
    MemoryError,
    ArithmeticError,
    LookupError,
    TypeError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.BusyResourceError,
)

_BACK_ERRORS: Final[tuple[type[Exception], ...]] = (TrimigError, *GUEST_ERRORS)


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """What the block raises is the guest's failure.

    Args:
        what: the call in words, for the message: ``"pausing the guest"``.

    Raises:
        GuestFailed: for an error of the system or of a value, and for errors of ours that would claim more than a
            guest can know (who owns it, that nothing was done).
        MigrationError: as it is.
    """
    try:
        yield
    except MigrationError:
        raise
    except TrimigError as error:
        raise GuestFailed(f"{what} failed: {error}") from error
    except GUEST_ERRORS as error:
        raise GuestFailed(f"{what} failed: {type(error).__name__}: {error}") from error


async def call(what: str, function: Callable[[], Awaitable[T]], seconds: float) -> T:
    """The result of *function*.

    Args:
        what: as for :func:`guarded`.
        seconds: how long it may take. The peer waits meanwhile, so a guest that hangs must not hang both sides.

    Raises:
        GuestFailed: it failed (see :func:`guarded`), or took too long.
        MigrationError: as the guest raised it.

    **Cancellation:** as the guest's method says.
    """
    with guarded(what):
        with trio.move_on_after(seconds) as limit:
            return await function()
    assert limit.cancelled_caught
    raise GuestFailed(f"{what} took longer than {formats.duration(seconds)}")


async def bring_back(what: str, call: Callable[[], Awaitable[None]], grace: float) -> GuestFailed | None:
    """Make *call*, which brings the guest back, within *grace* seconds; returns the failure instead of raising it.

    **Cancellation:** held off; the call is made in any case.
    """
    try:
        with trio.move_on_after(grace, shield=True) as scope:
            await call()
    except _BACK_ERRORS as error:
        failure = GuestFailed(f"the guest could not be {what}: {error}; it may be tried again")
        failure.__cause__ = error
        return failure
    if scope.cancelled_caught:
        return GuestFailed(f"the guest could not be {what} within {formats.duration(grace)}; it may be tried again")
    return None
