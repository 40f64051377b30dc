"""Alternating records handed out by kind: the same memory as in the order of the wire, at every density and piece."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from trimig.guest import PAGE_SIZE
from trimig.wire import Decoder, RecordWriter, Section, events
from trimig.wire import encoder as wire

PAGES = 400


def stream_of(is_page: NDArray[np.bool_]) -> bytes:
    """RAM START and one PART with a record for each page, in order; page n is filled with n mod 255 + 1."""
    records = RecordWriter()
    parts = [
        wire.file_header(),
        wire.configuration("none"),
        wire.section_start(Section.START, 2, "ram", 0, 4),
        wire.ram_list([("m0", PAGES * PAGE_SIZE)]),
        wire.END_WORD + wire.section_footer(2) + wire.section_continue(Section.PART, 2),
    ]
    for number, page in enumerate(is_page):
        offsets = np.array([number * PAGE_SIZE], np.int64)
        if page:
            parts.append(records.page_records("m0", offsets, np.full((1, PAGE_SIZE), number % 255 + 1, np.uint8)))
        else:
            parts.append(records.zero_records("m0", offsets))
    return b"".join([*parts, wire.END_WORD, wire.section_footer(2)])


def memory_of(data: bytes, piece: int, *, reorder: bool) -> tuple[NDArray[np.uint8], int]:
    """What the stream leaves in a block full of garbage, and the number of events it took."""
    decoder = Decoder(measure=None, reorder=reorder)
    memory = np.full((PAGES, PAGE_SIZE), 0xEE, np.uint8)
    count = position = 0
    while position < len(data):
        taken = data[position : position + min(piece, len(decoder.writable()))]
        decoder.feed(taken)
        position += len(taken)
        while (event := decoder.next_event()) is not None:
            count += 1
            if isinstance(event, events.PageRun):
                memory[event.offsets // PAGE_SIZE] = event.data
            elif isinstance(event, events.ZeroRun):
                memory[event.offsets // PAGE_SIZE] = event.fills[:, None]
    assert decoder.offset == len(data)
    return memory, count


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("piece", [5000, 70_001, 1 << 20])
def test_memory_is_the_same_in_both_orders(density: float, piece: int) -> None:
    """Q6, Q7: no record is lost, doubled or misplaced by gathering records of one kind."""
    is_page = np.random.default_rng(7).random(PAGES) < density
    data = stream_of(is_page)
    plain, _ = memory_of(data, piece, reorder=False)
    gathered, _ = memory_of(data, piece, reorder=True)
    assert (plain == gathered).all()
    assert (plain[is_page, 0] == np.flatnonzero(is_page) % 255 + 1).all()
    assert not plain[~is_page].any()


def test_alternating_records_make_few_events() -> None:
    is_page = np.arange(PAGES) % 2 == 0
    data = stream_of(is_page)
    assert memory_of(data, 1 << 22, reorder=True)[1] < memory_of(data, 1 << 22, reorder=False)[1] / 10


def test_page_that_occurs_twice_keeps_its_last_content() -> None:
    """Gathering by kind would swap a page and a later zero record for it; ascending offsets rule that out."""
    records = RecordWriter()
    body = stream_of(np.zeros(PAGES, np.bool_))[: -8 - 5]
    again = np.array([0], np.int64)
    for number in range(40):
        at = np.array([(number % 20) * PAGE_SIZE], np.int64)
        body += records.page_records("m0", at, np.full((1, PAGE_SIZE), number + 1, np.uint8))
        body += records.zero_records("m0", again)
    memory, _ = memory_of(body + wire.END_WORD + wire.section_footer(2), 1 << 22, reorder=True)
    assert not memory[0].any()
    assert memory[1:20, 0].tolist() == [n + 21 for n in range(1, 20)]
