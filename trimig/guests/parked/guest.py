"""A guest that is kept and never run here: received from a QEMU, to be sent to another one.

trimig does not interpret the machine. RAM is in memfd blocks. Device sections, the configuration and the description
are kept as bytes and sent again unchanged; the description gives the names of the sections.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias, final

import numpy as np
import trio

from ...config.peer import PeerProfile
from ...errors import GuestFailed, Owner, RemoteProtocolError, StateError
from ...expected import expect
from ...guest import (
    PAGE_SIZE,
    ArrivingPages,
    ConfigSubsection,
    DeviceProtocol,
    DeviceSection,
    DirtyTracker,
    PageBitmap,
    RamBlock,
)
from ...memory.block import MemfdBlock
from ...memory.tracking import NullTracker
from ...wire.devices import globalstate
from ...wire.postcopy import runs_of
from ..base import OwnedGuest
from . import reader, writer
from .newfile import check_target

_ORDINARY: Final = PeerProfile()

#: A section before the devices of a guest without all of its memory. No QEMU knows this device, so no QEMU starts the
#: guest. Its payload is the number of missing pages, be64.
PARTIAL_IDSTR: Final = "trimig/partial"

#: Runs of pages: the first page, and the page after the last.
Holes: TypeAlias = Mapping[str, Sequence[tuple[int, int]]]


@final
class ParkedGuest(OwnedGuest):
    """Implements :class:`trimig.guest.OpaqueGuest`. Use it as a context manager, or :meth:`close` it: it holds the RAM.

    Filled by :func:`trimig.receive` or :meth:`load`; after that it can be sent by :func:`trimig.migrate`, once. Sending
    does not change the file: a user who loads the file again and sends that guest, too, has two guests.

    Its ``name`` is that of the machine, for example ``pc-i440fx-7.2``; empty until it is known. Its ``run_state`` is
    ``inmigrate`` until the guest is filled, then ``paused``.

    Args:
        save_to: save the guest in this file too. A receiving side then owns the guest only when the file is on the
            disk; until then no file has this name. RAM is written out before the source is told that everything
            arrived. From the arrival until :meth:`close` the file is locked, so that ``trimig send`` refuses it.
        replace: *save_to* may replace an existing file.
        peer: the form of the saved file; the profile that the migration itself uses.
        max_ram: the most bytes of RAM that are accepted; None for as much as the host has.
    """

    def __init__(
        self,
        save_to: str | os.PathLike[str] | None = None,
        *,
        replace: bool = False,
        peer: PeerProfile = _ORDINARY,
        max_ram: int | None = None,
    ) -> None:
        expect("save_to", save_to, (str, os.PathLike, type(None)), "a path, or None")
        expect("peer", peer, PeerProfile, "a trimig.PeerProfile")
        expect("max_ram", max_ram, (int, type(None)), "an int, in bytes, or None")
        super().__init__("", run_state="inmigrate")
        self._save_to = None if save_to is None else Path(save_to)
        self._replace = replace
        self._peer = peer
        self._max_ram = max_ram
        self._ram: list[MemfdBlock] = []
        self._subsections: tuple[ConfigSubsection, ...] = ()
        self._sections: tuple[DeviceSection, ...] | None = None
        self._description: bytes | None = None
        self._file: writer.SaveFile | None = None
        self._lock = -1  # a descriptor that keeps the saved file locked
        self._arriving: ArrivingPages | None = None
        self._failure: OSError | None = None  # error of a write during the reception
        self._early: tuple[DeviceSection, ...] = ()
        self._warnings: tuple[str, ...] = ()
        self._holes: Holes = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the memory and the lock of the saved file, and remove an unfinished file. Idempotent."""
        self._discard_file()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        for block in self._ram:
            block.close()
        self._ram = []
        self._sections = None
        self._run_state = "inmigrate"

    # -- files -----------------------------------------------------------------------------------------------------

    @classmethod
    async def load(
        cls, path: str | os.PathLike[str], *, partial: bool = False, max_ram: int | None = None
    ) -> ParkedGuest:
        """Load the guest in a file: a saved guest, or any precopy stream (``migrate "exec:cat > FILE"`` of a QEMU).

        Args:
            partial: accept a stream that lacks some of the RAM; missing pages are zero, see :attr:`holes`.
            max_ram: the most bytes of RAM that are accepted.

        Raises:
            OSError: the file cannot be read.
            RemoteProtocolError: the stream is damaged, or of another form.
            TransportFailed: the stream ends too early.
            GuestFailed: there is not enough memory.

        **Cancellation:** nothing is left.
        """
        guest = cls(max_ram=max_ram)
        ok = False
        try:
            read = await reader.read_stream(Path(path), guest, partial=partial)
            guest._peer, guest._warnings = read.peer, tuple(read.problems)
            guest._holes = {
                name: [(first, end) for first, end in runs_of(~here).tolist()]
                for name, here in read.received.items()
                if not here.all()
            }
            guest._sections = tuple(s for s in guest.sections if s.idstr != PARTIAL_IDSTR)
            guest._run_state = "paused"
            guest.set_owner(Owner.HERE)
            ok = True
        finally:
            if not ok:
                guest.close()
        return guest

    async def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Write the guest to a file, which is on the disk when this returns.

        Raises:
            StateError: the guest is not filled yet.
            GuestFailed: the file cannot be written, or exists; no part of a new file is left.

        **Cancellation:** there is no file, or the whole of it.
        """
        await self._save(Path(path), await self.save_devices(), {}, replace=replace)

    async def save_partial(self, path: str | os.PathLike[str], missing: Holes, *, replace: bool = False) -> None:
        """Write the received part of a guest that will never be whole. No QEMU can load it, and :meth:`load` only with
        *partial*.

        Args:
            missing: :attr:`trimig.PostcopyLost.missing`.

        Raises:
            StateError: the devices have not come.
            ValueError: *missing* does not fit the guest's RAM.
            GuestFailed: as for :meth:`save`.

        **Cancellation:** there is no file, or the whole of it.
        """
        await trio.lowlevel.checkpoint()
        if self._sections is None:
            raise StateError("nothing is parked here: receive or load a guest first")
        lengths = {block.name: block.length // PAGE_SIZE for block in self._ram}
        absent = {name: np.zeros(length, np.bool_) for name, length in lengths.items()}
        for name, runs in missing.items():
            for first, end in runs:
                if not 0 <= first <= end <= lengths.get(name, -1):
                    raise ValueError(f"there are no pages {first} to {end} in a RAM block {name!r}")
                absent[name][first:end] = True
        count = sum(int(np.count_nonzero(bitmap)) for bitmap in absent.values())
        mark = DeviceSection(idstr=PARTIAL_IDSTR, instance_id=0, version_id=1, payload=count.to_bytes(8))
        await self._save(Path(path), (mark, *self._sections), absent, replace=replace)

    async def _save(
        self, target: Path, sections: Sequence[DeviceSection], absent: Mapping[str, PageBitmap], *, replace: bool
    ) -> None:
        file = None
        try:
            file = writer.SaveFile(target, self, self._ram, replace=replace, peer=self._peer, early=sections)
            await file.write_ram(absent=absent)
            await file.finish(sections)
        except OSError as error:
            raise writer.failed("the guest cannot be saved to", target, error) from error
        finally:
            if file is not None:
                file.discard()

    def check_store(self) -> None:
        """Check whether the file ``save_to`` could be made now: its directory and its name. No file is left.

        Raises:
            GuestFailed: the file could not be made; with the reason.
        """
        if self._save_to is not None:
            try:
                check_target(self._save_to, replace=self._replace)
            except OSError as error:
                raise writer.failed("the guest cannot be saved to", self._save_to, error) from error

    @property
    def saved_to(self) -> Path | None:
        """The file in which a receiving side saves the guest."""
        return self._save_to

    @property
    def peer(self) -> PeerProfile:
        """The form in which the guest's stream is written."""
        return self._peer

    @property
    def warnings(self) -> Sequence[str]:
        """Irregularities in the file that the guest was loaded from."""
        return self._warnings

    @property
    def holes(self) -> Holes:
        """Pages that were not in the file that the guest was loaded from, by the block's name; they are zero."""
        return self._holes

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def ram(self) -> Sequence[RamBlock]:
        """The RAM blocks, in the order in which they were announced."""
        return tuple(self._ram)

    @property
    def devices(self) -> Mapping[tuple[str, int], DeviceProtocol] | None:
        """None: sections are kept as bytes."""
        return None

    @property
    def sections(self) -> Sequence[DeviceSection]:
        """The device sections, with their objects of the description; empty until the guest is filled."""
        return self._sections or ()

    @property
    def subsections(self) -> Sequence[ConfigSubsection]:
        """The subsections of the configuration section."""
        return self._subsections

    @property
    def description(self) -> bytes | None:
        """The JSON text that followed the guest's stream."""
        return self._description

    @property
    def guest_run_state(self) -> str:
        """The run state that the guest will have at its destination, from its section ``globalstate``; ``running``
        without one.
        """
        for section in self.sections:
            if section.idstr == globalstate.IDSTR:
                return globalstate.decode(section.payload, section.version_id)
        return "running"

    # -- Guest -----------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """End the reservation of :meth:`claim`; an unfinished file is removed. Idempotent."""
        self._discard_file()
        super().release()

    @property
    def _title(self) -> str:
        return "the parked guest"

    async def pause(self) -> None:
        """No effect: the guest never runs here. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()

    async def resume(self) -> None:
        """No effect: the guest stays parked. NotOwner if this side does not own it. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()
        self._owner.check("be resumed")

    def dirty_tracker(self) -> DirtyTracker:
        """A tracker that never reports a dirty page."""
        return NullTracker(self._ram)

    async def throttle(self, percent: int) -> None:
        """No effect: the guest never runs here. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()

    async def save_devices(self) -> Sequence[DeviceSection]:
        """The device sections, unchanged.

        Raises:
            StateError: the guest is not filled yet.

        **Cancellation:** no effect.
        """
        await trio.lowlevel.checkpoint()
        if self._sections is None or self._run_state == "inmigrate":
            raise StateError("nothing is parked here: receive or load a guest first")
        return self._sections

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """Accept a stream that ends without any device section. **Cancellation:** nothing was taken."""
        await self.load_opaque(sections, None)

    async def activate(self, run_state: str) -> None:
        """Return when the guest is kept safely: in memory, or with ``save_to`` on the disk, under its name.

        Raises:
            GuestFailed: the file cannot be written. No file is left.

        **Cancellation:** as for an error, unless the file has its name already; then it returns.
        """
        if self._save_to is None:
            await trio.lowlevel.checkpoint()
        else:
            try:
                if self._file is None:
                    await self.ram_received()
                assert self._file is not None
                await self._finish(self._file)
            except OSError as error:
                raise writer.failed("the guest cannot be saved to", self._save_to, error) from error
            finally:
                self._discard_file()
        self._run_state = "paused"

    # -- OpaqueGuest -----------------------------------------------------------------------------------------------

    def adopt(self, machine: str, subsections: Sequence[ConfigSubsection], blocks: Sequence[tuple[str, int]]) -> None:
        """Take the shape of the incoming guest, and drop the previous one.

        Raises:
            RemoteProtocolError: a name is not text.
            GuestFailed: there is not enough memory, or the file cannot be made.
        """
        self.close()
        self._description = None
        self._failure = None
        self._warnings = ()
        self._holes = {}
        for what, name in (("the machine", machine), *(("a RAM block", name) for name, _ in blocks)):
            try:
                name.encode()
            except UnicodeEncodeError:
                raise RemoteProtocolError(
                    f"the name {name!r} of {what} is not UTF-8, so its guest cannot be kept"
                ) from None
        total = sum(length for _, length in blocks)
        limit = self._max_ram if self._max_ram is not None else _physical_memory()
        if total > limit:
            raise GuestFailed(f"the guest has {total} bytes of RAM, and there is room for {limit} here")
        try:
            for name, length in blocks:
                self._ram.append(MemfdBlock(name, length))
        except OSError as error:
            raise writer.failed("there is no memory for the guest", None, error) from error
        self._name = machine
        self._subsections = tuple(subsections)
        if self._save_to is not None:
            try:
                self._file = self._new_file(self._save_to)
            except OSError as error:
                raise writer.failed("the guest cannot be saved to", self._save_to, error) from error

    def framed(self, *, configuration: bool, footers: bool, early: Sequence[DeviceSection]) -> None:
        """Keep the form of the stream of an old machine type, and send the guest in the same form; see
        :class:`FramedGuest`.
        """
        self._early = tuple(early)
        if (configuration, footers) != (self._peer.send_configuration, self._peer.send_section_footer):
            self._peer = dataclasses.replace(
                self._peer, name="as it came", send_configuration=configuration, send_section_footer=footers
            )

    def identify(self, uuid: str) -> None:
        """Keep the UUID of the machine, unless there is one; see :class:`IdentifiableGuest`."""
        if self.uuid is None:
            self.uuid = uuid

    def _new_file(self, path: Path) -> writer.SaveFile:
        return writer.SaveFile(path, self, self._ram, replace=self._replace, peer=self._peer, early=self._early)

    async def store(self, pages: ArrivingPages) -> None:
        """Write RAM to ``save_to`` while it is received, if a file is set.

        Raises:
            GuestFailed: the file cannot be written. No file is left.

        **Cancellation:** written pages stay written; :meth:`ram_received` writes the rest.
        """
        await trio.lowlevel.checkpoint()
        self._arriving = pages
        if self._file is None:
            return
        try:
            await self._file.write_arriving(pages)
        except OSError as error:
            self._discard_file()
            self._failure = error
            raise writer.failed("the guest cannot be saved to", self._save_to, error) from error

    async def ram_received(self) -> None:
        """Write the rest of RAM to ``save_to``, if a file is set.

        Raises:
            GuestFailed: the file cannot be written, or :meth:`store` has failed.

        **Cancellation:** :meth:`release` removes the file.
        """
        await trio.lowlevel.checkpoint()
        if self._save_to is None:
            return
        if self._failure is not None:
            raise writer.failed("the guest cannot be saved to", self._save_to, self._failure) from self._failure
        try:
            if self._file is None:
                self._file = self._new_file(self._save_to)
            await self._file.write_ram(self._arriving)
        except OSError as error:
            self._discard_file()
            raise writer.failed("the guest cannot be saved to", self._save_to, error) from error

    async def reserve(self, pages: int) -> None:
        """Reserve room for *pages* more pages in the file ``save_to``, if a file is set.

        Raises:
            GuestFailed: the disk has no room for them, or :meth:`store` has failed.

        **Cancellation:** no effect, or all of it.
        """
        await trio.lowlevel.checkpoint()
        try:
            if self._failure is not None:
                raise self._failure
            if self._file is not None:
                await self._file.reserve(pages)
        except OSError as error:
            raise writer.failed("there is no room for the guest in", self._save_to, error) from error

    async def load_opaque(self, sections: Sequence[DeviceSection], description: bytes | None) -> None:
        """Keep the sections and the description. **Cancellation:** nothing was taken."""
        await trio.lowlevel.checkpoint()
        self._sections = tuple(sections)
        self._description = description

    async def _finish(self, file: writer.SaveFile) -> None:
        lock = file.hold()
        try:
            await file.finish(self.sections)
            self._lock, lock = lock, -1
        finally:
            if lock >= 0:
                os.close(lock)

    def _discard_file(self) -> None:
        file, self._file = self._file, None
        self._arriving = None
        if file is not None:
            file.discard()


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
