"""The packets of a source with multifd: their headers in bulk, and their compressed contents."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest

from trimig.guest import PAGE_SIZE
from trimig.wire.pages.multifd import HEADER_BYTES, PACKET_PAGES, Packet, PacketFlag, write_packet, write_packets
from trimig.wire.pages.packing import packer
from trimig.wire.pages.zstd import zstd

#: Pages of text-like bytes, so that a packet refers to bytes of the packet before it.
PAGES = np.frombuffer(bytes(random.Random(4).choices(b"migration", k=64 * PAGE_SIZE)), np.uint8).reshape(-1, PAGE_SIZE)
BATCHES = [np.array(batch, np.int64) for batch in ([0, 1, 2, 3], [5, 9, 60], [63], [0, 1, 2, 3])]


@pytest.mark.parametrize("count", [1, 2, PACKET_PAGES, PACKET_PAGES + 1, 3 * PACKET_PAGES])
@pytest.mark.parametrize("block", ["pc.ram", "x" * 255])
def test_headers_in_bulk_are_those_of_single_packets(count: int, block: str) -> None:
    """multifd.md part 3, newer.md part 3.1: full packets, and the rest in the last one."""
    offsets = np.arange(count, dtype=np.int64)[::-1] * PAGE_SIZE
    parts = [offsets[start : start + PACKET_PAGES] for start in range(0, count, PACKET_PAGES)]
    plain = write_packets(block, offsets, number=70)
    assert plain.shape == (len(parts), HEADER_BYTES)
    for number, (row, part) in enumerate(zip(plain, parts, strict=True), 70):
        packet = Packet(number=number, block=block, offsets=part, size=len(part) * PAGE_SIZE)
        assert row.tobytes() == write_packet(packet, new=False)
    zeros = write_packets(block, offsets, number=2**40, zero=True, compression=PacketFlag.ZSTD)
    for number, (row, part) in enumerate(zip(zeros, parts, strict=True), 2**40):
        packet = Packet(number=number, block=block, zeros=part, compression=PacketFlag.ZSTD)
        assert row.tobytes() == write_packet(packet, new=True)


def test_zero_pages_of_a_compressed_channel_name_the_compression() -> None:
    """QEMU compares it in each packet that names pages, though zero pages have no content."""
    packet = Packet(number=0, block="ram", zeros=np.zeros(1, np.int64), compression=PacketFlag.ZLIB)
    assert write_packet(packet, new=True)[8:12] == b"\0\0\0\x02"
    assert write_packet(Packet(number=0, sync=True, compression=PacketFlag.ZLIB), new=True)[8:12] == b"\0\0\0\x01"


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_zlib_is_one_stream(level: int) -> None:
    """multifd.md part 5: the zlib header stands in the first packet, and each ends with a sync flush."""
    pack, stream = packer("zlib", level), zlib.decompressobj()
    contents = [pack.pack(PAGES, batch) for batch in BATCHES]
    for content, batch in zip(contents, BATCHES, strict=True):
        assert content.endswith(b"\0\0\xff\xff")
        assert stream.decompress(content) == PAGES[batch].tobytes()
    assert contents[0][0] == 0x78
    assert (len(contents[0]) < len(BATCHES[0]) * PAGE_SIZE // 2) is (level > 0)
    assert not stream.eof


def test_levels_are_those_of_the_parameter() -> None:
    """newer.md part 7: 78 da for level 9. isal, if it is there, names another level than zlib for level 1."""
    assert packer("zlib", 9).pack(PAGES, BATCHES[0])[:2] == b"\x78\xda"
    assert packer("zlib", 1).pack(PAGES, BATCHES[0])[:2] in (b"\x78\x01", b"\x78\x5e")
    text = np.frombuffer(" ".join(map(str, range(4000))).encode()[: 4 * PAGE_SIZE], np.uint8).reshape(-1, PAGE_SIZE)
    batch = np.arange(4, dtype=np.int64)
    assert len(packer("zstd", 19).pack(text, batch)) < len(packer("zstd", 1).pack(text, batch))


@pytest.mark.parametrize("level", [0, 1, 20])
def test_zstd_is_one_frame(level: int) -> None:
    pack, stream = packer("zstd", level), zstd.ZstdDecompressor()
    contents = [pack.pack(PAGES, batch) for batch in BATCHES]
    assert contents[0][:4] == bytes.fromhex("28b52ffd")
    for content, batch in zip(contents, BATCHES, strict=True):
        assert stream.decompress(content) == PAGES[batch].tobytes()
    assert len(contents[3]) < len(contents[0]), "the window was not kept"
    assert not stream.eof
