"""Streams that are wrong on purpose: each is one typed error with the offset of the element and its section.

The docstrings and the notes in the tables say what a QEMU does with the same bytes (stream.md 10.2, ram.md).
"""

from __future__ import annotations

import tracemalloc

import pytest

from tests.wire import cases
from tests.wire.cases import EXAMPLE_A, hexed, read
from trimig.errors import RemoteProtocolError
from trimig.wire.sections import ram

A = EXAMPLE_A.data


def patched(at: int, new: bytes) -> bytes:
    """Example A with other bytes at an offset."""
    return A[:at] + new + A[at + len(new) :]


#: What is wrong, the bytes, (offset, section, words of the reason), QEMU's outcome.
BAD_STREAMS = [
    ("magic", patched(3, b"N"), (0, None, "not a migration stream: it starts with b'QEVN'"), "EINVAL"),
    ("magic, first byte", b"\0", (0, None, "it starts with b'\\x00' instead of b'QEVM'"), "EINVAL"),
    ("version 2", patched(7, b"\2"), (0, None, "version 2 is obsolete"), "ENOTSUP, a message of its own"),
    ("version 4", patched(7, b"\4"), (0, None, "version 4 is not supported"), "ENOTSUP"),
    ("configuration missing", A[:8] + A[0x11:], (8, None, "configuration section is missing: found type 0x01"), "EINVAL"),
    ("machine name of 4 GiB", patched(9, b"\xff" * 4), (8, None, "machine name of 4294967295 bytes"), "allocates"),
    ("machine name of 256 bytes", patched(9, b"\0\0\1\0"), (8, None, "machine name of 256 bytes"), "reads it"),
    ("RAM version 3", patched(0x21, b"\3"), (0x11, None, "section 'ram' has version 3, 4 is needed"), "EINVAL"),
    ("RAM version 5", patched(0x21, b"\5"), (0x11, None, "section 'ram' has version 5"), "EINVAL, unsupported version"),
    ("RAM instance 1", patched(0x1D, b"\1"), (0x11, None, "'ram' (instance 1) is not supported"), "EINVAL"),
    ("iterative section unknown", patched(0x17, b"raw"), (0x11, None, "iterative section 'raw'"), "EINVAL, unknown"),
    ("footer id", patched(0x36, b"\3"), (0x32, "ram", "footer with the id 3, expected 2"), "EINVAL, mismatched id"),
    ("footer missing", A[:0x32] + A[0x37:], (0x32, "ram", "missing section footer: found 0x03"), "EINVAL, missing"),
    ("type 0x09", patched(0x37, b"\x09"), (0x37, None, "unknown section type 9 (0x09)"), "EINVAL"),
    ("type 0x7f", patched(0x37, b"\x7f"), (0x37, None, "unknown section type 127 (0x7f)"), "EINVAL"),
    ("subsection as element", patched(0x37, b"\5"), (0x37, None, "unknown section type 5"), "EINVAL"),
    ("description as element", patched(0x37, b"\6"), (0x37, None, "unknown section type 6"), "EINVAL"),
    ("configuration again", patched(0x37, b"\7"), (0x37, None, "unknown section type 7"), "EINVAL"),
    ("footer as element", patched(0x37, b"\x7e"), (0x37, None, "unknown section type 126"), "EINVAL"),
    ("END of an unknown id", patched(0x3B, b"\7"), (0x37, None, "END with the id 7, which no START"), "EINVAL"),
    ("PART before any START", cases.OPENING + bytes.fromhex("02 00000000"), (0x11, None, "PART with the id 0"),
     "taken for the first handler"),
    ("empty device id", patched(0x4E, b"\0"), (0x49, None, "empty device id string"), "EINVAL"),
    ("unknown device", patched(0x4F, b"tamer"), (0x5C, "tamer", "unknown device 'tamer', instance 0"), "EINVAL"),
    ("device too new", patched(0x5B, b"\3"), (0x5C, "timer", "version 3 of 'timer' is too new"), "EINVAL"),
    ("device footer id", patched(0x78, b"\1"), (0x74, "timer", "footer with the id 1, expected 0"), "EINVAL"),
    ("no description", patched(0x100, b"\7"), (0x100, None, "expected the description behind the end of file"),
     "a message only"),
    ("description of 4 GiB", patched(0x101, b"\xff" * 4), (0x100, None, "description of 4294967295 bytes"),
     "reads until the end"),
]  # fmt: skip


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(("data", "expected"), [row[1:3] for row in BAD_STREAMS], ids=[row[0] for row in BAD_STREAMS])
def test_bad_stream(data: bytes, expected: tuple[int, str | None, str], step: int | None) -> None:
    """stream.md 10.2 and part 10; T4."""
    offset, section, words = expected
    error = read(data, step=step).error
    assert isinstance(error, RemoteProtocolError)
    assert (error.offset, error.section) == (offset, section)
    assert words in error.reason
    assert f"at byte {offset} (0x{offset:x})" in str(error)


