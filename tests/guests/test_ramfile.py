"""RAM in a file: each page once, with its last content, whatever comes again and in which order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimig.channel.vectored import Span, elements, writev
from trimig.engine.ram.sender import RAM_SECTION
from trimig.guests.parked.ramfile import GROUP, RamWriter
from trimig.memory import MemfdBlock
from trimig.wire import Decoder, Section
from trimig.wire import encoder as wire
from trimig.wire import events as ev
from trimig.wire.devices import description

NAMES = ("ram", "a much longer name than that of the other block, of 61 bytes")


def head(blocks: list[MemfdBlock], footer: bytes) -> bytes:
    """Everything in front of the pages."""
    start = wire.section_start(Section.START, RAM_SECTION, "ram", 0, wire.RAM_VERSION)
    sizes = wire.ram_list((block.name, block.length) for block in blocks)
    return wire.file_header() + wire.configuration("toy") + start + sizes + wire.END_WORD + footer


@contextlib.contextmanager
def writer(
    path: Path, lengths: dict[str, int], *, footers: bool = True
) -> Iterator[tuple[RamWriter, list[MemfdBlock]]]:
    """Blocks of so many pages, and what writes them to *path*."""
    with contextlib.ExitStack() as stack:
        blocks = [stack.enter_context(contextlib.closing(MemfdBlock(n, pages * 4096))) for n, pages in lengths.items()]
        footer = wire.section_footer(RAM_SECTION) if footers else b""
        before = head(blocks, footer)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        stack.callback(os.close, fd)
        os.write(fd, before)
        yield RamWriter(fd, len(before), blocks, footer), blocks


def read(
    path: Path, *, footers: bool = True, ended: bool = False
) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Memory and how often each page is in the file, by block; the file is read to its last byte.

    Args:
        ended: it goes on behind the RAM, up to the description.
    """
    data = path.read_bytes()
    if not ended:
        data += wire.end_of_stream() + wire.description(description.build(4096, []))
    decoder = Decoder(measure=lambda *_: None, footers=footers, buffer_bytes=2 * len(data))
    decoder.feed(data)
    found: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    came_to_the_end = False
    while (event := decoder.next_event()) is not None:
        match event:
            case ev.RamList():
                for name, length in event.blocks:
                    found[name] = np.full((length // 4096, 4096), 0xEE, np.uint8), np.zeros(length // 4096, np.int64)
            case ev.PageRun():
                indices = event.offsets // 4096
                found[event.block][0][indices] = event.data
                np.add.at(found[event.block][1], indices, 1)
            case ev.ZeroRun():
                indices = event.offsets // 4096
                assert not event.fills.any()
                found[event.block][0][indices] = 0
                np.add.at(found[event.block][1], indices, 1)
            case ev.EndOfStream():
                came_to_the_end = True
    assert came_to_the_end
    return found


def check(path: Path, blocks: list[MemfdBlock], *, footers: bool = True) -> None:
    """What is in the file is what is in memory, each page once."""
    found = read(path, footers=footers)
    assert list(found) == [block.name for block in blocks]
    for block in blocks:
        memory, times = found[block.name]
        assert (times == 1).all()
        assert np.array_equal(memory, block.pages)


@pytest.mark.parametrize("footers", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_random_writes_in_random_order(tmp_path: Path, seed: int, *, footers: bool) -> None:
    """Data and zeros come and go, in runs and alone, in two blocks, some of which is larger than a group."""
    random = np.random.default_rng(seed)
    lengths = {NAMES[0]: int(random.integers(1, 3 * GROUP)), NAMES[1]: int(random.integers(1, 2 * GROUP))}
    with writer(tmp_path / "out", lengths, footers=footers) as (ram, blocks):
        for _ in range(int(random.integers(0, 60))):
            number = int(random.integers(2))
            pages = blocks[number].pages
            first = int(random.integers(len(pages)))
            step = int(random.choice([1, 1, 1, 2, 7]))
            indices = np.arange(first, min(len(pages), first + int(random.choice([1, 5, 600, 2000]))), step)
            kind = random.integers(4)
            if kind == 0:
                pages[indices] = 0
            elif kind == 1:
                pages[indices] = random.integers(1, 256, (len(indices), 1), np.uint8)
            elif kind == 2:
                mixed = random.integers(0, 2, len(indices))
                pages[indices] = mixed[:, None] * random.integers(1, 256, (len(indices), 1), np.uint8)
            ram.write(number, indices)
        for number in range(2):
            ram.write(number, ram.unwritten(number, 0, 5 * GROUP))
        ram.finish()
        assert ram.end == (tmp_path / "out").stat().st_size
        check(tmp_path / "out", blocks, footers=footers)


@pytest.mark.parametrize("pages", [1, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, 5 * GROUP + 7])
def test_every_page_of_groups_gets_data_one_by_one(tmp_path: Path, pages: int) -> None:
    """The first group of a section has the name of the block in it, the others have not."""
    random = np.random.default_rng(pages)
    with writer(tmp_path / "out", {NAMES[1]: pages}) as (ram, blocks):
        ram.write(0, np.arange(pages))
        for page in random.permutation(pages).tolist():
            blocks[0].pages[page] = page % 255 + 1
            ram.write(0, np.array([page]))
        ram.finish()
        check(tmp_path / "out", blocks)
        slots = pages * 4104
        assert slots <= (tmp_path / "out").stat().st_size <= slots + 300


def test_a_page_that_comes_often_does_not_make_the_file_longer(tmp_path: Path) -> None:
    with writer(tmp_path / "out", {"ram": 3 * GROUP}) as (ram, blocks):
        for turn in range(20):
            blocks[0].pages[5:900] = turn
            ram.write(0, np.arange(3 * GROUP))
        ram.finish()
        check(tmp_path / "out", blocks)
        assert (tmp_path / "out").stat().st_size < 896 * 4104 + 500 * 9 + 300


def test_memory_that_is_absent_stays_so(tmp_path: Path) -> None:
    with writer(tmp_path / "out", {"ram": 8 * GROUP}) as (ram, blocks):
        blocks[0].pages[1000] = 7
        ram.write(0, ram.unwritten(0, 0, 8 * GROUP))
        ram.finish()
        assert np.flatnonzero(~blocks[0].absent()).tolist() == [1000]
        assert (tmp_path / "out").stat().st_size < 8 * GROUP * 9 + 5000
        check(tmp_path / "out", blocks)


def test_blocks_take_turns(tmp_path: Path) -> None:
    """Each turn of a block is a section of its own, whose first record names the block."""
    with writer(tmp_path / "out", dict.fromkeys(NAMES, 700)) as (ram, blocks):
        for first in range(0, 700, 50):
            for number, block in enumerate(blocks):
                block.pages[first : first + 20] = number + 1
                ram.write(number, np.arange(first, first + 50))
        for number, block in enumerate(blocks):
            block.pages[::3] = 9
            ram.write(number, np.arange(0, 700, 3))
        ram.finish()
        check(tmp_path / "out", blocks)


def test_writes_that_do_not_take_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take a part of what it is given."""
    random = np.random.default_rng(3)
    real_write, real_pread = os.write, os.pread

    def part(fd: int, data: Any) -> int:
        return real_write(fd, memoryview(data).cast("B")[: int(random.integers(1, 3000))])

    def some(fd: int, span: Span) -> int | None:
        cut = elements(span)[:3].copy()
        cut[-1, 1] = max(1, int(cut[-1, 1]) // 3)
        return writev(fd, (cut.ctypes.data, len(cut)))

    with writer(tmp_path / "out", {NAMES[1]: 3 * GROUP}) as (ram, blocks):
        monkeypatch.setattr(os, "write", part)
        monkeypatch.setattr(os, "pread", lambda fd, size, at: real_pread(fd, min(size, 1000), at))
        monkeypatch.setattr("trimig.guests.parked.ramfile.writev", some)
        ram.write(0, np.arange(3 * GROUP))
        blocks[0].pages[10:40] = 1
        blocks[0].pages[::100] = 2
        ram.write(0, np.arange(3 * GROUP))
        blocks[0].pages[:30] = 3
        ram.write(0, np.arange(3 * GROUP))
        ram.finish()
        monkeypatch.undo()
        check(tmp_path / "out", blocks)
