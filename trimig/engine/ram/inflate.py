"""Compressed pages at the destination: inflated in threads, ``decompress-threads`` of them, and then placed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...channel.offload import MAX_CALLS, offload
from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE
from ...wire.pages.compressed import CompressedRun
from ...wire.pages.sink import PageSink, put

if TYPE_CHECKING:
    from ...wire.events import PageElement

#: So few pages are inflated at once, without a thread: 0.1 to 0.3 ms.
INLINE_PAGES: Final = 8


async def put_inflated(sink: PageSink, element: PageElement, threads: int) -> None:
    """:func:`trimig.wire.pages.sink.put`, with compressed pages inflated in threads.

    Args:
        threads: at most so many work at once, and never more than ``MAX_CALLS``.

    Raises:
        RemoteProtocolError: the encoded bytes are malformed.

    **Cancellation:** some of the pages were taken; no thread works any more.
    """
    if isinstance(element, CompressedRun) and len(element.streams) > INLINE_PAGES:
        element = element.with_pages(await _inflate(element, threads))
    await put(sink, element)


async def _inflate(run: CompressedRun, threads: int) -> NDArray[np.uint8]:
    count = len(run.streams)
    data = np.empty((count, PAGE_SIZE), np.uint8)
    size = max(INLINE_PAGES, -(-count // min(threads, MAX_CALLS)))
    failures: list[RemoteProtocolError] = []

    async def work(first: int) -> None:
        try:
            await offload(run.inflate_into, data, first, min(first + size, count))
        except RemoteProtocolError as error:
            failures.append(error)

    async with trio.open_nursery(strict_exception_groups=True) as nursery:
        for first in range(0, count, size):
            nursery.start_soon(work, first, name="trimig.inflate")
    if failures:
        raise min(failures, key=lambda error: error.offset or 0)
    return data
