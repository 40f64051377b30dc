"""An application that can run before all of its memory is here, because it awaits its pages before it touches them.

In the same process a thread cannot wait inside a touch of memory: it would hold Python's global lock, and no other
thread could place the page. So the application names the bytes that it will touch, and awaits them::

    guest = LazyAppGuest("sessions", running=False)
    table = guest.add_ram("table", 64 * MiB)

    async def worker():
        while True:
            request = await next_request()
            await guest.ensure_present("table", request.offset, 4096)  # at once, except in postcopy
            async with guest.running():
                apply(request, table.view)
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import trio

from ..errors import GuestFailed, StateError
from ..guest import PAGE_SIZE, PageBitmap, Pages, Wait
from ..memory.block import MemfdBlock
from .app import AppGuest


class LazyBlock(MemfdBlock):
    """A block that records its discarded pages, which must be received before the application touches them."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__(name, length)
        self.gone: PageBitmap = np.zeros(length // PAGE_SIZE, np.bool_)

    def discard_slice(self, first_page: int, count: int) -> None:
        """Discard as :class:`MemfdBlock` does, and record the pages."""
        super().discard_slice(first_page, count)
        self.gone[first_page : first_page + count] = True


class LazyAppGuest(AppGuest):
    """An :class:`AppGuest` that may be the destination of postcopy; implements :class:`trimig.guest.LazyGuest`.

    Every task that touches its memory must await :meth:`ensure_present` before. Otherwise it reads zeros from pages
    that have not come yet, and its writes to them are lost.
    """

    _memory: AppMissingMemory | None = None

    def _make_block(self, name: str, length: int) -> MemfdBlock:
        return LazyBlock(name, length)

    async def ensure_present(self, block: str, start: int, length: int) -> None:
        """Wait until the bytes ``[start, start + length)`` of *block* are here; outside of postcopy they always are.

        Once here they stay. Do not await it inside :meth:`running`: a pause would wait for this call, and this call for
        the network.

        Raises:
            ValueError: the range is not in such a block.
            StateError: it is awaited inside :meth:`running`, and the bytes are not here.
            GuestFailed: the bytes will never come; the guest is lost.

        **Cancellation:** no effect.
        """
        size = next((ram.length for ram in self._blocks if ram.name == block), -1)
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start}..{start + length} are not in a RAM block {block!r}")
        await trio.lowlevel.checkpoint()
        if self._memory is None or not length:
            return
        pages = slice(start // PAGE_SIZE, (start + length - 1) // PAGE_SIZE + 1)
        number = [ram.name for ram in self.ram].index(block)
        if self._memory.here(number, pages):
            return
        if self._gate.held_by_caller():
            raise StateError(
                "await ensure_present() before guest.running(), not inside: a pause would wait for the network"
            )
        await self._memory.wait(number, pages)

    def _lazy_blocks(self) -> list[LazyBlock]:
        """All blocks, in the order of :attr:`ram`; :class:`trimig.guest.Wait` uses these numbers."""
        blocks = []
        for block in self.ram:
            assert isinstance(block, LazyBlock)
            blocks.append(block)
        return blocks

    async def missing_memory(self) -> AppMissingMemory:
        """Make :meth:`ensure_present` wait for pages without memory from now on. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()
        self._memory = AppMissingMemory(self._lazy_blocks())
        return self._memory

    async def memory_is_whole(self) -> Sequence[float]:
        """End postcopy: no page is missing any more. Returns the seconds that all tasks have waited. **Cancellation:**
        no effect.
        """
        await trio.lowlevel.checkpoint()
        memory, self._memory = self._memory, None
        for block in self._lazy_blocks():
            block.gone[:] = False  # includes pages that release-ram has discarded at a source
        return (memory.waited,) if memory is not None else (0.0,)


class AppMissingMemory:
    """Implements :class:`trimig.guest.MissingMemory` for tasks of this process."""

    def __init__(self, blocks: Sequence[LazyBlock]) -> None:
        self._blocks = tuple(blocks)
        self._absent = [block.gone for block in blocks]
        self._wanted: list[Wait] = []
        self._news = trio.Event()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        #: Seconds.
        self.waited = 0.0

    def here(self, block: int, pages: slice) -> bool:
        """Whether all of these pages have come."""
        return not self._absent[block][pages].any()

    async def wait(self, block: int, pages: slice) -> None:
        """Request the missing pages, and wait for them; raises the errors of :meth:`LazyAppGuest.ensure_present`.

        **Cancellation:** no effect.
        """
        began = trio.current_time()
        thread = id(trio.lowlevel.current_task()) & 0x7FFFFFFF
        missing = (np.flatnonzero(self._absent[block][pages]) + pages.start).tolist()
        self._wanted += [Wait(block=block, page=page, thread=thread) for page in missing]
        if self._event >= 0:
            os.eventfd_write(self._event, 1)
        try:
            while self._absent[block][pages].any():
                if self._event < 0:
                    raise GuestFailed(
                        f"bytes of RAM block {self._blocks[block].name!r} will never come: the rest of the guest's memory "
                        "is lost"
                    )
                await self._news.wait()
        finally:
            self.waited += trio.current_time() - began

    def fileno(self) -> int:
        """A descriptor that is readable when a task has begun to wait."""
        return self._event

    def waits(self) -> Sequence[Wait]:
        """The waits that began since the last call."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return ()
        wanted, self._wanted = self._wanted, []
        return wanted

    def place(self, block: int, first: int, pages: Pages) -> int:
        """Write *pages* where pages are absent."""
        absent = self._absent[block][first : first + len(pages)]
        new = np.flatnonzero(absent)
        self._blocks[block].pages[first + new] = pages[new]
        absent[:] = False
        self._tell()
        return len(new)

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """As :meth:`place`; the pages were discarded, so they are zero already."""
        absent = self._absent[block][first : first + count]
        new = int(np.count_nonzero(absent))
        absent[:] = False
        self._tell()
        return new

    def close(self) -> None:
        """Fail all tasks that still wait. Idempotent."""
        if self._event >= 0:
            os.close(self._event)
            self._event = -1
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()