CONFIGURATION = cases.HEADER + hexed('07 00000002 "pc"')

BAD_CONFIGURATIONS = [
    ("unknown subsection", hexed('05 12 "configuration/uuie" 00000001'), 8, "unknown configuration subsection"),
    ("too new", hexed('05 12 "configuration/uuid" 00000002'), 8, "has version 2, 1 is the newest known"),
    ("of another name", hexed('05 05 "other" 00000001'), 15, "unknown section type 5"),
    ("too many capabilities", hexed('05 1a "configuration/capabilities" 00000001 00000101'), 8, "257 capabilities"),
    ("4 G of capabilities", hexed('05 1a "configuration/capabilities" 00000001 ffffffff'), 8, "4294967295 capabil"),
    ("twice", 2 * (hexed('05 12 "configuration/uuid" 00000001') + bytes(16)), 8, "'configuration/uuid' comes twice"),
    ("name that is no text", b"\x05\x0fconfiguration\xc3\xa4\0\0\0\1", 8, "unknown configuration subsection"),
]


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(
    ("data", "offset", "words"), [row[1:] for row in BAD_CONFIGURATIONS], ids=[row[0] for row in BAD_CONFIGURATIONS]
)
def test_bad_subsection_of_the_configuration(data: bytes, offset: int, words: str, step: int | None) -> None:
    """stream.md 4.2: ENOENT for an unknown name, EINVAL otherwise."""
    error = read(CONFIGURATION + data, step=step).error
    assert isinstance(error, RemoteProtocolError)
    assert error.offset == offset
    assert words in error.reason


def test_subsections_without_end_are_not_collected() -> None:
    """A QEMU reads such a section for ever; here it would have filled the buffer and stood still."""
    uuid = hexed('05 12 "configuration/uuid" 00000001') + bytes(16)
    error = read(CONFIGURATION + uuid * 500, step=5000, buffer_bytes=8192, eof=False).error
    assert isinstance(error, RemoteProtocolError)


BAD_COMMANDS = [
    ("number 0", "08 0000 0000", "unknown command 0x0000 with 0 bytes"),
    ("switchover of 1", "08 000b 0001 00", "SWITCHOVER_START with 1 bytes of payload, expected 0"),
    ("number 12", "08 000c 0001 00", "command 0x000c with 1 bytes of payload is newer"),
    ("number 65535", "08 ffff ffff", "command 0xffff with 65535 bytes of payload is newer"),
    ("ping without payload", "08 0002 0000", "PING with 0 bytes of payload, expected 4"),
    ("ping of 5", "08 0002 0005 0000000000", "PING with 5 bytes of payload, expected 4"),
    ("open return path of 1", "08 0001 0001 00", "OPEN_RETURN_PATH with 1 bytes of payload, expected 0"),
    ("listen of 1", "08 0004 0001 00", "POSTCOPY_LISTEN with 1 bytes"),
    ("run of 1", "08 0005 0001 00", "POSTCOPY_RUN with 1 bytes"),
    ("packaged of 8", "08 0007 0008 0000000000000000", "PACKAGED with 8 bytes of payload, expected 4"),
    ("enable colo of 1", "08 0008 0001 00", "ENABLE_COLO with 1 bytes"),
    ("resume of 1", "08 0009 0001 00", "POSTCOPY_RESUME with 1 bytes"),
]


