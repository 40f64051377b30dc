"""Dirty tracking, which finds the pages that the guest has written: four trackers, and the choice between them.

========================  ==============================================  =========================================
tracker                   how it knows                                    price
========================  ==============================================  =========================================
:class:`UffdTracker`      the kernel write-protects the pages, lifts the  1 us for the first write to a page after
                          protection at a write and remembers it          each sync; 0.3 to 4 ms for each 256 MiB
:class:`CompareTracker`   a second copy of the memory                     twice the memory; 50 ms for each 256 MiB
:class:`MarkTracker`      the application calls ``mark`` at each write    a write without the call is lost
:class:`NullTracker`      the guest does not run and writes no page       none
========================  ==============================================  =========================================

All trackers are exact: they find each page that was written. With :class:`CompareTracker` this is true only if the sender
takes its pages from :meth:`CompareTracker.snapshot`; see there.

A migration asks :func:`snapshot_of` where to read a block's pages from, whatever the tracker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
import trio
from numpy.typing import NDArray

from ..errors import ConfigError, GuestFailed, StateError
from ..guest import PAGE_SIZE, DirtyTracker, PageBitmap, Pages, RamBlock
from .linux import (
    MemoryUnavailable,
    WrittenScanner,
    open_userfaultfd,
    probe_tracking,
    register_write_protect,
    unregister,
    write_protect,
)

_log: Final = logging.getLogger("trimig.memory")

#: Pages that one kernel call scans or protects, or whose protection it lifts: 32 MiB, about a millisecond.
_SCAN_SLICE: Final = (32 << 20) // PAGE_SIZE
#: Runs of protected and unprotected pages in a slice that have a kernel call each.
_FEW_RUNS: Final = 16
#: Pages that are compared or copied in one step: 2 MiB, below a millisecond.
_COMPARE_SLICE: Final = (2 << 20) // PAGE_SIZE

#: Values of ``prefer`` and of a guest's ``dirty_tracking``.
METHODS: Final = ("auto", "userfaultfd", "compare", "marks")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRange:
    """A RAM block at its address in the process that writes it."""

    name: str
    #: The address of the mapping in that process.
    address: int
    pages: int


def tracked_ranges(blocks: Sequence[RamBlock]) -> Sequence[TrackedRange]:
    """*blocks* at their addresses in this process."""
    return [
        TrackedRange(name=block.name, address=int(block.pages.ctypes.data), pages=len(block.pages)) for block in blocks
    ]


class UffdTracker:
    """Dirty tracking by the kernel: userfaultfd asynchronous write protection, read with PAGEMAP_SCAN.

    The tracker sees every write of *one* address space: by Python, by C code, by a system call that reads into the
    memory. It does not see writes of another process through its own mapping of the same memfd.

    Args:
        ranges: the blocks, at their addresses in the process that writes them.
        pid: that process; None for this one.
        uffd: a userfaultfd that *pid* made (:func:`trimig.memory.linux.open_userfaultfd`); the tracker owns it from now
            on. Required with *pid*; without *pid*, :meth:`start` makes one.
    """

    method: Final = "userfaultfd-wp"

    def __init__(self, ranges: Sequence[TrackedRange], *, pid: int | None = None, uffd: int | None = None) -> None:
        if (pid is None) != (uffd is None):
            raise ValueError("pid and uffd go together: only the process itself can make its userfaultfd")
        self._ranges = tuple(ranges)
        self._pid = pid
        self._uffd = -1 if uffd is None else uffd
        self._registered: list[TrackedRange] = []
        self._scanner: WrittenScanner | None = None
        self._on = False
        self._stopped = False
        #: After :meth:`start_late`, by block: pages that :meth:`protect` has come to once.
        self._reached: dict[str, PageBitmap] = {}
        #: By block: pages that were written, and protected again, before they were sent.
        self._found: dict[str, PageBitmap] = {}

    async def start(self) -> None:
        """Write-protect every page; earlier writes do not count. Call it only once, see :class:`DirtyTracker`.

        **Cancellation:** tracking may be on in part; call :meth:`stop`.
        """
        await self._start(late=False)

    async def start_late(self) -> None:
        """See :class:`LateTracker`.

        **Cancellation:** tracking may be on in part; call :meth:`stop`.
        """
        await self._start(late=True)

    async def _start(self, *, late: bool) -> None:
        if self._stopped or self._scanner is not None:
            raise StateError("dirty tracking was started already; take a new tracker for a new attempt")
        try:
            if self._pid is None:
                self._uffd = open_userfaultfd()
            self._scanner = WrittenScanner(self._pid)
            for area in self._ranges:
                register_write_protect(self._uffd, area.address, area.pages * PAGE_SIZE)
                self._registered.append(area)
                if late:
                    self._reached[area.name] = np.zeros(area.pages, np.bool_)
                    self._found[area.name] = np.zeros(area.pages, np.bool_)
                    continue
                for first in range(0, area.pages, _SCAN_SLICE):
                    count = min(_SCAN_SLICE, area.pages - first)
                    write_protect(self._uffd, area.address + first * PAGE_SIZE, count * PAGE_SIZE)
                    await trio.lowlevel.checkpoint()
        except OSError as exc:
            self.stop()
            raise GuestFailed(f"dirty tracking by userfaultfd could not be started: {exc.strerror}") from exc
        self._on = True
        await trio.lowlevel.checkpoint()

    async def sync(self) -> Mapping[str, PageBitmap]:
        """See :class:`DirtyTracker`. GuestFailed if the kernel refuses (for example, the memory was unmapped)."""
        if not self._on or self._scanner is None:
            raise StateError("dirty tracking is not on")
        result: dict[str, PageBitmap] = {}
        for area in self._ranges:
            dirty = np.empty(area.pages, dtype=np.bool_)
            for first in range(0, area.pages, _SCAN_SLICE):
                count = min(_SCAN_SLICE, area.pages - first)
                try:
                    dirty[first : first + count] = self._written(self._scanner, area, first, count)
                except OSError as exc:
                    raise GuestFailed(f"the written pages of {area.name!r} cannot be read: {exc.strerror}") from exc
                await trio.lowlevel.checkpoint()
                if self._scanner is None:
                    raise StateError("dirty tracking was stopped meanwhile")
            result[area.name] = dirty
            if self._found:
                self._found[area.name][:] = False
        return result

    def _written(self, scanner: WrittenScanner, area: TrackedRange, first: int, count: int) -> PageBitmap:
        address, part = area.address + first * PAGE_SIZE, slice(first, first + count)
        if not self._reached:
            return scanner.get_and_clear(address, count)
        # A page without a page table is not found, though it is not protected.
        return scanner.get(address, count) | self._found[area.name][part] | ~self._reached[area.name][part]

    async def protect(self, name: str, indices: NDArray[np.int64]) -> None:
        """See :class:`LateTracker`. StateError before :meth:`start_late`, and after :meth:`stop`.

        **Cancellation:** as for :meth:`sync`.
        """
        area = next(area for area in self._ranges if area.name == name)
        first, end = int(indices[0]), int(indices[-1]) + 1
        for start in range(first, end, _SCAN_SLICE):
            if not self._on or self._scanner is None or not self._reached:
                raise StateError("late dirty tracking is not on")
            try:
                self._protect(self._scanner, area, start, min(end, start + _SCAN_SLICE))
            except OSError as exc:
                raise GuestFailed(f"the pages of {name!r} cannot be protected: {exc.strerror}") from exc
            await trio.lowlevel.checkpoint()
        self._found[name][indices] = False

    def _protect(self, scanner: WrittenScanner, area: TrackedRange, start: int, end: int) -> None:
        reached = self._reached[area.name]
        bounds = [start, *(start + 1 + np.flatnonzero(np.diff(reached[start:end]))).tolist(), end]
        if len(bounds) > _FEW_RUNS:
            # It costs nothing but accuracy: pages without a page table are not protected, and are found at the next write
            # to any of the 512 pages that would have the same one.
            self._found[area.name][start:end] |= scanner.get_and_clear(area.address + start * PAGE_SIZE, end - start)
        else:
            for first, stop in itertools.pairwise(bounds):
                address, count = area.address + first * PAGE_SIZE, stop - first
                if reached[first]:
                    self._found[area.name][first:stop] |= scanner.get_and_clear(address, count)
                else:  # it has not been sent, and so its writes need not be known
                    write_protect(self._uffd, address, count * PAGE_SIZE)
        reached[start:end] = True

    async def lift(self) -> None:
        """Stop tracking and lift the protection, in slices; :meth:`stop` has little to do then.

        **Cancellation:** a part is protected; call :meth:`stop`.
        """
        self._on = False
        for area in self._registered:
            for first in range(0, area.pages, _SCAN_SLICE):
                if self._uffd < 0:
                    return  # stopped meanwhile
                start, count = area.address + first * PAGE_SIZE, min(_SCAN_SLICE, area.pages - first)
                with contextlib.suppress(OSError):  # as in stop()
                    unregister(self._uffd, start, count * PAGE_SIZE)
                await trio.lowlevel.checkpoint()

    def stop(self) -> None:
        """Lift the protection and close the descriptors."""
        self._stopped = True
        self._on = False
        if self._uffd >= 0:
            for area in self._registered:
                # The process may have ended or unmapped the memory: then there is no protection left to lift.
                with contextlib.suppress(OSError):
                    unregister(self._uffd, area.address, area.pages * PAGE_SIZE)
            os.close(self._uffd)
            self._uffd = -1
        self._registered.clear()
        if self._scanner is not None:
            self._scanner.close()
            self._scanner = None


class CompareTracker:
    """Dirty tracking by comparing with a copy of the memory. It needs no kernel feature.

    Comparing cannot see a page that changed and changed back between two syncs. A sender that read the page from the
    guest's memory in between has sent content that the guest no longer has, and no sync would report the page. So
    **pages must be sent from** :meth:`snapshot`, the copy that they are compared with. Then the destination always has
    a state from which the next comparison starts.
    """

    method: Final = "compare"

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = {block.name: block for block in blocks}
        self._shadows: dict[str, Pages] = {}
        self._on = False

    def snapshot(self, name: str) -> Pages:
        """The memory of a block as of the last sync, shape as ``RamBlock.pages``. Do not write. StateError if off."""
        if not self._on:
            raise StateError("dirty tracking is not on")
        return self._shadows[name]

    async def start(self) -> None:
        """Copy all memory. See :class:`DirtyTracker`."""
        self._on = False
        for name, block in self._blocks.items():
            shadow = np.empty_like(block.pages)
            for first in range(0, len(shadow), _COMPARE_SLICE):
                part = slice(first, first + _COMPARE_SLICE)
                shadow[part] = block.pages[part]
                await trio.lowlevel.checkpoint()
            self._shadows[name] = shadow
        self._on = True
        await trio.lowlevel.checkpoint()

    async def sync(self) -> Mapping[str, PageBitmap]:
        """See :class:`DirtyTracker`."""
        if not self._on:
            raise StateError("dirty tracking is not on")
        result: dict[str, PageBitmap] = {}
        for name, block in self._blocks.items():
            # A second copy of the slice, because another process may write during the comparison: the bytes that are
            # compared and the bytes that are kept must be the same.
            taken = np.empty((min(_COMPARE_SLICE, len(block.pages)), PAGE_SIZE), dtype=np.uint8)
            dirty = np.empty(len(block.pages), dtype=np.bool_)
            for first in range(0, len(dirty), _COMPARE_SLICE):
                shadow = self._shadows[name][first : first + _COMPARE_SLICE]
                now = taken[: len(shadow)]
                now[:] = block.pages[first : first + _COMPARE_SLICE]
                changed = (now.view(np.uint64) != shadow.view(np.uint64)).any(axis=1)
                shadow[changed] = now[changed]
                dirty[first : first + _COMPARE_SLICE] = changed
                await trio.lowlevel.checkpoint()
                if not self._on:
                    raise StateError("dirty tracking was stopped meanwhile")
            result[name] = dirty
        return result

    def stop(self) -> None:
        """Drop the copy."""
        self._on = False
        self._shadows.clear()


class MarkTracker:
    """Dirty tracking by the calls of :meth:`mark` that the application makes."""

    method: Final = "marks"

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._lengths = {block.name: block.length for block in blocks}
        self._dirty: dict[str, PageBitmap] | None = None

    async def start(self) -> None:
        """Forget all marks. See :class:`DirtyTracker`."""
        self._dirty = self._clean()
        await trio.lowlevel.checkpoint()

    def mark(self, name: str, start: int, length: int) -> None:
        """Bytes ``[start, start + length)`` of block *name* have been written. Ignored while tracking is off.

        Call it after the write, with no checkpoint between the two (or within the same hold on the guest's gate).

        Raises:
            ValueError: there is no such block, or the range is not inside it.
        """
        if not 0 <= start <= start + length <= self._lengths.get(name, -1):
            raise ValueError(f"bytes {start}..{start + length} are not in a RAM block {name!r}")
        if self._dirty is not None and length:
            self._dirty[name][start // PAGE_SIZE : -(-(start + length) // PAGE_SIZE)] = True

    async def sync(self) -> Mapping[str, PageBitmap]:
        """See :class:`DirtyTracker`."""
        await trio.lowlevel.checkpoint()
        if self._dirty is None:
            raise StateError("dirty tracking is not on")
        result, self._dirty = self._dirty, self._clean()
        return result

    def stop(self) -> None:
        """Forget all marks."""
        self._dirty = None

    def _clean(self) -> dict[str, PageBitmap]:
        return {name: np.zeros(length // PAGE_SIZE, dtype=np.bool_) for name, length in self._lengths.items()}


class NullTracker:
    """For a guest that never runs here: no page is ever dirty."""

    method: Final = "none"

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._pages = {block.name: block.length // PAGE_SIZE for block in blocks}

    async def start(self) -> None:
        """See :class:`DirtyTracker`."""
        await trio.lowlevel.checkpoint()

    async def sync(self) -> Mapping[str, PageBitmap]:
        """See :class:`DirtyTracker`."""
        await trio.lowlevel.checkpoint()
        return {name: np.zeros(pages, dtype=np.bool_) for name, pages in self._pages.items()}

    def stop(self) -> None:
        """Nothing to do."""


@runtime_checkable
class SnapshotTracker(DirtyTracker, Protocol):
    """A tracker with a copy of the memory, from which a sender must take the pages: see :class:`CompareTracker`."""

    def snapshot(self, name: str) -> Pages:
        """The copy of the block *name*, shape ``(pages, PAGE_SIZE)``."""


@runtime_checkable
class GradualTracker(DirtyTracker, Protocol):
    """A tracker whose end takes long where there is much memory."""

    async def lift(self) -> None:
        """Stop tracking, and do in slices most of what :meth:`stop` does.

        **Cancellation:** call :meth:`stop`.
        """


@runtime_checkable
class LateTracker(DirtyTracker, Protocol):
    """A tracker that can protect pages just before they are sent.

    A page that has not been sent yet must be sent, whether the guest writes it or not. While it is not protected, such a
    write costs the guest nothing.
    """

    async def start_late(self) -> None:
        """Start without protecting a page. Used in place of :meth:`start`. From now on ``sync`` has each page that was
        not protected, or was written since it was protected, also if the last call had it.

        **Cancellation:** as for :meth:`start`.
        """

    async def protect(self, name: str, indices: NDArray[np.int64]) -> None:
        """Find every write from now on to these pages of the block *name*, whose content is read and sent next.

        Args:
            indices: the numbers of the pages, rising, at least one. Pages between them may be protected too; no write to
                them is lost.

        **Cancellation:** as for :meth:`sync`.
        """


async def start_tracking(tracker: DirtyTracker) -> LateTracker | None:
    """Start *tracker*, late if it can do that.

    Returns:
        The tracker if each page must be protected before it is read; None if all pages are.

    **Cancellation:** tracking may be on; stop it.
    """
    if isinstance(tracker, LateTracker):
        await tracker.start_late()
        return tracker
    await tracker.start()
    return None


async def end_tracking(tracker: DirtyTracker) -> None:
    """Stop *tracker*, in slices where it takes long.

    **Cancellation:** it is stopped at once.
    """
    try:
        if isinstance(tracker, GradualTracker):
            await tracker.lift()
    finally:
        tracker.stop()


def snapshot_of(tracker: DirtyTracker, block: RamBlock) -> Pages:
    """The array that a sender must read the pages of *block* from: its memory, or the tracker's snapshot if there is
    one.
    """
    return tracker.snapshot(block.name) if isinstance(tracker, SnapshotTracker) else block.pages


def check_method(method: str) -> None:
    """Raise ConfigError unless *method* is one of :data:`METHODS`."""
    if method not in METHODS:
        raise ConfigError(f"dirty tracking {method!r} is not one of {', '.join(METHODS)}", name="dirty-tracking")


def choose_tracker(blocks: Sequence[RamBlock], *, prefer: str | None = None) -> DirtyTracker:
    """The best tracker for memory that this process writes; logged on ``trimig.memory``, with the reason.

    Args:
        prefer: one of :data:`METHODS`; ``"auto"`` or None takes userfaultfd, or else compares.

    Raises:
        ConfigError: *prefer* is not known.
        GuestFailed: userfaultfd was asked for by name and is not available; the message says how to enable it.
    """
    prefer = prefer or "auto"
    check_method(prefer)
    tracker: DirtyTracker
    if prefer == "marks":
        tracker = MarkTracker(blocks)
    elif prefer == "compare":
        tracker = CompareTracker(blocks)
    else:
        ranges = tracked_ranges(blocks)
        try:
            if any(area.address % PAGE_SIZE for area in ranges):
                raise MemoryUnavailable(0, "a RAM block does not begin at a page border")
            probe_tracking()
        except MemoryUnavailable as exc:
            if prefer == "userfaultfd":
                raise GuestFailed(f"no dirty tracking by userfaultfd: {exc.strerror}") from exc
            log_fallback(exc)
            return CompareTracker(blocks)
        tracker = UffdTracker(ranges)
    log_choice(tracker.method)
    return tracker


def log_choice(method: str) -> None:
    """Log the tracking method on ``trimig.memory``."""
    _log.info("dirty tracking by %s", method)


def log_fallback(reason: MemoryUnavailable) -> None:
    """Log on ``trimig.memory`` that memory is compared, and the reason."""
    _log.warning("dirty tracking by comparing with a copy, which is slow and doubles the memory: %s", reason.strerror)
