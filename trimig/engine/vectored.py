"""writev and readv between a socket and guest memory, with the vector built by NumPy.

A page is 4 KiB, so even one Python object per page is too much. The vector of the kernel (struct iovec: address and
length, 16 bytes) is an array of two uint64, which NumPy fills for hundreds of records at once. ctypes releases the
GIL during the call and takes the address of guest memory as it is, without a buffer object per page.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.uint64]

#: The kernel's UIO_MAXIOV.
MAX_ELEMENTS: Final = 1024

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("writev", "readv"):
    _function = getattr(_libc, _name)
    _function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    _function.restype = ctypes.c_ssize_t


def interleave(headers: int, header_size: int, bodies: NDArray[np.uint64], body_size: int) -> Vector:
    """The vector header, body, header, body, …

    Args:
        headers: address of the first header; they stand back to back.
        bodies: address of each body.
    """
    vector = np.empty((len(bodies), 4), np.uint64)
    vector[:, 0] = headers + np.arange(len(bodies), dtype=np.uint64) * np.uint64(header_size)
    vector[:, 1] = header_size
    vector[:, 2] = bodies
    vector[:, 3] = body_size
    return vector.reshape(-1, 2)


def advance(vector: Vector, done: int) -> Vector:
    """What is left of *vector* after its first *done* bytes; the original is not changed."""
    if not done:
        return vector
    ends = np.cumsum(vector[:, 1])
    first = int(np.searchsorted(ends, done, "right"))
    rest = vector[first:]
    if len(rest):
        cut = np.uint64(done - (int(ends[first - 1]) if first else 0))
        if cut:
            rest = rest.copy()
            rest[0, 0] += cut
            rest[0, 1] -= cut
    return rest


def _call(function: str, fd: int, vector: Vector) -> int | None:
    count = min(len(vector), MAX_ELEMENTS)
    while True:
        done = int(getattr(_libc, function)(fd, vector.ctypes.data, count))
        if done >= 0:
            return done
        error = ctypes.get_errno()
        if error in (errno.EAGAIN, errno.EWOULDBLOCK):
            return None
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def writev(fd: int, vector: Vector) -> int | None:
    """Bytes the kernel took of the first MAX_ELEMENTS of *vector*; None if it would block. Raises OSError."""
    return _call("writev", fd, vector)


def readv(fd: int, vector: Vector) -> int | None:
    """Bytes placed into the first MAX_ELEMENTS of *vector*; 0 at the end of file; None if it would block."""
    return _call("readv", fd, vector)
