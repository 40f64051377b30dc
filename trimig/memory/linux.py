"""Linux calls for guest memory that Python does not offer: userfaultfd, PAGEMAP_SCAN, a walk over the holes of a file.

This module has only the calls that dirty tracking and postcopy need. They are plain functions over descriptors and
addresses, so they also work on the memory of another process: a userfaultfd acts on the address space of the process
that made it, whichever process holds the descriptor.

The calls go through ctypes and not through :mod:`fcntl`: newer Pythons repeat an interrupted ``fcntl.ioctl`` by
themselves, and drop the data that the kernel wrote back if a call fails. ctypes releases the GIL around each call.

Numbers and layouts are kernel ABI (``linux/userfaultfd.h``, ``linux/fs.h``); all members are 64 bit wide, so an array
of ``uint64`` is used for every structure.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..guest import PAGE_SIZE, PageBitmap

_libc: Final = ctypes.CDLL(None, use_errno=True)
_ioctl: Final = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int
_syscall: Final = _libc.syscall
_syscall.restype = ctypes.c_long

_SYS_USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282}
_DEVICE: Final = "/dev/userfaultfd"
_SYSCTL: Final = "vm.unprivileged_userfaultfd"

_USERFAULTFD_IOC_NEW: Final = 0x0000AA00
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_UNREGISTER: Final = 0x8010AA01
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_COPY: Final = 0xC028AA03
_UFFDIO_ZEROPAGE: Final = 0xC020AA04
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_PAGEMAP_SCAN: Final = 0xC0606610

_UFFD_API: Final = 0xAA
_UFFD_USER_MODE_ONLY: Final = 1
_REGISTER_MISSING: Final = 1
_REGISTER_WP: Final = 2
_WRITEPROTECT_WP: Final = 1

FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
FEATURE_MISSING_SHMEM: Final = 1 << 5
FEATURE_THREAD_ID: Final = 1 << 8
FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
FEATURE_WP_UNPOPULATED: Final = 1 << 13
FEATURE_WP_ASYNC: Final = 1 << 15
#: The features that dirty tracking needs of a userfaultfd: the kernel lifts the protection at a write by itself, and
#: records it.
TRACKING_FEATURES: Final = (
    FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC
)

_PM_SCAN_WP_MATCHING: Final = 1
_PM_SCAN_CHECK_WPASYNC: Final = 2
_PAGE_IS_WRITTEN: Final = 1 << 1
_SCAN_ARG_SIZE: Final = 96
_WALK_END: Final = 4

#: Python's mmap module has no name for this constant (Linux 5.14).
MADV_POPULATE_WRITE: Final = 23


class MemoryUnavailable(OSError):
    """The kernel does not offer, or does not allow, a memory feature; the message names the setting to check."""


def _struct(*values: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * len(values))(*values)


def _control(fd: int, request: int, arg: ctypes.Array[ctypes.c_uint64]) -> int:
    """One ioctl, never repeated. OSError."""
    result: int = _ioctl(fd, request, ctypes.addressof(arg))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


# --- userfaultfd --------------------------------------------------------------------------------------------------


def _by_syscall(flags: int) -> int:
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of the userfaultfd call on {os.uname().machine} is not known")
    fd: int = _syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _by_device(flags: int) -> int:
    device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        # The argument is the flag word itself, not the address of one.
        fd: int = _ioctl(device, _USERFAULTFD_IOC_NEW, flags)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return fd
    finally:
        os.close(device)


def _new_descriptor(user_mode_only: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return _by_syscall(flags)
    except OSError as exc:
        if exc.errno == errno.ENOSYS:
            raise MemoryUnavailable(exc.errno, f"this kernel has no userfaultfd ({exc.strerror})") from exc
        refusal = exc
    if user_mode_only:
        with contextlib.suppress(OSError):
            return _by_syscall(flags | _UFFD_USER_MODE_ONLY)
    try:
        return _by_device(flags)
    except OSError as exc:
        raise MemoryUnavailable(
            refusal.errno,
            f"userfaultfd is not allowed here ({refusal.strerror}; {_DEVICE}: {exc.strerror}): set the sysctl "
            f"{_SYSCTL} to 1, or give this user access to {_DEVICE}",
        ) from exc


def open_userfaultfd(features: int = TRACKING_FEATURES, *, user_mode_only: bool = True) -> int:
    """A userfaultfd of this process, its handshake done; the descriptor is the caller's to close.

    Args:
        features: required feature bits.
        user_mode_only: where a full userfaultfd is not permitted, accept one that does not report faults inside the
            kernel. This is enough for asynchronous write protection, which reports no faults at all.

    Raises:
        MemoryUnavailable: names the sysctl, the device or the kernel version to check.
    """
    fd = _new_descriptor(user_mode_only)
    try:
        _control(fd, _UFFDIO_API, _struct(_UFFD_API, features, 0))
    except OSError as exc:
        os.close(fd)
        raise MemoryUnavailable(
            exc.errno,
            f"the userfaultfd of this kernel ({os.uname().release}) lacks a feature (asked for 0x{features:x}); "
            "asynchronous write protection needs Linux 6.7, faults in shared memory 4.11",
        ) from exc
    return fd


def register_write_protect(fd: int, start: int, length: int) -> None:
    """Put the range under *fd*, for write protection only. Addresses of the process that made *fd*; OSError."""
    _control(fd, _UFFDIO_REGISTER, _struct(start, length, _REGISTER_WP, 0))


def register_missing(fd: int, start: int, length: int) -> None:
    """Put the range under *fd*: touching an absent page waits. Addresses of the process that made *fd*; OSError."""
    _control(fd, _UFFDIO_REGISTER, _struct(start, length, _REGISTER_MISSING, 0))


#: Fills a part of a run, given its position and length in bytes; returns the number of bytes filled, and the error that
#: stopped it.
Fill = Callable[[int, int], tuple[int, OSError | None]]


def _filled(fd: int, request: int, arg: ctypes.Array[ctypes.c_uint64], length: int) -> tuple[int, OSError | None]:
    """Make one fill call. The last member of the structure has the progress, or a negative error number if none was
    made.
    """
    try:
        _control(fd, request, arg)
    except OSError as error:
        done = ctypes.c_int64(arg[len(arg) - 1]).value
        return max(done, 0), error
    return length, None


def copy_pages(fd: int, start: int, source: int, length: int) -> tuple[int, OSError | None]:
    """Fill absent pages of the registered process with memory of this one. Stops at a page that is present (EEXIST)."""
    return _filled(fd, _UFFDIO_COPY, _struct(start, source, length, 0, 0), length)


def zero_pages(fd: int, start: int, length: int) -> tuple[int, OSError | None]:
    """Fill absent pages with zeros. Stops at a page that is present (EEXIST)."""
    return _filled(fd, _UFFDIO_ZEROPAGE, _struct(start, length, 0, 0), length)


def wake(fd: int, start: int, length: int) -> None:
    """Wake the threads that wait for these pages; they repeat their access. OSError."""
    _control(fd, _UFFDIO_WAKE, _struct(start, length))


def unregister(fd: int, start: int, length: int) -> None:
    """Remove the range from *fd*, and lift its protection. OSError."""
    _control(fd, _UFFDIO_UNREGISTER, _struct(start, length))


def write_protect(fd: int, start: int, length: int) -> None:
    """Write-protect every page of a registered range, also pages without memory. OSError."""
    _control(fd, _UFFDIO_WRITEPROTECT, _struct(start, length, _WRITEPROTECT_WP))


# --- PAGEMAP_SCAN -------------------------------------------------------------------------------------------------


class WrittenScanner:
    """Gets, and perhaps clears, the written pages of a range of one process, given its pagemap.

    Get and clear are one step in the kernel (under the page table lock), so no write falls between.
    """

    def __init__(self, pid: int | None = None, *, max_regions: int = 1 << 14) -> None:
        """Open the pagemap of *pid*, or of this process. OSError."""
        self._fd = os.open(f"/proc/{'self' if pid is None else pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        # start address, end address, categories
        self._regions = np.zeros((max_regions, 3), dtype=np.uint64)

    def close(self) -> None:
        """Close the pagemap. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def probe(self) -> None:
        """Raise MemoryUnavailable if this kernel cannot scan."""
        arg = _struct(_SCAN_ARG_SIZE, 0, 0, 0, 0, 0, 0, 0, 0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN)
        try:
            _control(self._fd, _PAGEMAP_SCAN, arg)
        except OSError as exc:
            raise MemoryUnavailable(
                exc.errno, f"this kernel ({os.uname().release}) has no PAGEMAP_SCAN; it came with Linux 6.7"
            ) from exc

    def get_and_clear(self, start: int, pages: int) -> PageBitmap:
        """Which of *pages* pages from address *start* on have been written since they were protected last.

        The call protects them again. OSError; EPERM if a part of the range is not under asynchronous write protection
        any more.
        """
        return self._scan(start, pages, _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC)

    def get(self, start: int, pages: int) -> PageBitmap:
        """As :meth:`get_and_clear`; but the written pages stay as they are, and the next call has them again."""
        return self._scan(start, pages, _PM_SCAN_CHECK_WPASYNC)

    def _scan(self, start: int, pages: int, flags: int) -> PageBitmap:
        # Both masks must be exactly "written": only then the kernel counts a page whose page table entry is gone
        # (written, then reclaimed) as written. With any other category in the masks such a write would be lost.
        end = start + pages * PAGE_SIZE
        edges = np.zeros(pages + 1, dtype=np.int8)
        arg = _struct(
            _SCAN_ARG_SIZE,
            flags,
            start,
            end,
            0,
            self._regions.ctypes.data,
            len(self._regions),
            0,
            0,
            _PAGE_IS_WRITTEN,
            0,
            _PAGE_IS_WRITTEN,
        )
        base = np.uint64(start)
        while arg[2] < end:
            found = _control(self._fd, _PAGEMAP_SCAN, arg)
            if found:
                bounds = ((self._regions[:found, :2] - base) // np.uint64(PAGE_SIZE)).astype(np.intp)
                # Plain indexed addition is enough: no two regions of one answer begin, or end, at the same page.
                edges[bounds[:, 0]] += 1
                edges[bounds[:, 1]] -= 1
            arg[2] = arg[_WALK_END]
        return np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)


