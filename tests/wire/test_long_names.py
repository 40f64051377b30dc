"""B11: names of any length that the wire allows, cut at every byte: the same events whatever the pieces."""

from __future__ import annotations

import numpy as np
import pytest

from tests.wire.cases import flat, measure, read
from trimig.wire import Decoder, RecordWriter, Section, events
from trimig.wire import encoder as wire

LENGTHS = [1, 127, 128, 246, 247, 248, 255]
CLOSE = wire.END_WORD + wire.section_footer(2)


def stream(name: str) -> tuple[bytes, int, int]:
    """A stream of two blocks with long names, and where its list and its last record end."""
    other = name[:-1] + "z"
    head = wire.file_header() + wire.configuration(name)
    head += wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([(name, 8192), (other, 4096)]) + CLOSE
    records = RecordWriter()
    data = wire.section_continue(Section.PART, 2)
    data += records.zero_records(name, np.array([0], np.int64))
    data += records.page_records(name, np.array([4096], np.int64), np.full((1, 4096), 7, np.uint8))
    data += records.zero_records(other, np.array([0], np.int64), np.array([9], np.uint8))
    data += records.page_records(name, np.array([0], np.int64), np.full((1, 4096), 8, np.uint8))
    return head + data, len(head), len(head) + len(data)


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_names_of_blocks_at_every_split(length: int, reorder: bool) -> None:
    data, _, _ = stream("n" * length)
    end = wire.section_continue(Section.END, 2) + CLOSE + b"\0"
    whole = read(data + CLOSE + end, reorder=reorder, description=False)
    assert whole.error is None
    expected = flat(whole.found)
    assert [row[1] for row in expected if row[0] == "PageRun"] == 2 * ["n" * length]
    page = data.index(b"\7" * 4096)
    last = data.index(b"\x08" * 4096)
    cuts = [*range(1, page + 3), *range(page + 4095, last + 3)]
    for cut in cuts:
        got = read(data + CLOSE + end, pieces=[cut], reorder=reorder, description=False)
        assert got.error is None, (cut, got.error)
        assert flat(got.found) == expected, cut


@pytest.mark.parametrize("length", LENGTHS)
def test_names_of_devices_at_every_split(length: int) -> None:
    name = "d" * length
    data = wire.file_header() + wire.configuration("m") + wire.section_start(Section.FULL, 5, name, 0, 1)
    for cut in range(1, len(data) + 1):
        decoder = Decoder(measure=lambda *_: 2)
        found: list[events.Element] = []
        for piece in (data[:cut], data[cut:] + b"ab"):
            decoder.feed(piece)
            while (event := decoder.next_event()) is not None:
                found.append(event)
        assert [e.idstr for e in found if isinstance(e, events.SectionHeader)] == [name]
        assert [e.payload for e in found if isinstance(e, events.DevicePayload)] == [b"ab"]


@pytest.mark.parametrize("length", LENGTHS)
def test_names_on_the_second_connection_of_preempt(length: int) -> None:
    """It has records only, and each may name its block."""
    name = "n" * length
    first = Decoder(measure=measure)
    first.feed(wire.file_header() + wire.configuration("m"))
    first.feed(wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([(name, 8192)]) + CLOSE)
    while first.next_event() is not None:
        pass
    data = RecordWriter().page_records(name, np.array([4096], np.int64), np.full((1, 4096), 7, np.uint8))
    for cut in range(1, length + 12):
        decoder = Decoder(measure=None, continues=first, records_only=True)
        decoder.feed(data[:cut])
        assert decoder.next_event() is None
        decoder.feed(data[cut:])
        event = decoder.next_event()
        assert isinstance(event, events.PageRun)
        assert (event.block, event.offsets.tolist()) == (name, [4096])
