"""``file:PATH[,offset=N]``: the stream in a file, with the bytes of the wire; newer QEMUs have the same.

The bytes before the offset belong to another program and stay; the bytes behind it are replaced. The migration succeeds
when the disk has the stream, not when the page cache has it. The file is locked meanwhile (flock). A file that was made for a migration that
then failed is removed. A file that existed before keeps only the bytes before the offset, so that half a
stream is never taken for a whole one.

A file has one direction, and so no return path. A stock QEMU without ``file:`` loads it by ``-incoming "exec:cat PATH"``
(``tail -c +N`` for an offset).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
from typing import TYPE_CHECKING, Final

import trio

from ..channel import closing
from ..channel.offload import offload
from ..config.types import parse_size
from ..errors import ConfigError, TransportFailed
from ._interface import Listener, Transport
from ._one_task import OneTask

if TYPE_CHECKING:
    from ..config.config import Config

log = logging.getLogger("trimig.transport")

#: Bytes that are read at once: large enough to make the cost of the thread switch small.
_READ_BYTES: Final = 1 << 20
#: Seconds for which the removal of a file may hold off a cancellation.
_REMOVE_SECONDS: Final = 5.0
#: How often a file may appear and disappear between two attempts to open it.
_OPEN_TRIES: Final = 5
_OPTION: Final = ",offset="
_HEX: Final = re.compile(r"0[xX][0-9a-fA-F]+")
_MAX_OFFSET: Final = 2**63 - 1


def parse(rest: str) -> tuple[str, int]:
    """Path and offset, in bytes, of ``PATH[,offset=N]``; N as QEMU takes it: ``512``, ``0x200``, ``1M``.

    Raises:
        ConfigError: no path, or a bad offset.
    """
    path, option, text = rest.partition(_OPTION)
    if not path:
        raise ConfigError("file: needs a path", name="uri")
    if "\0" in path:
        raise ConfigError(f"a path cannot contain a NUL byte: {path[:80]!r}", name="uri")
    if not option:
        return path, 0
    try:
        offset = int(text, 16) if _HEX.fullmatch(text) else parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"the offset of file:{path} is wrong: {error}", name="uri") from None
    if offset > _MAX_OFFSET:
        raise ConfigError(f"the offset {text} of file:{path} is too large: at most {_MAX_OFFSET}", name="uri")
    return path, offset


class FileSender(trio.abc.SendStream):
    """Writes a stream to a file, and removes the stream unless it was completed.

    Args:
        path: for messages, and to remove it.
        fd: the file; the stream owns it from now on.
        offset: the place where the stream begins.
        kept: bytes at the beginning of the file that always stay; None: the file was made for this stream.
    """

    def __init__(self, path: str, fd: int, offset: int, *, kept: int | None) -> None:
        self._path = os.path.abspath(path)  # the working directory may change before the file is removed
        self._fd = fd
        self._at = offset
        self._kept = kept
        self._complete = False
        self._closed = False
        self._sending = OneTask("writing to the file")
        self._in_use = trio.Lock()  # a close waits for the end of the present call

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the file is closed")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of *data* behind what was written before.

        Raises:
            BrokenResourceError: the file system accepts no more; the cause says why.

        **Cancellation:** an unknown part of *data* was written.
        """
        self._check_open()
        view = memoryview(data)
        try:
            with self._sending:
                async with self._in_use:
                    while len(view):
                        count = await offload(os.pwrite, self._fd, view, self._at)
                        self._at += count
                        view = view[count:]
        except OSError as error:
            raise trio.BrokenResourceError(f"{self._path}: {error}") from _failed("write", self._path, error)
        self._check_open()  # it may have been closed meanwhile

    async def wait_send_all_might_not_block(self) -> None:
        """A file always accepts data.

        **Cancellation:** no effect.
        """
        self._check_open()
        with self._sending:
            await trio.lowlevel.checkpoint()

    async def delivered(self) -> None:
        """Wait until the disk has the file and its name.

        Raises:
            TransportFailed: the disk does not have the file.

        **Cancellation:** as for an error: the file is removed, or cut, when it is closed.
        """
        self._check_open()
        try:
            with self._sending:
                async with self._in_use:
                    await offload(_flush, self._fd, self._path if self._kept is None else None)
                    self._complete = True
        except OSError as error:
            raise _failed("write", self._path, error) from error

    async def aclose(self) -> None:
        """Close the file. Without :meth:`delivered` before, remove a file made for this stream, and cut any other at
        the offset.

        **Cancellation:** held off until that is done; the present operation of the disk must end first.
        """
        if not self._closed:
            self._closed = True
            if not await closing.bounded(self._close_in_thread, _REMOVE_SECONDS, otherwise=False):
                self._close()
        await trio.lowlevel.checkpoint()

    async def _close_in_thread(self) -> bool:
        async with self._in_use:
            await offload(self._close)  # freeing many GiB takes time
        return True

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd == -1:
            return
        try:
            if not self._complete:
                self._take_back(fd)
        except OSError as error:
            log.warning("half a stream is left in %s: %s", self._path, error.strerror or error)
        finally:
            os.close(fd)

    def _take_back(self, fd: int) -> None:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return
        if self._kept is None:
            with contextlib.suppress(FileNotFoundError):
                now = os.lstat(self._path)
                if (now.st_dev, now.st_ino) == (info.st_dev, info.st_ino):
                    os.unlink(self._path)
        else:
            os.ftruncate(fd, self._kept)


