"""Bytes -> events: every case at every split, and what an incomplete stream is called."""

from __future__ import annotations

import pytest

from tests.wire import cases
from tests.wire.cases import CASES, EXAMPLE_A, EXAMPLE_B, Case, encode, flat, read
from trimig.errors import RemoteProtocolError, TransportFailed
from trimig.guest import PAGE_SIZE
from trimig.wire import Decoder, Section, events


def splits(case: Case) -> list[int]:
    """Where to cut a case in two: everywhere, but in page content only next to its ends and in the middle."""
    whole = case.before + case.data
    if len(whole) <= 1000:
        return list(range(1, len(whole)))
    near: set[int] = set()
    at = 0
    for event in read(whole, eof=False).found:
        near |= set(range(max(1, event.at - 12), event.at + 30))
        at = max(at, event.at)
    near |= set(range(len(case.before), len(whole), 1021)) | set(range(len(whole) - 20, len(whole)))
    return sorted(n for n in near if len(case.before) - 30 <= n < len(whole))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_of_a_case_give_its_events(case: Case) -> None:
    got = read(case.before + case.data, eof=False)
    assert got.error is None
    assert flat(got.found) == flat([*case.before_events, *case.found])
    if not isinstance(case.found[-1], events.EndOfStream):
        assert got.decoder.offset == len(case.before + case.data)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_cut_in_two_anywhere_gives_the_same_events(case: Case) -> None:
    whole = case.before + case.data
    expected = flat([*case.before_events, *case.found])
    for cut in splits(case):
        got = read(whole, pieces=[cut], eof=False)
        assert (got.error, flat(got.found)) == (None, expected), cut


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_byte_by_byte_gives_the_same_events(case: Case) -> None:
    got = read(case.before + case.data, step=1, eof=False)
    assert got.error is None
    assert flat(got.found) == flat([*case.before_events, *case.found])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_events_know_where_they_began(case: Case) -> None:
    """From `at` of one event to `at` of the next stand the bytes of that event."""
    whole = case.before + case.data
    found = read(whole, eof=False).found
    bounds = [*(event.at for event in found), len(whole)]
    assert bounds == sorted(bounds)
    for event, start, end in zip(found, bounds, bounds[1:], strict=False):
        named = not isinstance(event, events.PageElement) or event.named
        if named:  # a run that continues needs the one before for its block
            assert encode([event]) == whole[start:end], event


@pytest.mark.parametrize("step", [1, 2, 3, 7, 16, 746])
def test_example_a_in_full(step: int) -> None:
    """stream.md part 12: the 747 bytes of `-M none`; Q1."""
    assert len(EXAMPLE_A.data) == 747
    assert EXAMPLE_A.data[0xFF:0x105] == bytes.fromhex("00 06 00 00 01 e6")
    got = read(EXAMPLE_A.data, step=step)
    assert got.error is None
    assert flat(got.found) == flat(EXAMPLE_A.found)
    starts = [event.at for event in got.found]
    assert starts == [
        0, 8, 0x11, 0x22, 0x2A, 0x32, 0x37, 0x3C, 0x44, 0x49, 0x5C, 0x74, 0x79, 0x92, 0xFA, 0xFF, 0x100
    ]  # fmt: skip


def test_example_b_differs_by_two_commands() -> None:
    """stream.md part 13."""
    got = read(EXAMPLE_B.data)
    assert got.error is None
    assert [e.at for e in got.found if isinstance(e, events.CommandElement)] == [0x11, 0x16]
    assert got.found[4].at == 0x1F


@pytest.mark.parametrize("step", [1, 1000])
def test_bytes_behind_the_description_are_ignored(step: int) -> None:
    """stream.md part 7: QEMU ignores junk behind the JSON text."""
    got = read(EXAMPLE_A.data + b"\x09 more, and more" * 500, step=step)
    assert got.error is None
    assert flat(got.found) == flat(EXAMPLE_A.found)


def test_without_a_description_the_rest_is_ignored() -> None:
    cut = EXAMPLE_A.data[:0x100]
    got = read(cut + b"\x55junk", description=False)
    assert got.error is None
    assert isinstance(got.found[-1], events.EndOfStream)


