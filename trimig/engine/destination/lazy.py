"""Checks whether a guest can be the destination of postcopy, and opens its missing memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import GuestFailed
from ...guest import LazyGuest, OpaqueGuest
from ...memory.faults import MissingPages
from ...memory.linux import MemoryUnavailable
from .. import guest_calls

if TYPE_CHECKING:
    from ...guest import Guest, MissingMemory


def check_guest(guest: Guest) -> None:
    """Check that *guest* can run before all of its memory has come, or is parked until then.

    Raises:
        GuestFailed: it can not; with the reason.
    """
    if not isinstance(guest, LazyGuest | OpaqueGuest):
        raise GuestFailed(
            f"guest {guest.name!r} cannot be the destination of postcopy: it lives in this process, where a thread that "
            "touches a missing page holds Python's global lock, so no other thread could bring the page; use a WorkloadGuest, or a "
            "LazyAppGuest, which awaits its pages, or turn postcopy-ram off"
        )


def obstacle(guest: Guest) -> str | None:
    """Why *guest* cannot be the destination of postcopy on this host; None if no reason is visible in advance."""
    try:
        check_guest(guest)
        if isinstance(guest, LazyGuest):
            MissingPages.open(user_mode_only=True).close()
    except GuestFailed as error:
        return str(error)
    except MemoryUnavailable as error:
        return error.strerror or str(error)
    return None


async def open_memory(guest: LazyGuest, seconds: float) -> MissingMemory:
    """Make each access to an absent page of *guest* wait from now on. GuestFailed, also after *seconds*.

    **Cancellation:** as the guest's method says.
    """
    return await guest_calls.call("watching for absent pages", guest.missing_memory, seconds)