class FileReceiver(trio.abc.ReceiveStream):
    """Reads a stream from a file.

    Args:
        path: for messages.
        fd: the file; the stream owns it from now on.
        offset: the place where the stream begins.
    """

    def __init__(self, path: str, fd: int, offset: int) -> None:
        self._path = path
        self._fd = fd
        self._at = offset
        self._receiving = OneTask("reading the file")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Read the next bytes; empty at the end of the file.

        Raises:
            BrokenResourceError: the file cannot be read; the cause says why.

        **Cancellation:** nothing was read.
        """
        if self._fd == -1:
            raise trio.ClosedResourceError("the file is closed")
        count = _READ_BYTES if max_bytes is None else min(max_bytes, _READ_BYTES)
        try:
            with self._receiving:
                await trio.lowlevel.checkpoint()
                # A second descriptor for the thread: this stream may be closed while the thread reads.
                own = os.dup(self._fd)
                try:
                    data = await offload(os.pread, own, count, self._at)
                finally:
                    os.close(own)
        except OSError as error:
            raise trio.BrokenResourceError(f"{self._path}: {error}") from _failed("read", self._path, error)
        if self._fd == -1:
            raise trio.ClosedResourceError("the file was closed meanwhile")
        self._at += len(data)
        return data

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd != -1:
            os.close(fd)

    async def aclose(self) -> None:
        """Close the file.

        **Cancellation:** the file is closed.
        """
        self.close()
        await trio.lowlevel.checkpoint()


class FileListener(Listener):
    """A file that holds a stream, once."""

    def __init__(self, path: str, offset: int, stream: FileReceiver) -> None:
        self._path = path
        self._offset = offset
        self._stream: FileReceiver | None = stream

    @property
    def uri(self) -> str:
        """The URI, with the offset of the stream."""
        return f"file:{self._path}{_OPTION}{self._offset}" if self._offset else f"file:{self._path}"

    async def accept(self) -> FileReceiver:
        """The stream.

        Raises:
            TransportFailed: the stream has been taken already.

        **Cancellation:** the stream can still be taken.
        """
        await trio.lowlevel.checkpoint()
        stream, self._stream = self._stream, None
        if stream is None:
            raise TransportFailed(f"{self.uri} is being read already")
        return stream

    def close(self) -> None:
        """Close the file unless :meth:`accept` has taken it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


async def connect(rest: str, config: Config) -> FileSender:
    """Open the file for the stream, and cut it at the offset; only its owner can read a new file (mode 0600).

    Raises:
        ConfigError: no path, or a bad offset.
        TransportFailed: the path cannot be opened, is no file, or another trimig holds the file.

    **Cancellation:** no file has been made.
    """
    path, offset = parse(rest)
    try:
        fd, kept = await offload(_open_to_write, path, offset)
    except OSError as error:
        raise _failed("write", path, error) from error
    return FileSender(path, fd, offset, kept=kept)


