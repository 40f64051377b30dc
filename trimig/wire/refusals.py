"""Errors for streams that are sound, but use features that trimig does not read."""

from __future__ import annotations

from typing import Final

from ..errors import RemoteProtocolError
from ..guest import PAGE_SIZE
from .constants import Command

#: The newest known command, and the version of QEMU that introduced it.
NEWEST_COMMAND: Final = max(Command)
#: Commands that do not change the state of a guest.
_HARMLESS: Final = frozenset({Command.OPEN_RETURN_PATH, Command.PING, Command.SWITCHOVER_START})


class Unsupported(RemoteProtocolError):
    """The stream uses something that trimig does not read: a capability, a page size, a command that is newer.

    The stream itself is correct. The message names the feature, and how to avoid it.
    """


def command_name(number: int) -> str:
    """Name of a command for messages: ``PING``, or ``0x000c`` for one without a name."""
    try:
        return Command(number).name
    except ValueError:
        return f"{number:#06x}"


def unknown_command(number: int, length: int, *, offset: int | None = None) -> RemoteProtocolError:
    """The error for an unknown command of *length* bytes: a newer command, or an illegal number."""
    if number > NEWEST_COMMAND:
        return Unsupported(
            f"command {number:#06x} with {length} bytes of payload is newer than the commands known here, which end with "
            f"{NEWEST_COMMAND:#06x} {command_name(NEWEST_COMMAND)}: start the source with an older machine type",
            offset=offset,
        )
    return RemoteProtocolError(f"unknown command {number:#06x} with {length} bytes of payload", offset=offset)


def check_kept_command(number: int, length: int, offset: int) -> None:
    """Check that the stream of a parked guest may contain this command.

    Raises:
        RemoteProtocolError: the command belongs to postcopy or COLO, or is unknown.
    """
    if number not in list(Command):
        raise unknown_command(number, length, offset=offset)
    if number == Command.POSTCOPY_ADVISE and not length:
        raise bitmaps_only(offset)
    if number not in _HARMLESS:
        raise RemoteProtocolError(f"a guest cannot be kept behind the command {command_name(number)}", offset=offset)


#: Iterative sections of QEMU other than ``ram``.
_SECTIONS: Final = {
    "dirty-bitmap": "the source migrates dirty bitmaps of disks: turn the capability dirty-bitmaps off at the source",
    "block": "the source migrates its disks: turn the capability block off at the source, or migrate without -b",
    "pbs-state": "it is the state of a backup of Proxmox VE",
}


def unknown_section(idstr: str, instance_id: int, offset: int) -> Unsupported:
    """The error for an iterative section other than ``ram``."""
    why = _SECTIONS.get(idstr, "the device that sends it must be left out")
    return Unsupported(
        f"the iterative section {idstr!r} (instance {instance_id}) is not supported: {why}", offset=offset
    )


def bitmaps_only(offset: int) -> Unsupported:
    """The error for the empty POSTCOPY_ADVISE, which announces bitmaps of disks and no RAM."""
    return Unsupported(
        f"the section 'dirty-bitmap' will follow, which is not supported: {_SECTIONS['dirty-bitmap']}", offset=offset
    )


def wrong_page_size(size: int, *, offset: int | None = None, section: str | None = None) -> Unsupported:
    """The error for a guest whose target pages have *size* bytes."""
    return Unsupported(
        f"the guest has target pages of {size} bytes, and only pages of {PAGE_SIZE} bytes can be read: guests of this "
        "architecture cannot be received, kept or sent here",
        offset=offset,
        section=section,
    )
