"""The RAM of a saved guest as a file of its own, for other tools."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..channel.offload import offload
from ..engine import device_tail
from ..errors import ConfigError, RemoteProtocolError
from ..guest import PAGE_SIZE, DeviceSection
from ..guests.named import naming
from ..guests.parked.newfile import NewFile
from ..wire import events as ev
from ..wire.decoder import Decoder
from ..wire.devices.virtio_mem import Unplugged, absent_by_rule, overlap
from ..wire.elements import Elements
from ..wire.pages.sink import put
from ..wire.refusals import wrong_page_size
from .files import STDIN, reading
from .pages import PageSet

#: The formats that can be written.
FORMATS: Final = ("raw",)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The result of an export."""

    #: Bytes.
    length: int
    #: Parts of the block that are not in the stream and zero in the file: pairs of an offset and a length, both in
    #: bytes.
    holes: Sequence[tuple[int, int]]


async def export_raw(
    source: str | os.PathLike[str],
    block: str,
    out: str | os.PathLike[str],
    *,
    replace: bool = False,
    partial: bool = False,
) -> Exported:
    """Write RAM block *block* of a stream, byte for byte.

    Args:
        source: a path, or ``-`` for standard input.
        block: the name of the block.
        out: a path, or ``-`` for standard output. Pages that are zero become holes of the file.
        replace: *out* may exist.
        partial: write pages that are not in the stream as zeros, and report them; otherwise they are an error.

    Raises:
        ConfigError: the stream has no such block (the message names those it has), or *out* is *source*.
        OSError: a file cannot be read or written, or *out* exists; with its name.
        TrimigError: the stream is damaged before the end of its RAM, or lacks some of it.

    **Cancellation:** there is no file of that name, or the whole of it.
    """
    if out == "-":
        with tempfile.TemporaryFile(prefix="trimig-export-") as scratch:
            with naming(tempfile.gettempdir()):
                done = await _copy_block(source, block, scratch.fileno(), partial)
            with naming("standard output"):
                await _to_stdout(scratch.fileno(), done.length)
        return done
    _check_other_file(source, out)
    file = NewFile(Path(out), replace=replace)
    try:
        with naming(out):
            done = await _copy_block(source, block, file.fd, partial)
            await offload(file.finish)
        return done
    finally:
        file.discard()


