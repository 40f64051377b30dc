"""A device section: its length, which the guest's device finds, and its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RemoteProtocolError
from ...guest import DeviceSection
from ...wire.devices import globalstate

if TYPE_CHECKING:
    from ...guest import Guest
    from ...wire import events as ev


def measure_device(guest: Guest, idstr: str, instance_id: int, version_id: int, data: memoryview) -> int | None:
    """The length of a device payload, see :class:`trimig.wire.measure.Measure`.

    Raises:
        RemoteProtocolError: *guest* has no such device, or an older version of it.
    """
    if idstr == globalstate.IDSTR:
        return globalstate.measure(data, version_id)
    devices = guest.devices or {}
    device = devices.get((idstr, instance_id))
    if device is None:
        known = ", ".join(f"{name!r}" for name, _ in devices) or "none"
        raise RemoteProtocolError(f"unknown device {idstr!r} (instance {instance_id}); this guest has {known}")
    if version_id > device.version_id:
        raise RemoteProtocolError(
            f"device {idstr!r} has version {version_id} at the source, {device.version_id} is the newest known here"
        )
    return device.measure(data, version_id)


def section_of(header: ev.SectionHeader, event: ev.DevicePayload) -> DeviceSection:
    """The device section that consists of these two elements."""
    return DeviceSection(
        idstr=header.idstr,
        instance_id=header.instance_id,
        version_id=header.version_id,
        payload=event.payload,
        section_id=header.section_id,
    )
