"""Guest memory -> page records on a channel: the one writer of pages.

The zero pages of a batch go as one block of 9-byte records, the others by one gathering write whose headers come from an
array and whose pages come straight from guest memory. Another encoding takes its pages in :meth:`PageSender.send`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...channel.channel import BATCH_PAGES, Channel
from ...guest import PAGE_SIZE, Pages
from ...wire.constants import RamFlag
from ...wire.encoder import RecordWriter
from .zeros import zero_pages

if TYPE_CHECKING:
    from ...monitor.statistics import Counters

#: ZERO records of one write: 9 bytes each.
ZERO_BATCH: Final = 8192


class PageSender:
    """Writes page records, and nothing around them."""

    def __init__(self, channel: Channel, counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._records = RecordWriter()

    async def send(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> None:
        """Send some pages of *block*, at least one. TransportFailed.

        Args:
            pages: where to read the content.
            indices: the numbers of the pages, rising.

        **Cancellation:** some have been sent; the channel is poisoned if one was cut.
        """
        for start in range(0, len(indices), BATCH_PAGES):
            batch = indices[start : start + BATCH_PAGES]
            zero = zero_pages(pages, batch)
            if zero.any():
                await self.send_zeros(block, batch[zero])
                batch = batch[~zero]
            if len(batch):
                await self._send_plain(block, pages, batch)

    async def send_zeros(self, block: str, indices: NDArray[np.int64]) -> None:
        """Send pages that are zero, at least one and at most ``ZERO_BATCH``. TransportFailed.

        **Cancellation:** as for :meth:`send`.
        """
        await self._channel.send(self._records.zero_records(block, indices * PAGE_SIZE))
        self._count(zero=len(indices))

    def send_now(self, block: str, pages: Pages, index: int) -> bytes:
        """Give one page to the kernel without waiting, as far as the kernel takes it.

        Returns:
            The bytes that the kernel did not take. They must be sent before anything else.
        """
        where = np.array([index], np.int64)
        if zero_pages(pages, where)[0]:
            data = self._records.zero_records(block, where * PAGE_SIZE)
            taken = self._channel.send_now(data)
            self._count(zero=1)
        else:
            data = self._records.page_records(block, where * PAGE_SIZE, pages[index : index + 1])
            taken = self._channel.send_now(data)
            self._count(normal=1)
        return data[taken:]

    async def _send_plain(self, block: str, pages: Pages, batch: NDArray[np.int64]) -> None:
        name, words = self._records.words(block, batch * PAGE_SIZE, RamFlag.PAGE)
        lead = words[:1].tobytes() + name if name else b""
        await self._channel.send_pages(lead, words, pages, batch)
        self._count(normal=len(batch))

    def _count(self, *, normal: int = 0, zero: int = 0) -> None:
        c = self._counters
        c.normal += normal
        c.duplicate += zero
        c.remaining = max(0, c.remaining - (normal + zero) * PAGE_SIZE)
