"""What a source sends before and after the RAM: header and configuration, device sections, end of file and description.

A parked guest keeps the configuration and the description with which it was received. They are sent again unchanged,
because trimig does not know the machine that they describe.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..guest import PAGE_SIZE, ConfigSubsection, DeviceSection, Guest, IdentifiedGuest, OpaqueGuest
from ..wire import encoder as wire
from ..wire.devices import description, globalstate

if TYPE_CHECKING:
    from ..config.peer import PeerProfile

#: The first section id of devices that were not received with one. QEMU's timer, block, ram and dirty-bitmap have 0 to 3.
FIRST_DEVICE_ID = 4


#: The subsection that names the machine's UUID: 16 bytes, in the order in which they are written.
UUID_SUBSECTION: Final = "configuration/uuid"


def profile_of(guest: Guest, peer: PeerProfile) -> PeerProfile:
    """The profile by which the stream of *guest* is written.

    For the settings that *peer* leaves open, the machine type of a parked guest decides. Other guests use trimig's own.
    """
    return peer.for_machine(guest.name if isinstance(guest, OpaqueGuest) else None)


def opening(guest: Guest, peer: PeerProfile, *, validate_uuid: bool = False) -> bytes:
    """File header and configuration section.

    Args:
        validate_uuid: send the guest's UUID, if it has one, so that the destination can compare it.
    """
    if not peer.send_configuration:
        return wire.file_header()
    subsections: Sequence[ConfigSubsection] = ()
    if isinstance(guest, OpaqueGuest):
        subsections = guest.subsections
    elif validate_uuid and isinstance(guest, IdentifiedGuest) and guest.uuid is not None:
        payload = uuid.UUID(guest.uuid).bytes
        subsections = (ConfigSubsection(name=UUID_SUBSECTION, version=1, payload=payload),)
    return wire.file_header() + wire.configuration(guest.name, subsections)


def machine_uuid(guest: Guest) -> bytes:
    """The UUID of the machine, 16 bytes: that of its stream, or the one that it was given; all zero without one."""
    if isinstance(guest, OpaqueGuest):
        for subsection in guest.subsections:
            if subsection.name == UUID_SUBSECTION:
                return bytes(subsection.payload)
    named = guest.uuid if isinstance(guest, IdentifiedGuest) else None
    return bytes(16) if named is None else uuid.UUID(named).bytes


def early_sections(sections: Sequence[DeviceSection], before: str, peer: PeerProfile) -> bytes:
    """The FULL sections that stand in front of the RAM: of its ``list``, or of its first ``pages``, as *before* says."""
    footer = peer.send_section_footer
    return b"".join(
        wire.device_section(s, s.section_id, footer=footer)
        for s in sections
        if s.before == before and s.section_id is not None
    )


def coming_state(guest: Guest, run_state: str, saved: Sequence[DeviceSection]) -> str:
    """The run state that *guest* will have at the destination. A parked guest has it in one of its device sections.

    Args:
        run_state: the guest's run state before it was stopped.
        saved: the guest's device sections.
    """
    if not isinstance(guest, OpaqueGuest):
        return run_state
    states = [s for s in saved if s.idstr == globalstate.IDSTR]
    return globalstate.decode(states[-1].payload, states[-1].version_id) if states else "running"


class DeviceSender:
    """Writes the FULL sections of one attempt, the end of the stream and its description."""

    def __init__(self, guest: Guest, peer: PeerProfile) -> None:
        self._guest = guest
        self._peer = peer
        self._described: list[Mapping[str, Any]] = []

    def sections(self, saved: Sequence[DeviceSection], run_state: str) -> bytes:
        """The FULL sections that follow the memory: the guest's saved devices, and the run state as the last one.

        Args:
            run_state: the run state before the guest was stopped; the destination brings the guest into it.
        """
        sections: list[DeviceSection] = list(saved)
        if not isinstance(self._guest, OpaqueGuest) and self._peer.store_global_state:
            sections.append(globalstate.section(run_state))
        out: list[bytes] = []
        taken = {s.section_id for s in sections}
        number = FIRST_DEVICE_ID
        for section in sections:
            if section.before is not None:
                if section.description is not None:
                    self._described.append(section.description)
                continue
            section_id = section.section_id
            if section_id is None:
                while number in taken:
                    number += 1
                section_id = number
                taken.add(number)
            out.append(wire.device_section(section, section_id, footer=self._peer.send_section_footer))
            if section.description is not None:
                self._described.append(section.description)
        return b"".join(out)

    def ending(self) -> bytes:
        """The end-of-file byte, which is the decision, and the description after it.

        A QEMU waits for a description, unless its machine type has none. A parked guest that came by postcopy has no
        description. So one is built from the devices whose descriptions are known; it may list no device at all.
        """
        text = self._guest.description if isinstance(self._guest, OpaqueGuest) else None
        if text is None and not self._peer.suppress_vmdesc:
            text = description.build(PAGE_SIZE, self._described)
        return wire.end_of_stream() + (wire.description(text) if text is not None else b"")
