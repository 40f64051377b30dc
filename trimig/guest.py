"""The interfaces a guest implements. No code.

A *guest* is RAM blocks, devices and a run state. The engine uses only these protocols. Ready-made guests are in
:mod:`trimig.guests`.
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

#: Bytes of a target page on the wire, on x86 and for every guest of :mod:`trimig.guests`.
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

        The engine takes the address of the array and lets the kernel read and write there, so the memory must stay
        mapped while a migration runs.
        """

    def absent(self) -> PageBitmap | None:
        """Pages that have no memory behind them yet, and so read as zero; None if finding them is not cheap."""


@runtime_checkable
class FileBackedBlock(RamBlock, Protocol):
    """A block whose memory is a file, shared between all processes that map it."""

    @property
    def fd(self) -> int:
        """The file; byte n of the file is byte n of the block. Writes to the file are seen in :attr:`pages` at once."""


@runtime_checkable
class DirtyTracker(Protocol):
    """Tells which pages the guest has written. One attempt of a migration uses one tracker."""

    @property
    def method(self) -> str:
        """The method of tracking: ``"userfaultfd-wp"``, ``"compare"``, ``"marks"`` or ``"none"`` (a guest that never
        runs).
        """

    async def start(self) -> None:
        """Start to notice every write, from the return of this call on. Raises GuestFailed; tracking is then off.

        **Cancellation:** tracking may be on; call :meth:`stop`.
        """

    async def sync(self) -> Mapping[str, PageBitmap]:
        """Get and clear the pages written since the last call (or the start), for each RAM block by name.

        The caller may keep the arrays. A page that is written during the call is in this result or in the next one.

        **Cancellation:** pages written since the last call may be lost; only :meth:`stop` is useful after it.
        """

    def stop(self) -> None:
        """Stop tracking and release all resources. Idempotent; never blocks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSection:
    """The state of one device as it stands in a FULL section."""

    #: Device id string, 1 to 255 bytes of UTF-8.
    idstr: str
    instance_id: int = 0
    version_id: int
    payload: bytes
    #: The section number on the wire that it was received from; None lets the sender choose.
    section_id: int | None = None
    #: The device's object in the JSON description (vmstate.md part 6); None if there was none.
    description: Mapping[str, Any] | None = None
    #: Where the section stands: before the RAM's ``list`` of blocks, or before its first ``pages``; None: after the
    #: RAM.
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
        """The number of bytes at the start of *data* that are one whole payload; None if more bytes are needed.

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
    """A guest: :func:`trimig.migrate` sends it and :func:`trimig.receive` fills it."""

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
        """Whether the guest may run here. :class:`trimig.owner.OwnerState` implements this, set_owner and settle."""

    def set_owner(self, owner: Owner, *, handed_over: bool = False, settle: Settle | None = None) -> None:
        """Set the owner; for the engine.

        Args:
            handed_over: with ELSEWHERE: True if the guest was handed over for certain, False if it has not arrived.
            settle: with UNKNOWN, the function that :meth:`settle` calls.

        Raises:
            GuestFailed: the owner is to become UNKNOWN, and the guest runs or is being started.
        """

    async def settle(self, owner: Owner) -> None:
        """State the owner of a guest whose owner is UNKNOWN. Raises the errors of
        :meth:`trimig.owner.OwnerState.settle`.

        **Cancellation:** cancelled before anything was done, or not at all.
        """

    def claim(self, purpose: str) -> None:
        """Reserve the guest for one migration; StateError (naming the present purpose) if the guest is reserved
        already.
        """

    def release(self) -> None:
        """End the reservation of :meth:`claim`."""

    async def pause(self) -> None:
        """Stop executing; after the return nothing writes guest memory. Raises GuestFailed; the guest then still runs.

        **Cancellation:** the guest may or may not be paused; the engine resumes it.
        """

    async def resume(self) -> None:
        """Execute again after :meth:`pause`. Raises GuestFailed; the guest then does not run, and may be resumed later.

        The call must be harmless on a guest that runs already. It must raise NotOwner unless :attr:`owner` is HERE,
        also if the owner changes during the call (:meth:`trimig.owner.OwnerState.starting`).

        **Cancellation:** as for an error; the engine calls it in a bounded shield only.
        """

    def dirty_tracker(self) -> DirtyTracker:
        """A new tracker over all of :attr:`ram`."""

    async def throttle(self, percent: int) -> None:
        """Take *percent* (0 to 99) of the guest's running time away; 0 ends the throttling.

        The engine ends the throttling also where the guest is paused, or has been handed over.

        **Cancellation:** the old or the new value is in force.
        """

    async def save_devices(self) -> Sequence[DeviceSection]:
        """The state of every device, in the order in which it must be loaded. The guest is paused.

        **Cancellation:** has no effect on the guest.
        """

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """Load device state on the destination; raises RemoteProtocolError or GuestFailed.

        **Cancellation:** devices are undefined until the next whole load; the guest must not be run.
        """

    async def activate(self, run_state: str) -> None:
        """Bring the guest, which is complete and owned by this side, into *run_state*; return when it is in that state.

        A guest with storage of its own must be stored before this call returns: the source then drops the guest. If
        this call raises, the guest is not running here.

        **Cancellation:** as for an error; the engine calls it in a bounded shield only.
        """


