"""Iterative sections of the stream: state that is sent while the guest runs, and again where it changes.

RAM is one. What a source and a destination do with each of them is QEMU's ``SaveVMHandlers``. A new section is a file of
this package, a line in :mod:`.table`, and a row in :data:`trimig.wire.sections.table.SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import trio

    from ...wire.events import Element


class SectionHandler(Protocol):
    """One iterative section at the source, in the order of the calls."""

    @property
    def tasks(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """What sends on connections of this section's own, from before :meth:`setup` to the end of the attempt, by the name
        of each task. Each is cancelled at the end.
        """

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

    async def cleanup(self) -> None:
        """Release what :meth:`setup` and the others hold; idempotent (``save_cleanup``). GuestFailed.

        **Cancellation:** it is released at once.
        """


class SectionLoader(Protocol):
    """One iterative section at the destination."""

    def begin(self, nursery: trio.Nursery) -> None:
        """The main connection is there: expect the connections that this section needs beside it.

        Args:
            nursery: of the attempt; the tasks of those connections run in it.
        """

    async def load(self, event: Element) -> None:
        """Take one element of the section's content (``load_state``).

        Raises:
            RemoteProtocolError: it does not fit the guest.
            GuestFailed: the guest cannot take it.

        **Cancellation:** a part was taken.
        """
