"""Sends the part of the stream in front of the pages: header, configuration, and the START sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from ... import formats
from ...channel.channels import MULTIFD
from ...errors import ConfigError, TransportFailed
from ...guest import DeviceSection, IdentifiedGuest, OpaqueGuest
from ...policy import convergence
from ...status import Status
from ...wire import encoder as wire
from ...wire import postcopy as wire_postcopy
from ...wire.constants import Command
from ...wire.marks import PING_MARK
from .. import guest_calls
from ..device_writer import UUID_SUBSECTION, early_sections, opening

if TYPE_CHECKING:
    from .outgoing import Outgoing

#: The value of QEMU's PING, directly behind OPEN_RETURN_PATH.
PING_OPENED: Final = 1
#: A value that only a trimig sends, behind the START sections. Its answer comes behind the destination's mark.
PING_BEGUN: Final = 0x74726962


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
        what = "saving the devices in front of the memory"
        early = await guest_calls.save_devices(out.guest, out.config.handover_timeout, what)
    if ahead := early_sections(early, "list", config.peer):
        await channel.send(ahead)
    for section in out.sections:
        await section.setup()
    if behind := early_sections(early, "pages", config.peer):
        await channel.send(behind)
    await _check_postcopy(out)
    out.count_sync()
    out.counters.setup_done = trio.current_time()
    if out.guest.run_state != "running":
        out.counters.transferred_at_pause = 0  # as in QEMU: a stopped guest counts as paused from the first byte on
    out.counters.convergence = convergence.FIRST_COPY
    await out.advance(Status.ACTIVE)


async def _check_postcopy(out: Outgoing) -> None:
    """With multifd and postcopy-ram: check that the destination can do both.

    A QEMU before 10.0 accepts them, and aborts at the end of postcopy; the guest is lost then (multifd.md part 7). Its version
    cannot be told from the stream. A trimig answers the mark.

    Raises:
        ConfigError: the destination may be such a QEMU.
        TransportFailed: the destination does not answer.

    **Cancellation:** as for the begin of the stream.
    """
    both = out.link.wants(MULTIFD) and out.config.capabilities.postcopy_ram
    if not both or out.config.peer.multifd_postcopy:
        return
    reader, seconds = out.link.reader, out.config.handover_timeout
    await out.link.channel.send(wire.ping(PING_BEGUN))
    with trio.move_on_after(seconds) as limit:
        await reader.wait_pong(PING_BEGUN)
    if limit.cancelled_caught:
        raise TransportFailed(f"the destination has not read the begin of the stream for {formats.duration(seconds)}")
    if not reader.marked:
        raise ConfigError(
            "multifd together with postcopy-ram loses the guest in a QEMU before 11.1, and the destination may be one: turn "
            "one of them off, or choose the peer profile qemu-11.1 if it is not",
            name="multifd",
        )


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