@runtime_checkable
class SheddingGuest(Guest, Protocol):
    """A guest that can shed load, so that it writes its memory less, in place of being slowed down."""

    async def on_throttle(self, share: float) -> bool:
        """The guest writes its memory faster than it can be sent (auto-converge): shed load, or leave it to *throttle*.

        The memory must not be written in this call while the guest is paused: at the end of the migration the call
        comes with 0 also where the guest is paused, or has been handed over.

        Args:
            share: the share of its load that the guest should shed, 0 to 0.99; 0 for none. A later call replaces it.

        Returns:
            True if the guest sheds load. False lets the engine call :meth:`Guest.throttle`, which slows the guest down.

        **Cancellation:** the old or the new value is in force.
        """


@runtime_checkable
class MortalGuest(Protocol):
    """A guest that may be lost while this process lives, because its code runs in another process."""

    @property
    def lost(self) -> str | None:
        """Why the guest is lost, in a sentence; None if it is not. Its run state is ``"internal-error"`` then."""

    async def wait_lost(self) -> None:
        """Return when the guest is lost, or when its process has ended in order.

        **Cancellation:** no effect.
        """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSubsection:
    """One optional part of a stream's configuration section, with its payload as bytes."""

    name: str
    version: int
    payload: bytes


@runtime_checkable
class OpaqueGuest(Guest, Protocol):
    """A guest of a machine type unknown to trimig. Everything beside its RAM is kept as bytes and sent again unchanged."""

    @property
    def subsections(self) -> Sequence[ConfigSubsection]:
        """The subsections of the configuration section."""

    @property
    def description(self) -> bytes | None:
        """The JSON text that follows the end of the stream; None if the stream had none."""

    def adopt(self, machine: str, subsections: Sequence[ConfigSubsection], blocks: Sequence[tuple[str, int]]) -> None:
        """Take the shape of the incoming guest: make the RAM blocks (name, bytes) that its source announces.

        Raises:
            GuestFailed: there is not enough memory.
        """

    async def ram_received(self) -> None:
        """Called when all RAM has been received; devices and the decision are still to come.

        A guest with storage on disk writes its RAM out here, while the source can still keep the guest: the proof of
        the prepare step is sent afterwards, and little is left for :meth:`activate`.

        Raises:
            GuestFailed: there is not enough room.

        **Cancellation:** once :meth:`release` has been called, nothing of the written data is left.
        """

    async def load_opaque(self, sections: Sequence[DeviceSection], description: bytes | None) -> None:
        """Keep the device sections, in order.

        **Cancellation:** as for :meth:`load_devices`.
        """


class ArrivingPages(Protocol):
    """The received pages of an incoming guest's RAM that were not taken from here since.

    A page that is received again is added again. The engine adds a page when its new content is in
    :attr:`RamBlock.pages`. So a caller that first takes a page and then reads it has the last content, or finds the
    page here once more.
    """

    def take(self, most: int) -> tuple[str, NDArray[np.int64]] | None:
        """Remove and return up to *most* pages (at least one) of one block.

        Returns:
            The block's name and the pages in ascending order, each once; None if there are no pages.
        """

    async def wait(self) -> None:
        """Wait until there is a page.

        **Cancellation:** no effect.
        """


