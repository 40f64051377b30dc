"""Messages of the return path, both directions, from one table."""

from __future__ import annotations

import numpy as np
import pytest

from tests.wire.cases import hexed
from trimig.errors import LocalProtocolError, RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.wire.return_path import (
    Message,
    PageRequest,
    Pong,
    ReceivedPages,
    ResumeAck,
    ReturnPathDecoder,
    Shut,
    encode,
)

LONGEST = "x" * 255
BLOCKS = {"pc.ram": 0x2000000, "rom": 0x8000, LONGEST: 0x1000, "a\udc80": 0x1000}

FIRST = hexed('0003 0013  00000000 003da000  00001000  06 "pc.ram"')
FIRST_MESSAGE = PageRequest(block="pc.ram", start=0x3DA000, length=0x1000)

#: Messages that may come first, and their bytes (return_path.md part 4).
CASES: list[tuple[Message, bytes]] = [
    (Shut(status=0), hexed("0001 0004 00000000")),
    (Shut(status=1), hexed("0001 0004 00000001")),
    (Pong(value=1), hexed("0002 0004 00000001")),
    (Pong(value=0xFFFFFFFF), hexed("0002 0004 ffffffff")),
    (FIRST_MESSAGE, FIRST),
    (PageRequest(block="rom", start=0, length=0x8000), hexed('0003 0010 0000000000000000 00008000 03 "rom"')),
    (PageRequest(block=LONGEST, start=0, length=0x1000), hexed(f'0003 010c 0000000000000000 00001000 ff "{LONGEST}"')),
    (PageRequest(block="a\udc80", start=0, length=0x1000), hexed("0003 000f 0000000000000000 00001000 02 61 80")),
    (ResumeAck(), hexed("0006 0004 00000001")),
]
IDS = [f"{type(message).__name__} {i}" for i, (message, _) in enumerate(CASES)]


def decode(data: bytes, step: int | None = None) -> list[Message]:
    """All messages of *data*, given in pieces."""
    decoder = ReturnPathDecoder(BLOCKS)
    found: list[Message] = []
    for at in range(0, len(data), step or len(data) or 1):
        found += decoder.feed(data[at : at + (step or len(data))])
    return found


@pytest.mark.parametrize(("message", "data"), CASES, ids=IDS)
def test_message_gives_its_bytes(message: Message, data: bytes) -> None:
    """J1-J5: be16 type, be16 length, payload; PONG echoes, SHUT says 0 or 1, a name may have 255 bytes."""
    assert encode(message) == data


@pytest.mark.parametrize(("message", "data"), CASES, ids=IDS)
def test_bytes_give_their_message_at_every_split(message: Message, data: bytes) -> None:
    assert decode(data) == [message]
    assert decode(data, 1) == [message]
    for cut in range(1, len(data)):
        decoder = ReturnPathDecoder(BLOCKS)
        assert decoder.feed(data[:cut]) == []
        assert decoder.pending == cut
        assert decoder.feed(memoryview(data)[cut:]) == [message]
        assert decoder.pending == 0


