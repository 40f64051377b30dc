"""Parked guests at the destination: one that is written to its file while it arrives, and the memory of one in postcopy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from ...errors import GuestFailed
from ...guest import OpaqueGuest, Pages, RamBlock, StoringGuest, Wait
from ...status import Status
from ..guest_calls import guarded

if TYPE_CHECKING:
    from ...monitor.core import MonitorCore
    from ..ram.marked import MarkedPages
    from .incoming import Incoming

#: The number of received pages that may wait for the disk; above it the stream is not read. So a slow disk slows the
#: source down while its guest still runs. Without the limit the queue for the disk would lengthen the downtime.
MOST_MARKED: Final = 16384


class Storing:
    """The task in which a guest writes its received pages to its file.

    Args:
        guest: the guest, with its RAM blocks made.
        pages: the received pages that are not written yet.
    """

    def __init__(self, guest: StoringGuest, pages: MarkedPages, monitor: MonitorCore) -> None:
        self._guest = guest
        #: The received pages that are not written yet.
        self.pages = pages
        self._monitor = monitor
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._writes = True

    async def run(self) -> None:
        """Run the task. It ends with :meth:`end`, or when the guest's method returns.

        Raises:
            GuestFailed: the guest cannot write, and the source still has its guest. After the switch to postcopy this is
                only a warning: all pages are received, and then :meth:`trimig.guest.OpaqueGuest.ram_received` fails.

        **Cancellation:** a piece that is being written is finished.
        """
        try:
            with self._scope, guarded("keeping the RAM"):
                await self._guest.store(self.pages)
        except GuestFailed as error:
            if self._monitor.status is Status.ACTIVE:
                raise
            self._monitor.warn(f"{error}; the rest of the guest's memory is still being received")
        finally:
            self._writes = False
            self._ended.set()
            self.pages.wake()

    async def wait_room(self) -> None:
        """Wait while too many pages have not been written.

        **Cancellation:** no effect.
        """
        while self._writes and self.pages.count > MOST_MARKED:
            await self.pages.wait_taken()

    async def reserve(self, missing: int) -> None:
        """Let the guest reserve space for *missing* pages that will come, and for the pages that it has not written.

        Raises:
            GuestFailed: there is not enough space.

        **Cancellation:** as for the guest's method.
        """
        with guarded("setting room aside"):
            await self._guest.reserve(missing + self.pages.count)

    async def end(self) -> None:
        """End the task. The guest writes the remaining pages in a later call.

        **Cancellation:** the task may go on; it ends with its nursery.
        """
        self._scope.cancel("all pages have come")
        await self._ended.wait()


async def keep_ram(into: Incoming, storing: Storing | None) -> None:
    """Tell a parked guest that all of its RAM has come, so that it can complete its file. GuestFailed.

    **Cancellation:** as for the guest's method.
    """
    assert isinstance(into.guest, OpaqueGuest)
    if storing is not None:
        await storing.end()
    with guarded("keeping the RAM"):
        await into.guest.ram_received()


class KeptMemory:
    """The :class:`trimig.guest.MissingMemory` of a parked guest. It does not run, so no thread waits for a page.

    Args:
        storing: the task that writes received pages to the guest's file, if there is one.
    """

    def __init__(self, blocks: Sequence[RamBlock], storing: Storing | None) -> None:
        self._blocks = tuple(blocks)
        self._marks = None if storing is None else storing.pages

    def fileno(self) -> int:
        """Raise OSError: there is no descriptor."""
        raise OSError("the memory of a guest that does not run is touched by nothing")

    def waits(self) -> Sequence[Wait]:
        """Return no wait, because the guest does not run."""
        return ()

    def place(self, block: int, first: int, pages: Pages) -> int:
        """Copy *pages* into the block from page *first* on."""
        self._blocks[block].pages[first : first + len(pages)] = pages
        return self._came(block, first, len(pages))

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """Count the pages as received. Their memory was discarded before, so it is zero already."""
        return self._came(block, first, count)

    def _came(self, block: int, first: int, count: int) -> int:
        if self._marks is not None:
            self._marks.mark(self._blocks[block].name, first, count)
        return count

    def close(self) -> None:
        """Do nothing."""
