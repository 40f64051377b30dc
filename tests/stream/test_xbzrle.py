"""XBZRLE in files and in incoming streams: every reader applies the differences, and refuses those that are malformed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import trio.testing

import trimig
from tests.stream.made import content, elements, joined, read_everywhere, received, with_before
from trimig.stream import export_raw, inspect_stream
from trimig.wire import RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire.constants import RamFlag
from trimig.wire.pages.xbzrle import encode, record_content

CLOSE = wire.END_WORD + wire.section_footer(2)


def part(*deltas: tuple[int, bytes]) -> bytes:
    """A section with those deltas, by their pages."""
    offsets = np.array([page for page, _ in deltas], np.int64) * 4096
    contents = [record_content(delta) for _, delta in deltas]
    records = RecordWriter().records("ram", offsets, RamFlag.XBZRLE, contents)
    return wire.section_continue(Section.PART, 2) + records + CLOSE


def whole(page: int, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> bytes:
    """A section with one page."""
    records = RecordWriter().page_records("ram", np.array([page], np.int64) * 4096, data.reshape(1, -1))
    return wire.section_continue(Section.PART, 2) + records + CLOSE


async def test_every_reader_applies_differences(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """S1: to the page that came last, several times, in one section and in several."""
    final = content()[1]
    first, second = final.copy(), final.copy()
    first[[0, 700, 4095]] ^= 1
    second[10:300] ^= 3
    steps = [encode(first, second), encode(second, final)]
    assert all(steps)
    deltas = [(1, step or b"") for step in steps]
    for sections in (part(*deltas), part(deltas[0]) + part(deltas[1])):
        report = await read_everywhere(with_before(elements(), "end", whole(1, first) + sections), tmp_path)
        assert report.blocks[0].pages == 3 + 1 + 2


async def test_a_difference_from_a_page_that_never_came(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """It is damage for every reader: what stands in the memory or the file is not the page that the source means."""
    parts = elements()
    parts["end"] = part((3, b"\x05\x01\x07")) + parts["end"]
    # In the elements page 3 comes at the end.
    del parts["part"]
    await refused(joined(parts), r"page 3 of RAM block 'ram' came as a difference, and it has not come whole", tmp_path)


async def refused(data: bytes, words: str, tmp_path: Path) -> trimig.RemoteProtocolError:
    """The error of a destination; every reader of files names the same."""
    path = tmp_path / "stream"
    path.write_bytes(data)
    report = await inspect_stream(path)
    assert report.damaged
    assert re.search(words, str(report.error))
    with pytest.raises(trimig.RemoteProtocolError, match=words):
        await export_raw(path, "ram", tmp_path / "ram")
    with pytest.raises(trimig.RemoteProtocolError, match=words):
        await trimig.ParkedGuest.load(path)
    with trimig.ParkedGuest() as guest:
        with pytest.raises(trimig.RemoteProtocolError, match=words) as caught:
            await received(data, guest)
        assert caught.value.owner is trimig.Ownership.SOURCE
        assert caught.value.section == "ram"
        assert caught.value.offset is not None
    return caught.value


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        ("05", "it ends inside a run"),
        ("05 00 00", "a run of no different bytes"),
        ("00 01 aa 00 01 bb", "a run of no equal bytes"),
        ("ff 1f 02 aa bb", "different bytes up to 4097"),
        ("80 21 01 aa", "equal bytes up to 4224"),
        ("80 a0 01 00", "a number of three bytes"),
    ],
)
async def test_malformed_differences_are_damage(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, delta: str, words: str
) -> None:
    """T4, L9: one typed error with its place; the guest stays at its source."""
    parts = elements()
    bad = part((0, b""), (1, bytes.fromhex(delta)))
    place = len(parts["header"] + parts["configuration"] + parts["start"] + parts["part"]) + 5
    error = await refused(with_before(parts, "end", bad), words, tmp_path)
    assert error.offset is not None
    assert place <= error.offset < place + len(bad)
