"""Pages whose places are known before they come: the kernel puts them there, without a copy in Python.

Pages without memory behind them are written to the file of their block. The first touch of a mapped page costs more than
that (see :mod:`.receiver`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...channel.vectored import Pieces
from ...guest import PAGE_SIZE

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.vectored import Span, Vector
    from .placement import Target

#: Bytes that are read at once on their way to a file; they stay in the processor's cache.
_STAGING_BYTES: Final = 256 << 10


class Scatterer:
    """Reads pages from one connection."""

    def __init__(self) -> None:
        self._staging: NDArray[np.uint8] | None = None

    async def read(self, channel: Channel, target: Target, indices: NDArray[np.int64]) -> bool:
        """Read pages of *target*. False at the end of the stream.

        Args:
            indices: the numbers of the pages, at least one, in the order in which they come.

        Raises:
            TransportFailed: the connection broke, or nothing came for ``stall_timeout``.

        **Cancellation:** pages that were not received yet may hold a part of their content.
        """
        starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1)
        runs = np.empty((len(starts), 2), np.uint64)
        runs[:, 0] = indices[starts] * PAGE_SIZE
        runs[:, 1] = np.diff(starts, append=len(indices)) * PAGE_SIZE
        fresh = target.fresh_each(indices)
        # The record of a zero page must not take a page for untouched of which a part has come.
        target.untouched[indices] = False
        if fresh:
            if self._staging is None:
                self._staging = np.empty(_STAGING_BYTES, np.uint8)
            plan: Pieces | _Writing = _Writing(target, runs, self._staging)
        else:
            runs[:, 0] += np.uint64(target.base)
            plan = Pieces(runs)
        if await channel.receive_vector(plan, len(indices) * PAGE_SIZE) and plan.left:
            return False
        target.arrived_each(indices)
        return True


class _Writing:
    """Bytes that are written to the file of a block as they come. A :class:`trimig.channel.step.Plan`.

    Args:
        runs: position in the file and size of each run, in bytes.
        staging: the buffer through which they go.
    """

    def __init__(self, target: Target, runs: Vector, staging: NDArray[np.uint8]) -> None:
        self._target = target
        self._runs: list[list[int]] = runs[::-1].tolist()  # the next one is the last
        self._staging = staging
        self._element = np.array([(staging.ctypes.data, len(staging))], np.uint64)
        self._span: Span = (self._element.ctypes.data, 1)
        #: Bytes that have not come.
        self.left = int(runs[:, 1].sum())

    @property
    def rest(self) -> Span:
        """The staging, see :class:`trimig.channel.step.Plan`."""
        if not self.left:
            return 0, 0
        self._element[0, 1] = min(self.left, len(self._staging))
        return self._span

    def advance(self, count: int) -> None:
        """Write what has come, see :class:`trimig.channel.step.Plan`. OSError of the file."""
        self.left -= count
        data = self._staging[:count].data
        while len(data):
            position, size = self._runs.pop()
            part = data[:size]
            self._target.write_at(position, part)
            data = data[len(part) :]
            if len(part) < size:
                self._runs.append([position + len(part), size - len(part)])
