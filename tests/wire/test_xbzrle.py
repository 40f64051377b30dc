"""XBZRLE: deltas of pages (protocol/ram.md part 6), and their records in a stream."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.wire.cases import hexed, read
from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.wire import Encoder, Section, events
from trimig.wire.constants import RAM_VERSION
from trimig.wire.encoder import file_header, ram_list, section_start
from trimig.wire.pages.sink import put
from trimig.wire.pages.xbzrle import MOST_BYTES, MOST_RECORDS, DeltaRun, decode, encode

Page = NDArray[np.uint8]
ZERO = np.zeros(PAGE_SIZE, np.uint8)
RAMP = (np.arange(PAGE_SIZE) * 7 % 256).astype(np.uint8)


def changed(page: Page, **runs: object) -> Page:
    """*page* with bytes at ``at_N`` replaced."""
    new = page.copy()
    for name, values in runs.items():
        at, content = int(name.removeprefix("at_")), np.asarray(values, np.uint8).reshape(-1)
        new[at : at + len(content)] = content
    return new


#: The worked examples of the page, which were loaded by a QEMU.
EXAMPLES = [
    (ZERO, changed(ZERO, at_16=[0xDE, 0xAD, 0xBE, 0xEF]), hexed("10 04 de ad be ef")),
    (ZERO, changed(ZERO, at_0=1, at_200=2, at_4095=3), hexed("00 01 01 c7 01 01 02 b6 1e 01 03")),
    (ZERO, changed(ZERO, at_5=range(1, 131)), hexed("05 82 01") + bytes(range(1, 131))),
    (
        RAMP,
        changed(RAMP, at_0=[RAMP[0] ^ 0xFF, RAMP[1] ^ 1], at_300=[0xAA, 0xBB, 0xCC], at_4095=RAMP[4095] ^ 0x10),
        hexed("00 02 ff 06 aa 02 03 aa bb cc d0 1d 01 e9"),
    ),
    (ZERO, changed(ZERO, at_0=0x51), hexed("00 01 51")),
]


@pytest.mark.parametrize(("old", "new", "delta"), EXAMPLES)
def test_worked_examples_both_ways(old: Page, new: Page, delta: bytes) -> None:
    """Q4."""
    assert encode(old, new) == delta
    page = old.copy()
    decode(delta, page, 0)
    assert (page == new).all()


def test_equal_pages_have_an_empty_delta_and_very_different_ones_none() -> None:
    assert encode(RAMP, RAMP) == b""
    assert encode(ZERO, ZERO + 1) is None
    every_second = ZERO.copy()
    every_second[::2] = 1
    assert encode(ZERO, every_second) is None


@pytest.mark.parametrize(
    ("first", "end", "length"), [(0, 4091, 4094), (0, 4092, None), (3, 4096, 4096), (2, 4096, None), (0, 4096, None)]
)
def test_room_for_one_more_number_is_needed_while_bytes_are_left(first: int, end: int, length: int | None) -> None:
    """By ram.md 6.2 QEMU's encoder looks before each pair, also before equal bytes that are not written."""
    new = ZERO.copy()
    new[first:end] = 1
    delta = encode(ZERO, new)
    assert (None if delta is None else len(delta)) == length


@hypothesis.given(st.lists(st.tuples(st.integers(0, PAGE_SIZE - 1), st.binary(min_size=1, max_size=300)), max_size=40))
def test_a_delta_makes_the_new_page_of_the_old_one(writes: list[tuple[int, bytes]]) -> None:
    """Q4: random pages."""
    new = RAMP.copy()
    for at, content in writes:
        new[at : at + len(content)] = np.frombuffer(content, np.uint8)[: PAGE_SIZE - at]
    delta = encode(RAMP, new)
    if delta is None:
        return
    assert len(delta) <= PAGE_SIZE
    page = RAMP.copy()
    decode(delta, page, 0)
    assert (page == new).all()
    assert encode(RAMP, page) == delta, "a pair of pages has one delta"


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        ("00", "it ends inside a run"),
        ("05 81 00", "a run of 1 bytes, of which 0 are there"),
        ("05 00 01", "a run of no different bytes"),
        ("00 01 aa 00 01 bb", "a run of no equal bytes"),
        ("05 03 01 02", "a run of 3 bytes, of which 2 are there"),
        ("80 a0 01 00", "a number of three bytes"),
        ("80 21 01 aa", "equal bytes up to 4224"),
        ("ff 1f 02 aa bb", "different bytes up to 4097"),
        ("00 01 aa 05", "it ends inside a run"),
    ],
)
def test_malformed_deltas(delta: str, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words) as caught:
        decode(hexed(delta), ZERO.copy(), 77)
    assert caught.value.offset == 77


@hypothesis.given(st.binary(max_size=60))
def test_any_bytes_are_a_delta_or_one_error(delta: bytes) -> None:
    page = ZERO.copy()
    try:
        decode(delta, page, 0)
    except RemoteProtocolError:
        return
    assert len(page) == PAGE_SIZE


