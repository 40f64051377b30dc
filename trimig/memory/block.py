"""A RAM block on a memfd: other processes can map it too, and its holes can be found without touching them.

A memfd is used instead of ``multiprocessing.shared_memory``, because a memfd has no name to collide or to leak, and no
helper process that removes it while it is in use.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final, Protocol, runtime_checkable

import numpy as np
import trio

from ..errors import ConfigError, StateError
from ..guest import PAGE_SIZE, PageBitmap, Pages, RamBlock
from .linux import MADV_POPULATE_WRITE, absent_pages

#: Extents that :meth:`MemfdBlock.absent` walks at most; this takes about two milliseconds.
MAX_EXTENTS: Final = 512
#: Pages that :func:`find_absent` asks for at once: 32 MiB.
_SLICE: Final = (32 << 20) // PAGE_SIZE


@runtime_checkable
class SlicedBlock(RamBlock, Protocol):
    """A block that finds its absent pages in slices."""

    def absent_slice(self, first_page: int, count: int) -> PageBitmap:
        """:meth:`absent` for *count* pages from *first_page* on."""


async def find_absent(block: RamBlock) -> PageBitmap | None:
    """``block.absent()``, in slices where the block can do that; then more holes are found, too.

    **Cancellation:** no effect.
    """
    await trio.lowlevel.checkpoint()
    if not isinstance(block, SlicedBlock):
        return block.absent()
    pages, parts = block.length // PAGE_SIZE, []
    for first in range(0, pages, _SLICE):
        parts.append(block.absent_slice(first, min(_SLICE, pages - first)))
        await trio.lowlevel.checkpoint()
    return np.concatenate(parts)  # not into an array of bool: the caller checks what an own block returns


def check_block(name: str, length: int) -> None:
    """Raise ConfigError unless a RAM block may have this name and length."""
    if not 1 <= len(name.encode()) <= 255:
        raise ConfigError(f"the name of a RAM block has 1 to 255 bytes, {name!r} has {len(name.encode())}")
    if length <= 0 or length % PAGE_SIZE:
        raise ConfigError(f"RAM block {name!r}: {length} bytes is not a positive multiple of {PAGE_SIZE}")


class MemfdBlock:
    """One RAM block of *length* bytes, shared, mapped read-write into this process; all zero, and absent, at first.

    The block owns the descriptor and the mapping. ``view`` and ``pages`` are windows into the mapping: an array made
    from them keeps the mapping (not the descriptor) alive after :meth:`close`, until the array is dropped.

    Args:
        name: the id on the wire.
        length: bytes, a multiple of PAGE_SIZE.
        fd: an existing memfd (or tmpfs file) of at least that size to take over, also when this call fails.

    Raises:
        ConfigError: a bad name or length, or *fd* is shorter.
        OSError: no memory or descriptors left.
    """

    def __init__(self, name: str, length: int, *, fd: int | None = None) -> None:
        self._fd = -1 if fd is None else fd
        try:
            check_block(name, length)
            if fd is None:
                label = name[:60].replace("\0", "?")  # shown in /proc; the kernel takes 249 bytes
                self._fd = os.memfd_create(f"trimig-{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(self._fd, length)
                # The seal: a process that gets the descriptor cannot shorten the file, which would turn our pages into
                # bus errors.
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            elif (size := os.fstat(fd).st_size) < length:
                raise ConfigError(f"RAM block {name!r} has {length} bytes, its file only {size}")
            self._map = mmap.mmap(self._fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            if self._fd >= 0:
                os.close(self._fd)
            raise
        self._name = name
        self._length = length
        self._view: memoryview | None = memoryview(self._map)
        self._pages: Pages | None = np.frombuffer(self._map, dtype=np.uint8).reshape(-1, PAGE_SIZE)

    def __repr__(self) -> str:
        return f"<MemfdBlock {self._name!r} {self._length} bytes{'' if self._pages is not None else ' closed'}>"

    @property
    def name(self) -> str:
        """The id on the wire."""
        return self._name

    @property
    def length(self) -> int:
        """Bytes."""
        return self._length

    @property
    def fd(self) -> int:
        """The memfd, for as long as the block is open; duplicate it to keep it. StateError after :meth:`close`."""
        self._check_open()
        return self._fd

    @property
    def pages(self) -> Pages:
        """The memory, shape ``(length // PAGE_SIZE, PAGE_SIZE)``. StateError after :meth:`close`."""
        if self._pages is None:
            raise self._closed()
        return self._pages

    @property
    def view(self) -> memoryview:
        """The memory as flat writable bytes; ``np.frombuffer(block.view, dtype)`` for arrays. StateError when closed."""
        if self._view is None:
            raise self._closed()
        return self._view

    @property
    def address(self) -> int:
        """The address of the mapping in this process."""
        return int(self.pages.ctypes.data)

    def absent(self) -> PageBitmap:
        """Pages with no memory behind them. The call does not touch (and so never allocates) pages.

        In a block with very many separate holes only the first 500 or so are found; see :meth:`absent_slice`.
        """
        return self.absent_slice(0, self._length // PAGE_SIZE)

    def absent_slice(self, first_page: int, count: int) -> PageBitmap:
        """:meth:`absent` for *count* pages from *first_page* on, for callers who go through a block in slices."""
        self._check_open()
        first, count = self._clip(first_page, count)
        return absent_pages(self._fd, first, count, max_extents=MAX_EXTENTS)

    def populate_slice(self, first_page: int, count: int) -> bool:
        """Give memory to *count* pages from *first_page* on, and map them; their content stays.

        The call is synchronous and costs as much as a first touch: about a millisecond per MiB, several on a virtual
        machine whose own memory is still cold. Call it in slices of one or two hundred pages with a checkpoint between.
        It is only an optimisation: False if the kernel cannot do it (before Linux 5.14). Dirty tracking may see the
        pages as written. OSError if memory runs out.
        """
        self._check_open()
        first, count = self._clip(first_page, count)
        try:
            if count:
                self._map.madvise(MADV_POPULATE_WRITE, first * PAGE_SIZE, count * PAGE_SIZE)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                return False
            raise
        return True

    def discard(self) -> None:
        """Give all memory back: every page is absent, and reads as zero, again.

        Do not call it while a migration sends this block: kernel dirty tracking does not see it (there is no write).
        """
        self._check_open()
        self._map.madvise(mmap.MADV_REMOVE)

    def discard_slice(self, first_page: int, count: int) -> None:
        """As :meth:`discard`, for *count* pages from *first_page* on."""
        self._check_open()
        first, count = self._clip(first_page, count)
        if count:
            self._map.madvise(mmap.MADV_REMOVE, first * PAGE_SIZE, count * PAGE_SIZE)

    def close(self) -> None:
        """Close the descriptor and unmap. Idempotent; never fails.

        Arrays and views of the block that the caller still holds stay usable. The memory is unmapped with the last one.
        """
        if self._pages is None:
            return
        self._pages = None
        view, self._view = self._view, None
        os.close(self._fd)
        self._fd = -1
        try:
            if view is not None:
                view.release()
            self._map.close()
        except BufferError:
            # An array still uses the mapping. Unmapping now would crash the process at a later access. The array holds
            # a reference to the map object, which unmaps when it is collected.
            del self._map

    def _clip(self, first: int, count: int) -> tuple[int, int]:
        total = self._length // PAGE_SIZE
        if first < 0 or count < 0 or first + count > total:
            raise ValueError(f"pages {first}..{first + count} are not within the {total} of RAM block {self._name!r}")
        return first, count

    def _check_open(self) -> None:
        if self._pages is None:
            raise self._closed()

    def _closed(self) -> StateError:
        return StateError(f"RAM block {self._name!r} is closed")
