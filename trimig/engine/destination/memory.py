"""Reads the memory of an incoming guest, up to the end of the RAM or to the package of a switch to postcopy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ...guest import DeviceSection, IdentifiableGuest, StoringGuest
from ...status import STREAM_IN_PRECOPY, Stream
from ...wire import events as ev
from ...wire.constants import Section
from .announced import make_blocks
from .arriving import Storing
from .commands import take_command

if TYPE_CHECKING:
    import trio

    from .announced import Announced
    from .devices import IncomingDevices
    from .incoming import Incoming
    from .stream import IncomingStream

#: Seconds without a byte behind the list of blocks after which the pages of data channels are read. A QEMU may keep the
#: footer of the first section in its buffer until it has sent pages there.
_FRAMING_SECONDS: Final = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The result of reading the memory, for the next phase.

    Attributes:
        storing: the task that writes received pages to the guest's file; None for other guests.
        early: device sections of an unknown machine in front of the memory.
        last: the first element after the RAM, which is not handled yet.
        ended: True if the RAM has ended with its section END.
    """

    storing: Storing | None
    early: Sequence[DeviceSection]
    last: ev.Element | None
    ended: bool


async def take_memory(
    into: Incoming, stream: IncomingStream, devices: IncomingDevices, announced: Announced, nursery: trio.Nursery
) -> Taken:
    """Read pages until the RAM ends, or the package of postcopy has come.

    Args:
        nursery: of the attempt; the task of a guest that writes its pages to a file runs in it.

    Raises:
        RemoteProtocolError: the blocks do not fit the guest, or an element is not legal here.
        GuestFailed: the guest cannot make its blocks, or cannot write them.

    **Cancellation:** the memory is undefined.
    """
    early = list(announced.early)
    event = await _to_pages(into, stream, devices, early)
    make_blocks(into, stream, announced, early)
    storing = None
    if isinstance(into.guest, StoringGuest):
        storing = Storing(into.guest, into.ram.watch(), into.monitor)
        nursery.start_soon(storing.run, name="trimig.storing")
    into.data.admit_pages(None if storing is None else storing.wait_room)
    while stream.state in STREAM_IN_PRECOPY:
        match event:
            case ev.SectionHeader(kind=Section.FULL):
                early += await devices.take_section(stream, event, before="pages")
            case ev.CommandElement():
                await take_command(into, stream, devices, event)
            case ev.SectionHeader() | ev.SectionFooter() | None:
                pass
            case _:
                await stream.load(event)
        if storing is not None:
            await storing.wait_room()
        event = await stream.next()
    if isinstance(event, ev.RamEnd):
        await stream.load(event)  # the end of the section END
    await into.data.finish(drain=stream.state is Stream.PACKAGE)
    if into.data.machine is not None and isinstance(into.guest, IdentifiableGuest):
        into.guest.identify(into.data.machine)
    return Taken(storing=storing, early=early, last=event, ended=stream.state is Stream.DEVICES)


async def _to_pages(
    into: Incoming, stream: IncomingStream, devices: IncomingDevices, early: list[DeviceSection]
) -> ev.Element | None:
    """The first element after the list of blocks that is no device section; those sections are appended to *early*.

    When it has come, the decoder knows the framing of the stream. A source with data channels may send it only when these
    have been read: then the result is None.
    """
    seconds = math.inf
    while True:
        match event := await stream.next(seconds):
            case ev.SectionHeader(kind=Section.FULL):
                early += await devices.take_section(stream, event, before="pages")
            case ev.RamEnd() | ev.RamSync():
                await stream.load(event)
                if isinstance(event, ev.RamEnd) and into.data.wanted:
                    seconds = _FRAMING_SECONDS
            case ev.SectionFooter():
                pass
            case _:
                return event
