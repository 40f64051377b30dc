"""The bytes of a data channel of multifd (protocol/multifd.md parts 2 to 5 and 8, newer.md part 3)."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from tests.wire import cases
from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.wire import Decoder, Encoder
from trimig.wire import encoder as wire
from trimig.wire import events as ev
from trimig.wire.pages.multifd import (
    HEADER_BYTES,
    HELLO_BYTES,
    PACKET_PAGES,
    Hello,
    Packet,
    PacketFlag,
    PacketReader,
    read_hello,
    write_hello,
    write_packet,
)
from trimig.wire.sections.table import SECTIONS_WITH_MULTIFD

UUID = bytes(range(16))
HELLO = bytes.fromhex("1122334400000001") + UUID + b"\x01" + bytes(39)
BLOCKS = {"pc.ram": 64 * PAGE_SIZE, "rom": PAGE_SIZE}


def reader(*, compression: int = 0, zero_pages: bool = True) -> PacketReader:
    return PacketReader(3, BLOCKS, compression=compression, zero_pages=zero_pages)


def offsets(*pages: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(pages, np.int64) * PAGE_SIZE


def header(
    *,
    magic: str = "11223344",
    version: int = 1,
    flags: int = 0,
    most: int = 128,
    count: int = 0,
    size: int = 0,
    number: int = 0,
    zeros: int = 0,
    block: bytes = b"",
    where: tuple[int, ...] = (),
) -> bytes:
    """A header by hand, field by field as the page has them."""
    data = bytes.fromhex(magic) + struct.pack(">IIIII", version, flags, most, count, size) + struct.pack(">Q", number)
    data += struct.pack(">I", zeros) + bytes(28) + block.ljust(256, b"\0")
    return data + b"".join(struct.pack(">Q", offset) for offset in where).ljust(8 * 128, b"\0")


def test_hello_both_ways() -> None:
    assert len(HELLO) == HELLO_BYTES == 64
    assert write_hello(Hello(uuid=UUID, number=1)) == HELLO
    assert read_hello(HELLO, channels=2) == Hello(uuid=UUID, number=1)


@pytest.mark.parametrize(
    ("data", "channels", "words"),
    [
        (b"QEVM" + HELLO[4:], 2, "magic 5145564d"),
        (HELLO[:7] + b"\x02" + HELLO[8:], 2, "version 2"),
        (HELLO, 1, "has the number 1, and multifd-channels is 1"),
    ],
)
def test_hello_that_is_wrong(data: bytes, channels: int, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        read_hello(data, channels=channels)


@pytest.mark.parametrize("new", [False, True])
def test_packets_both_ways(*, new: bool) -> None:
    assert HEADER_BYTES == 1344
    assert PACKET_PAGES == 128
    data = Packet(
        number=7, block="pc.ram", offsets=offsets(63, 1, 2), zeros=offsets(9) if new else offsets(), size=3 * PAGE_SIZE
    )
    raw = write_packet(data, new=new)
    assert raw == header(
        count=3,
        size=3 * PAGE_SIZE,
        number=7,
        zeros=int(new),
        block=b"pc.ram",
        where=(63 * PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE) + ((9 * PAGE_SIZE,) if new else ()),
    )
    found = reader(zero_pages=new).read(raw, 64)
    assert (found.number, found.sync, found.block, found.size) == (7, False, "pc.ram", 3 * PAGE_SIZE)
    assert found.offsets.tolist() == data.offsets.tolist()
    assert found.zeros.tolist() == data.zeros.tolist()
    sync = write_packet(Packet(number=8, sync=True), new=new)
    assert sync == header(flags=1, number=8, most=0 if new else 128)
    assert reader(zero_pages=new).read(sync, 0).sync


def test_what_is_left_over_of_an_earlier_packet_means_nothing() -> None:
    """7.2: a packet without pages still has the size, the name and the offsets of the one before."""
    left = header(flags=1, size=113410, number=6, block=b"gone", where=(2**60,) * 128)
    found = reader(zero_pages=False).read(left, 0)
    assert (found.sync, found.size, found.block, len(found.offsets)) == (True, 0, "", 0)
    assert not reader().read(header(number=6, size=4096), 0).sync
    behind = header(count=1, size=4096, block=b"rom", where=(0, 2**60, 5))
    assert reader().read(behind, 0).offsets.tolist() == [0]
    assert reader(zero_pages=False).read(header(zeros=5, block=b"rom"), 0).zeros.tolist() == []


def test_pages_that_are_compressed() -> None:
    raw = write_packet(
        Packet(number=1, sync=True, compression=PacketFlag.ZSTD, block="rom", offsets=offsets(0), size=20), new=False
    )
    assert raw == header(flags=5, count=1, size=20, number=1, block=b"rom", where=(0,))
    found = reader(compression=PacketFlag.ZSTD).read(raw, 0)
    assert (found.compression, found.size, found.sync) == (PacketFlag.ZSTD, 20, True)
    with pytest.raises(RemoteProtocolError, match="compressed with 'zstd', and multifd-compression is 'none' here"):
        reader().read(raw, 0)
    with pytest.raises(RemoteProtocolError, match="compressed with 'none', and multifd-compression is 'zlib' here"):
        reader(compression=PacketFlag.ZLIB).read(header(count=1, size=4096, block=b"rom", where=(0,)), 0)
    bare = write_packet(Packet(number=2, sync=True, compression=PacketFlag.ZLIB), new=False)
    assert bare == header(flags=1, number=2), "a packet without pages names no compression"


@pytest.mark.parametrize(
    ("raw", "words", "at"),
    [
        (header(magic="51455645"), "magic 51455645", 100),
        (header(version=2), "version 2", 104),
        (header(flags=0x40), "state of a device", 108),
        (header(flags=0x80), "unknown flags 0x80", 108),
        (header(most=129), "room for 129", 100),
        (header(count=129, block=b"pc.ram"), "129 pages", 100),
        (header(count=100, zeros=29, block=b"pc.ram"), "29 zero pages", 100),
        (header(count=2**32 - 1, zeros=2**32 - 1), "the most is 128", 100),
        (header(count=1, size=4096, block=b"none"), "unknown RAM block 'none'", 164),
        (header(count=1, size=4096, block=b"pc.ram", where=(64 * PAGE_SIZE,)), "outside of RAM block", 420),
        (header(zeros=2, block=b"pc.ram", where=(0, 2**63)), "page at 0x8000000000000000 is outside", 428),
        (header(count=1, size=4096, block=b"pc.ram", where=(1,)), "page at 0x1 is outside", 420),
        (header(count=2, size=4096, block=b"pc.ram", where=(0, 4096)), "2 pages in 4096 bytes", 120),
    ],
)
def test_packet_that_is_wrong(raw: bytes, words: str, at: int) -> None:
    with pytest.raises(RemoteProtocolError, match=words) as caught:
        reader().read(raw, 100)
    assert caught.value.offset == at
    assert "data channel 3" in str(caught.value)


def test_a_compressed_packet_may_not_be_larger_than_any_compressor_makes_it() -> None:
    raw = header(flags=2, count=1, size=1 << 20, block=b"rom", where=(0,))
    with pytest.raises(RemoteProtocolError, match="1 pages in 1048576 bytes; compressed they have at most"):
        reader(compression=PacketFlag.ZLIB).read(raw, 0)


def test_any_bytes_give_a_packet_or_one_error() -> None:
    source = random.Random(5)
    good = header(count=3, zeros=2, size=3 * PAGE_SIZE, block=b"pc.ram", where=(0, 4096, 8192, 4096 * 5, 4096 * 6))
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(source.randint(1, 6)):
            data[source.randrange(len(data))] = source.randrange(256)
        try:
            found = reader().read(bytes(data), 0)
        except RemoteProtocolError:
            continue
        for where in (found.offsets, found.zeros):
            assert ((where >= 0) & (where < BLOCKS.get(found.block, 0))).all()


RUNS = {"pc.ram": 1000 * PAGE_SIZE, "rom": PAGE_SIZE, "small": 100 * PAGE_SIZE}


def full(first: int, block: str = "pc.ram") -> bytearray:
    """The header of a full packet of consecutive pages."""
    pages = offsets(*range(first, first + PACKET_PAGES))
    return bytearray(
        write_packet(Packet(number=7, block=block, offsets=pages, size=PACKET_PAGES * PAGE_SIZE), new=True)
    )


def run_reader(*, compression: int = 0, zero_pages: bool = True) -> PacketReader:
    found = PacketReader(3, RUNS, compression=compression, zero_pages=zero_pages)
    assert found.read_run(bytes(full(0))) is None  # the block is not known before the first packet
    if not compression:
        found.read(bytes(full(0)), 0)
    return found


@pytest.mark.parametrize("first", [0, 1, 500, 1000 - PACKET_PAGES])
def test_a_run_is_read_at_once(first: int) -> None:
    assert run_reader().read_run(bytes(full(first))) == ("pc.ram", first)


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (0, b"\x12"), (7, b"\x02"), (11, b"\x01"), (11, b"\x02"), (8, b"\x80"), (15, b"\x81"), (19, b"\x7f"), (21, b"\x01"),
        (35, b"\x01"), (64, b"rom\0"), (64, b"small\0"), (64, b"xx"), (327, b"\x01"), (320, b"\x80"), (326, b"\x5f"), (335, b"\xff"),
        (HEADER_BYTES - 2, b"\x00"), (HEADER_BYTES - 8, b"\x80"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_left_to_the_other_way_of_reading(at: int, data: bytes) -> None:
    head = full(10)
    head[at : at + len(data)] = data
    assert run_reader().read_run(bytes(head)) is None


def test_a_run_beyond_the_end_of_its_block_is_none() -> None:
    assert run_reader().read_run(bytes(full(1000 - PACKET_PAGES + 1))) is None
    assert run_reader(compression=PacketFlag.ZSTD).read_run(bytes(full(0))) is None


def test_an_old_packet_may_have_anything_for_its_zero_pages() -> None:
    head = full(3)
    head[32:36] = bytes(3) + b"\x01"
    assert run_reader(zero_pages=False).read_run(bytes(head)) == ("pc.ram", 3)


def test_any_run_is_what_the_other_way_of_reading_finds() -> None:
    chosen = random.Random(3)
    runs = 0
    for _ in range(3000):
        head = full(chosen.randrange(900))
        for _ in range(chosen.randrange(3)):
            at = chosen.choice((chosen.randrange(64), chosen.randrange(HEADER_BYTES), 320 + chosen.randrange(8)))
            head[at] ^= 1 << chosen.randrange(8)
        both = run_reader()
        if (run := both.read_run(bytes(head))) is not None:
            packet = both.read(bytes(head), 0)
            assert (packet.block, packet.offsets.tolist()) == (
                run[0],
                offsets(*range(run[1], run[1] + PACKET_PAGES)).tolist(),
            )
            assert not packet.sync
            assert not packet.compression
            assert not len(packet.zeros)
            runs += 1
    assert 800 < runs < 2900


def test_the_mark_on_the_main_channel() -> None:
    """newer.md part 3.3: 0x200 in START before its end word, and in a PART between pages."""
    assert (0x200).to_bytes(8) == wire.SYNC_WORD
    stream = cases.OPENING + cases.START_HEAD + cases.LIST + wire.SYNC_WORD + cases.END_WORD + cases.FOOTER
    stream += cases.PART + wire.SYNC_WORD + cases.END_WORD
    decoder = Decoder(measure=None, sections=SECTIONS_WITH_MULTIFD)
    decoder.feed(stream)
    found = []
    while (event := decoder.next_event()) is not None:
        found.append(event)
    marks = [event.at for event in found if isinstance(event, ev.RamSync)]
    assert [stream[at : at + 8] for at in marks] == 2 * [wire.SYNC_WORD]
    encoder = Encoder()
    assert b"".join(map(encoder.encode, found)) == stream
