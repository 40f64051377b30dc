"""writev and readv between a socket and guest memory, with the vector built by NumPy.

A page is 4 KiB, so even one Python object per page is too much. The vector of the kernel (struct iovec: address and
length, 16 bytes) is an array of two uint64, which NumPy fills for thousands of records at once. ctypes releases the
GIL during the call and takes the address of guest memory as it is, without a buffer object per page.
"""

from __future__ import annotations

import ctypes
import errno
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Elements of the kernel's struct iovec: address and size in bytes of each, shape (n, 2).
Vector: TypeAlias = NDArray[np.uint64]
#: A part of a vector as the kernel takes it: the address of the first element, and the number of elements. An array object
#: for each call would cost more than the call.
Span: TypeAlias = tuple[int, int]

_ELEMENT_BYTES: Final = 16
#: The kernel's UIO_MAXIOV.
MAX_ELEMENTS: Final = 1024
#: Pages that are prepared for sending together, 32 MiB. One call takes MAX_ELEMENTS // 2 of them; the change of threads is
#: paid once for all of them.
BATCH_PAGES: Final = 8192
#: Bytes that one call moves at most. A cancellation waits for one call.
CALL_BYTES: Final = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_writev, _readv = _libc.writev, _libc.readv
for _function in (_writev, _readv):
    _function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    _function.restype = ctypes.c_ssize_t


class Records:
    """A plan of header, body, header, body, … with the count of bytes that were sent or received.

    All bodies have one size. All headers have one size too, except the first header, which may be longer. So a division
    finds the place of any byte, and :meth:`advance` costs the same for a vector of any length. The sizes are those of page
    records, so that MAX_ELEMENTS elements have CALL_BYTES and a little more.

    Args:
        headers: address of the first header; the headers follow each other without a gap.
        header_size: bytes of each header.
        bodies: address of each body.
        body_size: bytes of each body.
        lead: address and size of a header that replaces the first one, if there is such a header.
    """

    __slots__ = (
        "_address",
        "_count",
        "_cut",
        "_element",
        "_extra",
        "_header",
        "_numbers",
        "_record",
        "_vector",
        "done",
        "size",
    )

    def __init__(
        self,
        headers: int,
        header_size: int,
        bodies: NDArray[np.uint64],
        body_size: int,
        lead: tuple[int, int] | None = None,
    ) -> None:
        count = len(bodies)
        vector = np.empty((count, 4), np.uint64)
        vector[:, 0] = headers + np.arange(count, dtype=np.uint64) * np.uint64(header_size)
        vector[:, 1] = header_size
        vector[:, 2] = bodies
        vector[:, 3] = body_size
        self._vector: Vector = vector.reshape(-1, 2)
        self._header = header_size
        self._record = header_size + body_size
        self._extra = 0
        if lead is not None:
            self._vector[0] = lead
            self._extra = lead[1] - header_size
        self._element = 0
        self._cut = 0
        self._address, self._count, self._numbers = _parts(self._vector)
        #: Bytes of the whole vector.
        self.size = count * self._record + self._extra
        #: Bytes that were sent or received.
        self.done = 0

    @property
    def resting(self) -> bool:
        """Never, see :class:`.step.Plan`."""
        return False

    @property
    def left(self) -> int:
        """Bytes that were not yet sent or received."""
        return self.size - self.done

    @property
    def rest(self) -> Span:
        """The elements that were not yet sent or received completely; the first one is shortened to its rest."""
        return self._address + _ELEMENT_BYTES * self._element, self._count - self._element

    def rest_of_unit(self) -> bytes:
        """The rest of a record that was sent in part; empty if the last record was sent completely."""
        if not self.left or (self._element % 2 == 0 and not self._cut):
            return b""
        return _content(self._vector[self._element : (self._element | 1) + 1])

    def advance(self, count: int) -> None:
        """Count *count* more bytes as sent or received."""
        self.done += count
        place = self.done - self._extra  # as if the first header had the size of all others
        if place < self._header:
            element, inside = 0, self.done
        else:
            record, inside = divmod(place, self._record)
            element = 2 * record
            if inside >= self._header:
                element, inside = element + 1, inside - self._header
        more = inside - self._cut if element == self._element else inside
        if more:
            self._numbers[2 * element] += more
            self._numbers[2 * element + 1] -= more
        self._element, self._cut = element, inside


