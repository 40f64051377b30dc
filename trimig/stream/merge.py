"""Merges the two halves of a guest after a lost postcopy: the part at the destination, and the memory at the source.

After the package the source's guest stands still, so its memory stays the state of that moment. The pages that the
destination received are the same, page by page. The devices come from the destination, which has all of them. This is
true for a guest that was only kept at the destination. A guest that ran there has changed its pages, and only that host
can tell which pages are newer.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ..channel import closing
from ..channel.offload import offload
from ..errors import ConfigError, StateError
from ..guest import PAGE_SIZE, PageBitmap, RamBlock
from ..guests import ParkedGuest

if TYPE_CHECKING:
    from ..guests.parked.guest import Holes

#: Seconds that writing a guest to a disk may take.
_KEEPING_SECONDS: Final = 600.0
#: Pages compared and copied at once, by a call in a thread.
_SLICE: Final = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The result of a merge."""

    machine: str
    #: Pages taken from the source's half, by the block's name.
    filled: Mapping[str, int]
    #: Pages that both halves have with different content; the destination's were taken.
    different: Mapping[str, int]


async def keep_partial(guest: ParkedGuest, missing: Holes, path: str | os.PathLike[str]) -> None:
    """Save a partial guest (:meth:`trimig.ParkedGuest.save_partial`), also under cancellation. It replaces *path*.

    **Cancellation:** held off until the file is written, for at most ten minutes, because there is no second chance.
    """
    saving = functools.partial(guest.save_partial, path, missing, replace=True)
    await closing.bounded(saving, _KEEPING_SECONDS, None)


async def merge(
    partial: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    raw: Mapping[str, str | os.PathLike[str]] | None = None,
    replace: bool = False,
    accept_differences: bool = False,
) -> Merged:
    """Complete the guest in *partial* and save it in *out*; any QEMU of its machine type can load that file.

    Args:
        partial: the file that :meth:`trimig.ParkedGuest.save_partial` wrote (``trimig receive`` calls it FILE.partial).
        source: the source's half as a stream, for example the file that was sent. It may lack other pages.
        raw: RAM blocks of the source's half, by name, each byte for byte in a file (a ``memory-backend-file``, or
            ``pmemsave`` of a paused QEMU); they take precedence over *source*.
        replace: *out* may exist.
        accept_differences: go on if a page in both halves has different content.

    Raises:
        ConfigError: the halves are not of the same machine, or a file has another length than its block.
        StateError: both halves lack the same pages; or a page differs between them, so they are not of the same moment.
        OSError: a file cannot be read.
        TrimigError: as :meth:`trimig.ParkedGuest.load` and :meth:`trimig.ParkedGuest.save`.

    **Cancellation:** there is no file *out*, or the whole of it.
    """
    with await ParkedGuest.load(partial, partial=True) as guest:
        half = _Half(guest)
        blocks = {block.name: block for block in guest.ram}
        for name, path in (raw or {}).items():
            if name not in blocks:
                raise ConfigError(
                    f"there is no RAM block {name!r} in {partial}; it has {', '.join(blocks)}", name="raw"
                )
            await half.take_file(name, Path(path))
        if source is not None:
            with await ParkedGuest.load(source, partial=True) as other:
                _check_same(guest, other)
                await half.take_blocks(other, [block for block in other.ram if block.name not in (raw or {})])
        half.judge(accept_differences=accept_differences)
        await guest.save(out, replace=replace)
        return Merged(machine=guest.name, filled=half.filled, different=half.different)


def _check_same(guest: ParkedGuest, other: ParkedGuest) -> None:
    if guest.name != other.name:
        raise ConfigError(f"the halves are of different machines: {guest.name!r} and {other.name!r}", name="source")
    ours, theirs = ({block.name: block.length for block in each.ram} for each in (guest, other))
    if ours != theirs:
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ConfigError(f"the halves have different RAM blocks: {', '.join(names)}", name="source")


def _bitmap(holes: Mapping[str, Sequence[tuple[int, int]]], name: str, pages: int) -> PageBitmap:
    bitmap = np.zeros(pages, np.bool_)
    for first, end in holes.get(name, ()):
        bitmap[first:end] = True
    return bitmap


class _Half:
    """The destination's half while it is completed."""

    def __init__(self, guest: ParkedGuest) -> None:
        self._blocks = {block.name: block for block in guest.ram}
        self._missing = {name: _bitmap(guest.holes, name, len(block.pages)) for name, block in self._blocks.items()}
        self.filled: dict[str, int] = {}
        self.different: dict[str, int] = {}

    async def take_blocks(self, other: ParkedGuest, blocks: Sequence[RamBlock]) -> None:
        """Take the pages that *other* has of its RAM blocks *blocks*."""
        for block in blocks:
            await self.take(block.name, block.pages, ~_bitmap(other.holes, block.name, len(block.pages)))

    async def take_file(self, name: str, path: Path) -> None:
        """Take a whole block from a file."""
        block = self._blocks[name]
        size = await offload(os.path.getsize, path)
        if size != block.length:
            raise ConfigError(f"{path} has {size} bytes, and RAM block {name!r} has {block.length}", name="raw")
        pages = np.memmap(path, np.uint8, "r").reshape(-1, PAGE_SIZE)
        await self.take(name, pages, np.ones(len(pages), np.bool_))

    async def take(self, name: str, pages: NDArray[np.uint8], have: PageBitmap) -> None:
        """Take *pages* of a block; only the pages in *have* count."""
        missing = self._missing[name]
        ours = self._blocks[name].pages
        for first in range(0, len(missing), _SLICE):
            part = slice(first, first + _SLICE)
            fill, both = missing[part] & have[part], ~missing[part] & have[part]
            different = await offload(_take_slice, ours[part], pages[part], fill, both)
            self.filled[name] = self.filled.get(name, 0) + int(np.count_nonzero(fill))
            self.different[name] = self.different.get(name, 0) + different
            missing[part] &= ~fill
            await trio.lowlevel.checkpoint()

    def judge(self, *, accept_differences: bool) -> None:
        """Raise StateError if the result would not be the complete guest."""
        left = {name: int(np.count_nonzero(bitmap)) for name, bitmap in self._missing.items() if bitmap.any()}
        if left:
            words = ", ".join(f"{count} pages of RAM block {name!r}" for name, count in left.items())
            raise StateError(f"neither half has {words}")
        differing = {name: count for name, count in self.different.items() if count}
        if differing and not accept_differences:
            words = ", ".join(f"{count} pages of RAM block {name!r}" for name, count in differing.items())
            raise StateError(
                f"{words} are in both halves with different content: they are not of the same guest, or the source has "
                "run since"
            )


def _take_slice(ours: NDArray[np.uint8], theirs: NDArray[np.uint8], fill: PageBitmap, both: PageBitmap) -> int:
    """Copy the pages *fill*; return the number of pages in *both* that differ."""
    ours[fill] = theirs[fill]
    return int(np.count_nonzero((ours != theirs).any(axis=1) & both)) if both.any() else 0
