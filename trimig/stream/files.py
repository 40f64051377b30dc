"""Where the tools get their bytes from: a file, or a pipe such as standard input."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from ..channel.offload import offload

#: Reads bytes to where the view points; 0 at the end.
ReadInto = Callable[[memoryview], Awaitable[int]]
STDIN: Final = "-"


@asynccontextmanager
async def reading(source: str | os.PathLike[str]) -> AsyncIterator[ReadInto]:
    """A function that reads *source*: a path, or ``-`` for standard input.

    Raises:
        OSError: it cannot be opened.

    **Cancellation:** of a read: from a pipe nothing was taken; a file is closed with the context.
    """
    own = source != STDIN
    fd = await offload(os.open, source, os.O_RDONLY | os.O_CLOEXEC) if own else os.dup(0)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        try:
            yield lambda view: offload(os.readv, fd, [view])
        finally:
            os.close(fd)
        return
    # Pipes, sockets and terminals: may wait for ever, and so must be cancellable, which a thread is not.
    pipe = trio.lowlevel.FdStream(fd)

    async def read_into(view: memoryview) -> int:
        data = await pipe.receive_some(len(view))
        view[: len(data)] = data
        return len(data)

    try:
        yield read_into
    finally:
        pipe.close()