def _check_other_file(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Raise ConfigError if *out* is the stream itself, which would be lost."""
    try:
        same = os.path.samestat(os.fstat(0) if source == STDIN else os.stat(source), os.stat(out))
    except OSError:  # one of the files is missing; opening it will report that
        return
    if same:
        raise ConfigError(f"{os.fspath(out)} is the stream itself: the guest in it would be lost", name="out")


async def _copy_block(source: str | os.PathLike[str], block: str, fd: int, partial: bool) -> Exported:
    async with reading(source) as read_into:
        decoder = Decoder(measure=None, configuration=None, footers=None)
        elements = Elements(decoder, read_into)
        copy = _BlockCopy(block, fd)
        early: list[DeviceSection] = []
        header: ev.SectionHeader | None = None
        while not isinstance(event := await elements.next(), ev.TailBytes | ev.EndOfStream):
            assert event is not None, "the decoder takes no stream for ended that has no devices"
            if isinstance(event, ev.SectionHeader):
                header = event
            elif isinstance(event, ev.DevicePayload) and header is not None:
                early.append(
                    DeviceSection(
                        idstr=header.idstr,
                        instance_id=header.instance_id,
                        version_id=header.version_id,
                        payload=event.payload,
                    )
                )
            await copy.take(event)
        # No RAM follows a device section.
        if (size := decoder.page_size) is not None:
            raise wrong_page_size(size, section="ram")
        if copy.received.missing and isinstance(event, ev.TailBytes):
            await _read_on(event, decoder, elements, copy, early)
        return copy.finish(partial=partial)


async def _read_on(
    event: ev.TailBytes,
    decoder: Decoder,
    elements: Elements,
    copy: _BlockCopy,
    early: Sequence[DeviceSection],
) -> None:
    """Read the devices to explain missing pages: memory that was not plugged in, or pages of another size."""
    tail = device_tail.buffer(footers=decoder.footers is not False)
    tail_at = event.at
    found: ev.Element | None = event
    while isinstance(found, ev.TailBytes):
        await device_tail.feed(tail, found.data)
        found = None if tail.complete else await elements.next()
    if tail.description is not None and tail.description.page_size != PAGE_SIZE:
        raise wrong_page_size(tail.description.page_size)
    split = await device_tail.split(tail, tail_at, damaged=True, early=early)
    copy.unplugged = absent_by_rule(copy.lengths, (*split.early, *split.sections)).get(copy.name)


class _BlockCopy:
    """Writes the pages of one block to a file. A :class:`trimig.wire.pages.sink.PageSink` for that block."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd
        self.length = -1
        self.lengths: dict[str, int] = {}
        #: Pages that were not plugged in, if they are known.
        self.unplugged: Unplugged | None = None
        self.received = PageSet(0)
        self.written = PageSet(0)

    async def take(self, event: ev.Element) -> None:
        """Write the pages of the block."""
        match event:
            case ev.RamList() if self.length < 0:
                lengths = dict(event.blocks)
                if self.name not in lengths:
                    known = ", ".join(repr(name) for name in lengths)
                    raise ConfigError(
                        f"there is no RAM block {self.name!r} in the stream; it has {known}", name="block"
                    )
                self.length, self.lengths = lengths[self.name], lengths
                os.ftruncate(self.fd, self.length)
                self.received = PageSet(self.length // PAGE_SIZE)
                self.written = PageSet(self.length // PAGE_SIZE)
            case ev.PageElement(block=self.name):
                await put(self, event)

    async def pages(self, block: str, indices: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Write pages.

        **Cancellation:** no effect.
        """
        self._write(indices, data)

    async def zeros(self, block: str, indices: NDArray[np.int64], fills: NDArray[np.uint8]) -> None:
        """Write filled pages; a page that is still a hole of the file is zero already.

        **Cancellation:** no effect.
        """
        self.received.add(indices)
        do = self.written.contains(indices) | (fills != 0)
        if do.any():
            self._write(indices[do], np.repeat(fills[do, None], PAGE_SIZE, axis=1))

    def read(self, block: str, index: int) -> NDArray[np.uint8] | None:
        """The page as it is in the file; None if it has not come."""
        if not self.received.contains(np.array([index])).all():
            return None
        return np.frombuffer(os.pread(self.fd, PAGE_SIZE, index * PAGE_SIZE), np.uint8)

    def _write(self, indices: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.received.add(indices)
        self.written.add(indices)
        borders = np.flatnonzero(np.diff(indices) != 1) + 1
        for run, pages in zip(np.split(indices, borders), np.split(data, borders), strict=True):
            view = np.ascontiguousarray(pages).data.cast("B")
            at = int(run[0]) * PAGE_SIZE
            while len(view):
                done = os.pwrite(self.fd, view, at)
                view, at = view[done:], at + done

    def finish(self, *, partial: bool) -> Exported:
        """Raise RemoteProtocolError if the block must be whole and is not."""
        if self.length < 0:
            raise RemoteProtocolError("the stream has no RAM")
        missing = self.received.missing
        if missing and self.unplugged is not None:
            missing -= overlap(self.received.holes(), self.unplugged.runs())
        if missing and not partial:
            raise RemoteProtocolError(
                f"{missing} pages of RAM block {self.name!r} are not in the stream: export it with --partial, or complete "
                "it with trimig merge"
            )
        holes = [(first * PAGE_SIZE, (end - first) * PAGE_SIZE) for first, end in self.received.holes()]
        return Exported(length=self.length, holes=holes)


async def _to_stdout(fd: int, length: int) -> None:
    at = 0
    while at < length:
        at += await offload(_copy_piece, fd, at)


def _copy_piece(fd: int, at: int) -> int:
    view = memoryview(os.pread(fd, 1 << 20, at))
    size = len(view)
    while len(view):
        view = view[os.write(1, view) :]
    return size
