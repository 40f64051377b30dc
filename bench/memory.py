"""The guest's memory: its kind and its contents.

The *kind* (``memfd-cold``, ``anon``, …) is the destination's memory: first-touch page faults there are the largest
single cost of a migration, so every row names the kind. The source's memory is always a shared memfd, mapped and
touched, as for a guest that has written its memory; otherwise the figures would include the cost of a cold source.

The *pages* are the contents of the source's memory:

- ``random``: every page random, and different from every other;
- ``zero``: 15 of 16 pages were written with zeros, 1 of 16 is random, scattered singly over the whole memory;
- ``absent``: the same, but the zero pages were never touched (a guest that has just booted);
- ``eighth``: one page in eight is random, scattered singly; the others were never touched;
- ``image``: binaries and text files of this system, as the page cache of a guest has them (:mod:`bench.image`).
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import os
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from bench import image
from bench.errors import BenchError

PAGE_SIZE = 4096
#: Random bytes are made once for this many pages and reused with a different first word: making all of them would take
#: longer than the migration. No side compresses or compares pages, so no side gains from the reuse.
TEMPLATE_PAGES = 4096

#: ``MADV_POPULATE_WRITE`` (Linux 5.14), which Python's mmap module has no name for.
MADV_POPULATE_WRITE = 23

Pages = NDArray[np.uint8]

PAGE_PATTERNS = ("random", "zero", "absent", "eighth", "image")
#: In these patterns only the random pages are touched.
UNTOUCHED = frozenset({"absent", "eighth"})
#: The share of random pages, where the others are zero: one in so many.
_ONE_IN = {"zero": 16, "absent": 16, "eighth": 8}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryKind:
    """One kind of destination memory."""

    name: str
    #: memfd, mapped shared (QEMU: memory-backend-memfd); else private and anonymous (memory-backend-ram).
    shared: bool
    #: Every page has memory and a page table entry before the migration starts (QEMU: prealloc=on).
    populated: bool


MEMORY_KINDS = {
    kind.name: kind
    for kind in (
        MemoryKind(name="memfd-cold", shared=True, populated=False),
        MemoryKind(name="memfd-populated", shared=True, populated=True),
        MemoryKind(name="anon", shared=False, populated=False),
        MemoryKind(name="anon-populated", shared=False, populated=True),
    )
}

#: The kind of the source's memory, in every row.
SOURCE_KIND = MEMORY_KINDS["memfd-populated"]


def allocate(size: int, kind: MemoryKind) -> Pages:
    """Map *size* bytes of that kind, shape ``(size // 4096, 4096)``, with QEMU's advice about huge pages.

    The mapping lives as long as the array.
    """
    if kind.shared:
        descriptor = os.memfd_create("bench", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            area = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    else:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    if kind.populated:
        area.madvise(MADV_POPULATE_WRITE)
    return as_pages(area)


def as_pages(area: mmap.mmap) -> Pages:
    """The mapping as an array of pages."""
    return np.frombuffer(area, dtype=np.uint8).reshape(-1, PAGE_SIZE)


def populate(pages: Pages) -> None:
    """Touch every page for writing, without changing its contents."""
    pages[:, 0] |= 0


def fill(pages: Pages, pattern: str) -> None:
    """Write the contents of *pattern* into memory that is zero so far."""
    if pattern in _WHOLE:
        for first in range(0, len(pages), TEMPLATE_PAGES):
            part = pages[first : first + TEMPLATE_PAGES]
            part[:] = _WHOLE[pattern](np.arange(first, first + len(part), dtype=np.uint64))
        return
    if pattern == "zero":
        pages[:] = 0
    chosen = _chosen(len(pages), pattern)
    for at in range(0, len(chosen), TEMPLATE_PAGES):
        numbers = chosen[at : at + TEMPLATE_PAGES]
        pages[numbers.astype(np.intp)] = _random_pages(numbers)


def fill_in_fork(pages: Pages, pattern: str) -> None:
    """:func:`fill` shared memory from a forked child, then touch it here.

    Making the contents leaves megabytes in the allocator, and changes its later behaviour; neither belongs to
    the figures of the measured process. Call this before any event loop or thread is started.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fill(pages, pattern)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status:
        raise BenchError("the guest's memory could not be filled")
    if pattern not in UNTOUCHED:
        populate(pages)


def expected(first: int, count: int, total: int, pattern: str) -> Pages:
    """The contents that :func:`fill` wrote to pages *first* … *first* + *count* of a memory of *total* pages."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    if pattern in _WHOLE:
        return _WHOLE[pattern](numbers)
    result = np.zeros((count, PAGE_SIZE), dtype=np.uint8)
    chosen = _chosen(total, pattern)
    chosen = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + count)]
    result[(chosen - np.uint64(first)).astype(np.intp)] = _random_pages(chosen)
    return result


def mismatches(pages: Pages, pattern: str) -> int:
    """How many pages differ from what :func:`fill` wrote."""
    wrong = 0
    for first in range(0, len(pages), TEMPLATE_PAGES):
        part = pages[first : first + TEMPLATE_PAGES]
        wrong += differing(part, expected(first, len(part), len(pages), pattern))
    return wrong


def differing(left: Pages, right: Pages) -> int:
    """How many pages of two arrays of the same shape differ."""
    return int((left.view(np.uint64) != right.view(np.uint64)).any(axis=1).sum())


def parse_size(text: str) -> int:
    """``"256M"``, ``"1G"`` or plain bytes, as bytes: a positive multiple of 1 MiB.

    Raises:
        BenchError: *text* is no such size.
    """
    factors = {"M": 1 << 20, "G": 1 << 30}
    body, factor = (text[:-1], factors[text[-1].upper()]) if text[-1:].upper() in factors else (text, 1)
    if not body.isascii() or not body.isdigit():
        raise BenchError(f"{text!r} is not a size: write 256M, 1G or a number of bytes")
    size = int(body) * factor
    if size == 0 or size % (1 << 20):
        raise BenchError(f"the size {text!r} is not a positive multiple of 1 MiB")
    return size


@functools.cache
def _template() -> Pages:
    generator = np.random.default_rng(1)
    return np.frombuffer(generator.bytes(TEMPLATE_PAGES * PAGE_SIZE), dtype=np.uint8).reshape(-1, PAGE_SIZE)


@functools.lru_cache(maxsize=4)
def _chosen(total: int, pattern: str) -> NDArray[np.uint64]:
    """The numbers of the pages that are not zero, ascending."""
    if pattern not in _ONE_IN:
        raise BenchError(f"unknown contents {pattern!r}: one of {', '.join(PAGE_PATTERNS)}")
    generator = np.random.default_rng(2)
    chosen = generator.choice(total, size=total // _ONE_IN[pattern], replace=False)
    return np.sort(chosen).astype(np.uint64)


def _random_pages(numbers: NDArray[np.uint64]) -> Pages:
    """The random contents of the pages of these numbers, each different."""
    result = _template()[(numbers % np.uint64(TEMPLATE_PAGES)).astype(np.intp)]
    result.view(np.uint64)[:, 0] ^= numbers
    return result


def _image_pages(numbers: NDArray[np.uint64]) -> Pages:
    """The pages of these numbers of the image, which begins again at its end."""
    pages = image.pages()
    return pages[(numbers % np.uint64(len(pages))).astype(np.intp)]


#: The patterns that give each page a content of its own, whatever the size of the memory.
_WHOLE: Mapping[str, Callable[[NDArray[np.uint64]], Pages]] = {"random": _random_pages, "image": _image_pages}
