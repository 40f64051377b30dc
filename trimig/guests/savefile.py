"""A guest is read from a file: one that was saved (:mod:`.saving`), or any precopy stream."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import trio

from ..config import PeerProfile
from ..engine import tail_in
from ..engine.offload import offload
from ..engine.ram_in import RamReceiver
from ..errors import RemoteProtocolError, TransportFailed
from ..guest import ConfigSubsection, DeviceSection, OpaqueGuest, PageBitmap
from ..info import Counters
from ..wire import Decoder, Section
from ..wire import events as ev
from ..wire.devices import SplitTail, Undelimited
from ..wire.page_size import wrong_page_size
from ..wire.refusals import Unsupported, check_kept_command
from ..wire.tail import TailBuffer
from ..wire.virtio_mem import absent_by_rule
from .named import naming

#: Bytes read at once: copying them into memory that is still cold takes about a millisecond.
_READ: Final = 512 << 10
_BUFFER: Final = 2 << 20


def peer_of(decoder: Decoder) -> PeerProfile:
    """How the stream of *decoder* is written, as far as it has been read; an ordinary one where that is not known."""
    configuration, footers = decoder.configuration is not False, decoder.footers is not False
    return PeerProfile(
        name="as in the file",
        send_configuration=configuration,
        send_section_footer=footers,
        store_global_state=configuration and footers,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What was found in a file, beside the guest."""

    peer: PeerProfile
    #: What was not as it should be.
    problems: Sequence[str]
    #: The pages that are in it, by the block's name.
    received: Mapping[str, PageBitmap]


async def read_stream(path: Path, guest: OpaqueGuest, *, partial: bool = False) -> Read:
    """Fill *guest* from a stream in a file.

    Args:
        partial: RAM that is not in the stream is only reported, and stays zero.

    Raises:
        OSError: the file cannot be read.
        RemoteProtocolError: it is not a stream, or one that cannot be kept (postcopy).
        TransportFailed: it ends too early.
        GuestFailed: there is no memory for it.

    **Cancellation:** the guest is undefined until it is filled anew.
    """
    fd = await offload(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            return await _read(fd, guest, partial=partial)
    finally:
        os.close(fd)


async def _read(fd: int, guest: OpaqueGuest, *, partial: bool) -> Read:
    decoder = Decoder(measure=None, configuration=None, footers=None, buffer_bytes=_BUFFER)
    ram = RamReceiver(Counters())
    tail: TailBuffer | None = None
    early: list[DeviceSection] = []
    header: ev.SectionHeader | None = None
    machine = ""
    subsections: tuple[ConfigSubsection, ...] = ()
    tail_at = 0
    adopted = False
    ended = False
    while True:
        await trio.lowlevel.checkpoint()
        while (event := decoder.next_event()) is not None:
            match event:
                case ev.PageRun():
                    await ram.pages(event)
                case ev.ZeroRun():
                    await ram.zeros(event)
                case ev.Configuration():
                    machine, subsections = event.machine, event.subsections
                case ev.RamList():
                    if not adopted:
                        guest.adopt(machine, subsections, event.blocks)
                        adopted = True
                    ram.open(event, guest.ram)
                case ev.SectionHeader(kind=Section.FULL):
                    header = event
                case ev.DevicePayload():
                    assert header is not None
                    early.append(
                        DeviceSection(
                            idstr=header.idstr,
                            instance_id=header.instance_id,
                            version_id=header.version_id,
                            section_id=header.section_id,
                            payload=event.payload,
                            before="pages" if adopted else "list",
                        )
                    )
                case ev.CommandElement():
                    check_kept_command(event.number, len(event.payload), event.at)
                case ev.TailBytes():
                    if tail is None:
                        tail_at = event.at
                        tail = tail_in.buffer(footers=decoder.footers is not False)
                    await tail_in.feed(tail, event.data)
        if ended or (tail is not None and tail.complete):
            break
        count = await offload(os.readv, fd, [decoder.writable()[:_READ]])
        decoder.received(count)
        if not count:
            if not decoder.offset and not decoder.pending:
                raise Unsupported("the file is empty")
            decoder.receive_eof()
            ended = True
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
    problems += tail_in.first_problems(split)
    return Read(peer=peer_of(decoder), problems=problems, received=received)


async def _split(tail: TailBuffer, at: int, early: Sequence[DeviceSection]) -> SplitTail:
    try:
        return await tail_in.split(tail, at, early=early)
    except Undelimited as error:
        if error.offset == at + len(tail):
            raise TransportFailed(
                f"the stream ends at byte {error.offset} (0x{error.offset:x}), before the guest was complete"
            ) from error
        raise