@pytest.mark.parametrize(("data", "words"), [row[1:] for row in BAD_COMMANDS], ids=[row[0] for row in BAD_COMMANDS])
def test_bad_command(data: str, words: str) -> None:
    """commands.md part 3: EINVAL for a number, ERANGE for a length, and a name even for ENABLE_COLO."""
    for step in (None, 1):
        error = read(cases.OPENING + hexed(data), step=step).error
        assert isinstance(error, RemoteProtocolError)
        assert error.offset == 0x11
        assert words in error.reason


NAMED = hexed('0000000000000002 06 "pc.ram" 00')
BEHIND = len(cases.IN_RAM) + len(NAMED)

#: What is wrong, records behind one zero page of pc.ram, offset behind that, words of the reason.
BAD_RECORDS = [
    ("no flags", "0000000000001000", 0, "unknown combination of RAM flags 0x0"),
    ("zero and page", "000000000000100a", 0, "unknown combination of RAM flags 0xa"),
    ("end and zero", "0000000000000012", 0, "unknown combination of RAM flags 0x12"),
    ("end that continues", "0000000000000030", 0, "unknown combination of RAM flags 0x30"),
    ("continue alone", "0000000000000020", 0, "unknown combination of RAM flags 0x20"),
    ("all flags", "0000000000000fff", 0, "unknown combination of RAM flags 0xfff"),
    ("the unassigned 0x400", "0000000000000400", 0, "unknown combination of RAM flags 0x400"),
    ("the unassigned 0x800", "0000000000000800", 0, "unknown combination of RAM flags 0x800"),
    ("obsolete", "0000000000000001", 0, "obsolete FULL record"),
    ("xbzrle, another encoding", "0000000000001060 02 0003 000151", 0, "encoding 2 of an XBZRLE page"),
    ("xbzrle, named, another encoding", '0000000000001040 06 "pc.ram" 00 0000', 0, "encoding 0 of an XBZRLE page"),
    ("xbzrle, longer than a page", "0000000000001060 01 1001", 0, "XBZRLE delta of 4097 bytes"),
    ("xbzrle behind the end", "0000000000100060 01 0003 000151", 0, "page at 0x100000 is outside"),
    ("xbzrle of an unknown block", '0000000000001040 03 "rim" 01 0000', 0, "page of the unknown RAM block 'rim'"),
    ("second delta of two", "0000000000001060 01 0000 0000000000100060 01 0000", 11, "page at 0x100000 is outside"),
    ("compressed, too long", "0000000000001120 0000100f", 0, "compressed page of 4111 bytes; the longest has 4110"),
    ("compressed, 4 GiB", "0000000000001120 ffffffff", 0, "compressed page of 4294967295 bytes"),
    ("compressed behind the end", "0000000000100120 00000000", 0, "page at 0x100000 is outside"),
    ("compressed, of an unknown block", '0000000000001100 03 "rim" 00000000', 0, "page of the unknown RAM block 'rim'"),
    ("second one of two", "0000000000001120 00000000 0000000000100120 00000000", 12, "page at 0x100000 is outside"),
    ("rdma", "0000000000000080", 0, "private to the RDMA transport"),
    ("multifd flush", "0000000000000200", 0, "synchronisation mark of multifd channels (capability multifd)"),
    ("size list in a PART", "0000000000100004", 0, "size list outside of RAM START"),
    ("unknown block", '0000000000000002 03 "rim" 00', 0, "page of the unknown RAM block 'rim'"),
    ("block without a name", "0000000000000002 00 00", 0, "page of the unknown RAM block ''"),
    ("zero page behind the end", "0000000000100022 00", 0, "page at 0x100000 is outside of RAM block 'pc.ram'"),
    (
        "named page behind the end",
        '0000000000080002 03 "rom" 00',
        0,
        "0x80000 is outside of RAM block 'rom', which has",
    ),
    (
        "third of three",
        "0000000000001022 00 0000000000002022 00 0000000000100022 00",
        18,
        "page at 0x100000 is outside",
    ),
    ("the last page of 2^64", "fffffffffffff022 00", 0, "page at 0xfffffffffffff000 is outside"),
    ("2^63", "8000000000000022 00", 0, "page at 0x8000000000000000 is outside"),
    ("2^63, named", '8000000000000002 03 "rom" 00', 0, "page at 0x8000000000000000 is outside"),
]


