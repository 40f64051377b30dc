"""Compression of the pages of multifd: one continuous stream for each data channel (multifd.md part 5).

After each packet the stream is flushed, so that the receiver can take the packet out of it. It is never finished.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.uint8]


class Packer(Protocol):
    """The compressor of one channel. It is called with the packets in their order, and by one thread at a time."""

    def pack(self, pages: Pages, indices: NDArray[np.int64]) -> bytes:
        """The content of one packet: these pages, compressed.

        The pages are copied before they are compressed, because the guest may write them meanwhile.

        Args:
            pages: the block's memory, shape (n, page size).
            indices: the numbers of the pages.
        """


def packer(method: str, level: int) -> Packer:
    """A new compressor, of the *method* ``zlib`` or ``zstd``."""
    return _Zlib(level) if method == "zlib" else _Zstd(level)


class _Deflate(Protocol):
    def compress(self, data: memoryview, /) -> bytes: ...

    def flush(self, mode: int, /) -> bytes: ...


def _deflate(level: int) -> _Deflate:
    """isal, if it is installed, has three times the speed at level 1; its output is read by every zlib."""
    if level == 1:
        try:
            from isal import isal_zlib
        except ImportError:
            pass
        else:
            fast: _Deflate = isal_zlib.compressobj(1)
            return fast
    return zlib.compressobj(level)


class _Zlib:
    def __init__(self, level: int) -> None:
        self._stream = _deflate(level)

    def pack(self, pages: Pages, indices: NDArray[np.int64]) -> bytes:
        """See :class:`Packer`."""
        return self._stream.compress(_copied(pages, indices)) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class _Zstd:
    def __init__(self, level: int) -> None:
        # Imported on first use: most migrations need no compression.
        from .zstd import zstd

        self._stream = zstd.ZstdCompressor(level=level)

    def pack(self, pages: Pages, indices: NDArray[np.int64]) -> bytes:
        """See :class:`Packer`."""
        return self._stream.compress(_copied(pages, indices), self._stream.FLUSH_BLOCK)


def _copied(pages: Pages, indices: NDArray[np.int64]) -> memoryview:
    first, last = int(indices[0]), int(indices[-1])
    whole = last - first == len(indices) - 1  # they rise, so there is no gap
    copy = pages[first : last + 1].copy() if whole else pages[indices]
    return copy.reshape(-1).data
