"""Pages whose places are known before they come: the kernel puts them there, without a copy in Python.

On a data channel of multifd a header names the pages that follow it. The kernel reads the header behind them with the same call.
So a thread of the channel goes on from packet to packet for as long as they come.

Pages without memory behind them are written to the file of their block. The first touch of a mapped page costs more than
that (see :mod:`.receiver`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...channel.vectored import Pair, Pieces
from ...guest import PAGE_SIZE
from ...wire.pages.multifd import PACKET_PAGES

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.vectored import Span
    from .placement import Target

#: The numbers of the pages of one packet, in the order in which they come. A range costs least.
Indices: TypeAlias = "NDArray[np.int64] | range"
#: The pages of one packet: their block, and their numbers.
Place: TypeAlias = "tuple[Target, Indices]"
#: The header behind the pages has come. Returns where the pages behind it go; None if no more are to be read now. A thread
#: calls it.
Next: TypeAlias = Callable[[], "Place | None"]


class Scatterer:
    """Reads pages from one connection.

    Args:
        header: where the header behind the pages is put, writable.
    """

    def __init__(self, header: NDArray[np.uint8]) -> None:
        self._header = header
        self._staging: NDArray[np.uint8] | None = None
        #: The elements of a packet of consecutive pages: the pages, and the header behind them.
        self.pair = np.zeros((2, 2), np.uint64)

    def staging(self) -> NDArray[np.uint8]:
        """The buffer of the pages of one packet on their way to a file."""
        if self._staging is None:
            self._staging = np.empty(PACKET_PAGES * PAGE_SIZE, np.uint8)
        return self._staging

    async def read(
        self, channel: Channel, target: Target, indices: Indices, most: int = 0, following: Next | None = None
    ) -> tuple[list[int], bool]:
        """Read the pages of one packet, or of several packets.

        Args:
            indices: the numbers of the pages of the first packet, 1 to ``PACKET_PAGES``, in the order in which they come.
            most: bytes that are read at most with *following*.
            following: read the header behind the pages too, and call this; None to read one packet without that.

        Returns:
            How many pages have come of each packet that came whole; and False if the stream has ended inside a packet.

        Raises:
            RemoteProtocolError: *following* has raised it.
            TransportFailed: the connection broke, or nothing came for ``stall_timeout``.

        **Cancellation:** pages that were not received yet may hold a part of their content.
        """
        plan = _Scattering(self, target, indices, self._header if following is not None else None, following)
        try:
            await channel.receive_vector(plan, max(most, len(indices) * PAGE_SIZE))
        finally:
            for block, came in plan.came:
                if isinstance(came, range):
                    block.arrived(came.start, len(came))
                else:
                    block.arrived_each(came)
        return [len(came) for _, came in plan.came], plan.resting or plan.over


class _Scattering:
    """The content of packets, and the headers between. A :class:`trimig.channel.step.Plan`.

    Args:
        header: where a header behind the content is put; None to read none.
        following: called when it has come.

    Attributes:
        came: the packets that came whole.
        over: nothing more is wanted.
    """

    def __init__(
        self,
        owner: Scatterer,
        target: Target,
        indices: Indices,
        header: NDArray[np.uint8] | None,
        following: Next | None,
    ) -> None:
        self._owner = owner
        self._following = following
        self._header = (0, 0) if header is None else (header.ctypes.data, len(header))
        self._pair = Pair(owner.pair)
        self._pieces: Pieces | Pair = self._pair
        self._place: Place
        self.came: list[Place] = []
        self.over = False
        self._begin(target, indices)

    def _begin(self, target: Target, indices: Indices) -> None:
        if not isinstance(indices, range):
            first, count = int(indices[0]), len(indices)
            if int(indices[-1]) - first == count - 1 and bool((np.diff(indices) == 1).all()):
                indices = range(first, first + count)
        self._place = target, indices
        self._here = False  # the pages are in their places
        # The record of a zero page must not take a page for untouched of which a part has come: so that is noted first.
        if not isinstance(indices, range):
            self._begin_pieces(target, indices)
            return
        position, size = indices.start * PAGE_SIZE, len(indices) * PAGE_SIZE
        fresh = target.begin_run(indices.start, len(indices))
        self._runs = [(position, size)] if fresh else None
        self._pair.begin(self._owner.staging().ctypes.data if fresh else target.base + position, size, *self._header)
        self._pieces = self._pair

    def _begin_pieces(self, target: Target, indices: NDArray[np.int64]) -> None:
        count = len(indices)
        starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1)
        sizes = np.diff(starts, append=count) * PAGE_SIZE
        runs = list(zip((indices[starts] * PAGE_SIZE).tolist(), sizes.tolist(), strict=True))
        fresh = target.fresh_each(indices)
        target.untouched[indices] = False
        self._runs = runs if fresh else None
        if fresh:
            places = [(self._owner.staging().ctypes.data, count * PAGE_SIZE)]
        else:
            places = [(target.base + position, size) for position, size in runs]
        if self._header[1]:
            places.append(self._header)
        self._pieces = Pieces(np.array(places, np.uint64))

    @property
    def rest(self) -> Span:
        """Where the next bytes go, see :class:`trimig.channel.step.Plan`."""
        return (0, 0) if self.over else self._pieces.rest

    @property
    def resting(self) -> bool:
        """The last packet has come, and nothing of the next header, see :class:`trimig.channel.step.Plan`."""
        return self._here and self._pieces.left == self._header[1] and not self.over

    def advance(self, count: int) -> None:
        """See :class:`trimig.channel.step.Plan`. OSError of the file. RemoteProtocolError: the next header is malformed."""
        pieces = self._pieces
        pieces.advance(count)
        if not self._here and pieces.left <= self._header[1]:
            self._keep()
        if not pieces.left:
            place = None if self._following is None else self._following()
            if place is None:
                self.over = True
            else:
                self._begin(*place)

    def _keep(self) -> None:
        self._here = True
        at = 0
        for position, size in self._runs or ():
            self._place[0].write_at(position, self._owner.staging()[at : at + size].data)
            at += size
        self.came.append(self._place)
