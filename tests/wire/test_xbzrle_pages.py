"""XBZRLE of many pages at once, against the encoder of one page."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from trimig.guest import PAGE_SIZE, Pages
from trimig.wire.pages.xbzrle import decode, encode
from trimig.wire.pages.xbzrle_pages import encode_pages


def check(old: Pages, new: Pages) -> None:
    """The deltas are those of the reference, and make the new pages of the old ones."""
    deltas = encode_pages(old, new)
    assert deltas == [encode(before, after) for before, after in zip(old, new, strict=True)]
    for before, after, delta in zip(old, new, deltas, strict=True):
        if delta is not None:
            page = before.copy()
            decode(delta, page, 0)
            assert (page == after).all()


def pages(count: int, seed: int) -> Pages:
    found: Pages = np.random.default_rng(seed).integers(0, 256, (count, PAGE_SIZE), np.uint8)
    return found


@hypothesis.given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, PAGE_SIZE - 1), st.binary(min_size=1, max_size=200)), max_size=30
    )
)
def test_some_writes(writes: list[tuple[int, int, bytes]]) -> None:
    """Q4."""
    old = pages(5, 1)
    new = old.copy()
    for page, at, content in writes:
        content = content[: PAGE_SIZE - at]
        new[page, at : at + len(content)] = np.frombuffer(content, np.uint8)
    check(old, new)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.001, 1)), min_size=1, max_size=6), st.integers(0, 99))
def test_every_density_of_differences(kinds: list[tuple[float, float]], seed: int) -> None:
    """Q4: from pages that are nearly equal to pages that are longer as a delta, in runs of all lengths."""
    chance = np.random.default_rng(seed)
    old = pages(len(kinds), seed)
    new = old.copy()
    for page, (share, change) in enumerate(kinds):
        # Runs: each byte differs as the one before, unless the kind of run changes there.
        turns = np.cumsum(chance.random(PAGE_SIZE) < change)
        different = chance.random(turns[-1] + 1)[turns] < share
        new[page, different] ^= chance.integers(1, 256, int(different.sum()), np.uint8)
    check(old, new)


@pytest.mark.parametrize(
    ("first", "end"),
    [(0, 4090), (0, 4091), (0, 4092), (3, 4096), (2, 4096), (0, 4096), (127, 128), (128, 129), (0, 128)],
)
def test_borders(first: int, end: int) -> None:
    """A run at the end of a page, and one at the begin of the next, are two."""
    old = np.zeros((3, PAGE_SIZE), np.uint8)
    new = old.copy()
    new[:, first:end] = 1
    check(old, new)


def test_equal_pages_between_others() -> None:
    old = pages(9, 2)
    new = old.copy()
    new[[1, 4, 8], 7] ^= 1
    new[5] = pages(1, 3)[0]
    check(old, new)
    assert encode_pages(old, old) == [b""] * 9
    assert encode_pages(old[:0], old[:0]) == []


def test_pages_that_are_not_contiguous() -> None:
    old = pages(6, 4)
    new = old.copy()
    new[::2, 100:300] = 0
    check(old[::2], new[::2])
