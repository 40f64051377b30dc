"""Reads the stream in front of the memory: configuration, commands, early device sections, and the list of RAM blocks."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import RemoteProtocolError
from ...guest import ConfigSubsection, DeviceSection, FramedGuest, IdentifiedGuest, OpaqueGuest
from ...wire import events as ev
from ...wire.constants import Section
from .. import guest_calls
from ..device_writer import UUID_SUBSECTION
from .commands import take_command

if TYPE_CHECKING:
    from ...config.peer import PeerProfile
    from ...guest import Guest
    from .devices import IncomingDevices
    from .incoming import Incoming
    from .stream import IncomingStream


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """The contents of the stream in front of the memory.

    Attributes:
        machine: the name of the machine type; empty if the stream has no configuration section.
        subsections: the subsections of the configuration section.
        blocks: the list of RAM blocks.
        early: device sections of an unknown machine, in front of the list of blocks.
    """

    machine: str
    subsections: tuple[ConfigSubsection, ...]
    blocks: ev.RamList
    early: Sequence[DeviceSection]


async def take_announcement(into: Incoming, stream: IncomingStream, devices: IncomingDevices) -> Announced:
    """Read up to the list of RAM blocks.

    Raises:
        RemoteProtocolError: the source is another machine, or an element is not legal here.

    **Cancellation:** the stream must be given up.
    """
    machine, subsections = "", tuple[ConfigSubsection, ...]()
    early: list[DeviceSection] = []
    while True:
        match await stream.next():
            case ev.Configuration() as event:
                into.refine(refined(into, event))
                machine, subsections = event.machine, event.subsections
                for subsection in subsections:
                    if subsection.name == UUID_SUBSECTION:
                        into.data.identify(subsection.payload, event.at)
            case ev.SectionHeader(kind=Section.FULL) as header:
                early += await devices.take_section(stream, header, before="list")
            case ev.CommandElement() as event:
                await take_command(into, stream, devices, event)
            case ev.RamList() as event:
                into.data.know(dict(event.blocks), into.config.peer)
                return Announced(machine=machine, subsections=subsections, blocks=event, early=early)
            case ev.FileHeader() | ev.SectionHeader() | ev.SectionFooter() | None:
                pass
            case event:
                await stream.load(event)


def refined(into: Incoming, event: ev.Configuration) -> PeerProfile:
    """The profile of the source that sent the configuration section *event*. The lobby calls this before it chooses.

    Raises:
        RemoteProtocolError: the source is another machine than the guest.
    """
    guest = into.guest
    opaque = isinstance(guest, OpaqueGuest)
    if not opaque and event.machine != guest.name:
        raise RemoteProtocolError(
            f"the stream is of a machine {event.machine!r}, this one is {guest.name!r}",
            offset=event.at,
            section="configuration",
        )
    if not opaque:  # an opaque guest takes the stream of any machine
        for subsection in event.subsections:
            if subsection.name == UUID_SUBSECTION:
                _check_uuid(into, subsection, event.at)
    return into.config.peer.for_machine(event.machine if opaque else None, arriving=True)


def machine_of(guest: Guest) -> bytes | None:
    """The UUID that the guest's machine was given, 16 bytes; None if it was given none."""
    if not isinstance(guest, IdentifiedGuest) or guest.uuid is None:
        return None
    return uuid.UUID(guest.uuid).bytes


def _check_uuid(into: Incoming, subsection: ConfigSubsection, at: int) -> None:
    """Compare the UUID that the source has sent with the guest's UUID. RemoteProtocolError; a warning without one."""
    theirs = str(uuid.UUID(bytes=subsection.payload))
    ours = into.guest.uuid if isinstance(into.guest, IdentifiedGuest) else None
    if ours is None:
        warning = f"the stream is of the machine with the UUID {theirs}, this one has none to compare"
        if warning not in into.counters.warnings:  # the lobby has already checked the same section
            into.monitor.warn(warning)
    elif ours != theirs:
        raise RemoteProtocolError(
            f"the stream is of the machine with the UUID {theirs}, this one has {ours}",
            offset=at,
            section="configuration",
        )


def make_blocks(into: Incoming, stream: IncomingStream, announced: Announced, early: Sequence[DeviceSection]) -> None:
    """Make the RAM blocks, once the elements after the list of blocks have shown the framing of the stream.

    Args:
        early: all device sections in front of the memory.

    Raises:
        RemoteProtocolError: the blocks do not fit the guest.
        GuestFailed: the guest cannot make the blocks.
    """
    guest, peer = into.guest, into.config.peer
    configuration = stream.decoder.configuration is not False
    # With data channels the blocks may be needed before the framing is known; old machine types lack both parts of it.
    footers = configuration if stream.decoder.footers is None else stream.decoder.footers
    if (configuration, footers) != (peer.send_configuration, peer.send_section_footer):
        into.refine(dataclasses.replace(peer, send_configuration=configuration, send_section_footer=footers))
    if isinstance(guest, FramedGuest):
        guest.framed(configuration=configuration, footers=footers, early=early)
    if isinstance(guest, OpaqueGuest):
        try:
            with guest_calls.guarded("making the RAM blocks"):
                guest.adopt(announced.machine, announced.subsections, announced.blocks.blocks)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, offset=announced.blocks.at, section="ram") from None
    into.ram.open(announced.blocks, guest.ram)