@pytest.mark.parametrize(
    ("data", "ahead", "words"), [row[1:] for row in BAD_RECORDS], ids=[row[0] for row in BAD_RECORDS]
)
def test_bad_record(data: str, ahead: int, words: str) -> None:
    """ram.md parts 2, 4 and 13: EINVAL in QEMU, for records that it knows only without their capability."""
    for step in (None, 1):
        error = read(cases.IN_RAM + NAMED + hexed(data), step=step).error
        assert isinstance(error, RemoteProtocolError)
        assert (error.offset, error.section) == (BEHIND + ahead, "ram")
        assert words in error.reason


def test_bad_raw_page_is_found_behind_good_ones() -> None:
    data = b"".join(hexed(f"{word:016x}") + cases.page(1) for word in (0x1028, 0x2028, 0x100028, 0x3028))
    error = read(cases.IN_RAM + NAMED + data).error
    assert isinstance(error, RemoteProtocolError)
    assert error.offset == BEHIND + 2 * (8 + 4096)
    assert "page at 0x100000 is outside" in error.reason


@pytest.mark.parametrize("flags", ["22", "28"])
def test_record_that_continues_nothing(flags: str) -> None:
    """ram.md part 4: EINVAL."""
    error = read(cases.IN_RAM + hexed(f"00000000000000{flags} 00")).error
    assert isinstance(error, RemoteProtocolError)
    assert error.offset == len(cases.IN_RAM)
    assert "continues a block that was never named" in error.reason


def test_size_list_forgets_the_last_block() -> None:
    """ram.md part 4: the sender resets its memory when the block list changes, so nothing may continue over it."""
    data = cases.IN_RAM + NAMED + cases.END_WORD + cases.FOOTER + cases.START + cases.PART
    error = read(data + hexed("0000000000001022 00")).error
    assert isinstance(error, RemoteProtocolError)
    assert error.offset == len(data)


#: What is wrong, behind the word of a list that announces 0x2000 bytes, offset behind that word, words of the reason.
BAD_LISTS = [
    ("twice", '01 "a" 0000000000001000 01 "a" 0000000000001000', 10, "'a' is announced twice"),
    ("no name", "00 0000000000002000", 0, "RAM block without a name"),
    ("length 0", '01 "a" 0000000000000000', 0, "'a' of 0 bytes does not fit"),
    ("more than is left", '01 "a" 0000000000001000 01 "b" 0000000000002000', 10, "'b' of 8192 bytes does not fit"),
    ("no whole pages", '01 "a" 0000000000000800', 0, "'a' of 2048 bytes does not fit the announced total of 8192"),
    ("2^64", '01 "a" fffffffffffff000', 0, "'a' of 18446744073709547520 bytes does not fit"),
]


