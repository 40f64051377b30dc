"""Pages that are not here yet: whoever touches one sleeps in the kernel until it is placed (userfaultfd, missing mode).

One :class:`MissingPages` serves the memory of one process, this one or another: the descriptor acts on the address
space of the process that made it. Placing is atomic for everybody who looks: a page is absent, or whole.

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

#: What postcopy asks of a userfaultfd: faults in shared memory, and who waits.
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
    """What one read brought.

    Attributes:
        pages: address of the page that each one waits for, in the order in which they began to wait. The same page
            comes several times if several threads touch it.
        threads: kernel id of the thread that waits, for each.
    """

    pages: NDArray[np.uint64]
    threads: NDArray[np.uint32]


class MissingPages:
    """The missing pages of one address space.

    Args:
        descriptor: a userfaultfd with :data:`FEATURES`, not blocking; it is this object's from here on. Wait for it
            to become readable, then :meth:`read`.
    """

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    @classmethod
    def open(cls, *, user_mode_only: bool = False) -> MissingPages:
        """Of this process.

        Args:
            user_mode_only: one that does not see system calls touch missing pages will do where no other is
                permitted. Such a call fails with EFAULT instead of waiting, so that is for programs that make none.

        Raises:
            MemoryUnavailable: with the sysctl, the device or the kernel version to look at.
        """
        return cls(linux.open_userfaultfd(FEATURES, user_mode_only=user_mode_only))

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Whoever waits is woken, and what is missing reads as zero from here on. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def register(self, start: int, length: int) -> None:
        """From here on a touch of an absent page in that range waits. OSError."""
        linux.register_missing(self._fd, start, length)

    def unregister(self, start: int, length: int) -> None:
        """The range is ordinary memory again; whoever waits in it is woken. OSError."""
        linux.unregister(self._fd, start, length)

    def read(self) -> Faults:
        """Who has begun to wait since the last read; nobody, perhaps. Never blocks. OSError."""
        try:
            raw = os.read(self._fd, _BATCH * _MESSAGE.itemsize)
        except BlockingIOError:
            raw = b""
        messages = np.frombuffer(raw, _MESSAGE)
        messages = messages[messages["event"] == _EVENT_PAGEFAULT]
        return Faults(
            pages=messages["address"] & np.uint64(2**64 - PAGE_SIZE), threads=messages["thread"].astype(np.uint32)
        )

    def place(self, start: int, data: NDArray[np.uint8]) -> int:
        """Fill absent pages from address *start* on, and wake who waits for them.

        A page that is there already is left as it is: its content is newer than *data*, or the same.

        Args:
            data: whole pages, contiguous, of this process.

        Returns:
            How many pages were placed.

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
            elif error.errno != errno.EAGAIN:  # EAGAIN: the layout of the process changed in that moment
                raise error
        return placed // PAGE_SIZE


class UffdMemory:
    """:class:`trimig.guest.MissingMemory` by userfaultfd.

    Args:
        missing: of the process that runs the guest; this object's from here on.
        areas: the blocks where that process has them, in the order in which they are numbered.
    """

    def __init__(self, missing: MissingPages, areas: Sequence[TrackedRange]) -> None:
        self._missing = missing
        self._areas = tuple(areas)

    def open(self) -> None:
        """From here on a touch of an absent page waits. OSError."""
        for area in self._areas:
            self._missing.register(area.address, area.pages * PAGE_SIZE)

    def fileno(self) -> int:
        """Readable when somebody waits."""
        return self._missing.fileno()

    def waits(self) -> list[Wait]:
        """Who has begun to wait since the last call. Never blocks. OSError."""
        faults = self._missing.read()
        found = []
        for address, thread in zip(faults.pages.tolist(), faults.threads.tolist(), strict=True):
            for number, area in enumerate(self._areas):
                page = (address - area.address) // PAGE_SIZE
                if 0 <= page < area.pages:
                    found.append(Wait(block=number, page=page, thread=thread))
        return found

    def place(self, block: int, first: int, pages: Pages) -> int:
        """As :meth:`MissingPages.place`: *pages* go into *block* from page *first* on, those that are absent there."""
        return self._missing.place(self._address(block, first, len(pages)), pages)

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """As :meth:`MissingPages.place_zeros`, for *count* pages."""
        return self._missing.place_zeros(self._address(block, first, count), count * PAGE_SIZE)

    def close(self) -> None:
        """What is missing reads as zero from here on, and whoever waits is woken. Idempotent."""
        self._missing.close()

    def _address(self, block: int, first: int, count: int) -> int:
        area = self._areas[block]
        if first < 0 or first + count > area.pages:
            raise ValueError(f"pages {first}..{first + count} are not within the {area.pages} of {area.name!r}")
        return area.address + first * PAGE_SIZE
