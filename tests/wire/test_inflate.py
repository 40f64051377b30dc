"""The continuous streams of compressed data channels, and what they may not do."""

from __future__ import annotations

import random
import zlib

import pytest

from trimig.errors import RemoteProtocolError
from trimig.wire.pages.inflate import Inflater, inflater_of
from trimig.wire.pages.multifd import PacketFlag
from trimig.wire.pages.zstd import zstd

SIZE = 64 << 10


class Deflater:
    """One stream, flushed behind each packet."""

    def __init__(self, flag: PacketFlag, level: int = 1) -> None:
        self._zlib = zlib.compressobj(level) if flag is PacketFlag.ZLIB else None
        self._zstd = zstd.ZstdCompressor(level=level)

    def deflate(self, data: bytes) -> bytes:
        if self._zlib is not None:
            return self._zlib.compress(data) + self._zlib.flush(zlib.Z_SYNC_FLUSH)
        return self._zstd.compress(data, zstd.ZstdCompressor.FLUSH_BLOCK)


def made(flag: PacketFlag) -> Inflater:
    found = inflater_of(flag)
    assert found is not None
    return found


METHODS = pytest.mark.parametrize("flag", [PacketFlag.ZLIB, PacketFlag.ZSTD], ids=["zlib", "zstd"])


def test_without_compression_there_is_none() -> None:
    assert inflater_of(0) is None


@METHODS
@pytest.mark.parametrize("level", [1, 9])
def test_packets_continue_one_stream(flag: PacketFlag, level: int) -> None:
    """Also if a packet refers to what an earlier one had."""
    source = random.Random(1)
    deflater, inflater = Deflater(flag, level), made(flag)
    same = source.randbytes(SIZE)
    for data in (same, bytes(SIZE), same, source.randbytes(4096), same[:4096], b"x" * SIZE):
        assert inflater.inflate(deflater.deflate(data), len(data)) == data


@METHODS
def test_the_highest_window_of_zstd_is_read(flag: PacketFlag) -> None:
    """Level 20 of multifd-zstd-level has a window of 32 MiB; a larger one is refused before it is allocated."""
    if flag is PacketFlag.ZLIB:
        assert made(flag).inflate(Deflater(flag, 9).deflate(bytes(SIZE)), SIZE) == bytes(SIZE)
        return
    assert made(flag).inflate(Deflater(flag, 20).deflate(bytes(SIZE)), SIZE) == bytes(SIZE)
    options = {int(zstd.CompressionParameter.window_log): 27}
    large = zstd.ZstdCompressor(options=options).compress(bytes(SIZE), zstd.ZstdCompressor.FLUSH_BLOCK)
    with pytest.raises(RemoteProtocolError, match="zstd stream is damaged"):
        made(flag).inflate(large, SIZE)


@METHODS
@pytest.mark.parametrize("more", [1, 4096, 1 << 24])
def test_no_more_is_made_than_the_pages_have(flag: PacketFlag, more: int) -> None:
    """A bomb of 16 MiB."""
    with pytest.raises(RemoteProtocolError, match="has more than the 65536 bytes that the pages have"):
        made(flag).inflate(Deflater(flag).deflate(bytes(SIZE + more)), SIZE)


@METHODS
def test_any_bytes_give_the_pages_or_one_error(flag: PacketFlag) -> None:
    source = random.Random(3)
    good = Deflater(flag).deflate(source.randbytes(2048) * 2)
    for _ in range(500):
        data = bytearray(good)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        try:
            assert len(made(flag).inflate(data[: source.randint(0, len(data))], 4096)) == 4096
        except RemoteProtocolError:
            continue
