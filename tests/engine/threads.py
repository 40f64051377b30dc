"""Compression without threads: a virtual clock would jump over all timeouts while a thread works."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from trimig.engine.ram import compress, inflate, multifd_channel, multifd_sender


async def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    """In place of a thread, in which the virtual clock would not wait."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


@contextlib.contextmanager
def without_threads() -> Iterator[None]:
    """In the block, what a thread would encode or decode is done by the task itself."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (compress, inflate, multifd_channel, multifd_sender):
            patch.setattr(module, "offload", _here)
        yield