@pytest.mark.parametrize(("data", "ahead", "words"), [row[1:] for row in BAD_LISTS], ids=[row[0] for row in BAD_LISTS])
def test_bad_size_list(data: str, ahead: int, words: str) -> None:
    """ram.md part 3: a total that is not the sum makes a QEMU run into garbage."""
    for step in (None, 1):
        prefix = cases.OPENING + cases.START_HEAD + hexed("0000000000002004")
        error = read(prefix + hexed(data), step=step).error
        assert isinstance(error, RemoteProtocolError)
        assert (error.offset, error.section) == (len(prefix) + ahead, "ram")
        assert words in error.reason


def test_start_without_a_size_list() -> None:
    error = read(cases.OPENING + cases.START_HEAD + cases.END_WORD).error
    assert isinstance(error, RemoteProtocolError)
    assert error.reason == "RAM START without a size list"


def test_more_ram_than_accepted() -> None:
    data = cases.OPENING + cases.START_HEAD + cases.LIST
    assert read(data, max_ram_bytes=0x180000, eof=False).error is None
    error = read(data, max_ram_bytes=0x17FFFF).error
    assert isinstance(error, RemoteProtocolError)
    assert "1572864 bytes of RAM announced, at most 1572863 are accepted" in error.reason


def test_more_blocks_than_accepted() -> None:
    count = ram.MAX_BLOCKS + 1
    data = (count * 4096 | 4).to_bytes(8, "big")
    data += b"".join(b"\x04" + f"{n:04d}".encode() + (4096).to_bytes(8, "big") for n in range(count))
    prefix = cases.OPENING + cases.START_HEAD
    error = read(prefix + data).error
    assert isinstance(error, RemoteProtocolError)
    assert error.reason == "more than 4096 RAM blocks"
    assert error.offset == len(prefix) + 8 + ram.MAX_BLOCKS * 13


def test_starts_without_end_are_not_collected() -> None:
    """A START with another id replaces the one before, as in QEMU, so that the old id is unknown from then on."""

    def start(section_id: int) -> bytes:
        number = section_id.to_bytes(4, "big")
        return b"\1" + number + cases.START_HEAD[5:] + cases.LIST + cases.END_WORD + b"\x7e" + number

    data = cases.OPENING + b"".join(start(n) for n in range(20))
    assert read(data + b"\2\0\0\0\x13" + cases.END_WORD, eof=False).error is None
    error = read(data + b"\2\0\0\0\x12").error
    assert isinstance(error, RemoteProtocolError)
    assert "PART with the id 18" in error.reason


ABSURD = [
    ("machine name", cases.HEADER + hexed("07 ffffffff")),
    ("capabilities", CONFIGURATION + hexed('05 1a "configuration/capabilities" 00000001 ffffffff')),
    ("RAM", cases.OPENING + cases.START_HEAD + hexed("fffffffffffff004")),
    ("block", cases.OPENING + cases.START_HEAD + hexed('0000ffffffff f004 01 "a" 0000fffffffff000')),
    ("description", patched(0x101, b"\xff" * 4)[:0x105]),
    ("description, accepted", patched(0x101, b"\x03\xff\xff\xff")[:0x105]),
    ("packaged", cases.OPENING + hexed("08 0007 0004 ffffffff")),
]


@pytest.mark.parametrize("data", [row[1] for row in ABSURD], ids=[row[0] for row in ABSURD])
def test_absurd_length_allocates_nothing(data: bytes) -> None:
    """T4: what a length announces is not memory that is taken; QEMU allocates for some of these."""
    read(data, buffer_bytes=8192)  # caches of the interpreter
    tracemalloc.start()
    try:
        read(data, buffer_bytes=8192)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_a_package_takes_memory_as_its_bytes_come() -> None:
    """T4: its length is only announced. The buffer was doubled with each byte."""
    head = cases.OPENING + hexed("08 0007 0004 01000000")
    few = read(head + bytes(200), step=1, buffer_bytes=8192, eof=False)
    assert few.error is None
    assert len(few.decoder.writable()) <= 16384
