"""Iterative sections and encodings of pages are rows of tables: a stream with a section and an encoding of this test."""

from __future__ import annotations

import dataclasses
import functools
import struct
import zlib

import numpy as np
import pytest

from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.wire import Decoder, Section, encoder, events
from trimig.wire.constants import RamFlag
from trimig.wire.encoder import RecordWriter
from trimig.wire.pages.state import PageState
from trimig.wire.refusals import Unsupported
from trimig.wire.sections.ram import ENCODINGS, RamReader
from trimig.wire.sections.reader import SectionFormat, Window


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Note(events.Element):
    text: bytes


class NoteReader:
    """Counted strings; an empty one ends the part."""

    def __init__(self, state: PageState) -> None:
        self.begun: list[Section] = []
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    def begin(self, header: events.SectionHeader) -> None:
        self.begun.append(header.kind)
        self._ended = False

    def read(self, window: Window) -> tuple[events.Element | None, int]:
        if not window.have or window.have < 1 + int(window.array[window.pos]):
            return None, 0
        end = window.pos + 1 + int(window.array[window.pos])
        text = window.array[window.pos + 1 : end].tobytes()
        self._ended = not text
        return Note(text=text, at=window.offset), 1 + len(text)


def read_packed(state: PageState, window: Window, block: str, head: int) -> tuple[events.Element | None, int]:
    """A length as be32, and one page packed by zlib."""
    if window.have < head + 4:
        return None, 0
    start = window.pos + head + 4
    word, size = (int.from_bytes(window.array[a : a + n].tobytes()) for a, n in ((window.pos, 8), (start - 4, 4)))
    if window.end < start + size:
        return None, 0
    offsets = state.inside(block, np.array([word // PAGE_SIZE * PAGE_SIZE], np.int64), window.offset)
    state.end_run()
    data = np.frombuffer(zlib.decompress(window.array[start : start + size].tobytes()), np.uint8).reshape(1, -1)
    return events.PageRun(block=block, named=head > 8, offsets=offsets, data=data, at=window.offset), head + 4 + size


def packed(offset: int, fill: int, *, name: str = "") -> bytes:
    flags = RamFlag.COMPRESS_PAGE | (RamFlag(0) if name else RamFlag.CONTINUE)
    body = zlib.compress(bytes([fill]) * PAGE_SIZE)
    return (
        struct.pack(">Q", offset | flags) + (encoder.cstr(name) if name else b"") + struct.pack(">I", len(body)) + body
    )


BOTH = {
    "ram": SectionFormat(4, functools.partial(RamReader, encodings={**ENCODINGS, RamFlag.COMPRESS_PAGE: read_packed})),
    "notes": SectionFormat(1, NoteReader),
}
RAM, NOTES = 2, 3
START = encoder.file_header() + encoder.configuration("none")
RAM_START = (
    encoder.section_start(Section.START, RAM, "ram", 0, 4)
    + encoder.ram_list([("m0", 16 * PAGE_SIZE)])
    + encoder.END_WORD
    + encoder.section_footer(RAM)
)
NOTES_START = (
    encoder.section_start(Section.START, NOTES, "notes", 0, 1) + b"\x05first\x00" + encoder.section_footer(NOTES)
)


def part(kind: Section, section_id: int, body: bytes) -> bytes:
    return encoder.section_continue(kind, section_id) + body + encoder.section_footer(section_id)


def interleaved() -> bytes:
    records = RecordWriter()
    pages = records.page_records("m0", np.array([0, PAGE_SIZE], np.int64), np.full((2, PAGE_SIZE), 7, np.uint8))
    zeros = records.zero_records("m0", np.array([2 * PAGE_SIZE], np.int64))
    mixed = packed(3 * PAGE_SIZE, 3) + records.page_records(
        "m0", np.array([4 * PAGE_SIZE], np.int64), np.full((1, PAGE_SIZE), 4, np.uint8)
    )
    return (
        START
        + RAM_START
        + NOTES_START
        + part(Section.PART, RAM, pages + encoder.END_WORD)
        + part(Section.PART, NOTES, b"\x03one\x03two\x00")
        + part(Section.PART, RAM, zeros + mixed + encoder.END_WORD)
        + part(Section.END, NOTES, b"\x00")
        + part(Section.END, RAM, packed(5 * PAGE_SIZE, 5, name="m0") + encoder.END_WORD)
        + encoder.end_of_stream()
    )


def decode(data: bytes, decoder: Decoder, step: int = 1 << 30) -> tuple[dict[int, int], list[bytes], list[str]]:
    """The pages by their offsets as fill bytes, the notes, and the headers."""
    pages: dict[int, int] = {}
    notes: list[bytes] = []
    headers: list[str] = []
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])
        while (event := decoder.next_event()) is not None:
            match event:
                case events.PageRun():
                    assert (event.data == event.data[:, :1]).all()
                    pages |= dict(zip(event.offsets.tolist(), event.data[:, 0].tolist(), strict=True))
                case events.ZeroRun():
                    pages |= dict(zip(event.offsets.tolist(), event.fills.tolist(), strict=True))
                case Note():
                    notes.append(event.text)
                case events.SectionHeader():
                    headers.append(f"{event.idstr} {event.kind.name}")
                case _:
                    pass
    return pages, notes, headers


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 30])
def test_two_iterative_sections_and_an_encoding_of_a_table(step: int) -> None:
    decoder = Decoder(measure=None, sections=BOTH)
    pages, notes, headers = decode(interleaved(), decoder, step)
    assert pages == {page * PAGE_SIZE: fill for page, fill in enumerate([7, 7, 0, 3, 4, 5])}
    assert notes == [b"first", b"", b"one", b"two", b"", b""]
    assert headers == [
        "ram START", "notes START", "ram PART", "notes PART", "ram PART", "notes END", "ram END"
    ]  # fmt: skip
    assert dict(decoder.blocks) == {"m0": 16 * PAGE_SIZE}


