"""Lists the content of a stream: read once from front to back, in bounded memory, and up to the first damage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from ..engine import device_tail
from ..errors import RemoteProtocolError, TransportFailed, TrimigError
from ..guest import PAGE_SIZE, DeviceSection
from ..wire import events as ev
from ..wire.constants import Command, Section
from ..wire.decoder import Decoder
from ..wire.devices import decoding, globalstate
from ..wire.devices.tail import TailBuffer
from ..wire.devices.virtio_mem import absent_by_rule, overlap
from ..wire.elements import Elements
from ..wire.refusals import Unsupported, command_name, wrong_page_size
from .files import ReadInto, reading
from .pages import PageSet
from .report import BlockInfo, CommandInfo, DeviceInfo, SectionInfo, StreamReport

#: Sections and commands that are listed; further ones are only counted.
MAX_LISTED: Final = 20_000
#: Fields that are listed of all devices together: a fixed number, and one more per this many bytes of device state.
_FREE_FIELDS, _BYTES_PER_FIELD = 50_000, 16


_ZEROS: Final = np.zeros(PAGE_SIZE, np.uint8)


async def inspect_stream(source: str | os.PathLike[str], *, max_device_bytes: int = 256 << 20) -> StreamReport:
    """Read a stream from a path, or from standard input (``-``), to its end.

    Damage is reported in the result, with everything that came before it.

    Args:
        max_device_bytes: the most device state that is kept in memory, with the description.

    Raises:
        OSError: the stream cannot be read.

    **Cancellation:** there is no result.
    """
    async with reading(source) as read_into:
        inspector = _Inspector(max_device_bytes)
        await inspector.read(read_into)
        report = await inspector.finish()
    if source != "-":
        # If reading has ended early, the size is still that of the whole file.
        report.size = max(report.size, (await trio.Path(source).stat()).st_size)
    return report


class _Inspector:
    def __init__(self, max_device_bytes: int) -> None:
        self.report = StreamReport()
        self.decoder = Decoder(measure=None, configuration=None, footers=None)
        self.tail: TailBuffer | None = None
        self.tail_at = 0
        self.max_tail = max_device_bytes
        self.open: SectionInfo | None = None
        self.blocks: dict[str, BlockInfo] = {}
        self.seen: dict[str, PageSet] = {}
        self.fields_left = _FREE_FIELDS
        self.sections: Sequence[DeviceSection] = ()
        self.header: ev.SectionHeader | None = None
        self.early: list[DeviceSection] = []  # device sections before the RAM
        self.early_at: list[int] = []
        self.page_size: int | None = None  # the page size in the description, if it is not the usual one

    async def read(self, read_into: ReadInto) -> None:
        """Take all elements, up to the end of the file or to damage."""

        async def counted(view: memoryview) -> int:
            count = await read_into(view)
            report.size += count
            return count

        report, elements = self.report, Elements(self.decoder, counted)
        try:
            while (event := await elements.next()) is not None:
                report.footers = self.decoder.footers is not False
                if isinstance(event, ev.TailBytes):
                    await self._tail_bytes(event)
                elif isinstance(event, ev.PackageElement):
                    await self._package(event)
                else:
                    self._take(event)
        except TrimigError as error:
            report.error = error
        report.configuration = self.decoder.configuration is not False
        report.footers = self.decoder.footers is not False
        report.good = self.decoder.offset

    async def finish(self) -> StreamReport:
        report = self.report
        if self.tail is not None and (report.error is None or len(self.tail)):
            await self._take_tail(self.tail)
        size = self.decoder.page_size or self.page_size
        if report.error is None and size is not None:
            report.error = wrong_page_size(size)
        if not isinstance(report.error, Unsupported):
            lengths = {block.name: block.length for block in report.blocks}
            absent = absent_by_rule(lengths, self.sections)
            for name, seen in self.seen.items():
                lacking = overlap(seen.holes(), absent[name].runs()) if name in absent else 0
                self.blocks[name].missing = seen.missing - lacking
                self.blocks[name].unplugged = lacking
        for block in report.blocks:
            if block.missing:
                report.problems.append(f"{block.missing} pages of RAM block {block.name!r} are not in the stream")
        return report

    def _take(self, event: ev.Element) -> None:
        report = self.report
        match event:
            case ev.PageElement():
                self._pages(event)
            case ev.FileHeader():
                report.version = event.version
            case ev.Configuration():
                report.machine, report.subsections = event.machine, event.subsections
            case ev.RamList():
                self._ram_list(event)
            case ev.CommandElement():
                self._command(event.number, event.payload, event.at)
            case ev.SectionHeader():
                self._header(event)
                self.header = event
            case ev.DevicePayload():
                self._early(event)
            case ev.RamEnd():
                if self.open is not None:
                    self.open.size = event.at + 8 - self.open.offset
            case ev.SectionFooter():
                if self.open is not None:
                    self.open.size = event.at + 5 - self.open.offset
            case ev.EndOfStream():
                report.eof_offset = event.at
            case ev.DescriptionElement():
                report.description = event.text if event.complete else None
                if not event.complete:
                    report.problems.append("the description of the devices is missing or cut short")

    def _early(self, event: ev.DevicePayload) -> None:
        header = self.header
        assert header is not None
        self.early.append(
            DeviceSection(
                idstr=header.idstr,
                instance_id=header.instance_id,
                version_id=header.version_id,
                section_id=header.section_id,
                payload=event.payload,
                before="pages" if self.blocks else "list",
            )
        )
        self.early_at.append(header.at)

    async def _tail_bytes(self, event: ev.TailBytes) -> None:
        if self.tail is None:
            self.tail_at = event.at
            self.tail = TailBuffer(
                footers=self.report.footers, max_bytes=self.max_tail, inline_bytes=device_tail.INLINE_BYTES
            )
        await device_tail.feed(self.tail, event.data)

    def _header(self, event: ev.SectionHeader) -> None:
        self.open = SectionInfo(
            kind=event.kind.name.lower(),
            section_id=event.section_id,
            idstr=event.idstr,
            instance_id=event.instance_id,
            version_id=event.version_id,
            offset=event.at,
        )
        if self._room():
            self.report.sections.append(self.open)

    def _room(self) -> bool:
        if len(self.report.sections) + len(self.report.commands) < MAX_LISTED:
            return True
        self.report.unlisted += 1
        return False

    def _command(self, number: int, payload: bytes, at: int) -> None:
        name = command_name(number) if number in list(Command) else "unknown"
        if self._room():
            self.report.commands.append(CommandInfo(number=number, name=name, payload=payload, offset=at))

    def _ram_list(self, event: ev.RamList) -> None:
        self.blocks = {name: BlockInfo(name=name, length=length) for name, length in event.blocks}
        self.report.blocks = list(self.blocks.values())
        self.seen = {name: PageSet(length // PAGE_SIZE) for name, length in event.blocks}

    def _pages(self, event: ev.PageElement) -> None:
        for counted in (self.blocks[event.block], self.open):
            if isinstance(event, ev.ZeroRun) and counted is not None:
                counted.zero_pages += len(event.offsets)
            elif counted is not None:
                counted.pages += len(event.offsets)
        if not isinstance(event, ev.PageRun | ev.ZeroRun):
            event.content(self._former)  # a malformed page is damage
        self.seen[event.block].add(event.offsets // PAGE_SIZE)

    def _former(self, block: str, index: int) -> NDArray[np.uint8] | None:
        """In place of a page that has come: no list of contents depends on its content."""
        return _ZEROS if self.seen[block].contains(np.array([index])).all() else None

    async def _package(self, event: ev.PackageElement) -> None:
        """Read the package that postcopy sends at the switch: devices between commands, without a description of them."""
        inside = await device_tail.split_package(event.data, event.at, footers=self.report.footers, damaged=True)
        self.fields_left += len(event.data) // _BYTES_PER_FIELD
        for section, offset in zip(inside.sections, inside.offsets, strict=True):
            await self._device(section, offset)
        for number, payload, offset in inside.commands:
            self._command(number, payload, offset)
        if inside.error is not None:
            self.report.problems.append(f"the package at byte {event.at} cannot be taken apart: {inside.error.reason}")

    async def _take_tail(self, tail: TailBuffer) -> None:
        report, at = self.report, self.tail_at
        if tail.description is not None and tail.description.page_size != PAGE_SIZE:
            self.page_size = tail.description.page_size
        split = await device_tail.split(tail, at, damaged=True, early=self.early)
        self.early = list(split.early)
        report.good = at + split.eof_offset
        self.fields_left += len(tail) // _BYTES_PER_FIELD
        for section, offset in zip(self.early, self.early_at, strict=True):
            await self._device(section, offset)
        self.sections = (*self.early, *split.sections)
        for section, offset in zip(split.sections, split.offsets, strict=True):
            await self._device(section, offset)
        for number, payload, offset in split.commands:
            self._command(number, payload, offset)
        error = split.error
        if error is None:
            report.eof_offset = at + split.eof_offset
            report.description = split.description_text
            report.good += 1 + (0 if split.description_text is None else 5 + len(split.description_text))
            report.trailing = report.size - report.good
            if report.trailing and (tail.location is None or not tail.location.complete):
                report.trailing = 0
                report.error = TransportFailed(
                    f"the stream ends at byte {report.size} (0x{report.size:x}), inside the description of the devices"
                )
        elif report.error is None:
            end = at + len(tail)
            # The stream ends inside the last section, so the end of the section could not be found.
            cut = split.description_text is None
            report.error = (
                TransportFailed(
                    f"the stream ends at byte {end} (0x{end:x}), before the guest was complete ({error.reason})"
                )
                if cut
                else error
            )
        report.problems += device_tail.first_problems(split)

    async def _device(self, section: DeviceSection, offset: int) -> None:
        footer = 5 if self.report.footers else 0
        head = 5 + 1 + len(section.idstr.encode()) + 8
        assert section.section_id is not None
        device = DeviceInfo(
            idstr=section.idstr,
            instance_id=section.instance_id,
            section_id=section.section_id,
            version_id=section.version_id,
            offset=offset,
            size=len(section.payload),
            payload=section.payload,
        )
        self.report.devices.append(device)
        if section.before is None and self._room():
            self.report.sections.append(
                SectionInfo(
                    kind=Section.FULL.name.lower(),
                    section_id=section.section_id,
                    idstr=section.idstr,
                    instance_id=section.instance_id,
                    version_id=section.version_id,
                    offset=offset,
                    size=head + len(section.payload) + footer,
                )
            )
        if section.description is None:
            device.problem = "it is not described"
        else:
            work = decoding.decoding(section.description, section.payload, max_nodes=self.fields_left)
            try:
                device.fields = await device_tail.in_pieces(work)
            except RemoteProtocolError as error:
                device.problem = error.reason
            else:
                self.fields_left -= decoding.count(device.fields)
        if section.idstr == globalstate.IDSTR:
            try:
                self.report.run_state = globalstate.decode(section.payload, section.version_id)
            except RemoteProtocolError as error:
                device.problem = error.reason
