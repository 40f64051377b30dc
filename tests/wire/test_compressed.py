"""Compressed pages (protocol/ram.md part 4): their zlib streams, and their records in a stream."""

from __future__ import annotations

import itertools
import zlib
from typing import Any, Final

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.wire.cases import EXAMPLE_STREAM, read
from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.wire import Encoder, Section, events
from trimig.wire.constants import RAM_VERSION
from trimig.wire.encoder import file_header, ram_list, section_start
from trimig.wire.pages.compressed import MOST_BYTES, MOST_RECORDS, CompressedRun, deflate, inflate
from trimig.wire.pages.sink import put

OPTIONS: Final[dict[str, Any]] = {"configuration": False, "footers": False}
HEAD: Final = file_header() + section_start(Section.START, 2, "ram", 0, RAM_VERSION)
LIST: Final = ram_list([("ram", 1024 * PAGE_SIZE)])
NOISE: Final = np.random.default_rng(5).integers(0, 256, PAGE_SIZE, np.uint8).tobytes()
TEXT: Final = (b"the same line again and again\n" * 140)[:PAGE_SIZE]


def record(index: int, stream: bytes, *, length: int | None = None, name: bytes = b"") -> bytes:
    """A COMPRESS_PAGE record; without a name it continues the block."""
    word = (index * PAGE_SIZE) | (0x100 if name else 0x120)
    size = len(stream) if length is None else length
    return word.to_bytes(8, "big") + name + size.to_bytes(4, "big") + stream


def test_worked_example_is_read() -> None:
    """Q5: the stream is a QEMU's."""
    page = inflate(bytes.fromhex(EXAMPLE_STREAM), 0)
    assert len(page) == PAGE_SIZE
    assert page == page[:1] + bytes(PAGE_SIZE - 1)


@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize("page", [bytes(PAGE_SIZE), TEXT, NOISE], ids=["zero", "text", "noise"])
def test_page_comes_back(page: bytes, level: int) -> None:
    """S5, D3: every level; never longer than the longest stream that a QEMU takes."""
    content = deflate(page, level)
    assert int.from_bytes(content[:4], "big") == len(content) - 4 <= MOST_BYTES
    assert content[4] == 0x78
    assert inflate(content[4:], 0) == page


def test_longest_stream_is_that_of_zlib() -> None:
    assert MOST_BYTES == 4110


@hypothesis.given(st.binary(max_size=300), st.binary(min_size=1, max_size=20), st.integers(0, 9))
def test_any_page_comes_back(start: bytes, rest: bytes, level: int) -> None:
    page = (start + rest * PAGE_SIZE)[:PAGE_SIZE]
    assert inflate(deflate(page, level)[4:], 0) == page


GOOD: Final = zlib.compress(TEXT, 1)
BAD_STREAMS: Final = {
    "nothing": (b"", "a stream that is cut behind 0 bytes"),
    "garbage": (b"\xff" * 40, "no zlib stream"),
    "gzip": (zlib.compress(TEXT, 1, 31), "no zlib stream"),
    "raw deflate": (zlib.compress(TEXT, 1, -15), "no zlib stream"),
    "a byte too few": (zlib.compress(TEXT[:-1], 1), "only 4095 bytes"),
    "an empty stream": (zlib.compress(b"", 1), "only 0 bytes"),
    "a byte too many": (zlib.compress(TEXT + b"!", 1), "more than 4096 bytes"),
    "a bomb": (zlib.compress(bytes(3 << 20), 9), "more than 4096 bytes"),
    "cut": (GOOD[:-1], "a stream that is cut behind 4096 bytes"),
    "cut early": (GOOD[:10], "a stream that is cut"),
    "wrong checksum": (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "no zlib stream"),
    "bytes behind": (GOOD + b"..", "2 bytes behind the end of the stream"),
    "a dictionary": (b"\x78\x20\x01\x02\x03\x04", "no zlib stream"),
}


@pytest.mark.parametrize(("stream", "words"), BAD_STREAMS.values(), ids=BAD_STREAMS.keys())
def test_bad_stream_is_one_error(stream: bytes, words: str) -> None:
    """T4: no more is ever inflated than a byte above a page."""
    with pytest.raises(RemoteProtocolError) as caught:
        inflate(stream, 77)
    assert (caught.value.offset, caught.value.section) == (77, "ram")
    assert words in caught.value.reason


@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_are_a_page_or_one_error(stream: bytes) -> None:
    try:
        page = inflate(stream, 0)
    except RemoteProtocolError:
        return
    assert len(page) == PAGE_SIZE


