"""The C encoder of XBZRLE against the one of NumPy, and an installation without it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from trimig.guest import PAGE_SIZE, Pages
from trimig.wire.pages.xbzrle_kernel import LIBRARY, Encode, load
from trimig.wire.pages.xbzrle_pages import encode_with_numpy

SOURCE = LIBRARY.with_suffix(".c")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Encode:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("kernel") / "kernel.so"
    subprocess.run([compiler, "-O3", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    found = load(library)
    assert found is not None
    return found


def pages(count: int, seed: int) -> Pages:
    found: Pages = np.random.default_rng(seed).integers(0, 256, (count, PAGE_SIZE), np.uint8)
    return found


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.001, 1)), min_size=1, max_size=6), st.integers(0, 99))
def test_both_write_the_same_bytes(kernel: Encode, kinds: list[tuple[float, float]], seed: int) -> None:
    """Q4: runs of all lengths, up to pages that are longer as a delta."""
    chance = np.random.default_rng(seed)
    old = pages(len(kinds), seed)
    new = old.copy()
    for page, (share, change) in enumerate(kinds):
        turns = np.cumsum(chance.random(PAGE_SIZE) < change)
        different = chance.random(turns[-1] + 1)[turns] < share
        new[page, different] ^= chance.integers(1, 256, int(different.sum()), np.uint8)
    assert kernel(old, new) == encode_with_numpy(old, new)


@pytest.mark.parametrize("first", [0, 1, 2, 3, 5, 127, 128])
@pytest.mark.parametrize("end", [129, 4089, 4090, 4091, 4092, 4093, 4096])
def test_borders(kernel: Encode, first: int, end: int) -> None:
    """Q4: where the room for one more number ends."""
    old = np.zeros((2, PAGE_SIZE), np.uint8)
    new = old.copy()
    new[:, first:end] = 1
    assert kernel(old, new) == encode_with_numpy(old, new)


def test_pages_that_are_not_contiguous_and_none(kernel: Encode) -> None:
    old, new = pages(6, 1), pages(6, 1)
    new[:, 7] ^= 1
    assert kernel(old[::2], new[::2]) == encode_with_numpy(old[::2], new[::2])
    assert kernel(old[:0], new[:0]) == []


def test_without_a_library_or_with_a_foreign_one_there_is_none(tmp_path: Path) -> None:
    assert load(tmp_path / "missing.so") is None
    (tmp_path / "foreign.so").write_bytes(b"\x7fELF of another machine")
    assert load(tmp_path / "foreign.so") is None
