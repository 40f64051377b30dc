"""A guest is read from a file: one that was saved (:mod:`.saving`), or any precopy stream."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import trio

from ..config import PeerProfile
from ..engine import tail_in
from ..engine.offload import offload
from ..engine.ram_in import RamReceiver
from ..errors import RemoteProtocolError, TransportFailed
from ..guest import ConfigSubsection, OpaqueGuest, PageBitmap
from ..monitor import Counters
from ..wire import Decoder, Section
from ..wire import events as ev
from ..wire.devices import Undelimited
from ..wire.refusals import check_kept_command
from ..wire.tail import TailBuffer

#: Bytes read at once: copying them into memory that is still cold takes about a millisecond.
_READ: Final = 512 << 10
#: Enough of a stream to see its opening and the end of its first section.
_SNIFF: Final = 1 << 20


def peer_of(prefix: bytes) -> PeerProfile:
    """How a stream that begins with *prefix* is written: whether with a configuration section, and with footers.

    A stream that cannot be understood is taken for an ordinary one; reading it will say what is wrong.
    """
    configuration = prefix[8:9] in (b"", bytes((Section.CONFIGURATION,)))
    decoder = Decoder(measure=None, configuration=configuration, footers=False, buffer_bytes=2 * max(1, len(prefix)))
    decoder.feed(prefix)
    footers = True
    with contextlib.suppress(RemoteProtocolError):
        while (event := decoder.next_event()) is not None:
            if isinstance(event, ev.RamEnd):
                footers = prefix[event.at + 8 : event.at + 9] in (b"", bytes((Section.FOOTER,)))
                break
    if configuration and footers:
        return PeerProfile(name="as in the file")
    return PeerProfile(
        name="as in the file", send_configuration=configuration, send_section_footer=footers, store_global_state=False
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
        return await _read(fd, guest, partial=partial)
    finally:
        os.close(fd)


async def _read(fd: int, guest: OpaqueGuest, *, partial: bool) -> Read:
    prefix = await offload(_read_prefix, fd)
    peer = peer_of(prefix)
    decoder = Decoder(
        measure=None,
        configuration=peer.send_configuration,
        footers=peer.send_section_footer,
        buffer_bytes=2 * _SNIFF,
    )
    decoder.feed(prefix)
    ram = RamReceiver(Counters())
    tail = tail_in.buffer(footers=peer.send_section_footer)
    machine = ""
    subsections: tuple[ConfigSubsection, ...] = ()
    tail_at = None
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
                case ev.CommandElement():
                    check_kept_command(event.number, len(event.payload), event.at)
                case ev.TailBytes():
                    tail_at = event.at if tail_at is None else tail_at
                    await tail_in.feed(tail, event.data)
        if ended or tail.complete:
            break
        count = await offload(os.readv, fd, [decoder.writable()[:_READ]])
        decoder.received(count)
        if not count:
            decoder.receive_eof()
            ended = True
    if tail_at is None:
        raise RemoteProtocolError("the stream has no devices", offset=decoder.offset)
    problems = [f"{count} pages of RAM block {name!r} are not in the stream" for name, count in ram.missing().items()]
    if problems and not partial:
        raise RemoteProtocolError(f"{problems[0]} (what a lost postcopy has left is completed by trimig merge)")
    problems += await _take_tail(guest, tail, tail_at)
    return Read(peer=peer, problems=problems, received=ram.received())


def _read_prefix(fd: int) -> bytes:
    parts: list[bytes] = []
    have = 0
    while have < _SNIFF and (part := os.read(fd, _SNIFF - have)):
        parts.append(part)
        have += len(part)
    return b"".join(parts)


async def _take_tail(guest: OpaqueGuest, tail: TailBuffer, at: int) -> Sequence[str]:
    try:
        split = await tail_in.split(tail, at)
    except Undelimited as error:
        if error.offset == at + len(tail):
            raise TransportFailed(
                f"the stream ends at byte {error.offset} (0x{error.offset:x}), before the guest was complete"
            ) from error
        raise
    for number, payload, where in split.commands:
        check_kept_command(number, len(payload), where)
    await guest.ram_received()
    await guest.load_opaque(split.sections, split.description_text)
    return tail_in.first_problems(split)
