"""The fixtures of ``tests/memory``, for the tests of memory that need the kernel's help or another process."""

from __future__ import annotations

from tests.memory.conftest import make_block, no_descriptor_is_left

__all__ = ["make_block", "no_descriptor_is_left"]
