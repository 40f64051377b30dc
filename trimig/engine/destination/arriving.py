"""A guest that writes itself out while it arrives, and one that is only kept."""

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

#: Marked pages above which the stream is not read on: so a disk that is slower than the network slows the source down while
#: its guest still runs, instead of having a backlog when it stands still.
MOST_MARKED: Final = 16384


class Storing:
    """A guest writes itself out while it arrives.

    Args:
        guest: its RAM blocks are there.
        pages: what has come.
    """

    def __init__(self, guest: StoringGuest, pages: MarkedPages, monitor: MonitorCore) -> None:
        self._guest = guest
        #: What has come.
        self.pages = pages
        self._monitor = monitor
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._writes = True

    async def run(self) -> None:
        """The task. It ends with :meth:`end`, or when the guest has nothing to write.

        Raises:
            GuestFailed: it cannot write, and the source can still keep its guest. Behind the switch to postcopy it can not:
                then all pages are taken into memory first, and :meth:`trimig.guest.OpaqueGuest.ram_received` fails.

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
        """Let the guest set aside the room for *missing* pages that will come, and for those that it has not written.

        Raises:
            GuestFailed: there is none.

        **Cancellation:** as for the guest's method.
        """
        with guarded("setting room aside"):
            await self._guest.reserve(missing + self.pages.count)

    async def end(self) -> None:
        """End the task; what it has not written is left to the guest.

        **Cancellation:** it may go on, and ends with the nursery it is in.
        """
        self._scope.cancel("all pages have come")
        await self._ended.wait()


async def keep_ram(into: Incoming, storing: Storing | None) -> None:
    """Tell a guest that is only kept that all of its RAM is there: one on disk can be written out. GuestFailed.

    **Cancellation:** as for the guest's method.
    """
    assert isinstance(into.guest, OpaqueGuest)
    if storing is not None:
        await storing.end()
    with guarded("keeping the RAM"):
        await into.guest.ram_received()


class KeptMemory:
    """:class:`trimig.guest.MissingMemory` of a guest that is only kept: nothing waits for a page.

    Args:
        storing: writes what comes, if the guest does that.
    """

    def __init__(self, blocks: Sequence[RamBlock], storing: Storing | None) -> None:
        self._blocks = tuple(blocks)
        self._marks = None if storing is None else storing.pages

    def fileno(self) -> int:
        """There is nothing to wait for."""
        raise OSError("the memory of a guest that does not run is touched by nothing")

    def waits(self) -> Sequence[Wait]:
        """None."""
        return ()

    def place(self, block: int, first: int, pages: Pages) -> int:
        """Copy them."""
        self._blocks[block].pages[first : first + len(pages)] = pages
        return self._came(block, first, len(pages))

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """The memory was discarded, so they are there."""
        return self._came(block, first, count)

    def _came(self, block: int, first: int, count: int) -> int:
        if self._marks is not None:
            self._marks.mark(self._blocks[block].name, first, count)
        return count

    def close(self) -> None:
        """Nothing to do."""