def section_at(length: int) -> str | None:
    """The section that example A is in when it ends behind *length* bytes."""
    if 0x22 <= length < 0x37 or 0x3C <= length < 0x49:
        return "ram"
    if 0x5C <= length < 0x79:
        return "timer"
    return "globalstate" if 0x92 <= length < 0xFF else None


def test_stream_cut_before_the_end_of_file_byte_names_the_place() -> None:
    """stream.md 10.2: QEMU gives EIO or EINVAL."""
    for length in range(1, 0x100):
        got = read(EXAMPLE_A.data[:length])
        assert isinstance(got.error, TransportFailed), length
        section = section_at(length)
        where = f" in section {section!r}" if section else ""
        assert str(got.error).startswith(f"the stream ends{where} at byte {length} (0x{length:x}), "), length


def test_stream_without_a_byte_is_called_that() -> None:
    got = read(b"")
    assert isinstance(got.error, TransportFailed)
    assert "without sending anything" in str(got.error)


def test_stream_cut_behind_the_end_of_file_byte_is_whole() -> None:
    """stream.md 10.2: accepted by QEMU too, with a message where even the type of the description is missing."""
    for length in range(0x100, 747):
        got = read(EXAMPLE_A.data[:length])
        assert got.error is None, length
        last = got.found[-1]
        assert isinstance(last, events.DescriptionElement)
        assert (last.complete, last.text, last.at) == (False, cases.JSON[: max(0, length - 0x105)], 0x100)


def test_ram_cut_in_a_page_names_the_place() -> None:
    whole = cases.IN_RAM + bytes.fromhex("0000000000000008") + b"\x06pc.ram" + bytes(4000)
    got = read(whole)
    assert isinstance(got.error, TransportFailed)
    assert f"in section 'ram' at byte {len(whole)} " in str(got.error)


# -- undivided devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_unknown_devices_come_as_one_tail(step: int) -> None:
    """Nothing on the wire tells where an unknown device ends (vmstate.md part 7)."""
    got = read(EXAMPLE_A.data, step=step, measure=None)
    assert got.error is None
    assert flat(got.found) == [*flat(EXAMPLE_A.found[:9]), ("TailBytes", EXAMPLE_A.data[0x49:])]
    assert next(e.at for e in got.found if isinstance(e, events.TailBytes)) == 0x49
    assert encode(got.found) == EXAMPLE_A.data


# -- older peers ---------------------------------------------------------------------------------------------------


def test_stream_without_configuration_and_footers() -> None:
    """stream.md part 11: a machine type of 2.3 and older writes neither."""
    bare = cases.HEADER + cases.START_HEAD + cases.LIST + cases.END_WORD + bytes.fromhex("03 00000002") + cases.END_WORD
    full = b"\x04\0\0\0\0\x05timer\0\0\0\0\0\0\0\x02" + bytes(24)
    for step in (1, 1000):
        got = read(bare + full + b"\0", step=step, configuration=False, footers=False, description=False)
        assert got.error is None
        assert [type(e).__name__ for e in got.found] == [
            "FileHeader", "SectionHeader", "RamList", "RamEnd", "SectionHeader", "RamEnd",
            "SectionHeader", "DevicePayload", "EndOfStream",
        ]  # fmt: skip
        assert encode(got.found) == bare + full + b"\0"


def test_expected_configuration_is_missing() -> None:
    """stream.md 10.2: EINVAL in QEMU; a mismatch breaks the stream at byte 8."""
    got = read(cases.HEADER + cases.START)
    assert isinstance(got.error, RemoteProtocolError)
    assert (got.error.offset, "configuration section is missing" in got.error.reason) == (8, True)


def test_configuration_that_is_not_expected() -> None:
    got = read(cases.OPENING, configuration=False)
    assert isinstance(got.error, RemoteProtocolError)
    assert (got.error.offset, got.error.reason) == (8, "unknown section type 7 (0x07)")


# -- the buffer ----------------------------------------------------------------------------------------------------


def test_feed_takes_what_fits_and_refuses_more() -> None:
    decoder = Decoder(measure=None, buffer_bytes=2 * PAGE_SIZE)
    with pytest.raises(ValueError, match="do not fit"):
        decoder.feed(bytes(2 * PAGE_SIZE + 1))
    decoder.feed(cases.OPENING)
    assert decoder.next_event() == events.FileHeader(version=3, at=0)


