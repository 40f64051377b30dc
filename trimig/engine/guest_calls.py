"""Calls into the guest's code, with a time limit, and with GuestFailed in place of most exceptions of that code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import trio

from .. import formats
from ..errors import GuestFailed, MigrationError, TrimigError
from ..guest import DeviceSection, DirtyTracker, Guest, MortalGuest, PageBitmap, RamBlock
from .guest_results import saved_devices, written_pages

T = TypeVar("T")

#: Exceptions of a guest's code, beside trimig's own errors, that become GuestFailed. AttributeError and AssertionError are
#: not among them: they show a mistake in a program and are reported as InternalError.
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
    """Turn the exceptions of the block into GuestFailed.

    Args:
        what: the call in words, for the message: ``"pausing the guest"``.

    Raises:
        GuestFailed: the block raised one of GUEST_ERRORS, or a TrimigError that is no MigrationError. Such a TrimigError
            states facts that a guest cannot know: which side owns it, or that nothing was done.
        MigrationError: the block raised it; it is not changed.
    """
    try:
        yield
    except MigrationError:
        raise
    except TrimigError as error:
        raise GuestFailed(f"{what} failed: {error}") from error
    except GUEST_ERRORS as error:
        raise GuestFailed(f"{what} failed: {type(error).__name__}: {error}") from error


def new_tracker(guest: Guest) -> DirtyTracker:
    """A new dirty tracker of *guest*.

    Raises:
        GuestFailed: the guest's code failed, or what it returned is no tracker.
    """
    with guarded("preparing dirty tracking"):
        tracker = guest.dirty_tracker()
        if not isinstance(tracker, DirtyTracker):
            raise GuestFailed(
                f"{type(guest).__name__}.dirty_tracker() returned {tracker!r:.80}, which is no dirty tracker: it must have "
                "`method`, `start`, `sync` and `stop` (trimig docs own_guest)"
            )
        return tracker


async def call(what: str, function: Callable[[], Awaitable[T]], seconds: float) -> T:
    """Call *function* and return its result.

    Args:
        what: as for :func:`guarded`.
        seconds: the time limit. The peer waits during the call, so a guest that hangs must not block both sides.

    Raises:
        GuestFailed: *function* failed (see :func:`guarded`), or took too long.
        MigrationError: *function* raised it.

    **Cancellation:** as the guest's method says.
    """
    with guarded(what):
        with trio.move_on_after(seconds) as limit:
            return await function()
    assert limit.cancelled_caught
    raise GuestFailed(f"{what} took longer than {formats.duration(seconds)}")


async def find_written(tracker: DirtyTracker, blocks: Sequence[RamBlock], seconds: float) -> Mapping[str, PageBitmap]:
    """The pages of *blocks* that were written since the last call, by name; *seconds* as for :func:`call`.

    Raises:
        GuestFailed: the tracker failed, or what it returned are no such pages.

    **Cancellation:** pages written since the last call may be lost.
    """
    return written_pages(await call("finding dirty pages", tracker.sync, seconds), blocks)


async def save_devices(guest: Guest, seconds: float, what: str = "saving the devices") -> Sequence[DeviceSection]:
    """The state of the devices of *guest*; *seconds* and *what* as for :func:`call`.

    Raises:
        GuestFailed: the guest failed, or what it returned are no sections.
        MigrationError: the guest raised it.

    **Cancellation:** has no effect on the guest.
    """
    return saved_devices(await call(what, guest.save_devices, seconds))


async def watch_guest(guest: MortalGuest) -> None:
    """Wait until *guest* is lost, or has ended in order.

    Raises:
        GuestFailed: it is lost, and this side owns it.

    **Cancellation:** no effect.
    """
    await guest.wait_lost()
    if (lost := guest.lost) is not None:
        raise GuestFailed(lost)


async def bring_back(what: str, call: Callable[[], Awaitable[None]], grace: float) -> GuestFailed | None:
    """Make *call*, which lets the guest run again, within *grace* seconds. A failure is returned and not raised.

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