async def listen(rest: str, config: Config) -> FileListener:
    """Open the file that holds the stream.

    Raises:
        ConfigError: no path, or a bad offset.
        TransportFailed: the path cannot be opened, is no file, or ends before the offset.

    **Cancellation:** no file is left open.
    """
    path, offset = parse(rest)
    try:
        fd = await offload(_open_to_read, path, offset)
    except OSError as error:
        raise _failed("read", path, error) from error
    return FileListener(path, offset, FileReceiver(path, fd, offset))


# -- in a thread -------------------------------------------------------------------------------------------------------

#: Non-blocking: a blocking open of a FIFO waits for a process at its other end.
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK


def _open_to_write(path: str, offset: int) -> tuple[int, int | None]:
    fd, created = _open_or_create(path)
    try:
        _lock(path, fd)
        if not _check_kind(path, fd) or created:
            return fd, None if created else 0
        _keep_private(path, fd, offset)
        kept = min(offset, os.fstat(fd).st_size)
        os.ftruncate(fd, kept)
        return fd, kept
    except BaseException:
        os.close(fd)
        raise


def _lock(path: str, fd: int) -> None:
    """Hold the file until it is closed, as every trimig holds the file of its guest."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TransportFailed(
            f"cannot write file:{path}: another trimig holds it (send, settle, receive, run or migrate); end that one first"
        ) from None


def _keep_private(path: str, fd: int, offset: int) -> None:
    """Remove the access of other users: the file gets the memory of a guest, which only its owner may read.

    A file with bytes before the offset belongs to another program: then trimig only logs a warning.
    """
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if not mode & stat.S_IRWXO:
        return
    try:
        if not offset:
            os.fchmod(fd, mode & ~stat.S_IRWXO)
            return
    except PermissionError:
        pass  # the file belongs to another user
    log.warning("%s has the mode %04o: every user of this machine has access to the guest's memory", path, mode)


def _open_or_create(path: str) -> tuple[int, bool]:
    for left in reversed(range(_OPEN_TRIES)):
        try:
            return os.open(path, os.O_WRONLY | _FLAGS), False
        except FileNotFoundError:
            pass
        try:
            # Exclusive, because only a file that did not exist before may be removed again.
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600), True
        except FileExistsError:
            if os.path.islink(path):
                target = os.readlink(path)
                raise TransportFailed(
                    f"cannot write file:{path}: it is a symbolic link to {target!r}, which does not exist"
                ) from None
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def _open_to_read(path: str, offset: int) -> int:
    fd = os.open(path, os.O_RDONLY | _FLAGS)
    try:
        if _check_kind(path, fd) and (size := os.fstat(fd).st_size) < offset:
            raise TransportFailed(f"file:{path} has {size} bytes: there is nothing at the offset {offset}")
        return fd
    except BaseException:
        os.close(fd)
        raise


def _check_kind(path: str, fd: int) -> bool:
    """Whether the descriptor is a regular file; the only other possibility is a disk."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return stat.S_ISREG(mode)
    hint = "; for a FIFO or a device use exec:cat" if not stat.S_ISDIR(mode) else ", but a directory"
    raise TransportFailed(f"file:{path} is not a file{hint}")


def _flush(fd: int, created: str | None) -> None:
    """Write everything to the disk. A new file is on the disk only when its directory has been written, too."""
    os.fsync(fd)
    if created is not None:
        directory = os.open(os.path.dirname(created) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
                raise
        finally:
            os.close(directory)


def _failed(what: str, path: str, error: OSError) -> TransportFailed:
    # A FIFO without a reader and a socket cannot even be opened.
    words = "it is not a file" if error.errno == errno.ENXIO else error.strerror or str(error)
    return TransportFailed(f"cannot {what} file:{path}: {words}")


TRANSPORT: Final = Transport(connect=connect, listen=listen, parse=parse)
