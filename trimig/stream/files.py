"""The input and output of the tools: files, and pipes such as standard input."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from ..channel.offload import offload
from ..guests.named import naming
from ..guests.parked.newfile import NewFile

#: Reads bytes into the view and returns their number; 0 at the end.
ReadInto = Callable[[memoryview], Awaitable[int]]
STDIN: Final = "-"


async def write_new(path: str | os.PathLike[str], text: str, *, replace: bool = False) -> None:
    """Write a small file, which is on the disk when this returns.

    Raises:
        OSError: the file cannot be written, or exists; with its name.

    **Cancellation:** there is no file of that name, or the whole of it.
    """
    with naming(path):
        await offload(_write_new, Path(path), text.encode(), replace)


def _write_new(path: Path, data: bytes, replace: bool) -> None:
    file = NewFile(path, replace=replace)
    try:
        file.write_at(0, data)
        file.finish()
    finally:
        file.discard()


@asynccontextmanager
async def reading(source: str | os.PathLike[str]) -> AsyncIterator[ReadInto]:
    """A function that reads *source*: a path, or ``-`` for standard input.

    Raises:
        OSError: the file cannot be opened, or is a directory; in a read: it cannot be read. With its name.

    **Cancellation:** in a read: no bytes were taken from a pipe; a file is closed with the context.
    """
    own = source != STDIN
    fd = await offload(os.open, source, os.O_RDONLY | os.O_CLOEXEC) if own else os.dup(0)
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(source))
    if stat.S_ISREG(mode):

        async def read_file(view: memoryview) -> int:
            with naming(source):
                return await offload(os.readv, fd, [view])

        try:
            yield read_file
        finally:
            os.close(fd)
        return
    # Pipes, sockets and terminals: a read may wait for ever, so it must be cancellable, and a thread is not.
    pipe = trio.lowlevel.FdStream(fd)

    async def read_into(view: memoryview) -> int:
        try:
            data = await pipe.receive_some(len(view))
        except trio.BrokenResourceError as error:
            cause = error.__cause__
            code = (cause.errno if isinstance(cause, OSError) else None) or errno.EIO
            raise OSError(code, os.strerror(code), os.fspath(source)) from error
        view[: len(data)] = data
        return len(data)

    try:
        yield read_into
    finally:
        pipe.close()
