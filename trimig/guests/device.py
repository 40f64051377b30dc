"""Devices of the caller: a class with a declaration, whose attributes are the state.

class Clock(Device):
    vmstate = VMState("clock", fields=(Field("ticks", "uint64"), Field("armed", "timer")))

    def __init__(self) -> None:
        self.ticks = 0
        self.armed = None
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import RemoteProtocolError
from ..guest import DeviceProtocol, DeviceSection
from ..wire.constants import MAX_CSTR
from ..wire.devices.vmstate import VMState


class Device:
    """A device whose state is declared by :attr:`vmstate`; implements :class:`trimig.guest.DeviceProtocol`.

    Every field of the declaration is an attribute of the instance. A nested structure may be any object when it is
    saved, and is a ``dict`` after it was loaded, unless :meth:`restore` converts it.

    Class attributes:
        vmstate: the declaration.
        idstr: the device id string; left out, it is the name of the declaration.
        instance_id: the number that distinguishes devices of the same idstr.
        unmigratable: the reason why its state can never be migrated; a guest with such a device is refused, outgoing
            and incoming.

    Raises:
        TypeError: a subclass without declaration, or with an idstr that cannot stand on the wire.
    """

    vmstate: ClassVar[VMState]
    idstr: str = ""
    instance_id: int = 0
    unmigratable: str | None = None

    def __init__(self, *, instance_id: int = 0) -> None:
        self.instance_id = instance_id

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if not isinstance(getattr(cls, "vmstate", None), VMState):
            raise TypeError(f"{cls.__name__} needs a class attribute vmstate")
        if "idstr" not in vars(cls) and "vmstate" in vars(cls):
            cls.idstr = cls.vmstate.name
        if not 1 <= len(cls.idstr.encode()) <= MAX_CSTR:
            raise TypeError(f"{cls.__name__}: idstr {cls.idstr!r:.80} must have 1 to {MAX_CSTR} bytes")

    @property
    def version_id(self) -> int:
        """The number of the version that :meth:`save` writes."""
        return self.vmstate.version

    def pre_save(self) -> None:
        """Bring the attributes up to date. Called before saving and before describing; the guest is paused."""

    def post_load(self, version_id: int) -> None:
        """Check and use the attributes that were loaded from *version_id*.

        Raises:
            RemoteProtocolError: to refuse it (a ValueError will do); the attributes are put back.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Set the attributes from the decoded *state*. Fields that were not sent are not in *state*."""
        for name, value in state.items():
            setattr(self, name, value)

    def save(self) -> bytes:
        """The payload.

        Raises:
            LocalProtocolError: an attribute is missing or does not fit its field.
        """
        self.pre_save()
        return self.vmstate.encode(self)

    def describe(self) -> Mapping[str, Any]:
        """The device's object for the JSON description.

        Raises:
            LocalProtocolError: as for :meth:`save`.
        """
        self.pre_save()
        return {"name": self.idstr, "instance_id": self.instance_id, **self.vmstate.describe(self)}

    def measure(self, data: memoryview, version_id: int) -> int | None:
        """The number of bytes at the start of *data* that are one payload; None if more bytes are needed.

        Raises:
            RemoteProtocolError: no payload of this version begins with these bytes.
        """
        return self.vmstate.measure(data, version_id, local=self, section=self.idstr)

    def load(self, payload: bytes, version_id: int) -> None:
        """Load the state in *payload*, as a whole or not at all.

        Raises:
            RemoteProtocolError: the version is not readable, the payload does not fit, or :meth:`post_load` refused.
        """
        state = self.vmstate.decode(payload, version_id, local=self, section=self.idstr)
        before = dict(vars(self))
        taken = False
        try:
            self.restore(state)
            self.post_load(version_id)
            taken = True
        except ValueError as error:
            raise RemoteProtocolError(f"the state was refused: {error}", section=self.idstr) from error
        finally:
            if not taken:
                vars(self).clear()
                vars(self).update(before)


def device_section(device: DeviceProtocol, section_id: int | None = None) -> DeviceSection:
    """The state of *device*, saved now, with its description.

    Raises:
        LocalProtocolError: as for :meth:`Device.save`.
    """
    return DeviceSection(
        idstr=device.idstr,
        instance_id=device.instance_id,
        version_id=device.version_id,
        payload=device.save(),
        section_id=section_id,
        description=device.describe(),
    )