def test_long_command_fits_a_small_buffer() -> None:
    """The buffer grows for the longest payload that a command can have."""
    whole = cases.OPENING + bytes.fromhex("08 0006 ffff") + bytes(65535)
    got = read(whole, step=4096, eof=False, buffer_bytes=1)
    assert got.error is None
    assert flat(got.found)[-1] == ("CommandElement", 6, bytes(65535))


def test_long_size_list_fits_a_small_buffer() -> None:
    names = [f"{n:0200d}" for n in range(500)]
    listed = (500 * PAGE_SIZE | 4).to_bytes(8, "big") + b"".join(
        b"\xc8" + name.encode() + PAGE_SIZE.to_bytes(8, "big") for name in names
    )
    got = read(cases.OPENING + cases.START_HEAD + listed, eof=False, buffer_bytes=1, step=5000)
    assert got.error is None
    assert flat(got.found)[-1] == ("RamList", tuple((name, PAGE_SIZE) for name in names), {})
    assert got.decoder.blocks == dict.fromkeys(names, PAGE_SIZE)


def test_device_larger_than_the_buffer() -> None:
    size = 100_000
    whole = cases.OPENING + b"\x04\0\0\0\x09\x03big\0\0\0\0\0\0\0\x01" + bytes(range(256)) * 400 + b"\x7e\0\0\0\x09"

    def measure(idstr: str, instance_id: int, version_id: int, data: memoryview) -> int | None:
        return 102_400 if len(data) >= 102_400 else None

    got = read(whole, measure=measure, buffer_bytes=1, step=3000, eof=False)
    assert got.error is None
    assert flat(got.found)[-2:] == [("DevicePayload", bytes(range(256)) * 400), ("SectionFooter", 9)]
    got = read(whole, measure=measure, buffer_bytes=1, step=3000, max_device_bytes=size)
    assert isinstance(got.error, RemoteProtocolError)
    assert (got.error.offset, got.error.section) == (0x22, "big")
    assert "more than 100000 bytes" in got.error.reason


def test_end_of_the_connection_is_not_asked_for_twice() -> None:
    got = read(EXAMPLE_A.data)
    assert got.decoder.next_event() is None
    assert got.decoder.next_event() is None


def test_decoder_is_dead_after_an_error() -> None:
    """T4: whatever comes later, it is the same error again."""
    decoder = Decoder(measure=None)
    decoder.feed(b"QEVN")
    with pytest.raises(RemoteProtocolError) as first:
        decoder.next_event()
    decoder.feed(EXAMPLE_A.data)
    with pytest.raises(RemoteProtocolError) as second:
        decoder.next_event()
    assert second.value is first.value


def test_decoder_is_dead_after_a_cut() -> None:
    decoder = Decoder(measure=None)
    decoder.feed(EXAMPLE_A.data[:40])
    decoder.receive_eof()
    assert decoder.next_event() is not None
    assert decoder.next_event() is not None
    assert decoder.next_event() is not None
    with pytest.raises(TransportFailed) as first:
        decoder.next_event()
    with pytest.raises(TransportFailed) as second:
        decoder.next_event()
    assert second.value is first.value


def test_section_is_named_while_it_is_read() -> None:
    decoder = Decoder(measure=None)
    decoder.feed(cases.OPENING + cases.START_HEAD)
    seen = []
    while decoder.next_event() is not None:
        seen.append(decoder.section)
    assert seen == [None, None, "ram"]
    assert decoder.offset == 0x22


def test_end_section_is_read_like_a_part() -> None:
    """stream.md part 10: END is treated exactly like PART, so PART behind END is legal."""
    end = bytes.fromhex("03 00000002") + cases.END_WORD + cases.FOOTER
    part = cases.PART + cases.END_WORD + cases.FOOTER
    got = read(cases.OPENING + cases.START + end + part, eof=False)
    assert got.error is None
    kinds = [e.kind for e in got.found if isinstance(e, events.SectionHeader)]
    assert kinds == [Section.START, Section.END, Section.PART]
