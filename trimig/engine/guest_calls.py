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
