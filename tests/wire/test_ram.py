"""Runs of page records: how they are found, and the decoder's side of placing predicted pages without its buffer."""

from __future__ import annotations

import numpy as np
import pytest

from tests.wire import cases
from tests.wire.cases import flat, page, read
from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.wire import Decoder, RamFlag, RecordWriter, events

RECORD = 8 + PAGE_SIZE
NAMED = bytes.fromhex("0000000000000008") + b"\x06pc.ram"
PAGES = [page(n) for n in range(64)]


def again(index: int, flags: int = 0x28) -> bytes:
    """A PAGE record that continues, of the page with number *index*."""
    return (index * PAGE_SIZE | flags).to_bytes(8, "big") + PAGES[index]


def after_first_page(rest: bytes = b"") -> Decoder:
    """A decoder that has read page 0 of pc.ram and has *rest* of a record in its buffer."""
    decoder = Decoder(measure=None)
    decoder.feed(cases.IN_RAM + NAMED + PAGES[0] + rest)
    drain(decoder)
    return decoder


def drain(decoder: Decoder) -> list[events.Element]:
    found = []
    while (event := decoder.next_event()) is not None:
        found.append(cases.copied(event))
    return found


# -- how runs are found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63])
def test_equal_records_come_as_one_run(count: int) -> None:
    """Runs are looked for in growing steps; their borders (16, 128, …) must not show."""
    data = cases.IN_RAM + NAMED + PAGES[0] + b"".join(again(n) for n in range(1, count + 1))
    found = read(data, eof=False).found[len(cases.IN_RAM_EVENTS) :]
    assert [type(e).__name__ for e in found] == ["PageRun", "PageRun"]
    run = found[1]
    assert isinstance(run, events.PageRun)
    assert run.offsets.tolist() == [n * PAGE_SIZE for n in range(1, count + 1)]
    assert run.data.shape == (count, PAGE_SIZE)
    assert [row.tobytes() for row in run.data] == PAGES[1 : count + 1]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 127, 128, 129, 255])
def test_equal_zero_records_come_as_one_run(count: int) -> None:
    writer = RecordWriter()
    data = writer.zero_records("pc.ram", np.arange(count + 1, dtype=np.int64) * PAGE_SIZE)
    found = read(cases.IN_RAM + data + cases.END_WORD, eof=False).found[len(cases.IN_RAM_EVENTS) :]
    assert [type(e).__name__ for e in found] == ["ZeroRun", "ZeroRun", "RamEnd"]
    run = found[1]
    assert isinstance(run, events.ZeroRun)
    assert run.offsets.tolist() == [n * PAGE_SIZE for n in range(1, count + 1)]
    assert run.fills.tolist() == [0] * count


@pytest.mark.parametrize("good", [1, 15, 16, 17, 40])
def test_run_ends_before_a_record_of_another_kind(good: int) -> None:
    """Bytes of a page that look like a header are not taken for one."""
    data = NAMED + PAGES[0] + b"".join(again(n) for n in range(1, good + 1)) + bytes.fromhex("0000000000032022 00")
    data += b"".join(again(n) for n in range(51, 54))
    found = read(cases.IN_RAM + data, eof=False).found[len(cases.IN_RAM_EVENTS) :]
    kinds = [(type(e).__name__, len(e.offsets)) for e in found if isinstance(e, events.PageRun | events.ZeroRun)]
    assert kinds == [("PageRun", 1), ("PageRun", good), ("ZeroRun", 1), ("PageRun", 3)]


