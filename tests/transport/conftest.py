"""A pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends; those that a test leaves open are closed."""
    ends = os.pipe()
    kept = [os.fstat(end) for end in ends]
    yield ends
    for end, was in zip(ends, kept, strict=True):
        if is_open(end) and os.fstat(end).st_ino == was.st_ino:
            os.close(end)


def is_open(number: int) -> bool:
    """Whether this process has that descriptor."""
    return os.path.exists(f"/proc/self/fd/{number}")
