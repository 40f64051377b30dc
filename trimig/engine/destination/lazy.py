"""Which guests can run before their memory has come."""

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
    """Whether *guest* can run on memory that follows, or be kept until it is whole.

    Raises:
        GuestFailed: with the reason.
    """
    if not isinstance(guest, LazyGuest | OpaqueGuest):
        raise GuestFailed(
            f"guest {guest.name!r} cannot be the destination of postcopy: it lives in this process, where a thread that "
            "touches a missing page holds Python's global lock, so no other thread could bring the page; use a WorkloadGuest, or a "
            "LazyAppGuest, which awaits its pages, or turn postcopy-ram off"
        )


def obstacle(guest: Guest) -> str | None:
    """Why *guest* could not be the destination of postcopy on this host; None if it could, as far as can be told before."""
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
    """From here on an access to an absent page of *guest* waits. GuestFailed, also when it takes longer than *seconds*.

    **Cancellation:** as the guest's method says.
    """
    return await guest_calls.call("watching for absent pages", guest.missing_memory, seconds)
