"""Blocks, and the check that no descriptor is left behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest

from trimig.guest import PAGE_SIZE
from trimig.memory import MemfdBlock


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def make_block() -> Iterator[Callable[..., MemfdBlock]]:
    made: list[MemfdBlock] = []

    def make(pages: int = 1024, name: str = "ram") -> MemfdBlock:
        made.append(MemfdBlock(name, pages * PAGE_SIZE))
        return made[-1]

    yield make
    for block in made:
        block.close()
