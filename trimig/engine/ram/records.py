"""Guest memory -> page records on a channel: the one writer of pages.

The zero pages of a batch go as one block of 9-byte records, the others by one gathering write whose headers come from an
array and whose pages come straight from guest memory. A :class:`PageEncoder` takes its pages out of a batch before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ...channel.vectored import BATCH_PAGES, Pieces
from ...guest import PAGE_SIZE, Pages
from ...wire.constants import RamFlag
from ...wire.encoder import RecordWriter
from .zeros import find_zero_pages, zero_pages

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.step import SendPlan
    from ...monitor.statistics import Counters

#: ZERO records of one write: 9 bytes each.
ZERO_BATCH: Final = 8192
_ZERO_PAGE: Final = bytes(PAGE_SIZE)


class PageEncoder(Protocol):
    """Sends pages in another encoding than PAGE and ZERO, in precopy; :mod:`.encoding` makes it.

    It never gets a page that a guest in postcopy waits for, nor any page after the switch to postcopy.
    """

    def begin_pass(self, *, first: bool, last: bool) -> None:
        """A pass over the memory begins.

        Args:
            first: no page was sent before.
            last: the guest is stopped, and no pass follows.
        """

    def zeros(self, block: str, indices: NDArray[np.int64]) -> None:
        """These pages of *block* go as ZERO records."""

    async def send(
        self, records: PageSender, block: str, pages: Pages, indices: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Send some pages of *block*, at least one; none of them was zero just before. TransportFailed.

        The guest may write the pages meanwhile, so a page that is read twice may differ.

        Args:
            records: writes and counts the records: :meth:`PageSender.send_encoded`, :meth:`PageSender.send_copies`,
                :meth:`PageSender.send_whole`.
            pages: where to read the content.
            indices: the numbers of the pages, rising, at most BATCH_PAGES.

        Returns:
            The numbers of the pages that were left, rising. They go as PAGE records, straight from *pages*.

        **Cancellation:** as for :meth:`PageSender.send`.
        """