def test_an_empty_delta_changes_nothing() -> None:
    page = RAMP.copy()
    decode(b"", page, 0)
    assert (page == RAMP).all()


# -- in a stream -----------------------------------------------------------------------------------------------------

HEAD = (
    file_header()
    + section_start(Section.START, 2, "ram", 0, RAM_VERSION)
    + ram_list([("ram", 600 * PAGE_SIZE)])
    + hexed("00 00 00 00 00 00 00 10")
    + hexed("02 00 00 00 02")
)
FIRST = hexed('00 00 00 00 00 00 10 40 03 "ram" 01 00 03 00 01 51')
AGAIN = hexed("00 00 00 00 00 00 20 60 01 00 00") + hexed("00 00 00 00 00 00 10 60 01 00 03 01 01 52")
OPTIONS: dict[str, Any] = {"configuration": False, "footers": False}


def deltas(found: list[events.Element]) -> list[tuple[bool, int, bytes]]:
    return [
        (event.named and not row, int(offset), delta)
        for event in found
        if isinstance(event, DeltaRun)
        for row, (offset, delta) in enumerate(zip(event.offsets, event.deltas, strict=True))
    ]


@pytest.mark.parametrize("step", [None, 1, 7, 30])
def test_records_for_any_division_of_the_bytes(step: int | None) -> None:
    result = read(HEAD + FIRST + AGAIN + hexed("00 00 00 00 00 00 00 10"), step=step, eof=False, **OPTIONS)
    assert result.error is None
    assert deltas(result.found) == [
        (True, 0x1000, b"\0\1\x51"),
        (False, 0x2000, b""),
        (False, 0x1000, b"\1\1\x52"),
    ]
    encoder = Encoder()
    assert b"".join(encoder.encode(event) for event in result.found) == HEAD + FIRST + AGAIN + bytes(7) + b"\x10"


def test_very_many_records_are_several_events() -> None:
    many = b"".join(
        (page * PAGE_SIZE | 0x60).to_bytes(8, "big") + hexed("01 00 03 00 01 51")
        for page in range(2, 2 + 2 * MOST_RECORDS)
    )
    result = read(HEAD + FIRST + many, eof=False, **OPTIONS)
    assert len(deltas(result.found)) == 1 + 2 * MOST_RECORDS
    assert max(len(event.offsets) for event in result.found if isinstance(event, DeltaRun)) == MOST_RECORDS


def test_long_deltas_are_several_events() -> None:
    """So that no event takes long to apply."""
    delta = bytes.fromhex("01 01 07") * 1300
    record = (0x2060).to_bytes(8, "big") + b"\1" + len(delta).to_bytes(2, "big") + delta
    result = read(HEAD + FIRST + 30 * record, eof=False, **OPTIONS)
    assert len(deltas(result.found)) == 31
    sizes = [sum(map(len, event.deltas)) for event in result.found if isinstance(event, DeltaRun)]
    assert MOST_BYTES <= max(sizes) < MOST_BYTES + PAGE_SIZE


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("00 00 00 00 00 00 20 60 02 00 00", "encoding 2 of an XBZRLE page"),
        ("00 00 00 00 00 00 20 60 01 10 01", "delta of 4097 bytes"),
        ("00 00 00 00 00 25 80 60 01 00 00", "outside of RAM block 'ram'"),
    ],
)
def test_records_that_are_wrong(record: str, words: str) -> None:
    """The good records in front of them are read."""
    for step in (None, 1):
        result = read(HEAD + FIRST + hexed(record), step=step, eof=False, **OPTIONS)
        assert isinstance(result.error, RemoteProtocolError)
        assert words in str(result.error)
        assert result.error.offset == len(HEAD + FIRST)
        assert len(deltas(result.found)) == 1


class Memory:
    """A sink."""

    def __init__(self) -> None:
        self.content = np.zeros((8, PAGE_SIZE), np.uint8)

    async def pages(self, block: str, indices: NDArray[np.int64], data: Page) -> None:
        self.content[indices] = data

    async def zeros(self, block: str, indices: NDArray[np.int64], fills: Page) -> None:
        self.content[indices] = fills[:, None]

    def read(self, block: str, index: int) -> Page:
        return np.asarray(self.content[index])


async def test_a_page_twice_in_one_event_has_both_changes() -> None:
    memory = Memory()
    memory.content[1] = RAMP
    run = DeltaRun(
        block="ram",
        named=False,
        offsets=np.array([1, 3, 1], np.int64) * PAGE_SIZE,
        deltas=(b"\0\1\x51", b"\5\1\7", b"\1\1\x52"),
    )
    await put(memory, run)
    assert (memory.content[1] == changed(RAMP, at_0=[0x51, 0x52])).all()
    assert (memory.content[3] == changed(ZERO, at_5=7)).all()
    assert not memory.content[[0, 2, 4, 5, 6, 7]].any()
