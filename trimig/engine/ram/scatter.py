"""Pages whose places are known before they come: the kernel puts them there, without a copy in Python.

Pages without memory behind them are written to the file of their block. The first touch of a mapped page costs more than
that (see :mod:`.receiver`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...channel import vectored
from ...guest import PAGE_SIZE

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from .placement import Target

#: Bytes that are read at once on their way to a file; they stay in the processor's cache.
_STAGING_BYTES: Final = 1 << 20


class Scatterer:
    """Reads pages from sockets; one for each incoming migration, for all of its connections."""

    def __init__(self) -> None:
        self._staging = np.empty(_STAGING_BYTES, np.uint8)

    async def read(self, channel: Channel, target: Target, indices: NDArray[np.int64]) -> bool:
        """Read pages of *target*. False at the end of the stream.

        Args:
            indices: the numbers of the pages, at least one, in the order in which they come.

        Raises:
            TransportFailed: the connection broke, or nothing came for ``stall_timeout``.

        **Cancellation:** pages that were not received yet may hold a part of their content.
        """
        await trio.lowlevel.checkpoint()
        starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1)
        runs = np.empty((len(starts), 2), np.uint64)
        runs[:, 0] = indices[starts] * PAGE_SIZE
        runs[:, 1] = np.diff(starts, append=len(indices)) * PAGE_SIZE
        fresh = target.fresh_each(indices)
        # The record of a zero page must not take a page for untouched of which a part has come.
        target.untouched[indices] = False
        if fresh:
            whole = await self._to_file(channel, target, runs)
        else:
            runs[:, 0] += np.uint64(target.base)
            whole = await self._to_memory(channel, vectored.Pieces(runs))
        if whole:
            target.arrived_each(indices)
        return whole

    async def _to_memory(self, channel: Channel, pieces: vectored.Pieces) -> bool:
        while pieces.left:
            if not await channel.read_pieces(pieces):
                return False
        return True

    async def _to_file(self, channel: Channel, target: Target, runs: vectored.Vector) -> bool:
        """Write pages to the file of their block.

        Args:
            runs: position in the file and length of each run of pages, in bytes.
        """
        left = int(runs[:, 1].sum())
        rest = runs.tolist()
        while left:
            piece = np.array([(self._staging.ctypes.data, min(left, _STAGING_BYTES))], np.uint64)
            # The staging is shared: nothing is awaited between the read and the end of the writes.
            count = await channel.read_pieces(vectored.Pieces(piece))
            if not count:
                return False
            left -= count
            data = self._staging[:count].data
            while len(data):
                position, length = rest[0]
                part = data[:length]
                target.write_now(position, part)
                data = data[len(part) :]
                rest[0] = [position + len(part), length - len(part)]
                if not rest[0][1]:
                    rest.pop(0)
        return True
