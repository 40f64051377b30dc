"""Commands of postcopy and bitmaps of its recovery, byte for byte, there and back, and hostile."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.errors import LocalProtocolError, RemoteProtocolError
from trimig.guest import PAGE_SIZE, PageBitmap
from trimig.wire import Decoder, Section, encoder, events
from trimig.wire import postcopy as wire

BLOCKS = {"pc.ram": 64 * PAGE_SIZE, "x": PAGE_SIZE}


def bitmap(pages: int, *chosen: int) -> PageBitmap:
    made = np.zeros(pages, np.bool_)
    made[list(chosen)] = True
    return made


def payload(command: bytes) -> bytes:
    (length,) = struct.unpack_from(">H", command, 3)
    assert len(command) == 5 + length
    return command[5:]


def ranges(*pairs: tuple[int, int], name: bytes = b"pc.ram") -> bytes:
    return bytes([0, len(name)]) + name + b"\0" + b"".join(struct.pack(">QQ", *pair) for pair in pairs)


def test_advise_as_qemu_sends_it() -> None:
    """commands.md part 4.3."""
    sent = wire.advise(wire.Advice())
    assert sent.hex() == "08000300100000000000001000" + "0000000000001000"
    assert wire.decode_advise(payload(sent), offset=0) == wire.Advice()
    assert wire.decode_advise(b"", offset=0) is None


@pytest.mark.parametrize("length", [1, 15, 17, 32])
def test_advise_of_another_length(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match="expected 16 or none") as caught:
        wire.decode_advise(bytes(length), offset=7)
    assert caught.value.offset == 7


@pytest.mark.parametrize(("sizes", "target"), [(0, 4096), (4096, 0), (4096, 4097)])
def test_advise_with_impossible_pages(sizes: int, target: int) -> None:
    with pytest.raises(RemoteProtocolError, match="page sizes"):
        wire.decode_advise(struct.pack(">QQ", sizes, target), offset=0)


def test_discard_as_qemu_sends_it() -> None:
    """commands.md part 4.6: two single pages at 1 MiB and 3 MiB."""
    (sent,) = wire.discards("pc.ram", bitmap(1024, 0x100, 0x300))
    assert sent.hex() == (
        "080006002900" + "06" + b"pc.ram".hex() + "00"
        "0000000000100000" + "0000000000001000" + "0000000000300000" + "0000000000001000"
    )  # fmt: skip


def test_nothing_stale_needs_no_command() -> None:
    assert list(wire.discards("pc.ram", bitmap(64))) == []


def test_a_long_list_becomes_several_commands() -> None:
    sent = list(wire.discards("pc.ram", bitmap(64, *range(0, 50, 2))))
    assert [len(wire.decode_discard(payload(c), BLOCKS, offset=0).runs) for c in sent] == [12, 12, 1]


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_a_name_that_no_discard_can_carry(name: str) -> None:
    with pytest.raises(LocalProtocolError, match="1 to 255"):
        list(wire.discards(name, bitmap(1, 0)))


@given(st.lists(st.booleans(), min_size=64, max_size=64))
def test_discards_say_exactly_what_is_stale(flags: list[bool]) -> None:
    stale = np.array(flags, np.bool_)
    seen = np.zeros(64, np.bool_)
    for command in wire.discards("pc.ram", stale):
        found = wire.decode_discard(payload(command), BLOCKS, offset=0)
        assert found.block == "pc.ram"
        for start, end in found.runs:
            assert not seen[start:end].any()
            seen[start:end] = True
    assert np.array_equal(seen, stale)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "version none"),
        (b"\1" + ranges((0, 4096))[1:], "version 1"),
        (b"\0\0\0" + struct.pack(">QQ", 0, 4096), "whole name"),
        (b"\0\x06pc.ram", "whole name"),
        (ranges((0, 4096)).replace(b"ram\0", b"ram\1"), "whole name"),
        (ranges(), "0 bytes of ranges"),
        (ranges((0, 4096))[:-1], "15 bytes of ranges"),
        (ranges((0, 4096), name=b"other"), "unknown RAM block 'other'"),
        (ranges((1, 4096)), "misaligned"),
        (ranges((0, 4095)), "misaligned"),
        (ranges((0, 0)), "empty"),
        (ranges((0, 65 * 4096)), "outside"),
        (ranges((64 * 4096, 4096)), "outside"),
        (ranges((63 * 4096, 2 * 4096)), "outside"),
        (ranges((0, 4096), (2**64 - 4096, 4096)), "outside"),
        (ranges((4096, 2**64 - 4096)), "outside"),
    ],
)
def test_hostile_discards(data: bytes, match: str) -> None:
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        wire.decode_discard(data, BLOCKS, offset=99)
    assert caught.value.offset == 99


@given(st.binary(max_size=80))
def test_any_bytes_are_a_discard_or_one_error(data: bytes) -> None:
    try:
        found = wire.decode_discard(data, BLOCKS, offset=0)
    except RemoteProtocolError:
        return
    assert ((found.runs[:, 0] < found.runs[:, 1]) & (found.runs[:, 1] * PAGE_SIZE <= BLOCKS[found.block])).all()


def test_a_package() -> None:
    assert wire.packaged(b"abc") == bytes.fromhex("0800070004" + "00000003") + b"abc"


@pytest.mark.parametrize(("pages", "size"), [(1, 8), (64, 8), (65, 16), (8192, 1024)])
def test_size_of_a_bitmap(pages: int, size: int) -> None:
    """ram.md part 12: 32 MiB are 1024 bytes, one page 8."""
    assert wire.bitmap_bytes(pages) == size
    assert len(wire.received_bitmap(bitmap(pages))) == size + 16


def test_bits_are_little_endian() -> None:
    sent = wire.received_bitmap(bitmap(70, 0, 9, 69))
    assert sent.hex() == "0000000000000010" + "0102000000000000" + "2000000000000000" + "0123456789abcdef"


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_bitmaps_there_and_back(flags: list[bool]) -> None:
    received = np.array(flags, np.bool_)
    again = wire.decode_received_bitmap(wire.received_bitmap(received), len(received), offset=0, block="b")
    assert np.array_equal(again, received)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[:7], "7 bytes, expected 24"),
        (lambda data: struct.pack(">Q", 16) + data[8:], "16 bytes announced, 8 belong to 10 pages"),
        (lambda data: data[:-1], "23 bytes, expected 24"),
        (lambda data: data[:-1] + b"\0", "ends with"),
        (lambda data: data[:9] + b"\x04" + data[10:], "behind the last of 10"),
    ],
)
def test_hostile_bitmaps(change: object, match: str) -> None:
    assert callable(change)
    with pytest.raises(RemoteProtocolError, match=match):
        wire.decode_received_bitmap(change(wire.received_bitmap(bitmap(10))), 10, offset=0, block="b")


def test_runs() -> None:
    assert wire.runs_of(bitmap(8, 0, 1, 4, 7)).tolist() == [[0, 2], [4, 5], [7, 8]]
    assert wire.runs_of(bitmap(8)).tolist() == []


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_host_page_sizes_in_the_size_list(step: int) -> None:
    """ram.md part 3: said of a block only where it is not the usual one, and only behind ADVISE."""
    sizes = {"pc.ram": 0x200000, "last": 0x40000000}
    blocks = (("pc.ram", 0x400000), ("rom", 0x1000), ("last", 0x40000000))
    listed = encoder.ram_list(blocks, sizes)
    head = encoder.file_header() + encoder.configuration("pc", ()) + wire.advise(wire.Advice(page_sizes=0x40201000))
    data = (
        head
        + encoder.section_start(Section.START, 2, "ram", 0, 4)
        + listed
        + encoder.END_WORD
        + encoder.section_footer(2)
    )
    decoder, found = Decoder(measure=None), []
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])
        while (event := decoder.next_event()) is not None:
            found.append(event)
    (ram,) = [event for event in found if isinstance(event, events.RamList)]
    assert (ram.blocks, ram.page_sizes) == (blocks, sizes)
    assert b"".join(map(encoder.Encoder().encode, found)) == data


def test_a_host_page_size_that_was_not_announced_is_no_page_size() -> None:
    head = encoder.file_header() + encoder.configuration("pc", ()) + wire.advise(wire.Advice())
    listed = encoder.ram_list([("pc.ram", 0x400000)], {"pc.ram": 0x200000})
    decoder = Decoder(measure=None)
    decoder.feed(head + encoder.section_start(Section.START, 2, "ram", 0, 4) + listed + encoder.END_WORD)
    with pytest.raises(RemoteProtocolError, match="RAM flags 0x0"):
        list(iter(decoder.next_event, None))
