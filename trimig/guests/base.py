"""The base of all guests that come with trimig: the claim, the run state, the register of devices."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import trio

from ..errors import ConfigError, GuestFailed, Owner, RemoteProtocolError, StateError
from ..expected import expect
from ..guest import DeviceProtocol, DeviceSection, DirtyTracker, RamBlock
from ..monitor.blockers import Blockers, why_unmigratable
from ..owner import OwnerState, Settle
from .device import device_section

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class OwnedGuest:
    """The identity of a guest, its owner and its claim; :class:`trimig.guest.Guest` defines the contract of each method.

    A subclass keeps ``_run_state``.

    Args:
        name: the machine name in the stream; empty while it is not known.
        run_state: ``"running"``, or ``"inmigrate"`` for a guest that waits to be filled and is not owned by this side.
    """

    def __init__(self, name: str, *, run_state: str) -> None:
        self._name = name
        self._run_state = run_state
        self._purpose: str | None = None
        self._uuid: str | None = None
        first = Owner.ELSEWHERE if run_state == "inmigrate" else Owner.HERE
        self._owner = OwnerState(first, runs=self._runs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name!r} {self._run_state}>"

    @property
    def name(self) -> str:
        """The machine name in the configuration section."""
        return self._name

    @property
    def uuid(self) -> str | None:
        """The machine's UUID in its usual form, or None; the destination compares it with ``validate-uuid`` and ``multifd``.

        That of a parked guest's stream has precedence.

        Raises:
            ConfigError: set to something else.
        """
        return self._uuid

    @uuid.setter
    def uuid(self, value: str | None) -> None:
        if value is not None and not _UUID.fullmatch(value):
            raise ConfigError(f"{value!r} is not a UUID: 00112233-4455-6677-8899-aabbccddeeff is the form", name="uuid")
        self._uuid = None if value is None else value.lower()

    @property
    def run_state(self) -> str:
        """QEMU's name of the run state."""
        return self._run_state

    @property
    def owner(self) -> Owner:
        """HERE: the guest may run in this process. ELSEWHERE: it was handed over, or has not arrived. UNKNOWN: see
        :meth:`settle`.
        """
        return self._owner.owner

    def set_owner(self, owner: Owner, *, handed_over: bool = False, settle: Settle | None = None) -> None:
        """For the engine: see :class:`trimig.guest.Guest`."""
        self._owner.set(owner, handed_over=handed_over, settle=settle)

    async def settle(self, owner: Owner) -> None:
        """State the owner of the guest after :class:`trimig.HandoverUncertain`: HERE resumes it, ELSEWHERE gives it up.

        Raises:
            TypeError: *owner* is no :class:`trimig.Owner`.
            ValueError: *owner* is UNKNOWN.
            StateError: the owner is known, or the answer may still come.
            GuestNotResumed: the guest is here and could not be resumed; :meth:`resume` may be tried again.

        **Cancellation:** cancelled before anything was done, or not at all.
        """
        await self._owner.settle(owner)

    def claim(self, purpose: str) -> None:
        """Reserve the guest for one migration. StateError if it is reserved."""
        if self._purpose is not None:
            raise StateError(f"{self._title} is busy: {self._purpose}")
        self._purpose = purpose

    def release(self) -> None:
        """End the reservation of :meth:`claim`. Idempotent."""
        self._purpose = None

    def _runs(self) -> bool:
        """Whether the guest may execute now."""
        return self._run_state == "running"

    @property
    def _title(self) -> str:
        """The guest in a sentence."""
        return f"guest {self._name!r}"


