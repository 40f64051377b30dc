"""The interfaces a guest implements. No code.

A *guest* is RAM blocks, devices and a run state. The engine never looks behind these protocols; what comes out of
the box is in :mod:`trimig.guests`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .errors import Owner
    from .owner import Settle

#: Bytes of a target page on the wire, on x86 and on every guest trimig brings itself.
PAGE_SIZE = 4096

PageBitmap = NDArray[np.bool_]
Pages = NDArray[np.uint8]


@runtime_checkable
class RamBlock(Protocol):
    """One contiguous piece of guest memory, mapped into this process."""

    @property
    def name(self) -> str:
        """The id on the wire, 1 to 255 bytes of UTF-8."""

    @property
    def length(self) -> int:
        """Used length in bytes, a multiple of PAGE_SIZE."""

    @property
    def pages(self) -> Pages:
        """The memory itself, shape ``(length // PAGE_SIZE, PAGE_SIZE)``, writable and C-contiguous.

        The engine takes the address of it and lets the kernel read and write there, so it must stay mapped for as
        long as a migration runs.
        """

    def absent(self) -> PageBitmap | None:
        """Pages that have no memory behind them yet, and so read as zero; None if that cannot be told cheaply."""


@runtime_checkable
class FileBackedBlock(RamBlock, Protocol):
    """A block whose memory is a file, shared between everybody who maps it."""

    @property
    def fd(self) -> int:
        """The file; byte n of it is byte n of the block. Writing to it is seen in :attr:`pages` at once."""


class DirtyTracker(Protocol):
    """Tells which pages the guest has written. One attempt of a migration uses one tracker."""

    @property
    def method(self) -> str:
        """How it knows: ``"userfaultfd-wp"``, ``"compare"``, ``"marks"`` or ``"none"`` (a guest that never runs)."""

    async def start(self) -> None:
        """From the return on, every write is noticed. Raises GuestFailed; tracking is then off.

        **Cancellation:** tracking may be on; call :meth:`stop`.
        """

    async def sync(self) -> Mapping[str, PageBitmap]:
        """Get and clear: for each RAM block by name, the pages written since the last call (or the start).

        The arrays are the caller's to keep. A page that is written while the call runs is in this result or in the
        next one.

        **Cancellation:** pages written since the last call may be lost; only :meth:`stop` is useful after it.
        """

    def stop(self) -> None:
        """Tracking off, everything given back. Idempotent; never blocks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSection:
    """The state of one device as it stands in a FULL section."""

    #: Device id string, 1 to 255 bytes of UTF-8.
    idstr: str
    instance_id: int = 0
    version_id: int
    payload: bytes
    #: The number it had on the wire it came from; None lets the sender choose.
    section_id: int | None = None
    #: Its object in the JSON description (vmstate.md part 6); None if there was none.
    description: Mapping[str, Any] | None = None
    #: It stands in front of RAM's ``list`` of blocks, or of its first ``pages``; None: behind the RAM.
    before: Literal["list", "pages"] | None = None


@runtime_checkable
class DeviceProtocol(Protocol):
    """A small piece of state beside the RAM. :class:`trimig.guests.Device` implements it from a declaration."""

    @property
    def idstr(self) -> str:
        """Device id string, 1 to 255 bytes of UTF-8."""

    @property
    def instance_id(self) -> int:
        """Tells devices of the same idstr apart."""

    @property
    def version_id(self) -> int:
        """The version that :meth:`save` writes; :meth:`load` refuses newer ones."""

    def save(self) -> bytes:
        """The payload. The guest is paused."""

    def measure(self, data: memoryview, version_id: int) -> int | None:
        """How many bytes of *data* are one whole payload; None if it goes on behind them.

        Raises:
            RemoteProtocolError: *data* cannot be the start of a payload of this version.
        """

    def load(self, payload: bytes, version_id: int) -> None:
        """Take over the state.

        Raises:
            RemoteProtocolError: a value is out of its range; the device is unchanged.
        """

    def describe(self) -> Mapping[str, Any]:
        """The device's object for the JSON description, for a payload saved now."""


@runtime_checkable
class Guest(Protocol):
    """What :func:`trimig.migrate` moves away and :func:`trimig.receive` fills."""

    @property
    def name(self) -> str:
        """The machine name in the configuration section; both ends must agree on it."""

    @property
    def ram(self) -> Sequence[RamBlock]:
        """The RAM blocks, constant while a migration runs."""

    @property
    def devices(self) -> Mapping[tuple[str, int], DeviceProtocol] | None:
        """Devices by (idstr, instance id); None for a guest that takes every section as bytes (a parked one)."""

    @property
    def run_state(self) -> str:
        """QEMU's run state name: ``"running"``, ``"paused"``, ``"prelaunch"``, …"""

    @property
    def owner(self) -> Owner:
        """Whether it may run here. :class:`trimig.owner.OwnerState` implements this and the next two."""

    def set_owner(self, owner: Owner, *, gone: bool = False, settle: Settle | None = None) -> None:
        """For the engine: the owner from now on.

        Args:
            gone: with ELSEWHERE, it was handed over for certain; else it has not arrived.
            settle: with UNKNOWN, what :meth:`settle` calls.

        Raises:
            GuestFailed: it is to be UNKNOWN, and runs or is being started.
        """

    async def settle(self, owner: Owner) -> None:
        """State who owns it where that is UNKNOWN. Raises as :meth:`trimig.owner.OwnerState.settle`.

        **Cancellation:** cancelled before anything was done, or not at all.
        """

    def claim(self, purpose: str) -> None:
        """Reserve the guest for one migration; StateError (naming the present purpose) if it has one."""

    def release(self) -> None:
        """The end of what :meth:`claim` began."""

    async def pause(self) -> None:
        """Stop executing; when it returns nothing writes guest memory. Raises GuestFailed; it then still runs.

        **Cancellation:** the guest may or may not be paused; the engine resumes it.
        """

    async def resume(self) -> None:
        """Execute again after :meth:`pause`. Raises GuestFailed; it then does not run, and may be resumed later.

        Must be harmless on a guest that runs already, and raise NotOwner unless :attr:`owner` is HERE, also where that
        changes while it is being resumed (:meth:`trimig.owner.OwnerState.starting`).

        **Cancellation:** as for an error; the engine calls it in a bounded shield only.
        """

    def dirty_tracker(self) -> DirtyTracker:
        """A new tracker over all of :attr:`ram`."""

    async def throttle(self, percent: int) -> None:
        """Take *percent* (0 to 99) of its running time from the guest; 0 ends it.

        **Cancellation:** the old or the new value is in force.
        """

    async def save_devices(self) -> Sequence[DeviceSection]:
        """The state of every device, in the order in which it must be loaded. The guest is paused.

        **Cancellation:** has no effect on the guest.
        """

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """Take over device state on the destination; raises RemoteProtocolError or GuestFailed.

        **Cancellation:** devices are undefined until the next whole load; the guest must not be run.
        """

    async def activate(self, run_state: str) -> None:
        """The guest is complete and this side's: bring it into *run_state*, and return when it really is there.

        A guest with a place to keep itself does so before it returns: the source forgets the guest on the strength
        of this call. If it raises, the guest is not running here.

        **Cancellation:** as for an error; the engine calls it in a bounded shield only.
        """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSubsection:
    """One optional part of a stream's configuration section, its payload uninterpreted."""

    name: str
    version: int
    payload: bytes


@runtime_checkable
class OpaqueGuest(Guest, Protocol):
    """A guest whose machine trimig knows nothing of: everything but its RAM is kept, and sent again, as it came."""

    @property
    def subsections(self) -> Sequence[ConfigSubsection]:
        """Of the configuration section."""

    @property
    def description(self) -> bytes | None:
        """The JSON text that follows the end of the stream; None if it had none."""

    def adopt(self, machine: str, subsections: Sequence[ConfigSubsection], blocks: Sequence[tuple[str, int]]) -> None:
        """Become the guest that is coming: make the RAM blocks (name, bytes) that its source announces.

        Raises:
            GuestFailed: there is no memory for it.
        """

    async def ram_received(self) -> None:
        """All RAM is there; devices and the decision are still to come.

        A guest that keeps itself on disk writes its RAM out here, where the source may still take everything back:
        the proof of the prepare step is sent afterwards, and what is left for :meth:`activate` is small.

        Raises:
            GuestFailed: there is no room for it.

        **Cancellation:** nothing is left of what was written once :meth:`release` has been called.
        """

    async def load_opaque(self, sections: Sequence[DeviceSection], description: bytes | None) -> None:
        """Keep the device sections, in order.

        **Cancellation:** as for :meth:`load_devices`.
        """


class ArrivingPages(Protocol):
    """Which pages of an arriving guest's RAM have come, and were not taken from here since.

    A page that comes again is here again. The engine adds a page when its new content is in :attr:`RamBlock.pages`. So whoever
    takes a page first and reads it then has the last content, or finds the page here once more.
    """

    def take(self, most: int) -> tuple[str, NDArray[np.int64]] | None:
        """Take up to *most* pages (at least one) of one block out of here.

        Returns:
            The block's name and the pages, rising, each once; None if there are none.
        """

    async def wait(self) -> None:
        """Wait until there is a page.

        **Cancellation:** no effect.
        """


@runtime_checkable
class StoringGuest(OpaqueGuest, Protocol):
    """A guest that keeps itself in a place of its own, and writes its RAM there while it arrives."""

    def check_store(self) -> None:
        """Find out whether there is such a place, before anything comes.

        Raises:
            GuestFailed: it can be told now that there is none.
        """

    async def store(self, pages: ArrivingPages) -> None:
        """Write RAM out while it arrives. The engine calls it in a task of its own once the RAM blocks are there.

        It writes until it is cancelled, or returns at once if there is nothing to do. :meth:`OpaqueGuest.ram_received`
        is called behind it, also if it has failed, and finds the pages that were not taken in the same *pages*.

        Raises:
            GuestFailed: there is no room for it. While the source can still keep its guest, this ends the migration.

        **Cancellation:** what is written counts, and :meth:`OpaqueGuest.ram_received` writes the rest.
        """

    async def reserve(self, pages: int) -> None:
        """Set aside the room for *pages* more pages: the source is about to give its guest away before they have come.

        It may be called while :meth:`store` runs.

        Raises:
            GuestFailed: there is no such room. The source keeps its guest.

        **Cancellation:** no effect, or all of it.
        """


@runtime_checkable
class FramedGuest(OpaqueGuest, Protocol):
    """A guest that is written again as it came, also where old machine types leave parts of a stream out."""

    def framed(self, *, configuration: bool, footers: bool, early: Sequence[DeviceSection]) -> None:
        """Say how its stream is written, before :meth:`OpaqueGuest.adopt`.

        Args:
            configuration: it has a configuration section.
            footers: its sections have footers.
            early: device sections in front of its memory.
        """


@runtime_checkable
class IdentifiedGuest(Guest, Protocol):
    """A guest whose machine has a UUID, or could have one."""

    @property
    def uuid(self) -> str | None:
        """In its usual form, 8-4-4-4-12 hexadecimal digits; None if it has none."""


@runtime_checkable
class CountingGuest(Guest, Protocol):
    """A guest that tells whether it has run since it was last looked at, also if it stands still again."""

    @property
    def starts(self) -> int:
        """Rises when it begins to be resumed, and again when that has come to its end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A thread of the guest waits for a page: the block by its number in :attr:`Guest.ram`, the page in it, and the
    kernel's id of the thread."""

    block: int
    page: int
    thread: int


class MissingMemory(Protocol):
    """The RAM of a guest that runs here while parts of it are elsewhere (postcopy).

    Whoever placed a page here once must not place another content there: the guest may have written it since.
    """

    def fileno(self) -> int:
        """A descriptor that is readable when somebody waits."""

    def waits(self) -> Sequence[Wait]:
        """Who has begun to wait since the last call. Never blocks. OSError."""

    def place(self, block: int, first: int, pages: Pages) -> int:
        """Put *pages* into *block* from page *first* on, those that are absent there, and wake who waits for them.

        Returns:
            How many were placed.

        Raises:
            OSError: there is no memory, or nobody lives there any more.
        """

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """As :meth:`place`, with *count* pages of zeros."""

    def close(self) -> None:
        """What is absent reads as zero from here on, and whoever waits is woken. Idempotent."""


@runtime_checkable
class LazyGuest(Guest, Protocol):
    """A guest that can run before all of its memory is here."""

    async def missing_memory(self) -> MissingMemory:
        """From here on the guest waits where it touches a page that has no memory yet. It does not run.

        Raises:
            GuestFailed: that is not to be had here; the message names what to look at.

        **Cancellation:** the guest is as it was, or slower.
        """

    async def memory_is_whole(self) -> Sequence[float]:
        """No page is missing any more; the memory has been closed.

        Returns:
            Seconds that each of its processors has waited for pages, as far as it has measured that.

        Raises:
            GuestFailed: it does not answer.

        **Cancellation:** it may have been told.
        """


@runtime_checkable
class DiscardableBlock(RamBlock, Protocol):
    """A RAM block whose pages can be made absent again."""

    def discard_slice(self, first_page: int, count: int) -> None:
        """Make those pages zero and absent."""
