"""Where the pages of a stream go: the memory of a guest, a file, a set of files.

A sink does not know encodings: :func:`put` gives it whole pages.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...guest import PAGE_SIZE
from ..events import PageElement, ZeroRun


class PageSink(Protocol):
    """Takes the pages of a stream. A page may come several times; the last content counts."""

    async def pages(self, block: str, indices: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Take pages with their content.

        Args:
            indices: the numbers of the pages in *block*, inside of it, in any order.
            data: uint8, shape (n, page size); valid until this returns.

        **Cancellation:** some of the pages were taken.
        """

    async def zeros(self, block: str, indices: NDArray[np.int64], fills: NDArray[np.uint8]) -> None:
        """Take pages that are filled with one byte each.

        Args:
            indices: as for :meth:`pages`.
            fills: uint8, shape (n,): the byte of each page; nearly always 0.

        **Cancellation:** some of the pages were taken.
        """

    def read(self, block: str, index: int) -> NDArray[np.uint8] | None:
        """The present content of a page, uint8, shape (page size,); None if it was never taken."""


async def put(sink: PageSink, element: PageElement) -> None:
    """Give the pages of *element* to *sink*.

    Raises:
        RemoteProtocolError: the encoded bytes are malformed, or a difference is from a page that *sink* has not.

    **Cancellation:** some of the pages were taken.
    """
    found, indices = element.content(sink.read), element.offsets // PAGE_SIZE
    if isinstance(found, ZeroRun):
        await sink.zeros(found.block, indices, found.fills)
    else:
        await sink.pages(found.block, indices, found.data)
