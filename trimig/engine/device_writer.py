"""What a source sends around the RAM: the opening, the device sections, the ending.

A parked guest brings its own: the configuration and the description it was received with are sent again as they are,
because they describe a machine that trimig knows nothing of.
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

#: Section ids of devices that have none from a wire before: behind QEMU's timer, block, ram and dirty-bitmap.
FIRST_DEVICE_ID = 4


#: The subsection that names the machine's UUID: 16 bytes, in the order in which they are written.
UUID_SUBSECTION: Final = "configuration/uuid"


def profile_of(guest: Guest, peer: PeerProfile) -> PeerProfile:
    """How the stream of *guest* is written: its machine type decides, unless *peer* does, or the guest is trimig's own."""
    return peer.for_machine(guest.name if isinstance(guest, OpaqueGuest) else None)


def opening(guest: Guest, peer: PeerProfile, *, validate_uuid: bool = False) -> bytes:
    """File header and configuration section.

    Args:
        validate_uuid: name the guest's UUID, if it has one, for the destination to compare.
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


def early_sections(sections: Sequence[DeviceSection], before: str, peer: PeerProfile) -> bytes:
    """The FULL sections among *sections* that stand in front of RAM's ``list``, or of its first ``pages``."""
    footer = peer.send_section_footer
    return b"".join(
        wire.device_section(s, s.section_id, footer=footer)
        for s in sections
        if s.before == before and s.section_id is not None
    )


def coming_state(guest: Guest, run_state: str, saved: Sequence[DeviceSection]) -> str:
    """The run state that *guest* is to have at the destination: its own, or that among the sections of one that is kept.

    Args:
        run_state: its own before it was stopped.
        saved: its devices.
    """
    if not isinstance(guest, OpaqueGuest):
        return run_state
    states = [s for s in saved if s.idstr == globalstate.IDSTR]
    return globalstate.decode(states[-1].payload, states[-1].version_id) if states else "running"


class DeviceSender:
    """The FULL sections of one attempt, and what follows them."""

    def __init__(self, guest: Guest, peer: PeerProfile) -> None:
        self._guest = guest
        self._peer = peer
        self._described: list[Mapping[str, Any]] = []

    def sections(self, saved: Sequence[DeviceSection], run_state: str) -> bytes:
        """The FULL sections of the guest's saved devices, with the run state last; without those in front of the memory.

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
        """The end-of-file byte, which is the decision, and the description behind it.

        A QEMU waits for one unless its machine type has none, so a guest that came without (by postcopy) gets one of those
        devices whose objects are known; of none, perhaps.
        """
        text = self._guest.description if isinstance(self._guest, OpaqueGuest) else None
        if text is None and not self._peer.suppress_vmdesc:
            text = description.build(PAGE_SIZE, self._described)
        return wire.end_of_stream() + (wire.description(text) if text is not None else b"")
