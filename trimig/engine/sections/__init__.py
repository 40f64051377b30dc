"""Iterative sections of the stream: state that is sent while the guest runs, and again where it changes.

RAM is one. What a source does with each of them is QEMU's ``SaveVMHandlers``. A new one is a file of this package, and a
line in :func:`trimig.engine.source.announce.announce`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class SectionHandler(Protocol):
    """One iterative section at the source, in the order of the calls."""

    @property
    def boundary(self) -> bytes:
        """What brings the stream to the end of its section, behind a write that was cancelled and mended."""

    async def setup(self) -> None:
        """Send the START section, and begin to notice changes (``save_setup``).

        Raises:
            GuestFailed, TransportFailed.

        **Cancellation:** as for an error: :meth:`cleanup` is called in any case.
        """

    async def iterate(self, stop: Callable[[], bool]) -> None:
        """Send all that has to be sent, once (``save_live_iterate``).

        Args:
            stop: asked now and then whether to leave the rest.

        Raises:
            GuestFailed, TransportFailed.

        **Cancellation:** a part has been sent.
        """

    async def find_pending(self) -> int:
        """Find what has changed since the last call, and how many bytes have to be sent (``state_pending_exact``).

        Raises:
            GuestFailed.

        **Cancellation:** changes may be lost; only :meth:`cleanup` is useful behind it.
        """

    async def complete(self) -> None:
        """Send what was found last, with the END section; the guest stands still (``save_live_complete_precopy``).

        Raises:
            GuestFailed, TransportFailed.

        **Cancellation:** a part has been sent.
        """

    async def switch_to_postcopy(self) -> None:
        """Tell what follows the guest, in place of :meth:`complete`; a section that cannot follow is completed.

        Raises:
            GuestFailed, TransportFailed.

        **Cancellation:** a part has been sent.
        """

    def cleanup(self) -> None:
        """Release what :meth:`setup` and the others hold; idempotent (``save_cleanup``). GuestFailed."""
