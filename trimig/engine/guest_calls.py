"""Calls into the guest's code: bounded in time, and with one kind of error whatever that code raises."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import trio

from ..errors import GuestFailed, MigrationError

T = TypeVar("T")


async def call(what: str, awaitable: Awaitable[T], seconds: float) -> T:
    """The result of *awaitable*.

    Args:
        what: the call in words, for the message: ``"pausing the guest"``.
        seconds: how long it may take. The peer waits meanwhile, so a guest that hangs must not hang both sides.

    Raises:
        GuestFailed: it raised an error of the system or of a value, or took too long.
        MigrationError: as the guest raised it.

    **Cancellation:** as the guest's method says.
    """
    try:
        with trio.fail_after(seconds):
            return await awaitable
    except MigrationError:
        raise
    except trio.TooSlowError:
        raise GuestFailed(f"{what} took longer than {seconds:g} s") from None
    except (OSError, RuntimeError, ValueError, MemoryError, ArithmeticError, LookupError, TypeError) as error:
        raise GuestFailed(f"{what} failed: {type(error).__name__}: {error}") from error
