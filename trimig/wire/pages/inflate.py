"""multifd: the compressed content of packets (multifd.md part 5).

A data channel has one continuous stream of zlib or zstd, which each packet continues and flushes. So an inflater lives as
long as its channel, and gets the packets in their order. It never makes more bytes than the packet has pages for.
"""

from __future__ import annotations

import zlib
from typing import Final, Protocol

from ...errors import RemoteProtocolError
from .multifd import PacketFlag
from .zstd import zstd

#: log2 of the largest window that a zstd stream may have, in bytes: that of level 20, the highest one of multifd.
_WINDOW_LOG: Final = 25


class Inflater(Protocol):
    """The decompressor of one data channel."""

    def inflate(self, data: bytes | bytearray | memoryview, size: int) -> bytes:
        """The content of the next packet.

        Args:
            data: the compressed content, all of it.
            size: the bytes that the pages of the packet have, above 0.

        Raises:
            RemoteProtocolError: *data* is malformed, or does not give exactly *size* bytes. The inflater is unusable.
        """


class ZlibInflater:
    """For ``multifd-compression`` zlib."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def inflate(self, data: bytes | bytearray | memoryview, size: int) -> bytes:
        """See :class:`Inflater`."""
        try:
            found = self._stream.decompress(data, size)
            # The output may be complete before the flush behind it has been read.
            surplus = self._stream.decompress(self._stream.unconsumed_tail, 1)
        except zlib.error as error:
            raise RemoteProtocolError(f"the zlib stream is damaged: {error}") from error
        _check("zlib", len(found), surplus, size, ended=self._stream.eof)
        return found


class ZstdInflater:
    """For ``multifd-compression`` zstd."""

    def __init__(self) -> None:
        self._stream = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})

    def inflate(self, data: bytes | bytearray | memoryview, size: int) -> bytes:
        """See :class:`Inflater`."""
        stream, pieces, have = self._stream, list[bytes](), 0
        surplus = b""
        try:
            while have < size and not stream.eof and (data or not stream.needs_input):
                pieces.append(stream.decompress(data, size - have))
                have += len(pieces[-1])
                data = b""
            if not stream.eof and not stream.needs_input:
                surplus = stream.decompress(b"", 1)
        except zstd.ZstdError as error:
            raise RemoteProtocolError(f"the zstd stream is damaged: {error}") from error
        _check("zstd", have, surplus, size, ended=stream.eof)
        return b"".join(pieces) if len(pieces) > 1 else pieces[0]


def _check(name: str, have: int, surplus: bytes, size: int, *, ended: bool) -> None:
    if surplus:
        raise RemoteProtocolError(f"the {name} stream has more than the {size} bytes that the pages have")
    if have < size:
        raise RemoteProtocolError(f"the {name} stream has {have} bytes, and the pages have {size}")
    if ended:
        raise RemoteProtocolError(f"the {name} stream has ended; it goes on as long as its channel")


def inflater_of(compression: int) -> Inflater | None:
    """A new inflater for one of the bits of :data:`.multifd.COMPRESSION`; None for no compression."""
    if compression == PacketFlag.ZLIB:
        return ZlibInflater()
    return ZstdInflater() if compression == PacketFlag.ZSTD else None
