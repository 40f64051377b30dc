"""Missing pages: a thread that touches one sleeps in the kernel until the page is placed (userfaultfd, missing mode).

One :class:`MissingPages` serves the memory of one process, this one or another: the descriptor acts on the address
space of the process that made it. Placing is atomic for all readers: a page is absent, or whole.

This process must not touch a missing page of its own while it holds the GIL: the task that would place it could never
run. Another process may, and so may code that has released the GIL.

Numbers and layouts are kernel ABI (``linux/userfaultfd.h``).
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ..guest import PAGE_SIZE, Pages, Wait
from . import linux

if TYPE_CHECKING:
    from .tracking import TrackedRange

#: The features that postcopy needs of a userfaultfd: faults in shared memory, and the ids of waiting threads.
FEATURES: Final = linux.FEATURE_MISSING_SHMEM | linux.FEATURE_THREAD_ID

_EVENT_PAGEFAULT: Final = 0x12
#: Messages taken with one read.
_BATCH: Final = 64
_MESSAGE = np.dtype(
    {
        "names": ["event", "flags", "address", "thread"],
        "formats": ["u1", "<u8", "<u8", "<u4"],
        "offsets": [0, 8, 16, 24],
        "itemsize": 32,
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """The faults of one read.

    Attributes:
        pages: address of the page that each thread waits for, in the order in which the waits began. The same page is
            listed several times if several threads touch it.
        threads: kernel id of each waiting thread.
    """

    pages: NDArray[np.uint64]
    threads: NDArray[np.uint32]


_NO_FAULTS: Final = Faults(pages=np.zeros(0, np.uint64), threads=np.zeros(0, np.uint32))


class MissingPages:
    """The missing pages of one address space.

    Args:
        descriptor: a userfaultfd with :data:`FEATURES`, not blocking; this object owns it from now on. Wait until it is
            readable, then call :meth:`read`.
    """

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    @classmethod
    def open(cls, *, user_mode_only: bool = False) -> MissingPages:
        """Open a userfaultfd of this process.

        Args:
            user_mode_only: if a full userfaultfd is not permitted, accept one that does not notice system calls on
                missing pages. Such a system call fails with EFAULT and does not wait. So use this only for programs that
                make no system calls on this memory.

        Raises:
            MemoryUnavailable: names the sysctl, the device or the kernel version to check.
        """
        return cls(linux.open_userfaultfd(FEATURES, user_mode_only=user_mode_only))

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Wake all waiting threads; missing pages read as zero from now on. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def register(self, start: int, length: int) -> None:
        """Make a touch of an absent page in the range wait from now on. OSError."""
        linux.register_missing(self._fd, start, length)

    def unregister(self, start: int, length: int) -> None:
        """Make the range ordinary memory again, and wake the threads that wait in it. OSError."""
        linux.unregister(self._fd, start, length)

    def read(self) -> Faults:
        """The threads that began to wait since the last read; may be empty. Never blocks. OSError."""
        try:
            raw = os.read(self._fd, _BATCH * _MESSAGE.itemsize)
        except BlockingIOError:
            return _NO_FAULTS
        messages = np.frombuffer(raw, _MESSAGE)
        messages = messages[messages["event"] == _EVENT_PAGEFAULT]
        return Faults(
            pages=messages["address"] & np.uint64(2**64 - PAGE_SIZE), threads=messages["thread"].astype(np.uint32)
        )

    def place(self, start: int, data: NDArray[np.uint8]) -> int:
        """Fill absent pages from address *start* on, and wake the threads that wait for them.

        A page that is present already is not changed: its content is newer than *data*, or the same.

        Args:
            data: whole pages, contiguous, of this process.

        Returns:
            The number of pages placed.

        Raises:
            ValueError: *data* is no run of whole pages.
            ProcessLookupError: the process has ended.
            OSError: the range is not registered, or there is no memory.
        """
        if data.nbytes % PAGE_SIZE or not data.flags.c_contiguous:
            raise ValueError(f"{data.nbytes} bytes are no contiguous run of whole pages")
        source = int(data.ctypes.data)

        def copy(position: int, length: int) -> tuple[int, OSError | None]:
            return linux.copy_pages(self._fd, start + position, source + position, length)

        return self._fill(start, data.nbytes, copy)

    def place_zeros(self, start: int, length: int) -> int:
        """Fill absent pages with zeros; otherwise as :meth:`place`."""
        if length % PAGE_SIZE:
            raise ValueError(f"{length} bytes are no run of whole pages")

        def zero(position: int, length: int) -> tuple[int, OSError | None]:
            return linux.zero_pages(self._fd, start + position, length)

        return self._fill(start, length, zero)

    def _fill(self, start: int, length: int, fill: linux.Fill) -> int:
        position = placed = 0
        while position < length:
            done, error = fill(position, length - position)
            placed += done
            position += done
            if error is None or done:
                continue
            if error.errno == errno.EEXIST:
                linux.wake(self._fd, start + position, PAGE_SIZE)
                position += PAGE_SIZE
            elif error.errno != errno.EAGAIN:  # EAGAIN: the memory layout of the process changed during the call
                raise error
        return placed // PAGE_SIZE


class UffdMemory:
    """:class:`trimig.guest.MissingMemory` by userfaultfd.

    Args:
        missing: the missing pages of the process that runs the guest; this object owns it from now on.
        areas: the blocks at their addresses in that process, in the order of their numbers.
    """

    def __init__(self, missing: MissingPages, areas: Sequence[TrackedRange]) -> None:
        self._missing = missing
        self._areas = tuple(areas)

    def open(self) -> None:
        """Make a touch of an absent page wait from now on. OSError."""
        for area in self._areas:
            self._missing.register(area.address, area.pages * PAGE_SIZE)

    def fileno(self) -> int:
        """A descriptor that is readable when a thread waits."""
        return self._missing.fileno()

    def waits(self) -> list[Wait]:
        """The threads that began to wait since the last call. Never blocks. OSError."""
        faults = self._missing.read()
        found: list[Wait] = []
        if faults is _NO_FAULTS:
            return found
        for address, thread in zip(faults.pages.tolist(), faults.threads.tolist(), strict=True):
            for number, area in enumerate(self._areas):
                page = (address - area.address) // PAGE_SIZE
                if 0 <= page < area.pages:
                    found.append(Wait(block=number, page=page, thread=thread))
        return found

    def place(self, block: int, first: int, pages: Pages) -> int:
        """As :meth:`MissingPages.place`: put *pages* into *block* from page *first* on, where pages are absent."""
        return self._missing.place(self._address(block, first, len(pages)), pages)

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """As :meth:`MissingPages.place_zeros`, for *count* pages."""
        return self._missing.place_zeros(self._address(block, first, count), count * PAGE_SIZE)

    def close(self) -> None:
        """Make missing pages read as zero from now on, and wake all waiting threads. Idempotent."""
        self._missing.close()

    def _address(self, block: int, first: int, count: int) -> int:
        area = self._areas[block]
        if first < 0 or first + count > area.pages:
            raise ValueError(f"pages {first}..{first + count} are not within the {area.pages} of {area.name!r}")
        return area.address + first * PAGE_SIZE
