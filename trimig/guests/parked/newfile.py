"""A file that gets its name only when it is whole and on the disk.

Where the file system supports it (``O_TMPFILE``), the file has no name until then, so nothing is left of it at any end
of the process. On other file systems it is written under a hidden name in the same directory. A link never replaces a
file, so a file that replaces another also has a hidden name for a moment. Only SIGKILL or a loss of power leaves a
hidden file. The next write of the same name removes a hidden file that no process has locked.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

#: Errors of :func:`os.open` if the file system or the kernel does not support files without a name.
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS})

#: A hidden name consists of a dot, the first _NAME_BYTES bytes of the name, a dot, twelve digits, and this suffix.
_SUFFIX: Final = ".part"
_NAME_BYTES: Final = 100
#: Types of files that are not replaced.
_OTHERS: Final = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)

_SYNC_FILE_RANGE_WRITE: Final = 2

_libc: Final = ctypes.CDLL(None, use_errno=True)
_sync_file_range: Final = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    _sync_file_range.restype = ctypes.c_int
_FALLOC_FL_KEEP_SIZE: Final = 1
_fallocate: Final = getattr(_libc, "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    _fallocate.restype = ctypes.c_int


def check_target(path: Path, *, replace: bool) -> None:
    """Check whether a new file may get the name *path*, as far as this is known now. No file is left.

    Args:
        replace: a file of that name may be replaced. A symbolic link counts as a file of its own: the link is replaced, and
            not the file that it names. A name that is not a regular file, or a link to one (/dev/stdout), is never
            replaced.

    Raises:
        OSError: the directory does not exist or is not writable, or the name is taken; with the path.
    """
    NewFile(path, replace=replace).discard()


class NewFile:
    """A file that is being written, readable by its owner only.

    Args:
        path: its final name.
        replace: as for :func:`check_target`. If False, a file that gets this name meanwhile is not replaced.

    Attributes:
        fd: open for reading and writing, at the file's beginning.

    Raises:
        OSError: as :func:`check_target`.
    """

    def __init__(self, path: Path, *, replace: bool) -> None:
        self.path = path
        self.fd = -1
        self._replace = replace
        self._hidden: str | None = None
        self._check_name()
        self._directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._open()
        except BaseException:
            os.close(self._directory)
            raise
        self._remove_left()

    def _check_name(self) -> None:
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
        if (what := _what_it_is(self.path)) is not None:
            raise OSError(errno.EINVAL, f"It is {what}, and only a file can be replaced", str(self.path))
        if self._replace:
            return
        if stat.S_ISLNK(found.st_mode) and not self.path.exists():
            text = f"File exists (a symbolic link to {os.readlink(self.path)}, which does not)"
            raise FileExistsError(errno.EEXIST, text, str(self.path))
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path))

    def _open(self) -> None:
        parent = self.path.parent
        try:
            self.fd = os.open(parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        else:
            if os.path.exists(self._by_descriptor()):
                self._lock()  # for the moment with a hidden name
                return
            os.close(self.fd)  # without /proc the file could not be given a name
        while True:
            hidden = self._hidden_name()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(hidden, flags, 0o600, dir_fd=self._directory)
            self._lock()
            if os.fstat(self.fd).st_nlink:
                self._hidden = hidden
                return
            os.close(self.fd)  # another process has removed the file as a leftover, before it was locked

    def _hidden_name(self) -> str:
        return f"{_hidden_prefix(self.path)}{secrets.token_hex(6)}{_SUFFIX}"

    def _lock(self) -> None:
        """Lock the file, so that other processes do not remove it as a leftover while this process lives."""
        with contextlib.suppress(OSError):  # a file system without locks, where no process removes leftovers either
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _remove_left(self) -> None:
        """Remove hidden files that killed processes have left."""
        left = re.compile(re.escape(_hidden_prefix(self.path)) + "[0-9a-f]{12}" + re.escape(_SUFFIX))
        with contextlib.suppress(OSError):  # removing leftovers is optional
            for name in os.listdir(self._directory):
                if name != self._hidden and left.fullmatch(name):
                    _remove_if_left(name, self._directory)

    def _by_descriptor(self) -> str:
        return f"/proc/self/fd/{self.fd}"

    def write_at(self, position: int, data: bytes) -> None:
        """Write all of *data* at *position*. OSError."""
        os.lseek(self.fd, position, os.SEEK_SET)
        view = memoryview(data)
        while len(view):
            view = view[os.write(self.fd, view) :]

    def start_writing_back(self, start: int, length: int) -> None:
        """Ask the kernel to begin to write these bytes to the disk. The call does not wait, and :meth:`sync` is still
        needed.

        Raises:
            OSError: the disk has failed.
        """
        if _sync_file_range is None:
            return
        if _sync_file_range(self.fd, start, length, _SYNC_FILE_RANGE_WRITE) < 0:
            code = ctypes.get_errno()
            if code not in (errno.ENOSYS, errno.ESPIPE, errno.EINVAL):  # only a hint
                raise OSError(code, os.strerror(code))

    def reserve(self, start: int, length: int) -> None:
        """Reserve room on the disk for *length* bytes from *start* on, if the file system can. The file's length is
        unchanged.

        Raises:
            OSError: there is not enough room.
        """
        if _fallocate is not None and _fallocate(self.fd, _FALLOC_FL_KEEP_SIZE, start, length) < 0:
            code = ctypes.get_errno()
            if code not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(code, os.strerror(code))

    def sync(self) -> None:
        """Wait until all written bytes are on the disk. OSError."""
        os.fdatasync(self.fd)

    def hold(self) -> int:
        """A descriptor that keeps the file locked beyond :meth:`finish`, from the moment it has its name. The caller
        closes it.
        """
        return os.dup(self.fd)

    def finish(self) -> None:
        """Give the file its name and close it. When this returns, the file and its name survive a loss of power.

        Raises:
            OSError: the disk failed, or there is a file of that name. The new file does not have the name then.
        """
        os.ftruncate(self.fd, os.fstat(self.fd).st_size)  # release reserved room that is not needed
        os.fsync(self.fd)
        self._take_name()
        try:
            os.fsync(self._directory)
        except OSError:
            # The caller will report that there is no file, so there must be none.
            os.unlink(self.path)
            raise
        with contextlib.suppress(OSError):  # the whole file is on the disk
            self._close()

    def _take_name(self) -> None:
        if self._hidden is None:
            try:
                self._link_descriptor(self.path.name)
                return
            except FileExistsError:
                if not self._replace:
                    raise
            hidden = self._hidden_name()
            self._link_descriptor(hidden)
            self._hidden = hidden
        directory = self._directory
        if self._replace:
            self._check_name()
            os.rename(self._hidden, self.path.name, src_dir_fd=directory, dst_dir_fd=directory)
        else:
            _rename_new(self._hidden, self.path.name, directory)
        self._hidden = None

    def _link_descriptor(self, name: str) -> None:
        # With a directory descriptor Python calls linkat(2), which follows the link in /proc; link(2) does not.
        directory = self._directory
        os.link(self._by_descriptor(), name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=True)

    def discard(self) -> None:
        """Remove the file, unless it has its final name. Idempotent."""
        if self.fd < 0:
            return
        if self._hidden is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._hidden, dir_fd=self._directory)
        self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        directory, self._directory = self._directory, -1
        try:
            os.close(fd)
        finally:
            os.close(directory)


def _what_it_is(path: Path) -> str | None:
    """The type of *path*, or of the target of a link, in words, if it is neither a regular file nor a directory."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # a link without a target
        return None
    return next((what for test, what in _OTHERS if test(mode)), None)


def _hidden_prefix(path: Path) -> str:
    # Cut by bytes: a name has at most 255 bytes.
    return "." + os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES]) + "."


def _remove_if_left(name: str, directory: int) -> None:
    """Remove a hidden file unless a process still writes it. OSError."""
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        os.unlink(name, dir_fd=directory)
    finally:
        os.close(fd)


def _rename_new(temporary: str, name: str, directory: int) -> None:
    """Give the file its name unless another file has it."""
    try:
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, where the check and the rename cannot be one step
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    else:
        with contextlib.suppress(OSError):  # a leftover second name does not make the file invalid
            os.unlink(temporary, dir_fd=directory)
