"""The names that the elements of a stream have in the table of the order, and the values of PING with a meaning.

:data:`trimig.status.STREAM` is the table.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from ..status import Item
from ..wire import events as ev
from ..wire.constants import Command, Section
from ..wire.marks import Mark, is_mark
from ..wire.refusals import unknown_command

#: PING values of a QEMU inside the package. PING_LOADED follows the devices. A source from QEMU 11.1 on gives its guest up
#: only after the answer to PING_RUNS (newer.md part 4).
PING_LOADED: Final = 3
PING_RUNS: Final = 0x42
#: The first two bytes of every PING value that only a trimig sends (return_path.md part 9).
TRIMIG_PINGS: Final = 0x7472

_ITEMS: Final = MappingProxyType(
    {
        ev.FileHeader: Item.FILE_HEADER,
        ev.Configuration: Item.CONFIGURATION,
        ev.RamList: Item.RAM_LIST,
        ev.RamEnd: Item.RAM_END,
        ev.RamSync: Item.RAM_SYNC,
        ev.DevicePayload: Item.PAYLOAD,
        ev.SectionFooter: Item.FOOTER,
        ev.TailBytes: Item.TAIL,
        ev.PackageElement: Item.PACKAGE,
        ev.EndOfStream: Item.EOF,
        ev.DescriptionElement: Item.DESCRIPTION,
    }
)
_SECTIONS: Final = MappingProxyType(
    {Section.START: Item.START, Section.PART: Item.PART, Section.END: Item.END, Section.FULL: Item.FULL}
)


def item_of(event: ev.Element) -> Item:
    """The name of *event* in the table. RemoteProtocolError: a command that is not known."""
    if isinstance(event, ev.PageElement):
        return Item.PAGES
    if isinstance(event, ev.CommandElement):
        return item_of_command(event.number, event.at)
    if isinstance(event, ev.SectionHeader):
        return _SECTIONS[event.kind]
    return _ITEMS[type(event)]


def item_of_command(number: int, at: int) -> Item:
    """The name of a command in the table.

    Args:
        at: its offset in the stream.

    Raises:
        RemoteProtocolError: it is not known.
    """
    if is_mark(number):
        return Item[Mark(number).name]
    if number not in list(Command):
        raise unknown_command(number, 0, offset=at)
    return Item[Command(number).name]