def bitmap(block: str, *have: int) -> ReceivedPages:
    pages = np.zeros(BLOCKS[block] // PAGE_SIZE, np.bool_)
    pages[list(have)] = True
    return ReceivedPages(block=block, pages=pages)


@pytest.mark.parametrize("step", [None, 1, 7, 1000])
def test_bitmaps_of_a_recovery(step: int | None) -> None:
    """J1: one for each block that was asked for, then the connection is taken up (return_path.md part 8)."""
    sent = [bitmap("rom", 0), bitmap("pc.ram", 0, 9, 77)]
    data = b"".join(map(encode, sent)) + encode(ResumeAck())
    decoder = ReturnPathDecoder(BLOCKS)
    for block in ("pc.ram", "rom"):
        decoder.expect_bitmap(block)
    found: list[Message] = []
    for at in range(0, len(data), step or len(data)):
        found += decoder.feed(data[at : at + (step or len(data))])
        assert decoder.pending >= 0
    assert decoder.pending == 0
    *bitmaps, last = found
    assert last == ResumeAck()
    for one, other in zip(bitmaps, sent, strict=True):
        assert isinstance(one, ReceivedPages)
        assert one.block == other.block
        assert np.array_equal(one.pages, other.pages)


def test_beginning_of_a_bitmap_as_qemu_sends_it() -> None:
    """return_path.md part 4.5: 32 MiB are 1024 bytes."""
    pages = np.ones(8192, np.bool_)
    assert encode(ReceivedPages(block="pc.ram", pages=pages)).startswith(
        hexed('0005 0007 06 "pc.ram" 0000000000000400 ffff')
    )


def test_a_bitmap_that_was_not_asked_for_or_comes_twice() -> None:
    data = encode(bitmap("rom"))
    decoder = ReturnPathDecoder(BLOCKS)
    decoder.expect_bitmap("rom")
    decoder.feed(data)
    with pytest.raises(RemoteProtocolError, match="'rom' was not asked for") as caught:
        decoder.feed(data)
    assert caught.value.offset == len(data)


def test_a_bitmap_of_the_wrong_length_is_refused_before_it_has_come() -> None:
    decoder = ReturnPathDecoder(BLOCKS)
    decoder.expect_bitmap("rom")
    with pytest.raises(RemoteProtocolError, match="bytes announced"):
        decoder.feed(hexed('0005 0004 03 "rom" 7fffffffffffffff'))


def test_a_name_that_does_not_fit_its_bitmap_message() -> None:
    decoder = ReturnPathDecoder(BLOCKS)
    decoder.expect_bitmap("rom")
    with pytest.raises(RemoteProtocolError, match="does not fit the name"):
        decoder.feed(hexed('0005 0004 02 "rom"'))


def test_second_request_in_a_block_has_no_name() -> None:
    """J3: the block is that of the request before, of either kind."""
    second = PageRequest(block="pc.ram", start=0x3E4000, length=0x1000, named=False)
    third = PageRequest(block="pc.ram", start=0x1000, length=0x2000, named=False)
    data = hexed("0004 000c 00000000003e4000 00001000")
    assert encode(second) == data
    assert decode(FIRST + data + encode(third)) == [FIRST_MESSAGE, second, third]


@pytest.mark.parametrize("step", [None, 1, 5])
def test_recorded_conversation(step: int | None) -> None:
    """return_path.md part 8: a postcopy over a slow link; PONG 4 comes before PONG 3."""
    talk: list[Message] = [
        Pong(value=1), Pong(value=2), Pong(value=4), Pong(value=3), FIRST_MESSAGE,
        PageRequest(block="pc.ram", start=0x3E4000, length=0x1000, named=False), Shut(status=0),
    ]  # fmt: skip
    assert decode(b"".join(map(encode, talk)), step) == talk


def test_pong_may_have_any_value() -> None:
    """K6: the value is the sender's business."""
    assert decode(b"".join(hexed("0002 0004") + n.to_bytes(4, "big") for n in (0, 7, 2**31))) == [
        Pong(value=0), Pong(value=7), Pong(value=2**31)
    ]  # fmt: skip


@pytest.mark.parametrize("junk", [b"\0", b"\xff" * 100, hexed("0001 0004 00000001"), hexed("0002 0004")])
def test_bytes_behind_shut_are_ignored(junk: bytes) -> None:
    """K12: in the same piece, in a later one, and never kept."""
    shut = hexed("0001 0004 00000000")
    decoder = ReturnPathDecoder(BLOCKS)
    assert decoder.feed(shut + junk) == [Shut(status=0)]
    assert decoder.feed(junk) == []
    assert decoder.pending == 0


#: What is wrong, bytes, words of the reason.
BAD = [
    ("type 0", "0000 0004 00000000", "invalid return-path message type 0x0000 (length 4)"),
    ("type 8", "0008 0000", "invalid return-path message type 0x0008"),
    ("type 65535", "ffff ffff", "invalid return-path message type 0xffff (length 65535)"),
    ("short SHUT", "0001 0003 000000", "SHUT with 3 bytes of payload, expected 4"),
    ("long PONG", "0002 0005 0000000001", "PONG with 5 bytes of payload, expected 4"),
    ("REQ_PAGES of 13", "0004 000d", "REQ_PAGES with 13 bytes of payload, expected 12"),
    ("REQ_PAGES_ID of 513", "0003 0201", "REQ_PAGES_ID with 513 bytes of payload, at most 512"),
    ("RESUME_ACK of 0", "0006 0000", "RESUME_ACK with 0 bytes of payload, expected 4"),
    ("RESUME_ACK 2", "0006 0004 00000002", "RESUME_ACK with the value 2"),
    ("RESUME_ACK 0", "0006 0004 00000000", "RESUME_ACK with the value 0"),
    ("SWITCHOVER_ACK of 1", "0007 0001 00", "SWITCHOVER_ACK with 1 bytes of payload, expected 0"),
    ("RECV_BITMAP", '0005 0007 06 "pc.ram"', "'pc.ram' was not asked for"),
    ("REQ_PAGES_ID without a name", "0003 000c 0000000000000000 00001000", "does not fit the name inside it"),
    ("REQ_PAGES_ID too short", '0003 000f 0000000000000000 00001000 03 "ro"', "15 bytes does not fit the name"),
    ("REQ_PAGES_ID too long", '0003 0011 0000000000000000 00001000 03 "rom" 00', "17 bytes does not fit the name"),
    ("unknown block", '0003 0010 0000000000000000 00001000 03 "rim"', "unknown RAM block 'rim'"),
    ("empty name", "0003 000d 0000000000000000 00001000 00", "unknown RAM block ''"),
    ("no block before", "0004 000c 0000000000000000 00001000", "before any REQ_PAGES_ID"),
    ("start misaligned", '0003 0010 0000000000000800 00001000 03 "rom"', "misaligned page request: start 0x800"),
    ("length misaligned", '0003 0010 0000000000000000 00000fff 03 "rom"', "misaligned page request: start 0x0, length"),
    ("length 0", '0003 0010 0000000000000000 00000000 03 "rom"', "0x0+0x0 overruns 'rom'"),
    ("behind the end", '0003 0010 0000000000008000 00001000 03 "rom"', "0x8000+0x1000 overruns 'rom' of 0x8000 bytes"),
    ("over the end", '0003 0010 0000000000007000 00002000 03 "rom"', "0x7000+0x2000 overruns"),
    ("2^64", '0003 0010 fffffffffffff000 00001000 03 "rom"', "0xfffffffffffff000+0x1000 overruns"),
]


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(("data", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_message(data: str, words: str, step: int | None) -> None:
    """K3, K7, K8; return_path.md part 5: a QEMU source fails the migration on each."""
    with pytest.raises(RemoteProtocolError) as caught:
        decode(hexed("0002 0004 00000001") + hexed(data), step)
    assert (caught.value.offset, caught.value.section) == (8, "return path")
    assert words in caught.value.reason


def test_bad_request_does_not_become_the_block_before() -> None:
    decoder = ReturnPathDecoder(BLOCKS)
    with pytest.raises(RemoteProtocolError, match="overruns"):
        decoder.feed(hexed('0003 0010 0000000000008000 00001000 03 "rom"'))


def test_announced_length_is_judged_before_it_comes() -> None:
    """K3: nothing is waited for, or kept, that could never become a message."""
    decoder = ReturnPathDecoder(BLOCKS)
    with pytest.raises(RemoteProtocolError, match="at most 512"):
        decoder.feed(hexed("0003 ffff"))
    assert decoder.pending == 4


def test_name_of_256_bytes_is_not_encoded() -> None:
    """J4."""
    with pytest.raises(LocalProtocolError, match="256 bytes"):
        encode(PageRequest(block="x" * 256, start=0, length=0x1000))