class PageSender:
    """Writes page records, and nothing around them.

    Args:
        encoder: gets each batch first; None for PAGE and ZERO records only.
        look_for_zeros: send pages that are zero as ZERO records. If False, only those of :meth:`send_zeros`.
    """

    def __init__(
        self,
        channel: Channel,
        counters: Counters,
        encoder: PageEncoder | None = None,
        *,
        look_for_zeros: bool = True,
    ) -> None:
        self._channel = channel
        self._counters = counters
        self._encoder = encoder
        self._look_for_zeros = look_for_zeros
        self._records = RecordWriter()

    def stop_encoding(self) -> None:
        """From now on all pages go as PAGE and ZERO records (postcopy)."""
        self._encoder = None

    async def send(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> None:
        """Send some pages of *block*, at least one. TransportFailed.

        Args:
            pages: where to read the content.
            indices: the numbers of the pages, rising.

        **Cancellation:** some have been sent; the channel is poisoned if one was cut.
        """
        for start in range(0, len(indices), BATCH_PAGES):
            batch = indices[start : start + BATCH_PAGES]
            if self._look_for_zeros and (zero := await find_zero_pages(pages, batch)).any():
                await self.send_zeros(block, batch[zero])
                batch = batch[~zero]
            if len(batch) and self._encoder is not None:
                batch = await self._encoder.send(self, block, pages, batch)
            if len(batch):
                await self.send_whole(block, pages, batch)

    async def send_zeros(self, block: str, indices: NDArray[np.int64]) -> None:
        """Send pages that are zero, at least one and at most ``ZERO_BATCH``. TransportFailed.

        **Cancellation:** as for :meth:`send`.
        """
        if self._encoder is not None:
            self._encoder.zeros(block, indices)
        await self._channel.send(self._records.zero_records(block, indices * PAGE_SIZE))
        self._count(zero=len(indices))

    async def send_whole(self, block: str, pages: Pages, indices: NDArray[np.int64]) -> None:
        """Send some pages, at least one and at most BATCH_PAGES, as PAGE records straight from *pages*. TransportFailed.

        **Cancellation:** as for :meth:`send`.
        """
        await self._send_plain(block, indices, pages, indices)

    async def send_copies(self, block: str, indices: NDArray[np.int64], copies: Pages) -> None:
        """Send pages, at least one and at most BATCH_PAGES, as PAGE records whose content is in *copies*. TransportFailed.

        Args:
            copies: shape (n, page size): one for each of *indices*.

        **Cancellation:** as for :meth:`send`.
        """
        await self._send_plain(block, indices, copies, np.arange(len(indices)))

    async def send_encoded(
        self, block: str, indices: NDArray[np.int64], flag: RamFlag, contents: Sequence[bytes]
    ) -> None:
        """Send pages, at least one, as records of another encoding. TransportFailed.

        Args:
            flag: of the records.
            contents: what follows the word, and the block's name, of each record.

        **Cancellation:** as for :meth:`send`.
        """
        data = self._records.records(block, indices * PAGE_SIZE, flag, contents)
        await self._channel.send(data)
        self._count(encoded=len(indices))
        self._counters.encoded_bytes += len(data)

    def skip(self, count: int) -> None:
        """Count *count* pages that the destination has as they are now: nothing is sent."""
        self._count(encoded=count)

    def send_now(self, block: str, pages: Pages, index: int) -> bytes:
        """Give one page to the kernel without waiting, as far as the kernel takes it.

        Returns:
            The bytes that the kernel did not take. They must be sent before anything else.
        """
        data = self._one(block, pages, np.array([index], np.int64))
        return data[self._channel.send_now(data) :]

    def _one(self, block: str, pages: Pages, index: NDArray[np.int64]) -> bytes:
        """The record of the one page of *index*, with a copy of the page. It is counted."""
        content = pages[index[0]].tobytes()
        if self._look_for_zeros and content == _ZERO_PAGE:
            self._count(zero=1)
            return self._records.records(block, index * PAGE_SIZE, RamFlag.ZERO, [b"\0"])
        self._count(normal=1)
        return self._records.records(block, index * PAGE_SIZE, RamFlag.PAGE, [content])

    def plan(self, lead: bytes, block: str, pages: Pages, indices: NDArray[np.int64]) -> SendPlan:
        """What :meth:`send` would send of up to BATCH_PAGES pages without an encoder, behind *lead*. The pages are counted."""
        if len(indices) == 1:  # as a rule a page that a guest waits for, so each microsecond counts
            data = np.frombuffer(lead + self._one(block, pages, indices), np.uint8)
            return Pieces(np.array([[data.ctypes.data, len(data)]], np.uint64), keep=data)
        head, keep = lead, indices
        if self._look_for_zeros and (zero := zero_pages(pages, indices)).any():
            head += self._records.zero_records(block, indices[zero] * PAGE_SIZE)
            keep = indices[~zero]
        self._count(normal=len(keep), zero=len(indices) - len(keep))
        if not len(keep):
            data = np.frombuffer(head, np.uint8)
            return Pieces(np.array([[data.ctypes.data, len(data)]], np.uint64), keep=data)
        name, words = self._records.words(block, keep * PAGE_SIZE, RamFlag.PAGE)
        data = np.frombuffer(head + words[:1].tobytes() + name, np.uint8)
        vector = np.empty((len(keep), 4), np.uint64)
        vector[:, 0] = words.ctypes.data + np.arange(len(keep), dtype=np.uint64) * np.uint64(8)
        vector[:, 1] = 8
        vector[:, 2] = pages.ctypes.data + keep.astype(np.uint64) * np.uint64(PAGE_SIZE)
        vector[:, 3] = PAGE_SIZE
        vector[0, :2] = data.ctypes.data, len(data)
        return Pieces(vector.reshape(-1, 2), keep=(data, words))

    async def _send_plain(self, block: str, indices: NDArray[np.int64], pages: Pages, rows: NDArray[np.int64]) -> None:
        """PAGE records of *indices*, whose content is in *rows* of *pages*."""
        name, words = self._records.words(block, indices * PAGE_SIZE, RamFlag.PAGE)
        lead = words[:1].tobytes() + name if name else b""
        await self._channel.send_pages(lead, words, pages, rows)
        self._count(normal=len(indices))

    def _count(self, *, normal: int = 0, zero: int = 0, encoded: int = 0) -> None:
        c = self._counters
        c.normal += normal
        c.duplicate += zero
        c.encoded += encoded
        c.remaining = max(0, c.remaining - (normal + zero + encoded) * PAGE_SIZE)
