"""Which command of the main stream is legal where, on the destination.

The decoder knows the forms, this table the places. What a command needs beside its place (a return path to answer on, an
ADVISE before a switch) is looked at where it is acted on.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import Final

from ..errors import RemoteProtocolError
from ..wire.constants import Command
from ..wire.marks import Mark, is_mark
from ..wire.refusals import command_name, unknown_command


class Place(enum.Enum):
    """Where a destination is in its stream. The value completes the sentence "... has no place ..."."""

    HEAD = "before the list of RAM blocks"
    RAM = "between the list of RAM blocks and the end of the RAM"
    DEVICES = "behind the end of the RAM"
    PACKAGE = "in a package"
    FOLLOWING = "behind the switch to postcopy"
    RECOVERING = "in a recovery, before RESUME"


#: PING values of a QEMU, inside the package: behind the devices; and what a source from 11.1 on waits for before it gives
#: its guest up (newer.md part 4).
PING_LOADED: Final = 3
PING_RUNS: Final = 0x42
#: The first two bytes of every PING value that only a trimig sends (return_path.md part 9).
TRIMIG_PINGS: Final = 0x7472

_MAIN: Final = frozenset({Place.HEAD, Place.RAM, Place.DEVICES})
_PAGES: Final = frozenset({Place.FOLLOWING, Place.RECOVERING})

#: ENABLE_COLO is legal nowhere: it is not built.
LEGAL: Final = MappingProxyType(
    {
        Command.OPEN_RETURN_PATH: _MAIN,  # a second time it says nothing new, as in QEMU
        Command.PING: frozenset(Place),
        Command.POSTCOPY_ADVISE: frozenset({Place.HEAD}),
        Command.POSTCOPY_RAM_DISCARD: frozenset({Place.RAM}),
        Command.PACKAGED: frozenset({Place.RAM}),
        Command.POSTCOPY_LISTEN: frozenset({Place.PACKAGE}),
        Command.POSTCOPY_RUN: frozenset({Place.PACKAGE}),
        Command.RECV_BITMAP: frozenset({Place.RECOVERING}),
        Command.POSTCOPY_RESUME: frozenset({Place.RECOVERING}),
        # It says that the last pages are next; early or repeated it is harmless (newer.md part 2).
        Command.SWITCHOVER_START: frozenset(Place),
    }
)


#: What a trimig may say behind its mark; without one the decoder does not know these numbers.
_MARKS: Final = MappingProxyType(
    {
        Mark.REASON: _MAIN | _PAGES,
        Mark.CLOCK: _MAIN | _PAGES,
        Mark.ATTEMPT: frozenset({Place.HEAD, Place.RAM, Place.RECOVERING}),
    }
)


def check_place(number: int, place: Place, at: int, section: str | None = None) -> None:
    """RemoteProtocolError if the command *number* is not legal at *place*; *at* is its offset."""
    if is_mark(number):
        if place not in _MARKS[Mark(number)]:
            raise RemoteProtocolError(
                f"mark {Mark(number).name} has no place {place.value}", offset=at, section=section
            )
        return
    if number not in list(Command):
        raise unknown_command(number, 0, offset=at)
    if number == Command.ENABLE_COLO:
        raise RemoteProtocolError("the source wants COLO, which is not built yet", offset=at, section=section)
    if place not in LEGAL.get(Command(number), ()):
        raise RemoteProtocolError(
            f"command {command_name(number)} has no place {place.value}", offset=at, section=section
        )