class GuestBase(OwnedGuest, abc.ABC):
    """A guest with declared devices; :class:`trimig.guest.Guest` defines the contract of each method.

    A subclass appends its blocks to ``_ram``, keeps ``_run_state``, and implements :meth:`pause`, :meth:`resume` and
    :meth:`dirty_tracker`.

    Args:
        name: the machine name in the stream; both ends must agree on it.
        run_state: ``"running"``, or ``"inmigrate"`` for a guest that waits to be filled and is not owned by this side.

    Raises:
        ConfigError: the name is empty or longer than 255 bytes.
    """

    def __init__(self, name: str, *, run_state: str) -> None:
        expect("name", name, str, "a str")
        if not 1 <= len(name.encode()) <= 255:
            raise ConfigError(f"a guest's name has 1 to 255 bytes, {name!r} has {len(name.encode())}")
        super().__init__(name, run_state=run_state)
        self._ram: list[RamBlock] = []
        self._devices: dict[tuple[str, int], DeviceProtocol] = {}
        self._throttle = 0
        #: The reasons why the guest cannot be migrated now.
        self.blockers = Blockers(busy=lambda: self._purpose)

    @property
    def ram(self) -> Sequence[RamBlock]:
        """The RAM blocks."""
        return tuple(self._ram)

    @property
    def devices(self) -> Mapping[tuple[str, int], DeviceProtocol] | None:
        """Devices by (idstr, instance id)."""
        return MappingProxyType(self._devices)

    @property
    def throttle_percent(self) -> int:
        """The last value given to :meth:`throttle`, in percent."""
        return self._throttle

    @property
    def starts(self) -> int:
        """The number of starts, as :class:`trimig.guest.CountingGuest` counts them."""
        return self._owner.starts

    def add_device(self, device: DeviceProtocol) -> None:
        """Register *device*; its state moves with the guest, in the order in which devices were added.

        Raises:
            ConfigError: its (idstr, instance id) is taken, the idstr does not fit the wire, or the device cannot be
                migrated although :attr:`blockers` demand that.
            StateError: a migration is under way.
        """
        expect("device", device, DeviceProtocol, "a trimig.Device")
        self._check_unclaimed("a device cannot be added")
        if not 1 <= len(device.idstr.encode()) <= 255:
            raise ConfigError(f"a device id has 1 to 255 bytes, {device.idstr!r} has {len(device.idstr.encode())}")
        key = (device.idstr, device.instance_id)
        if key in self._devices:
            raise ConfigError(f"guest {self._name!r} has a device {device.idstr!r} {device.instance_id} already")
        reason = why_unmigratable(device)
        if reason and self.blockers.only_migratable:
            raise ConfigError(
                f"device {device.idstr!r} cannot be migrated ({reason}), and only-migratable is on",
                name="only-migratable",
            )
        self._devices[key] = device

    async def save_devices(self) -> Sequence[DeviceSection]:
        """The state of every device, in the order of registration.

        Raises:
            LocalProtocolError: a device holds a value that its declaration cannot express.

        **Cancellation:** has no effect on the guest.
        """
        await trio.lowlevel.checkpoint()
        return [device_section(device) for device in self._devices.values()]

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """Load device state. Every device must be given, once; this is checked before the first is loaded.

        Raises:
            RemoteProtocolError: a device is unknown, missing, given twice, or refuses its payload. A device that
                refuses is unchanged; the devices before it are loaded.

        **Cancellation:** cancelled before the first device is loaded, or not at all.
        """
        await trio.lowlevel.checkpoint()
        given: set[tuple[str, int]] = set()
        for section in sections:
            key = (section.idstr, section.instance_id)
            if key not in self._devices:
                raise RemoteProtocolError(
                    f"guest {self._name!r} has no device {section.idstr!r} {section.instance_id}", section=section.idstr
                )
            if key in given:
                raise RemoteProtocolError(
                    f"device {section.idstr!r} {section.instance_id} is given twice", section=section.idstr
                )
            given.add(key)
        for idstr, instance_id in self._devices:
            if (idstr, instance_id) not in given:
                raise RemoteProtocolError(f"the state of device {idstr!r} {instance_id} is missing in the stream")
        for section in sections:
            self._devices[section.idstr, section.instance_id].load(section.payload, section.version_id)

    async def throttle(self, percent: int) -> None:
        """Store *percent*; a subclass also slows its guest down, if it can.

        Raises:
            ValueError: not within 0 to 99.
        """
        self._check_percent(percent)
        await trio.lowlevel.checkpoint()
        self._throttle = percent

    async def activate(self, run_state: str) -> None:
        """Resume for ``"running"``; otherwise only set the run state.

        Raises:
            GuestFailed: the guest could not be resumed, or it runs although it should not.

        **Cancellation:** as for :meth:`resume`.
        """
        if run_state == "running":
            await self.resume()
            return
        await trio.lowlevel.checkpoint()
        if self._run_state == "running":
            raise GuestFailed(f"guest {self._name!r} runs and cannot be put into run state {run_state!r}")
        self._run_state = run_state

    @abc.abstractmethod
    async def pause(self) -> None:
        """See :class:`trimig.guest.Guest`."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """See :class:`trimig.guest.Guest`."""

    @abc.abstractmethod
    def dirty_tracker(self) -> DirtyTracker:
        """See :class:`trimig.guest.Guest`."""

    def _check_percent(self, percent: int) -> None:
        if not 0 <= percent <= 99:
            raise ValueError(f"a throttle of {percent} percent is not within 0 to 99")

    def _check_unclaimed(self, what: str) -> None:
        if self._purpose is not None:
            raise StateError(f"{what} while guest {self._name!r} is busy: {self._purpose}")