@runtime_checkable
class StoringGuest(OpaqueGuest, Protocol):
    """A guest with storage of its own, which writes its RAM there while it is received."""

    def check_store(self) -> None:
        """Check the storage before anything is received.

        Raises:
            GuestFailed: the storage cannot be used.
        """

    async def store(self, pages: ArrivingPages) -> None:
        """Write RAM out while it is received. The engine calls this in a task of its own once the RAM blocks exist.

        The call writes until it is cancelled, or returns at once if there is nothing to do.
        :meth:`OpaqueGuest.ram_received` is called after it, also if it has failed, and finds the pages that were not
        taken in the same *pages*.

        Raises:
            GuestFailed: there is not enough room. While the source can still keep its guest, this ends the migration.

        **Cancellation:** written pages stay written, and :meth:`OpaqueGuest.ram_received` writes the rest.
        """

    async def reserve(self, pages: int) -> None:
        """Reserve room for *pages* more pages: the source is about to hand the guest over before they have been sent.

        It may be called while :meth:`store` runs.

        Raises:
            GuestFailed: there is not enough room. The source keeps its guest.

        **Cancellation:** no effect, or all of it.
        """


@runtime_checkable
class FramedGuest(OpaqueGuest, Protocol):
    """A guest that is sent with the framing of the received stream; old machine types leave out parts of it."""

    def framed(self, *, configuration: bool, footers: bool, early: Sequence[DeviceSection]) -> None:
        """Tell the guest the form of its stream, before :meth:`OpaqueGuest.adopt`.

        Args:
            configuration: the stream has a configuration section.
            footers: the sections have footers.
            early: device sections before the RAM.
        """


@runtime_checkable
class IdentifiableGuest(OpaqueGuest, Protocol):
    """A guest that can be told the UUID of its machine."""

    def identify(self, uuid: str) -> None:
        """Keep the UUID that the data channels of multifd have said, if the guest has none: whatever it is sent to compares it.

        Args:
            uuid: in its usual form.
        """


@runtime_checkable
class IdentifiedGuest(Guest, Protocol):
    """A guest whose machine has a UUID, or could have one."""

    @property
    def uuid(self) -> str | None:
        """The UUID in its usual form, 8-4-4-4-12 hexadecimal digits; None if the machine has none."""


@runtime_checkable
class CountingGuest(Guest, Protocol):
    """A guest that counts its starts, so that a start since the last check is seen even if the guest was stopped again."""

    @property
    def starts(self) -> int:
        """A counter that rises at the begin of each resume, and again at its end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A thread of the guest waits for a page: the block by its number in :attr:`Guest.ram`, the page in it, and the
    kernel's id of the thread."""

    block: int
    page: int
    thread: int


class MissingMemory(Protocol):
    """The RAM of a guest that runs here while parts of it are elsewhere (postcopy).

    A caller that placed a page must not place other content there: the guest may have written the page since.
    """

    def fileno(self) -> int:
        """A descriptor that is readable when a thread of the guest waits."""

    def waits(self) -> Sequence[Wait]:
        """The threads that began to wait since the last call. Never blocks. OSError."""

    def place(self, block: int, first: int, pages: Pages) -> int:
        """Put *pages* into *block* from page *first* on, where pages are absent, and wake the threads that wait for
        them.

        Returns:
            The number of pages placed.

        Raises:
            OSError: there is no memory, or the process of the guest has ended.
        """

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """As :meth:`place`, with *count* pages of zeros."""

    def close(self) -> None:
        """Make absent pages read as zero from now on, and wake all waiting threads. Idempotent."""


@runtime_checkable
class LazyGuest(Guest, Protocol):
    """A guest that can run before all of its memory is here."""

    async def missing_memory(self) -> MissingMemory:
        """Make the guest wait from now on when it touches a page without memory. The guest does not run now.

        Raises:
            GuestFailed: this is not possible here; the message names the setting to check.

        **Cancellation:** the guest is as it was, or slower.
        """

    async def memory_is_whole(self) -> Sequence[float]:
        """Tell the guest that no page is missing any more; the missing memory has been closed.

        Returns:
            Seconds that each processor of the guest has waited for pages, as far as the guest measured it.

        Raises:
            GuestFailed: the guest does not answer.

        **Cancellation:** the guest may have been told.
        """


@runtime_checkable
class DiscardableBlock(RamBlock, Protocol):
    """A RAM block whose pages can be made absent again."""

    def discard_slice(self, first_page: int, count: int) -> None:
        """Make those pages zero and absent."""