def test_no_run_is_open_inside_of_another_section() -> None:
    """A prediction of pages would read the content of that section."""
    decoder = Decoder(measure=None, sections=BOTH)
    records = RecordWriter().page_records(
        "m0", np.arange(4, dtype=np.int64) * PAGE_SIZE, np.ones((4, PAGE_SIZE), np.uint8)
    )
    decode(START + RAM_START + NOTES_START + encoder.section_continue(Section.PART, RAM) + records, decoder)
    assert decoder.open_run == ("m0", 4 * PAGE_SIZE, 4)
    decode(encoder.END_WORD + encoder.section_footer(RAM) + encoder.section_continue(Section.PART, NOTES), decoder)
    assert decoder.open_run is None


def test_a_connection_of_the_same_stream_knows_its_sections() -> None:
    first = Decoder(measure=None, sections=BOTH)
    decode(START + RAM_START + NOTES_START, first)
    second = Decoder(measure=None, continues=first)
    found = decode(
        part(Section.PART, NOTES, b"\x05again\x00") + part(Section.PART, RAM, packed(0, 9, name="m0")), second
    )
    assert found == ({0: 9}, [b"again", b""], ["notes PART", "ram PART"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (NOTES_START, "the iterative section 'notes' (instance 0) is not supported: the device that sends it"),
        (
            encoder.section_start(Section.START, 9, "block", 0, 1),
            "the iterative section 'block' (instance 0) is not supported: the source migrates its disks",
        ),
        (
            encoder.section_start(Section.START, RAM, "ram", 1, 4),
            "the iterative section 'ram' (instance 1) is not supported",
        ),
    ],
)
def test_section_without_a_row_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(Unsupported) as caught:
        decode(START + RAM_START + data, Decoder(measure=None))
    assert words in str(caught.value)


def test_encoding_without_a_row_is_refused() -> None:
    data = START + RAM_START + encoder.section_continue(Section.PART, RAM) + int(RamFlag.HOOK).to_bytes(8, "big")
    with pytest.raises(Unsupported, match="a record private to the RDMA transport, which is not supported yet"):
        decode(data, Decoder(measure=None))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoder.section_start(Section.START, NOTES, "notes", 0, 2), "section 'notes' has version 2, 1 is needed"),
        (
            encoder.section_start(Section.START, RAM, "notes", 0, 1),
            "section 'notes' with the id 2, which section 'ram' has",
        ),
        (encoder.section_continue(Section.PART, 7), "section PART with the id 7, which no START has announced"),
    ],
)
def test_section_that_does_not_fit_its_row_is_an_error(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(START + RAM_START + data, Decoder(measure=None, sections=BOTH))
    assert words in str(caught.value)


def test_section_that_starts_again_may_have_another_id() -> None:
    again = NOTES_START + encoder.section_start(Section.START, 8, "notes", 0, 1) + b"\x00" + encoder.section_footer(8)
    decoder = Decoder(measure=None, sections=BOTH)
    decode(START + RAM_START + again + part(Section.PART, 8, b"\x00"), decoder)
    with pytest.raises(RemoteProtocolError, match="with the id 3, which no START has announced"):
        decode(part(Section.PART, NOTES, b"\x00"), decoder)