@hypothesis.given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_changed_stream_is_never_another_page(place: int, change: int) -> None:
    """The checksum of the stream is looked at."""
    changed = bytearray(GOOD)
    changed[place] ^= change
    try:
        page = inflate(bytes(changed), 0)
    except RemoteProtocolError:
        return
    assert page == TEXT  # the bits of the header that say how it was compressed


# -- records in a stream -------------------------------------------------------------------------------------------------


def runs(found: list[events.Element]) -> list[CompressedRun]:
    return [event for event in found if isinstance(event, CompressedRun)]


def stream_of(*records: bytes) -> bytes:
    return HEAD + LIST + b"".join(records)


def test_records_are_taken_together_and_written_again() -> None:
    first = record(7, GOOD, name=b"\x03ram")
    rest = [record(3 * n, GOOD) for n in range(MOST_RECORDS)]
    data = stream_of(first, *rest)
    result = read(data, eof=False, **OPTIONS)
    assert [len(run.streams) for run in runs(result.found)] == [MOST_RECORDS, 1]
    assert runs(result.found)[1].at == len(data) - len(rest[-1])
    encoder = Encoder()
    assert b"".join(encoder.encode(event) for event in result.found) == data


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_pieces_make_no_difference(step: int) -> None:
    data = stream_of(record(7, GOOD, name=b"\x03ram"), record(8, zlib.compress(NOISE)), record(7, GOOD))
    found = runs(read(data, step=step, eof=False, **OPTIONS).found)
    assert [offset // PAGE_SIZE for run in found for offset in run.offsets.tolist()] == [7, 8, 7]
    assert list(itertools.chain(*(run.streams for run in found))) == [GOOD, zlib.compress(NOISE), GOOD]


def test_error_names_the_record() -> None:
    """T4: the offset is that of the record, not of the first one that was taken together with it."""
    first, second = record(1, GOOD, name=b"\x03ram"), record(2, GOOD)
    data = stream_of(first, second, record(3, BAD_STREAMS["a bomb"][0]), record(4, GOOD))
    (run,) = runs(read(data, eof=False, **OPTIONS).found)
    with pytest.raises(RemoteProtocolError) as caught:
        run.content(lambda *_: np.zeros(PAGE_SIZE, np.uint8))
    assert caught.value.offset == len(stream_of(first, second))


def test_record_outside_of_the_block_is_found_behind_good_ones() -> None:
    first, second = record(1, GOOD, name=b"\x03ram"), record(2, GOOD)
    result = read(stream_of(first, second, record(1024, GOOD)), **OPTIONS)
    assert [len(run.streams) for run in runs(result.found)] == [2]
    assert isinstance(result.error, RemoteProtocolError)
    assert result.error.offset == len(stream_of(first, second))
    assert "is outside of RAM block 'ram'" in result.error.reason


def test_longest_record_is_read_and_a_longer_one_refused() -> None:
    longest = zlib.compress(NOISE, 0)
    longest = deflate(NOISE, 0)[4:] + bytes(MOST_BYTES - len(longest))
    assert len(runs(read(stream_of(record(1, longest, name=b"\x03ram")), eof=False, **OPTIONS).found)) == 1
    result = read(stream_of(record(1, b"", length=MOST_BYTES + 1, name=b"\x03ram")), eof=False, **OPTIONS)
    assert isinstance(result.error, RemoteProtocolError)
    assert "compressed page of 4111 bytes; the longest has 4110" in result.error.reason


class Memory:
    """A sink of 1024 pages."""

    def __init__(self) -> None:
        self.memory = np.zeros((1024, PAGE_SIZE), np.uint8)

    async def pages(self, block: str, indices: np.ndarray[Any, Any], data: np.ndarray[Any, Any]) -> None:
        """Take them."""
        self.memory[indices] = data

    async def zeros(self, block: str, indices: np.ndarray[Any, Any], fills: np.ndarray[Any, Any]) -> None:
        """Take them."""
        raise AssertionError("no page of zeros was sent")

    def read(self, block: str, index: int) -> np.ndarray[Any, Any]:
        """Not needed."""
        raise AssertionError("no page depends on its former content")


async def test_any_sink_gets_whole_pages() -> None:
    data = stream_of(record(7, GOOD, name=b"\x03ram"), record(5, zlib.compress(NOISE)))
    sink = Memory()
    for run in runs(read(data, eof=False, **OPTIONS).found):
        await put(sink, run)
    assert sink.memory[7].tobytes() == TEXT
    assert sink.memory[5].tobytes() == NOISE
