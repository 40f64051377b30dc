"""A guest in a file: a plain stream with each page once, which a stock QEMU loads through ``exec:cat FILE``.

:class:`SaveFile` writes one beside its final name and gives it that name only when it is whole and on the disk, so
that nobody ever finds a part of a guest there. :func:`read_stream` fills a guest from any precopy stream in a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import trio

from ..config import PeerProfile
from ..engine.offload import offload
from ..engine.ram_in import RamReceiver
from ..engine.ram_out import RAM_SECTION
from ..engine.stream_out import DeviceSender, opening
from ..engine.vectored import MAX_ELEMENTS, Records, writev
from ..engine.zeros import zero_pages
from ..errors import GuestFailed, RemoteProtocolError, TransportFailed
from ..guest import PAGE_SIZE, ConfigSubsection, DeviceSection, OpaqueGuest, PageBitmap, RamBlock
from ..monitor import Counters
from ..wire import Decoder, RamFlag, RecordWriter, Section
from ..wire import encoder as wire
from ..wire import events as ev
from ..wire.devices import TailBuffer, Undelimited, split_tail
from ..wire.refusals import check_kept_command

#: Pages looked at and written by one call in a thread, which is what a cancellation may have to wait for.
_SLICE: Final = 4096
#: After so many bytes the file is synced, so that no single sync takes long.
_SYNC_EVERY: Final = 128 << 20
#: Pages of one gathering write.
_GATHER: Final = MAX_ELEMENTS // 2
#: Bytes read at once: copying them into memory that is still cold takes about a millisecond.
_READ: Final = 512 << 10
#: Enough of a stream to see its opening and the end of its first section.
_SNIFF: Final = 1 << 20


class SaveFile:
    """A saved guest that is being written.

    Args:
        path: its final name. The file grows in the same directory, under a hidden name and readable by its owner only.
        replace: a file of that name may be replaced; otherwise it is an error, also if it comes up meanwhile.
        peer: how the stream is written.

    Raises:
        OSError: the directory cannot be written to.
    """

    def __init__(self, path: Path, *, replace: bool, peer: PeerProfile) -> None:
        self.path = path
        self._replace = replace
        self._peer = peer
        self._records = RecordWriter()
        if not replace and path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self._fd, self._temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)

    def discard(self) -> None:
        """Remove what has been written, unless it has got its final name. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    async def write_ram(self, guest: OpaqueGuest, absent: Mapping[str, PageBitmap] | None = None) -> None:
        """Everything up to the end of RAM, on disk when it returns.

        Args:
            absent: pages that are left out, by the block's name.

        Raises:
            OSError: no room, or the disk failed.

        **Cancellation:** a part has been written; :meth:`discard` it.
        """
        footer = wire.section_footer(RAM_SECTION) if self._peer.send_section_footer else b""
        start = wire.section_start(Section.START, RAM_SECTION, "ram", 0, wire.RAM_VERSION)
        sizes = wire.ram_list((block.name, block.length) for block in guest.ram)
        await offload(self._write, opening(guest, self._peer) + start + sizes + wire.END_WORD + footer)
        unsynced = 0
        for block in guest.ram:
            left_out = (absent or {}).get(block.name)
            await offload(self._write, wire.section_continue(Section.PART, RAM_SECTION))
            for first in range(0, block.length // PAGE_SIZE, _SLICE):
                unsynced += await offload(self._write_pages, block, first, left_out)
                if unsynced > _SYNC_EVERY:
                    await offload(os.fdatasync, self._fd)
                    unsynced = 0
            await offload(self._write, wire.END_WORD + footer)
        end = wire.section_continue(Section.END, RAM_SECTION) + wire.END_WORD + footer
        await offload(self._write, end)
        await offload(os.fdatasync, self._fd)

    async def finish(self, guest: OpaqueGuest, sections: Sequence[DeviceSection]) -> None:
        """Devices and end, and then the final name; when it returns, all of it survives a loss of power.

        Raises:
            OSError: no room, the disk failed, or there is a file of that name. Nothing has that name through us then.

        **Cancellation:** cancelled with nothing done, or not at all.
        """
        sender = DeviceSender(guest, guest.run_state, self._peer)
        await offload(self._finish, sender.sections(sections) + sender.ending())

    def _finish(self, rest: bytes) -> None:
        self._write(rest)
        os.fsync(self._fd)
        if self._replace:
            os.rename(self._temporary, self.path)
        else:
            _rename_new(self._temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        except OSError:
            # The caller will say that the guest is not here, so it must not be found here.
            os.unlink(self.path)
            raise
        finally:
            os.close(directory)
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # all of it is on the disk
            os.close(fd)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[os.write(self._fd, view) :]

    def _write_pages(self, block: RamBlock, first: int, left_out: PageBitmap | None) -> int:
        pages = block.pages
        indices = np.arange(first, min(first + _SLICE, len(pages)), dtype=np.int64)
        if left_out is not None and not len(indices := indices[~left_out[indices]]):
            return 0
        zero = zero_pages(pages, indices)
        data = self._records.zero_records(block.name, indices[zero] * PAGE_SIZE) if zero.any() else b""
        self._write(data)
        indices = indices[~zero]
        for begin in range(0, len(indices), _GATHER):
            part = indices[begin : begin + _GATHER]
            name, words = self._records.words(block.name, part * PAGE_SIZE, RamFlag.PAGE)
            head = np.frombuffer(words[:1].tobytes() + name, np.uint8)
            lead = (head.ctypes.data, len(head)) if name else None
            addresses = pages.ctypes.data + part.astype(np.uint64) * np.uint64(PAGE_SIZE)
            records = Records(words.ctypes.data, 8, addresses, PAGE_SIZE, lead)
            while records.left:
                records.advance(writev(self._fd, records.rest) or 0)
        return len(indices) * PAGE_SIZE


def _rename_new(temporary: str, path: Path) -> None:
    """Give the file its name unless another one has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links; then the look and the rename cannot be one step
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)
    else:
        with contextlib.suppress(OSError):  # a second name that stays behind is no reason to disown the file
            os.unlink(temporary)


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
    tail = TailBuffer(footers=peer.send_section_footer)
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
                    tail.feed(event.data)
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
    problems += await _take_tail(guest, tail.finish(), tail_at, peer)
    return Read(peer=peer, problems=problems, received=ram.received())


def _read_prefix(fd: int) -> bytes:
    parts: list[bytes] = []
    have = 0
    while have < _SNIFF and (part := os.read(fd, _SNIFF - have)):
        parts.append(part)
        have += len(part)
    return b"".join(parts)


async def _take_tail(guest: OpaqueGuest, data: bytes, at: int, peer: PeerProfile) -> Sequence[str]:
    try:
        split = split_tail(data, footers=peer.send_section_footer, offset=at)
    except Undelimited as error:
        if error.offset == at + len(data):
            raise TransportFailed(
                f"the stream ends at byte {error.offset} (0x{error.offset:x}), before the guest was complete"
            ) from error
        raise
    for number, payload, where in split.commands:
        check_kept_command(number, len(payload), where)
    await guest.ram_received()
    await guest.load_opaque(split.sections, split.description_text)
    return split.problems


def failed(what: str, path: Path | None, error: OSError) -> GuestFailed:
    """The domain error for a file that could not be written."""
    failure = GuestFailed(f"{what}{f' {path}' if path is not None else ''}: {error.strerror or error}")
    failure.__cause__ = error
    return failure
