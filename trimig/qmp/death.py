"""Notices that the guest of a machine is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from ..guest import MortalGuest

if TYPE_CHECKING:
    from ..guest import Guest

log: Final = logging.getLogger("trimig.qmp")


class DeathWatch:
    """Calls a function once when the guest is lost.

    Args:
        guest: a guest that cannot be lost is not watched.
        nursery: the task of the watch runs there, until :meth:`close`.
        notify: called when the guest is lost. A QEMU emits STOP when its machine comes into the state ``internal-error``.
    """

    def __init__(self, guest: Guest, nursery: trio.Nursery, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._scope = trio.CancelScope()
        if isinstance(guest, MortalGuest):
            nursery.start_soon(self._watch, guest, name="trimig.qmp.death")

    async def _watch(self, guest: MortalGuest) -> None:
        with self._scope:
            await guest.wait_lost()
            if (lost := guest.lost) is not None:
                log.error("%s", lost)
                self._notify()

    def close(self) -> None:
        """End the watch. Idempotent."""
        self._scope.cancel("the machine is closed")
