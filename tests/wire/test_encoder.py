"""Events -> bytes, and bytes -> events -> the same bytes."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.wire import cases
from tests.wire.cases import CASES, EXAMPLE_A, Case, encode, flat, read
from trimig.errors import LocalProtocolError
from trimig.guest import PAGE_SIZE, ConfigSubsection, DeviceSection
from trimig.wire import Encoder, RamFlag, RecordWriter, Section, encoder, events


@pytest.mark.parametrize("case", CASES, ids=str)
def test_events_of_a_case_give_its_bytes(case: Case) -> None:
    assert encode([*case.before_events, *case.found]) == case.before + case.data


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("step", [None, 1, 4099])
def test_case_is_written_again_as_it_was_read(case: Case, step: int | None) -> None:
    """Q1, Q7: byte-identical whatever the pieces, CONTINUE across sections and names given again included."""
    whole = case.before + case.data
    assert encode(read(whole, step=step, eof=False).found) == whole


def test_pieces_of_the_functions_make_example_a() -> None:
    """The functions that the engine writes with, against the worked example."""
    timer = DeviceSection(idstr="timer", version_id=2, payload=bytes(24))
    state = DeviceSection(idstr="globalstate", version_id=1, payload=EXAMPLE_A.data[0x92:0xFA])
    made = b"".join(
        [
            encoder.file_header(),
            encoder.configuration("none"),
            encoder.section_start(Section.START, 2, "ram", 0, encoder.RAM_VERSION),
            encoder.ram_list([]),
            encoder.END_WORD,
            encoder.section_footer(2),
            encoder.section_continue(Section.END, 2),
            encoder.END_WORD,
            encoder.section_footer(2),
            encoder.device_section(timer, 0),
            encoder.device_section(state, 4),
            encoder.end_of_stream(),
            encoder.description(cases.JSON),
        ]
    )
    assert made == EXAMPLE_A.data


def test_ping_and_open_return_path_are_those_of_example_b() -> None:
    assert encoder.command(1) + encoder.ping(1) == cases.EXAMPLE_B.data[0x11:0x1F]


def test_device_section_without_footer() -> None:
    section = DeviceSection(idstr="timer", version_id=2, payload=bytes(24))
    assert encoder.device_section(section, 0, footer=False) == EXAMPLE_A.data[0x49:0x74]


def test_configuration_with_a_subsection() -> None:
    sub = ConfigSubsection(name="configuration/target-page-bits", version=1, payload=b"\0\0\0\x0c")
    expected = cases.hexed('07 00000002 "pc" 05 1e "configuration/target-page-bits" 00000001 0000000c')
    assert encoder.configuration("pc", [sub]) == expected


# -- what cannot be written ----------------------------------------------------------------------------------------


def test_name_of_255_bytes_is_the_longest() -> None:
    assert encoder.cstr("x" * 255) == b"\xff" + b"x" * 255
    assert encoder.cstr("") == b"\0"
    with pytest.raises(LocalProtocolError, match="256 bytes, the wire allows 255"):
        encoder.cstr("x" * 256)
    with pytest.raises(LocalProtocolError, match="256 bytes"):
        encoder.cstr("ü" * 128)


def test_payload_of_a_command_has_16_bits_of_length() -> None:
    assert encoder.command(6, bytes(65535)).startswith(bytes.fromhex("08 0006 ffff"))
    with pytest.raises(LocalProtocolError, match="65536 bytes"):
        encoder.command(6, bytes(65536))


def test_what_is_no_element_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="Element is not an element"):
        Encoder().encode(events.Element())


def test_name_that_has_no_bytes_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="no form in bytes"):
        encoder.cstr("\ud800")


def test_names_that_are_no_utf8_are_written_as_they_were_read() -> None:
    """Q1 for machines, blocks and devices with bytes that are no text."""
    whole = (
        cases.HEADER
        + b"\x07\0\0\0\x02\xff\xfe"
        + cases.START_HEAD
        + b"\0\0\0\0\0\0\x10\x04\x03a\x80b\0\0\0\0\0\0\x10\0"
        + b"\0\0\0\0\0\0\0\x02\x03a\x80b\0"
        + cases.END_WORD
        + cases.FOOTER
        + b"\x04\0\0\0\x07\x02\xc3\x28\0\0\0\0\0\0\0\x01"
        + b"\x7e\0\0\0\x07\0"
    )
    got = read(whole, measure=lambda *_: 0, eof=False)
    assert got.error is None
    assert encode(got.found) == whole


# -- RecordWriter --------------------------------------------------------------------------------------------------


def offsets(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, np.int64)


def test_first_record_names_its_block_and_the_next_call_continues() -> None:
    writer = RecordWriter()
    name, words = writer.words("pc.ram", offsets(0, 0x1000), RamFlag.PAGE)
    assert (name, words.tobytes()) == (b"\x06pc.ram", bytes.fromhex("0000000000000008 0000000000001028"))
    name, words = writer.words("pc.ram", offsets(0x2000), RamFlag.ZERO)
    assert (name, words.tobytes()) == (b"", bytes.fromhex("0000000000002022"))
    name, words = writer.words("rom", offsets(0), RamFlag.ZERO)
    assert (name, words.tobytes()) == (b"\x03rom", bytes.fromhex("0000000000000002"))


def test_no_records_name_no_block() -> None:
    writer = RecordWriter()
    assert writer.zero_records("pc.ram", offsets()) == b""
    assert writer.zero_records("pc.ram", offsets(0)).startswith(bytes.fromhex("0000000000000002 06"))


def test_forgotten_block_is_named_again() -> None:
    writer = RecordWriter()
    first = writer.zero_records("pc.ram", offsets(0))
    assert writer.zero_records("pc.ram", offsets(0)) == bytes.fromhex("0000000000000022 00")
    writer.forget()
    assert writer.zero_records("pc.ram", offsets(0)) == first


def test_words_hold_offsets_above_4_gib() -> None:
    writer = RecordWriter()
    _, words = writer.words("m", offsets((1 << 40) + 0x3000, 1 << 33), RamFlag.PAGE)
    assert words.tobytes() == bytes.fromhex("0000010000003008 0000000200000028")


# -- random streams ------------------------------------------------------------------------------------------------

BLOCKS = {"a": 16, "longer name": 8, "ü": 1}


@st.composite
def records(draw: st.DrawFn) -> list[events.Element]:
    """Runs of zero and raw pages of several blocks, mixed at random, over several sections."""
    found: list[events.Element] = []
    last: str | None = None
    for section in range(draw(st.integers(0, 3))):
        if section:
            found += [events.RamEnd(), cases.FOOTER_EVENT, cases.ram_header(Section.PART)]
        for _ in range(draw(st.integers(0, 4))):
            block = draw(st.sampled_from(sorted(BLOCKS)))
            named = block != last or draw(st.booleans())
            last = block
            count = draw(st.integers(1, 1 if named else 5))
            where = [PAGE_SIZE * draw(st.integers(0, BLOCKS[block] - 1)) for _ in range(count)]
            if draw(st.booleans()):
                found.append(cases.pages(block, where, [bytes([draw(st.integers(0, 255))]) * PAGE_SIZE] * count,
                                         named=named))  # fmt: skip
            else:
                fills = [draw(st.sampled_from([0, 0, 0, 7, 255])) for _ in range(count)]
                found.append(cases.zeros(block, where, named=named, fills=fills))
    return found


OPENED = encode(
    [
        *cases.OPENING_EVENTS,
        cases.ram_header(Section.START),
        events.RamList(blocks=tuple((name, count * PAGE_SIZE) for name, count in BLOCKS.items())),
        events.RamEnd(),
        cases.FOOTER_EVENT,
        cases.ram_header(Section.PART),
    ]
)


@hypothesis.settings(max_examples=60, derandomize=True)
@hypothesis.given(found=records(), step=st.sampled_from([None, 1, 9, 4104, 5000]))
def test_random_records_survive_the_way_there_and_back(found: list[events.Element], step: int | None) -> None:
    """Q6, Q7: events -> bytes -> events -> bytes; zero and raw pages, named and continued, mixed."""
    data = encode([*found, events.RamEnd()])
    got = read(OPENED + data, step=step, eof=False)
    assert got.error is None
    assert encode(got.found) == OPENED + data
    assert flat(got.found)[7:] == flat([*found, events.RamEnd()])


@hypothesis.settings(max_examples=60, derandomize=True)
@hypothesis.given(
    machine=st.text(st.characters(codec="utf-8"), max_size=40),
    number=st.sampled_from([3, 6, 10]),
    payload=st.binary(max_size=300),
    section_id=st.integers(0, 2**32 - 1),
    instance_id=st.integers(0, 2**32 - 1),
    idstr=st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
    state=st.binary(max_size=200),
    text=st.binary(max_size=200),
    step=st.integers(1, 50),
)
def test_random_elements_survive_the_way_there_and_back(
    machine: str,
    number: int,
    payload: bytes,
    section_id: int,
    instance_id: int,
    idstr: str,
    state: bytes,
    text: bytes,
    step: int,
) -> None:
    header = events.SectionHeader(
        kind=Section.FULL, section_id=section_id, idstr=idstr, instance_id=instance_id, version_id=2**32 - 1
    )
    found: list[events.Element] = [
        cases.HEADER_EVENT,
        events.Configuration(machine=machine),
        events.CommandElement(number=number, payload=payload),
        header,
        events.DevicePayload(payload=state),
        events.SectionFooter(section_id=section_id),
        events.EndOfStream(),
        events.DescriptionElement(text=text),
    ]
    data = encode(found)
    got = read(data, step=step, measure=lambda *args: len(state) if len(args[3]) >= len(state) else None)
    assert got.error is None
    assert flat(got.found) == flat(found)
