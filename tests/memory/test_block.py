"""RAM blocks on a memfd."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable

import numpy as np
import pytest
import trio

from trimig.errors import ConfigError, StateError
from trimig.guest import PAGE_SIZE, RamBlock
from trimig.memory import MemfdBlock, block, linux

Make = Callable[..., MemfdBlock]


def test_a_new_block_is_zero_absent_and_fits_the_protocol(make_block: Make) -> None:
    ram = make_block(64)
    assert isinstance(ram, RamBlock)
    assert (ram.name, ram.length, ram.pages.shape, len(ram.view)) == ("ram", 64 * PAGE_SIZE, (64, PAGE_SIZE), 262144)
    assert ram.absent().all()
    assert not ram.pages.any()


@pytest.mark.parametrize("length", [0, -4096, 1, 4095, 4097])
def test_a_length_that_is_not_whole_pages_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match="4096"):
        MemfdBlock("ram", length)


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128])
def test_a_name_that_does_not_fit_the_wire_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 255 bytes"):
        MemfdBlock(name, PAGE_SIZE)


def test_names_of_any_bytes_that_the_wire_allows_are_accepted() -> None:
    for name in ("a/b", "\0", "é" * 127, "/objects/m0"):
        MemfdBlock(name, PAGE_SIZE).close()


def test_view_and_pages_and_another_mapping_show_the_same_bytes(make_block: Make) -> None:
    ram = make_block(4)
    ram.view[PAGE_SIZE : PAGE_SIZE + 5] = b"hello"
    assert ram.pages[1, :5].tobytes() == b"hello"
    with mmap.mmap(ram.fd, ram.length) as other:
        other[0:2] = b"hi"
    assert bytes(ram.view[:2]) == b"hi"


def test_absent_names_exactly_the_untouched_pages_and_touches_none(make_block: Make) -> None:
    ram = make_block(512)
    touched = np.zeros(512, dtype=np.bool_)
    touched[[0, 3, 4, 100, 511]] = True
    ram.pages[touched, 7] = 1
    for _ in range(2):
        assert (ram.absent() == ~touched).all()
    assert (ram.absent_slice(3, 98) == ~touched[3:101]).all()
    assert os.fstat(ram.fd).st_blocks * 512 == 5 * PAGE_SIZE


def test_absent_errs_towards_present_when_the_block_is_too_ragged(
    make_block: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = make_block(64)
    ram.pages[::2, 0] = 1
    monkeypatch.setattr(block, "MAX_EXTENTS", 4)
    absent = ram.absent()
    assert absent[:7].tolist() == [False, True] * 3 + [False]
    assert not absent[7:].any()


def test_absent_slice_at_every_border_agrees_with_the_whole(make_block: Make) -> None:
    ram = make_block(16)
    ram.pages[[1, 2, 5, 15], 0] = 1
    whole = ram.absent()
    for first in range(17):
        for count in range(17 - first):
            assert (ram.absent_slice(first, count) == whole[first : first + count]).all()


async def test_holes_are_found_in_slices_in_which_other_tasks_go_on(
    make_block: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = make_block(64)
    ram.pages[::2, 0] = 1
    monkeypatch.setattr(block, "MAX_EXTENTS", 4)
    monkeypatch.setattr(block, "_SLICE", 8)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        absent = await block.find_absent(ram)
        nursery.cancel_scope.cancel()
    assert absent is not None
    assert np.flatnonzero(absent).tolist() == [page for page in range(64) if page % 2 and page % 8 != 7]
    assert turns >= 8


def test_populate_gives_memory_and_keeps_content(make_block: Make) -> None:
    ram = make_block(64)
    ram.pages[2] = 9
    assert ram.populate_slice(0, 32)
    assert ram.populate_slice(64, 0)
    assert (ram.absent() == (np.arange(64) >= 32)).all()
    assert (ram.pages[2] == 9).all()


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 65), (64, 1), (5, -1)])
def test_slices_outside_the_block_are_refused(make_block: Make, first: int, count: int) -> None:
    ram = make_block(64)
    with pytest.raises(ValueError, match="not within"):
        ram.populate_slice(first, count)
    with pytest.raises(ValueError, match="not within"):
        ram.absent_slice(first, count)


def test_populate_on_a_kernel_without_it_is_a_no(make_block: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "MADV_POPULATE_WRITE", 9999)
    ram = make_block(4)
    assert not ram.populate_slice(0, 4)


def test_discard_makes_every_page_absent_and_zero(make_block: Make) -> None:
    ram = make_block(64)
    ram.pages[:] = 5
    ram.discard()
    assert ram.absent().all()
    assert not ram.pages.any()


def test_close_is_idempotent_and_ends_all_access() -> None:
    ram = MemfdBlock("ram", PAGE_SIZE)
    ram.close()
    ram.close()
    for use in (
        lambda: ram.pages,
        lambda: ram.view,
        lambda: ram.fd,
        lambda: ram.absent(),
        lambda: ram.discard(),
        lambda: ram.populate_slice(0, 1),
    ):
        with pytest.raises(StateError, match="closed"):
            use()


def test_arrays_made_from_a_block_outlive_its_close() -> None:
    ram = MemfdBlock("ram", 4 * PAGE_SIZE)
    pages, words, part = ram.pages, np.frombuffer(ram.view, dtype=np.uint64), ram.view[8:16]
    words[1] = 77
    ram.close()
    assert words[1] == 77
    assert pages[0, 8] == 77
    assert part[0] == 77


def test_a_given_descriptor_is_taken_over() -> None:
    first = MemfdBlock("ram", 2 * PAGE_SIZE)
    second = MemfdBlock("ram", 2 * PAGE_SIZE, fd=os.dup(first.fd))
    first.view[0] = 3
    first.close()
    assert second.view[0] == 3
    second.close()


def test_a_given_descriptor_that_is_too_short_is_refused_and_closed() -> None:
    fd = os.memfd_create("short")
    with pytest.raises(ConfigError, match="only 0"):
        MemfdBlock("ram", PAGE_SIZE, fd=fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_file_cannot_be_cut_short(make_block: Make) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(make_block(2).fd, 0)


def test_data_extents_of_an_empty_range(make_block: Make) -> None:
    assert list(linux.data_extents(make_block(2).fd, 0, 0)) == []


def test_only_the_slice_is_given_back() -> None:
    """What stands before and behind it keeps its content and its memory."""
    with contextlib.closing(MemfdBlock("ram", 8 * PAGE_SIZE)) as block:
        block.pages[:] = np.arange(1, 9, dtype=np.uint8)[:, None]
        block.discard_slice(2, 3)
        assert block.pages[:, 0].tolist() == [1, 2, 0, 0, 0, 6, 7, 8]
        block.discard_slice(7, 1)
        block.discard_slice(0, 0)
        assert block.absent()[[0, 1, 5, 6]].tolist() == [False] * 4
        assert block.absent()[7]
