"""Sends the part of the stream in front of the pages: header, configuration, and the START sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from ...guest import DeviceSection, IdentifiedGuest, OpaqueGuest
from ...policy import convergence
from ...status import Status
from ...wire import encoder as wire
from ...wire import postcopy as wire_postcopy
from ...wire.constants import Command
from ...wire.marks import PING_MARK
from ..device_writer import UUID_SUBSECTION, early_sections, opening

if TYPE_CHECKING:
    from .outgoing import Outgoing

#: The value of QEMU's PING, directly behind OPEN_RETURN_PATH.
PING_OPENED: Final = 1


async def announce(out: Outgoing) -> None:
    """Send header, configuration, and the START of each iterative section. Dirty tracking begins.

    Raises:
        GuestFailed: the guest's code failed.
        TransportFailed: the connection was lost.

    **Cancellation:** the destination has the begin of a stream, without its end.
    """
    config, link, channel = out.config, out.link, out.link.channel
    if config.capabilities.validate_uuid:
        warn_without_uuid(out)
    await channel.send(opening(out.guest, config.peer, validate_uuid=config.capabilities.validate_uuid))
    if link.asks:
        await channel.send(wire.command(Command.OPEN_RETURN_PATH) + wire.ping(PING_OPENED) + wire.ping(PING_MARK))
    if config.capabilities.postcopy_ram:
        await channel.send(wire_postcopy.advise(wire_postcopy.Advice()))
    early: Sequence[DeviceSection] = ()
    if isinstance(out.guest, OpaqueGuest):
        early = await out.call("saving the devices in front of the memory", out.guest.save_devices)
    if ahead := early_sections(early, "list", config.peer):
        await channel.send(ahead)
    for section in out.sections:
        await section.setup()
    if behind := early_sections(early, "pages", config.peer):
        await channel.send(behind)
    out.count_sync()
    out.counters.setup_done = trio.current_time()
    if out.guest.run_state != "running":
        out.counters.transferred_at_pause = 0  # as in QEMU: a stopped guest counts as paused from the first byte on
    out.counters.convergence = convergence.FIRST_COPY
    await out.advance(Status.ACTIVE)


def warn_without_uuid(out: Outgoing) -> None:
    """Warn if the capability validate-uuid has no effect, because no UUID is sent."""
    guest = out.guest
    if isinstance(guest, OpaqueGuest):
        named = any(subsection.name == UUID_SUBSECTION for subsection in guest.subsections)
    else:
        named = isinstance(guest, IdentifiedGuest) and guest.uuid is not None
    if not named or not out.config.peer.send_configuration:
        why = "the guest has none" if not named else "the peer profile has no configuration section for it"
        out.monitor.warn(f"validate-uuid is on, but no UUID is sent and none is compared: {why}")
