"""Writes a guest to a file: a plain stream with each page once, which a stock QEMU loads through ``exec:cat FILE``.

An incoming guest is written while it still runs at its source, and the kernel begins at once to bring the pages to the
disk. After the source has stopped the guest, only the last pages and the devices remain to be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from ...channel.offload import offload
from ...engine.device_writer import DeviceSender, early_sections, opening
from ...engine.ram.sender import RAM_SECTION
from ...errors import GuestFailed
from ...guest import PAGE_SIZE, ArrivingPages, DeviceSection, OpaqueGuest, PageBitmap
from ...wire import encoder as wire
from ...wire.constants import Section
from .newfile import NewFile
from .ramfile import SLOT, Indices, RamWriter

if TYPE_CHECKING:
    from ...config.peer import PeerProfile
    from ...memory.block import MemfdBlock

#: Pages checked and written by one call in a thread; a cancellation may have to wait for one such call.
_SLICE: Final = 2048
#: Pages searched in one step for pages that were never written: a millisecond.
_LOOK: Final = 1 << 20
#: The kernel is asked to begin writing back after this many new bytes.
_WRITE_BACK: Final = 8 << 20
#: The most bytes that may not be on the disk yet; with more the writer waits for the disk. It bounds the last sync.
_UNSYNCED: Final = 64 << 20
#: Bytes that are reserved in addition to the pages: for devices, and for data that is written meanwhile.
_MARGIN: Final = 32 << 20
#: Seconds without a new page after which the written data is synced to the disk.
_QUIET: Final = 0.03
#: The least seconds between two syncs; otherwise a trickle of pages would keep the disk busy.
_SYNC_AT_MOST: Final = 0.25
#: Seconds between two syncs while pages keep coming.
_SYNC_EVERY: Final = 1.0
#: Seconds in which pages are collected, so that not every page needs a call in a thread.
_GATHER: Final = 0.01


class SaveFile:
    """A saved guest while it is written.

    Args:
        path: its final name.
        replace: a file of that name may be replaced; if False, such a file is an error, also if it appears meanwhile.
        guest: the guest; its RAM blocks exist.
        peer: the form of the stream.
        early: the device sections before the RAM; other sections among them are left out.

    Raises:
        OSError: the name is taken, or the directory cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        guest: OpaqueGuest,
        blocks: Sequence[MemfdBlock],
        *,
        replace: bool,
        peer: PeerProfile,
        early: Sequence[DeviceSection] = (),
    ) -> None:
        self._guest = guest
        self._peer = peer
        self._footer = wire.section_footer(RAM_SECTION) if peer.send_section_footer else b""
        start = wire.section_start(Section.START, RAM_SECTION, "ram", 0, wire.RAM_VERSION)
        sizes = wire.ram_list((block.name, block.length) for block in blocks)
        ahead, behind = (early_sections(early, before, peer) for before in ("list", "pages"))
        self._head = opening(guest, peer) + ahead + start + sizes + wire.END_WORD + self._footer + behind
        self._numbers = {block.name: number for number, block in enumerate(blocks)}
        self._file = NewFile(path, replace=replace)
        self._ram = RamWriter(self._file.fd, len(self._head), blocks, self._footer)
        self._taken: list[tuple[int, Indices]] = []
        self._begun = False
        self._written_back = 0  # position up to which the kernel has been asked to write back
        self._unsynced = 0
        self._synced_at = 0.0

    def discard(self) -> None:
        """Remove the file, unless it has its final name. Idempotent."""
        self._file.discard()

    async def write_arriving(self, pages: ArrivingPages) -> None:
        """Write pages while they are received, until cancelled.

        Raises:
            OSError: no room, or the disk failed.

        **Cancellation:** pages that were taken have been written, and :meth:`write_ram` writes the others.
        """
        self._synced_at = trio.current_time()
        while True:
            if await self._write_taken(pages):
                if self._unsynced > _UNSYNCED or trio.current_time() > self._synced_at + _SYNC_EVERY:
                    await self._sync()
                continue
            if self._unsynced:
                since = trio.current_time() - self._synced_at
                with trio.move_on_after(max(_QUIET, _SYNC_AT_MOST - since)) as quiet:
                    await pages.wait()
                if quiet.cancelled_caught:
                    await self._sync()
            await pages.wait()
            await trio.sleep(_GATHER)

    async def reserve(self, pages: int) -> None:
        """Reserve room on the disk for *pages* more pages of data, and for the devices.

        Raises:
            OSError: there is not enough room.

        **Cancellation:** no effect, or all of it.
        """
        await offload(self._file.reserve, self._ram.end, pages * SLOT + _MARGIN)

    async def write_ram(
        self, pages: ArrivingPages | None = None, absent: Mapping[str, PageBitmap] | None = None
    ) -> None:
        """Write the rest, up to the end of RAM: the last received pages, and those that were never written. All is on
        the disk at the return.

        Args:
            absent: pages that are left out, by the block's name.

        Raises:
            OSError: no room, or the disk failed.

        **Cancellation:** a part has been written; call :meth:`discard`.
        """
        await offload(self._begin)
        while pages is not None and await self._write_taken(pages):
            pass
        for number, block in enumerate(self._ram.blocks):
            for start in range(0, block.length // PAGE_SIZE, _LOOK):
                missing = await offload(self._ram.unwritten, number, start, _LOOK)
                if absent is not None and block.name in absent:
                    missing = missing[~absent[block.name][missing]]
                for first in range(0, len(missing), _SLICE):
                    self._unsynced += await offload(self._write_batch, [(number, missing[first : first + _SLICE])])
                    if self._unsynced > _UNSYNCED:
                        await self._sync()
        await offload(self._ram.finish)
        await self._sync()

    async def finish(self, sections: Sequence[DeviceSection]) -> None:
        """Write the devices and the end, and then set the final name. When this returns, the file survives a loss of
        power.

        Raises:
            OSError: no room, the disk failed, or there is a file of that name. The new file does not have the name
                then.

        **Cancellation:** cancelled with nothing done, or not at all.
        """
        sender = DeviceSender(self._guest, self._peer)
        await offload(self._finish, sender.sections(sections, self._guest.run_state) + sender.ending())

    def hold(self) -> int:
        """A descriptor that keeps the file locked beyond :meth:`finish`. The caller closes it."""
        return self._file.hold()

    async def _sync(self) -> None:
        await offload(self._file.sync)
        self._unsynced = 0
        self._synced_at = trio.current_time()

    async def _write_taken(self, pages: ArrivingPages) -> bool:
        """Write some of the received pages; False if there are none."""
        # Pages that were taken and not written, because of a cancellation, are written by the next call.
        count = sum(len(indices) for _, indices in self._taken)
        while count < _SLICE and (some := pages.take(_SLICE - count)) is not None:
            name, indices = some
            self._taken.append((self._numbers[name], indices))
            count += len(indices)
        if not self._taken:
            return False
        self._unsynced += await offload(self._write_batch, self._taken)
        self._taken = []
        return True

    # The following functions run in a thread.

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._file.write_at(0, self._head)

    def _write_batch(self, batch: Sequence[tuple[int, Indices]]) -> int:
        self._begin()
        before = self._ram.end
        written = sum(self._ram.write(number, indices) for number, indices in batch)
        if self._ram.end - self._written_back > _WRITE_BACK:
            self._file.start_writing_back(self._written_back, self._ram.end - self._written_back)
            self._written_back = self._ram.end
        return max(written, self._ram.end - before)

    def _finish(self, rest: bytes) -> None:
        self._file.write_at(self._ram.end, rest)
        self._file.finish()


def failed(what: str, path: Path | None, error: OSError) -> GuestFailed:
    """The domain error for a file that could not be written."""
    failure = GuestFailed(f"{what}{f' {path}' if path is not None else ''}: {error.strerror or error}")
    failure.__cause__ = error
    return failure