class Pieces:
    """A plan of pieces of any sizes, with the count of bytes that were sent or received.

    Args:
        vector: address and size in bytes of each piece, shape (n, 2), no size 0. It is used up. A piece of more than CALL_BYTES
            makes a call longer.
        units: where each record or packet ends, as bytes from the beginning of the first piece; rising, the last one is the
            end of the last piece. If they are given, the rest of a packet that was cut off is known.
        keep: the memory of pieces that nothing else holds.
    """

    __slots__ = ("_address", "_cut", "_element", "_ends", "_keep", "_numbers", "_units", "_vector", "done", "size")

    def __init__(self, vector: Vector, units: NDArray[np.int64] | None = None, keep: object = None) -> None:
        self._vector = vector
        self._address, _, self._numbers = _parts(vector)
        self._ends = np.cumsum(vector[:, 1]).astype(np.int64).data
        self._keep = keep
        self._units = units
        self._element = 0
        self._cut = 0
        #: Bytes of all pieces.
        self.size = int(self._ends[-1]) if len(vector) else 0
        #: Bytes that were sent or received.
        self.done = 0

    @property
    def resting(self) -> bool:
        """Never, see :class:`.step.Plan`."""
        return False

    @property
    def left(self) -> int:
        """Bytes that were not yet sent or received."""
        return self.size - self.done

    @property
    def rest(self) -> Span:
        """The elements of the next call; the first one is shortened to its rest."""
        first, done = self._element, self.done
        if done == self.size:
            return self._address, 0
        return self._address + _ELEMENT_BYTES * first, max(
            bisect_right(self._ends, done + CALL_BYTES, first) - first, 1
        )

    def rest_of_unit(self) -> bytes | None:
        """The rest of a unit that was sent in part; empty between two, None if the units are not known."""
        if not self.left or not self.done:
            return b""
        if self._units is None:
            return None
        end = int(self._units[np.searchsorted(self._units, self.done, "left")])
        if end == self.done:
            return b""
        last = bisect_left(self._ends, end)
        return _content(self._vector[self._element : last + 1])[: end - self.done]

    def advance(self, count: int) -> None:
        """Count *count* more bytes as sent or received."""
        self.done += count
        element = bisect_right(self._ends, self.done, self._element)
        inside = self.done - (self._ends[element - 1] if element else 0)
        more = inside - self._cut if element == self._element else inside
        if more:
            self._numbers[2 * element] += more
            self._numbers[2 * element + 1] -= more
        self._element, self._cut = element, inside


class Pair:
    """A plan of two pieces for receiving, which is used again and again. It makes no object for another two.

    Args:
        vector: room for the pieces, shape (2, 2). The caller keeps it.

    Attributes:
        left: bytes that were not yet received.
    """

    __slots__ = ("_address", "_numbers", "_second", "left")

    def __init__(self, vector: Vector) -> None:
        self._address, _, self._numbers = _parts(vector)
        self._second = 0
        self.left = 0

    def begin(self, first: int, first_size: int, second: int, second_size: int) -> None:
        """The addresses and sizes of the next two pieces; the second one may be empty."""
        numbers = self._numbers
        numbers[0], numbers[1], numbers[2], numbers[3] = first, first_size, second, second_size
        self._second, self.left = second_size, first_size + second_size

    @property
    def rest(self) -> Span:
        """The elements that were not yet received completely; the first one is shortened to its rest."""
        if self.left > self._second:
            return self._address, 2 if self._second else 1
        return self._address + _ELEMENT_BYTES, 1 if self.left else 0

    def advance(self, count: int) -> None:
        """Count *count* more bytes as received."""
        numbers = self._numbers
        first = min(count, max(self.left - self._second, 0))
        self.left -= count
        numbers[0] += first
        numbers[1] -= first
        numbers[2] += count - first
        numbers[3] -= count - first


def _parts(vector: Vector) -> tuple[int, int, memoryview[int]]:
    """Address, number of elements and numbers of a vector, for code that must not make array objects."""
    return vector.ctypes.data, len(vector), vector.reshape(-1).data


def elements(span: Span) -> Vector:
    """The elements that *span* names; valid as long as their memory is."""
    address, count = span
    return np.frombuffer(memoryview((ctypes.c_uint64 * (2 * count)).from_address(address)), np.uint64).reshape(-1, 2)


def _content(vector: Vector) -> bytes:
    return b"".join(ctypes.string_at(address, size) for address, size in vector.tolist())


def copied(span: Span, room: NDArray[np.uint8]) -> Iterator[memoryview]:
    """Copy the bytes that the elements of *span* name through *room*: yields what *room* holds, as often as is needed."""
    start, held = room.ctypes.data, 0
    for address, size in elements(span).tolist():
        taken = 0
        while taken < size:
            part = min(size - taken, len(room) - held)
            ctypes.memmove(start + held, address + taken, part)
            held, taken = held + part, taken + part
            if held == len(room):
                yield room.data
                held = 0
    if held:
        yield room[:held].data


def view(span: Span) -> memoryview:
    """The bytes at the first place of *span*, for writing; valid as long as their memory is."""
    address, size = elements(span)[0].tolist()
    return memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B")


def _failed() -> bool:
    """The last call was interrupted and must be made again; False if it would block. Raises OSError for any other error."""
    error = ctypes.get_errno()
    if error not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR):
        raise OSError(error, os.strerror(error))
    return error == errno.EINTR


def writev(fd: int, span: Span) -> int | None:
    """Bytes the kernel took of the first MAX_ELEMENTS of *span*; None if it would block. Raises OSError."""
    address, count = span
    while (done := int(_writev(fd, address, min(count, MAX_ELEMENTS)))) < 0:
        if not _failed():
            return None
    return done


def readv(fd: int, span: Span) -> int | None:
    """Bytes placed into the first MAX_ELEMENTS of *span*; 0 at the end of file; None if it would block. Raises OSError."""
    address, count = span
    while (done := int(_readv(fd, address, min(count, MAX_ELEMENTS)))) < 0:
        if not _failed():
            return None
    return done
