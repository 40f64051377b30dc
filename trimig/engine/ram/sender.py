"""Guest memory -> the section ``ram`` of the stream, in batches of records within the bandwidth limit.

The guest may write meanwhile; what it changes is dirty again and will be sent again. With multifd the pages of precopy go on
data channels, and the section says where these are synchronised.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...guest import PageBitmap, Pages, RamBlock
from ...wire import encoder as wire
from ...wire.constants import Section
from ...wire.pages.plain import ZERO_RECORD
from .records import ZERO_BATCH

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.limiter import Limiter
    from ...channel.step import SendPlan
    from .multifd_sender import MultifdSender
    from .records import PageSender

#: The section id of RAM in every QEMU (stream.md part 5.4), and ours.
RAM_SECTION = 2
#: A PART section is closed after this many bytes, so that what is not RAM never waits long for its turn.
PART_BYTES = 32 << 20


class RamSender:
    """Sends pages of RAM blocks as sections of the stream.

    Args:
        pages: writes the records to *channel*.
        data: writes the pages of precopy to the data channels of multifd, if there are any.
        section_id: of the section ``ram``.
        footers: close sections with a footer.
    """

    def __init__(
        self,
        channel: Channel,
        limiter: Limiter,
        pages: PageSender,
        *,
        data: MultifdSender | None = None,
        section_id: int = RAM_SECTION,
        footers: bool = True,
    ) -> None:
        self._channel = channel
        self._pages = pages
        self._data = data
        self._limiter = limiter
        self._id = section_id
        self._close = wire.END_WORD + (wire.section_footer(section_id) if footers else b"")
        self._open_since: int | None = None
        self._inside = False  # a PART or END section has begun, and its end has not

    def stop_encoding(self) -> None:
        """See :meth:`.records.PageSender.stop_encoding`."""
        self._pages.stop_encoding()

    @property
    def boundary(self) -> bytes:
        """What brings the stream to the end of its section, behind a write that was cancelled and mended."""
        return self._close if self._inside else b""

    async def start(self, blocks: Sequence[RamBlock]) -> None:
        """The START section with the size list."""
        head = wire.section_start(Section.START, self._id, "ram", 0, wire.RAM_VERSION)
        listed = head + wire.ram_list((b.name, b.length) for b in blocks)
        if self._data is not None and (check := self._data.check) is not None:
            await check.begin()
            await self._channel.send(listed + self._close)
            await check.end()
            await self._synchronised(pass_over=True)
            return
        await self._channel.send(listed + await self._synchronised(pass_over=True) + self._close)

    async def send_pass(
        self,
        block: RamBlock,
        pages: Pages,
        todo: PageBitmap,
        absent: PageBitmap | None,
        stop: Callable[[], bool] | None = None,
        protect: Callable[[NDArray[np.int64]], Awaitable[None]] | None = None,
    ) -> PageBitmap | None:
        """Send the pages of *block* that are set in *todo*, in PART sections. The last one stays open: see :meth:`end_pass`.

        Args:
            pages: where to read the content: the block's memory, or the dirty tracker's snapshot of it.
            absent: pages known to be zero without a look (they have no memory, and looking would give them some).
            stop: asked between batches whether to leave the rest.
            protect: called with the numbers of the pages before their content is read.

        Returns:
            What was left; None for nothing.

        **Cancellation:** some pages have been sent; the channel is poisoned if one was cut.
        """
        if absent is not None:
            await self._send_absent(block.name, np.flatnonzero(todo & absent))
            todo = todo & ~absent
        rest = await self._send_limited(block.name, pages, np.flatnonzero(todo), stop, protect)
        if rest is None:
            return None
        left = np.zeros_like(todo)
        left[rest] = True
        return left

    async def end_pass(self) -> None:
        """Close the section behind the last block of a pass.

        **Cancellation:** the channel is poisoned if a write was cut.
        """
        await self._part_end(pass_over=True)

    def leave_channels(self) -> None:
        """Send everything on the main connection from now on. All data channels have been synchronised."""
        if self._data is not None:
            self._data.finish()
            self._data = None

    async def send_unlimited(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> None:
        """Send some pages at once, whatever the bandwidth limit says. Their section stays open for more.

        **Cancellation:** as for :meth:`send_pass`.
        """
        await self._part_begin()
        await self._pages.send(block, pages, indices)

    def send_page_now(self, block: str, pages: Pages, index: int) -> bytes | None:
        """Hand one page to the kernel without waiting, where that can be done.

        Returns:
            What it did not take, which must be sent before anything else; None if nothing was begun: no section is
            open, or the transport is no socket.
        """
        if self._open_since is None or self._channel.socket_fd is None:
            return None
        return self._pages.send_now(block, pages, index)

    def plan(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> SendPlan:
        """What :meth:`send_unlimited` would send of up to BATCH_PAGES pages; it must be sent next. Only without data channels."""
        assert self._data is None
        head = b""
        if self._open_since is not None and self._channel.sent - self._open_since > PART_BYTES:
            head, self._open_since = self._close, None
        if self._open_since is None:
            self._inside = True
            head += wire.section_continue(Section.PART, self._id)
            self._open_since = self._channel.sent + len(head)
        return self._pages.plan(head, block, pages, indices)

    async def end(self, rest: Sequence[tuple[RamBlock, Pages, PageBitmap]]) -> None:
        """The END section, with the last pages in it: of each block, where to read them and which.

        When this returns, all data channels have been synchronised, and nothing follows on them.

        **Cancellation:** as for :meth:`send_pass`.
        """
        await self._part_end()
        self._inside = True
        await self._channel.send(wire.section_continue(Section.END, self._id))
        self._open_since = None
        for block, pages, todo in rest:
            await self._send_limited(block.name, pages, np.flatnonzero(todo), part=False)
        said = await self._synchronised(pass_over=True)
        self._inside = False
        await self._channel.send(said + self._close)
        self.leave_channels()

    async def _part_begin(self) -> None:
        end = b""
        if self._open_since is not None:
            if self._channel.sent - self._open_since <= PART_BYTES:
                return
            end = await self._synchronised(pass_over=False) + self._close
        self._open_since = None
        self._inside = True
        await self._channel.send(end + wire.section_continue(Section.PART, self._id))
        self._open_since = self._channel.sent

    async def _part_end(self, *, pass_over: bool = False) -> None:
        if self._open_since is not None:
            said = await self._synchronised(pass_over=pass_over)
            self._open_since = None
            self._inside = False
            await self._channel.send(said + self._close)

    async def _synchronised(self, *, pass_over: bool) -> bytes:
        """Synchronise the data channels, if there are any; returns what the section says of it before its end."""
        return b"" if self._data is None else await self._data.synchronise(pass_over=pass_over)

    @property
    def _spent(self) -> int:
        """Bytes that were sent here or handed over to data channels."""
        return self._channel.sent + (0 if self._data is None else self._data.handed_over)

    async def _send_absent(self, block: str, indices: NDArray[np.int64]) -> None:
        for start in range(0, len(indices), ZERO_BATCH):
            batch = indices[start : start + ZERO_BATCH]
            await self._part_begin()
            await self._limiter.bytes(len(batch) * ZERO_RECORD)
            await (self._data or self._pages).send_zeros(block, batch)

    async def _send_limited(
        self,
        block: str,
        pages: Pages,
        indices: NDArray[np.int64],
        stop: Callable[[], bool] | None = None,
        protect: Callable[[NDArray[np.int64]], Awaitable[None]] | None = None,
        *,
        part: bool = True,
    ) -> NDArray[np.int64] | None:
        """Returns what was left because *stop* said so."""
        position = 0
        while position < len(indices):
            if stop is not None and stop():
                return indices[position:]
            count = await self._limiter.pages(len(indices) - position)
            if part:
                await self._part_begin()
            before, batch = self._spent, indices[position : position + count]
            if protect is not None:
                await protect(batch)
            await (self._data or self._pages).send(block, pages, batch)
            self._limiter.give_back(count, self._spent - before)
            position += count
        return None
