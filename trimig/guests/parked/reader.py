"""Reads a guest from a file: a saved guest (:mod:`.writer`), or any precopy stream."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from ...channel.offload import offload
from ...config.peer import PeerProfile
from ...engine import device_tail
from ...engine.ram.receiver import RamReceiver
from ...errors import RemoteProtocolError, TransportFailed
from ...guest import ConfigSubsection, DeviceSection, OpaqueGuest, PageBitmap
from ...monitor.statistics import Counters
from ...wire import events as ev
from ...wire.constants import Section
from ...wire.decoder import Decoder
from ...wire.devices.sections import SplitTail, Undelimited
from ...wire.devices.virtio_mem import absent_by_rule
from ...wire.elements import Elements
from ...wire.pages.sink import put
from ...wire.refusals import check_kept_command, wrong_page_size
from ..named import naming

if TYPE_CHECKING:
    from ...wire.devices.tail import TailBuffer

#: Bytes of one read: copying them into memory that is still cold takes about a millisecond.
_READ: Final = 512 << 10
_BUFFER: Final = 2 << 20


def peer_of(decoder: Decoder) -> PeerProfile:
    """The form of the stream of *decoder*, as far as it has been read; the usual form where it is not known."""
    configuration, footers = decoder.configuration is not False, decoder.footers is not False
    return PeerProfile(
        name="as in the file",
        send_configuration=configuration,
        send_section_footer=footers,
        store_global_state=configuration and footers,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The result of reading a file, in addition to the guest."""

    peer: PeerProfile
    #: Irregularities in the file.
    problems: Sequence[str]
    #: The pages in the file, by the block's name.
    received: Mapping[str, PageBitmap]


async def read_stream(path: Path, guest: OpaqueGuest, *, partial: bool = False) -> Read:
    """Fill *guest* from a stream in a file.

    Args:
        partial: only report RAM that is not in the stream; it stays zero.

    Raises:
        OSError: the file cannot be read.
        RemoteProtocolError: the file is not a stream, or a stream that cannot be kept (postcopy).
        TransportFailed: the stream ends too early.
        GuestFailed: there is not enough memory.

    **Cancellation:** the guest is undefined until it is filled again.
    """
    fd = await offload(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            return await _read(fd, guest, partial=partial)
    finally:
        os.close(fd)


class _Reading:
    """The state of reading a guest from a file."""

    def __init__(self, guest: OpaqueGuest, decoder: Decoder) -> None:
        self._guest = guest
        self._decoder = decoder
        self._header: ev.SectionHeader | None = None
        self._machine = ""
        self._subsections: tuple[ConfigSubsection, ...] = ()
        self._adopted = False
        self.ram = RamReceiver(Counters())
        self.early: list[DeviceSection] = []
        self.tail: TailBuffer | None = None
        self.tail_at = 0

    async def take(self, event: ev.Element) -> None:
        match event:
            case ev.PageElement():
                await put(self.ram, event)
            case ev.Configuration():
                self._machine, self._subsections = event.machine, event.subsections
            case ev.RamList():
                if not self._adopted:
                    self._guest.adopt(self._machine, self._subsections, event.blocks)
                    self._adopted = True
                self.ram.open(event, self._guest.ram)
            case ev.SectionHeader(kind=Section.FULL):
                self._header = event
            case ev.DevicePayload():
                assert self._header is not None
                self.early.append(
                    DeviceSection(
                        idstr=self._header.idstr,
                        instance_id=self._header.instance_id,
                        version_id=self._header.version_id,
                        section_id=self._header.section_id,
                        payload=event.payload,
                        before="pages" if self._adopted else "list",
                    )
                )
            case ev.CommandElement():
                check_kept_command(event.number, len(event.payload), event.at)
            case ev.TailBytes():
                if self.tail is None:
                    self.tail_at = event.at
                    self.tail = device_tail.buffer(footers=self._decoder.footers is not False)
                await device_tail.feed(self.tail, event.data)


async def _read(fd: int, guest: OpaqueGuest, *, partial: bool) -> Read:
    decoder = Decoder(measure=None, configuration=None, footers=None, buffer_bytes=_BUFFER)
    reading = _Reading(guest, decoder)
    elements = Elements(decoder, lambda buffer: offload(os.readv, fd, [buffer[:_READ]]))
    while (reading.tail is None or not reading.tail.complete) and (event := await elements.next()) is not None:
        await reading.take(event)
    tail, tail_at, ram, early = reading.tail, reading.tail_at, reading.ram, reading.early
    if tail is None:
        raise RemoteProtocolError("the stream has no devices", offset=decoder.offset)
    if (size := decoder.page_size) is not None:
        raise wrong_page_size(size, section="ram")
    split = await _split(tail, tail_at, early)
    sections = (*split.early, *split.sections)
    absent = absent_by_rule({block.name: block.length for block in guest.ram}, sections)
    received = {name: here | absent[name].bitmap() if name in absent else here for name, here in ram.received().items()}
    missing = {name: len(here) - int(np.count_nonzero(here)) for name, here in received.items()}
    problems = [f"{n} pages of RAM block {name!r} are not in the stream" for name, n in missing.items() if n]
    if problems and not partial:
        raise RemoteProtocolError(
            f"{problems[0]} (what a lost postcopy has left is completed by trimig merge; the option "
            'completeness = "warn" accepts it as it is)'
        )
    for number, payload, where in split.commands:
        check_kept_command(number, len(payload), where)
    await guest.ram_received()
    await guest.load_opaque(sections, split.description_text)
    problems += device_tail.first_problems(split)
    return Read(peer=peer_of(decoder), problems=problems, received=received)


async def _split(tail: TailBuffer, at: int, early: Sequence[DeviceSection]) -> SplitTail:
    try:
        return await device_tail.split(tail, at, early=early)
    except Undelimited as error:
        end = at + len(tail)
        # Without a description the stream may end inside the last section, so that the end of it cannot be found.
        if error.offset == end or tail.location is None:
            why = "" if error.offset == end else f" ({error.reason})"
            raise TransportFailed(
                f"the stream ends at byte {end} (0x{end:x}), before the guest was complete{why}"
            ) from error
        raise