def probe_tracking(pid: int | None = None) -> None:
    """Raise MemoryUnavailable unless written pages of *pid* (None: this process) can be scanned exactly.

    Making a userfaultfd is tried only for this process.
    """
    if mmap.PAGESIZE != PAGE_SIZE:
        raise MemoryUnavailable(errno.ENOTSUP, f"this kernel's pages have {mmap.PAGESIZE} bytes, not {PAGE_SIZE}")
    if pid is None:
        os.close(open_userfaultfd())
    try:
        scanner = WrittenScanner(pid)
    except OSError as exc:
        raise MemoryUnavailable(exc.errno, f"cannot open {exc.filename}: {exc.strerror}") from exc
    with contextlib.closing(scanner):
        scanner.probe()


# --- holes --------------------------------------------------------------------------------------------------------


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of ``[start, end)`` of a file that have memory behind them, as byte ranges in ascending order.

    Moves the file offset of *fd*; other code must not depend on it. OSError.
    """
    position = start
    while position < end:
        try:
            first = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return
            raise
        if first >= end:
            return
        position = os.lseek(fd, first, os.SEEK_HOLE)
        yield first, min(position, end)


def absent_pages(fd: int, first: int, count: int, *, max_extents: int) -> NDArray[np.bool_]:
    """True for each of *count* pages from page *first* on that is a hole of the file.

    The walk takes about two microseconds for each extent. It stops after *max_extents* extents, and reports the
    remaining pages as present, which is always safe.
    """
    state = os.fstat(fd)
    if state.st_blocks * 512 >= state.st_size:  # the file has no holes: skip a walk of about 10 ms for each GiB
        return np.zeros(count, dtype=np.bool_)
    absent = np.ones(count, dtype=np.bool_)
    origin = first * PAGE_SIZE
    for number, (begin, stop) in enumerate(data_extents(fd, origin, origin + count * PAGE_SIZE), 1):
        absent[(begin - origin) // PAGE_SIZE : -((origin - stop) // PAGE_SIZE)] = False
        if number == max_extents:
            absent[(stop - origin) // PAGE_SIZE :] = False
            break
    return absent