def test_content_of_a_page_may_look_like_records() -> None:
    fake = bytes.fromhex("0000000000001028") * (PAGE_SIZE // 8)
    data = NAMED + fake + (0x1028).to_bytes(8, "big") + fake + cases.END_WORD
    for step in (None, 1, 4104):
        found = read(cases.IN_RAM + data, step=step, eof=False).found[len(cases.IN_RAM_EVENTS) :]
        assert flat(found) == [
            ("PageRun", "pc.ram", True, 0, fake),
            ("PageRun", "pc.ram", False, 0x1000, fake),
            ("RamEnd",),
        ]


def test_records_before_a_bad_one_are_still_handed_out() -> None:
    """The events before an error do not depend on the pieces in which the bytes came."""
    bad = (0x100000 | 0x28).to_bytes(8, "big") + PAGES[0]
    data = cases.IN_RAM + NAMED + PAGES[0] + again(1) + again(2) + bad + again(3)
    whole, bytewise = read(data), read(data, step=1)
    assert flat(whole.found) == flat(bytewise.found)
    assert str(whole.error) == str(bytewise.error)
    assert [row[3] for row in flat(whole.found) if row[0] == "PageRun"] == [0, 0x1000, 0x2000]


def test_pages_are_views_until_bytes_are_given() -> None:
    decoder = Decoder(measure=None)
    decoder.feed(cases.IN_RAM + NAMED + PAGES[0] + again(1))
    runs = []
    while (event := decoder.next_event()) is not None:
        if isinstance(event, events.PageRun):
            runs.append(event)
    assert [run.data.tobytes() for run in runs] == [PAGES[0], PAGES[1]]
    assert all(run.data.base is not None for run in runs)


def test_blocks_are_known_from_the_size_list() -> None:
    assert read(cases.IN_RAM, eof=False).decoder.blocks == {"pc.ram": 0x100000, "rom": 0x80000}
    assert Decoder(measure=None).blocks == {}


# -- the open run --------------------------------------------------------------------------------------------------


def test_consecutive_pages_open_a_run() -> None:
    decoder = after_first_page()
    assert decoder.open_run == ("pc.ram", PAGE_SIZE, 1)
    decoder.feed(again(1) + again(2))
    drain(decoder)
    assert decoder.open_run == ("pc.ram", 3 * PAGE_SIZE, 3)


def test_no_run_is_open_before_records_and_while_one_is_whole_in_the_buffer() -> None:
    decoder = Decoder(measure=None)
    assert decoder.open_run is None
    decoder.feed(cases.IN_RAM)
    drain(decoder)
    assert decoder.open_run is None
    decoder = after_first_page()
    decoder.feed(again(1))
    assert decoder.open_run is None
    drain(decoder)
    assert decoder.open_run == ("pc.ram", 2 * PAGE_SIZE, 2)


@pytest.mark.parametrize(
    "data",
    [bytes.fromhex("0000000000001022 00"), cases.END_WORD, again(1) + again(3) + again(5), again(4) + again(3)],
    ids=["zero page", "end of the section", "gaps", "backwards"],
)
def test_run_is_closed_by_anything_else(data: bytes) -> None:
    decoder = after_first_page()
    decoder.feed(data)
    drain(decoder)
    assert decoder.open_run is None


def test_jump_begins_a_run_of_its_own() -> None:
    decoder = after_first_page()
    decoder.feed(again(10) + again(11))
    drain(decoder)
    assert decoder.open_run == ("pc.ram", 12 * PAGE_SIZE, 2)
    decoder.feed((0x5008).to_bytes(8, "big") + b"\x03rom" + PAGES[5])
    drain(decoder)
    assert decoder.open_run == ("rom", 6 * PAGE_SIZE, 1)


@pytest.mark.parametrize("held", [0, 1, 7, 8, 9, 4000, RECORD - 1])
def test_rest_is_taken_and_records_are_placed_elsewhere(held: int) -> None:
    """What the engine does: takes the beginning of a record, places that and two more, and goes on in the buffer."""
    record = again(1)
    decoder = after_first_page(record[:held])
    start = decoder.offset
    assert decoder.open_run == ("pc.ram", PAGE_SIZE, 1)
    assert decoder.take_rest() == record[:held]
    assert decoder.offset == start
    decoder.placed(3)
    assert decoder.offset == start + 3 * RECORD
    assert decoder.open_run == ("pc.ram", 4 * PAGE_SIZE, 4)
    decoder.feed(again(4) + cases.END_WORD + cases.FOOTER)
    found = drain(decoder)
    assert flat(found) == [("PageRun", "pc.ram", False, 4 * PAGE_SIZE, PAGES[4]), ("RamEnd",), ("SectionFooter", 2)]
    assert [e.at for e in found] == [start + 3 * RECORD, start + 4 * RECORD, start + 4 * RECORD + 8]


@pytest.mark.parametrize("placed", [0, 2])
def test_wrong_prediction_is_given_back(placed: int) -> None:
    """Behind the pages that came as predicted stands something else: it is parsed as what it is."""
    decoder = after_first_page()
    start = decoder.offset
    decoder.take_rest()
    decoder.placed(placed)
    other = bytes.fromhex("0000000000009022 00") + again(12)[:100]
    decoder.give_back(other)
    decoder.end_run()
    assert decoder.open_run is None
    assert decoder.offset == start + placed * RECORD
    assert flat(drain(decoder)) == [("ZeroRun", "pc.ram", False, 0x9000, b"\0")]
    decoder.feed(again(12)[100:])
    assert flat(drain(decoder)) == [("PageRun", "pc.ram", False, 12 * PAGE_SIZE, PAGES[12])]
    assert decoder.offset == start + placed * RECORD + 9 + RECORD


def test_error_behind_placed_pages_has_its_true_offset() -> None:
    decoder = after_first_page()
    start = decoder.offset
    decoder.take_rest()
    decoder.placed(5)
    decoder.give_back(bytes.fromhex("0000000000001012"))
    with pytest.raises(Exception, match="unknown combination of RAM flags 0x12") as caught:
        decoder.next_event()
    assert getattr(caught.value, "offset", None) == start + 5 * RECORD


def test_bytes_are_not_given_back_over_others() -> None:
    decoder = after_first_page(b"\0")
    with pytest.raises(ValueError, match="empty buffer only"):
        decoder.give_back(b"\0")


def test_more_is_given_back_than_the_buffer_held() -> None:
    """A wrong prediction of many pages can be longer than the buffer."""
    decoder = Decoder(measure=None, buffer_bytes=1)
    for at in range(0, len(whole := cases.IN_RAM + NAMED + PAGES[0]), 1000):
        decoder.feed(whole[at : at + 1000])
        drain(decoder)
    decoder.take_rest()
    decoder.give_back(b"".join(again(n) for n in range(20, 50)))
    assert [row[3] for row in flat(drain(decoder))] == [n * PAGE_SIZE for n in range(20, 50)]


# -- RecordWriter against the reader -------------------------------------------------------------------------------


def test_page_records_are_words_names_and_pages() -> None:
    writer = RecordWriter()
    data = np.frombuffer(PAGES[1] + PAGES[2], np.uint8).reshape(2, PAGE_SIZE)
    assert writer.page_records("pc.ram", np.array([0, 0x2000], np.int64), data) == (
        NAMED + PAGES[1] + (0x2028).to_bytes(8, "big") + PAGES[2]
    )
    assert writer.page_records("pc.ram", np.array([0x3000], np.int64), data[:1]) == (
        (0x3028).to_bytes(8, "big") + PAGES[1]
    )


def test_flags_are_disjoint_bits_below_a_page() -> None:
    """ram.md part 2: flags occupy the bits below the page size."""
    assert sum(RamFlag) == 0x3FF
    assert all(0 < flag < PAGE_SIZE for flag in RamFlag)


@pytest.mark.parametrize("size", [8192, 16384, 32768])
@pytest.mark.parametrize("pieces", [100, 1 << 20])
def test_larger_pages_are_told_by_the_record_behind_the_first(size: int, pieces: int) -> None:
    """What stands behind its first 4096 bytes is damage, until the next record shows itself where a larger page ends."""
    rest = b"\xff" * (size - PAGE_SIZE)
    data = cases.IN_RAM + NAMED + PAGES[1] + rest + (size | 0x28).to_bytes(8, "big") + PAGES[2] + rest
    decoder = Decoder(measure=None)

    def feed() -> None:
        for at in range(0, len(data), pieces):
            decoder.feed(data[at : at + pieces])
            drain(decoder)

    with pytest.raises(RemoteProtocolError, match=f"target pages of {size} bytes") as error:
        feed()
    assert error.value.offset == len(cases.IN_RAM + NAMED) + PAGE_SIZE
