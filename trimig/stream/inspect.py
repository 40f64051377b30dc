"""What is in a stream: read once from front to back, in bounded memory, and as far as it goes if it is damaged."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import trio

from ..errors import RemoteProtocolError, TransportFailed, TrimigError
from ..guest import PAGE_SIZE, ConfigSubsection, DeviceSection, PageBitmap
from ..guests.savefile import peer_of
from ..wire import Command, Decoder, Section, globalstate
from ..wire import description as json_text
from ..wire import events as ev
from ..wire.devices import find_description, split_tail
from ..wire.refusals import Unsupported, command_name
from .files import reading

#: Sections and commands that are listed; what comes behind them is only counted.
MAX_LISTED: Final = 20_000
#: The most RAM of which each page is remembered, to tell pages that are missing (1 byte for each).
_REMEMBERED: Final = 64 << 30
_PREFIX: Final = 1 << 20


@dataclasses.dataclass(slots=True, kw_only=True)
class SectionInfo:
    """One section. Offsets and sizes in bytes; the size includes header and footer, and is None if it has no end."""

    kind: str
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    offset: int
    size: int | None = None
    #: RAM sections: PAGE and ZERO records in it.
    pages: int = 0
    zero_pages: int = 0


@dataclasses.dataclass(slots=True, kw_only=True)
class BlockInfo:
    """One RAM block, and the records of its pages; a page that was sent twice counts twice."""

    name: str
    length: int
    pages: int = 0
    zero_pages: int = 0
    #: Pages that are not in the stream; None if that was not looked at (more than 64 GiB).
    missing: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class CommandInfo:
    """One command."""

    number: int
    name: str
    payload: bytes
    offset: int


@dataclasses.dataclass(slots=True, kw_only=True)
class DeviceInfo:
    """The state of one device."""

    idstr: str
    instance_id: int
    section_id: int
    version_id: int
    #: Of the section, and the bytes of its payload.
    offset: int
    size: int
    payload: bytes
    #: Decoded by the description; None if that is not possible.
    fields: tuple[json_text.Node, ...] | None = None
    #: Why not.
    problem: str | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class StreamReport:
    """All that was found. ``error`` is None for a stream that is sound."""

    #: Bytes read, and the offset behind the last byte that was understood.
    size: int = 0
    good: int = 0
    version: int | None = None
    machine: str | None = None
    subsections: Sequence[ConfigSubsection] = ()
    #: The stream has a configuration section, and footers.
    configuration: bool = True
    footers: bool = True
    sections: list[SectionInfo] = dataclasses.field(default_factory=list)
    commands: list[CommandInfo] = dataclasses.field(default_factory=list)
    #: Sections and commands that are not listed, because there are too many.
    unlisted: int = 0
    blocks: list[BlockInfo] = dataclasses.field(default_factory=list)
    devices: list[DeviceInfo] = dataclasses.field(default_factory=list)
    #: From ``globalstate``.
    run_state: str | None = None
    #: The end-of-file byte, or None.
    eof_offset: int | None = None
    #: The text of the description; None if there is none.
    description: bytes | None = None
    #: Bytes behind the end.
    trailing: int = 0
    #: What is odd, but not damage.
    problems: list[str] = dataclasses.field(default_factory=list)
    error: TrimigError | None = None

    @property
    def sound(self) -> bool:
        """Whole, and without damage."""
        return self.error is None

    @property
    def damaged(self) -> bool:
        """Something is wrong with it; not only something in it that trimig does not read."""
        return self.error is not None and not isinstance(self.error, Unsupported)

    def record(self) -> dict[str, Any]:
        """As JSON: bytes in hexadecimal."""
        error = self.error
        return {
            "sound": self.sound,
            "damaged": self.damaged,
            "size": self.size,
            "good": self.good,
            "version": self.version,
            "configuration": {
                "machine": self.machine,
                "subsections": [
                    {"name": s.name, "version": s.version, "payload": s.payload.hex()} for s in self.subsections
                ],
            }
            if self.machine is not None
            else None,
            "footers": self.footers,
            "run_state": self.run_state,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "sections": [dataclasses.asdict(section) for section in self.sections],
            "commands": [dataclasses.asdict(c) | {"payload": c.payload.hex()} for c in self.commands],
            "unlisted": self.unlisted,
            "devices": [_device_record(device) for device in self.devices],
            "eof_offset": self.eof_offset,
            "description": None if self.description is None else {"size": len(self.description)},
            "trailing": self.trailing,
            "problems": self.problems,
            "error": None
            if error is None
            else {
                "kind": type(error).__name__,
                "message": str(error),
                "offset": getattr(error, "offset", None),
                "section": getattr(error, "section", None),
            },
        }


def _device_record(device: DeviceInfo) -> dict[str, Any]:
    return {
        "idstr": device.idstr,
        "instance_id": device.instance_id,
        "section_id": device.section_id,
        "version_id": device.version_id,
        "offset": device.offset,
        "size": device.size,
        "payload": device.payload.hex(),
        "fields": None if device.fields is None else [node_record(node) for node in device.fields],
        "problem": device.problem,
    }


def node_record(node: json_text.Node) -> dict[str, Any]:
    """A field as JSON: with ``value``, ``raw`` (hexadecimal) or ``children``."""
    record: dict[str, Any] = {"name": node.name, "type": node.type, "offset": node.offset, "size": node.size}
    for name in ("index", "vmsd_name", "version"):
        if (value := getattr(node, name)) is not None:
            record[name] = value
    if node.children:
        record["children"] = [node_record(child) for child in node.children]
    elif node.value is not None:
        record["value"] = node.value
    else:
        record["raw"] = node.raw.hex()
    return record


async def inspect_stream(source: str | os.PathLike[str], *, max_device_bytes: int = 256 << 20) -> StreamReport:
    """Read a stream from a path, or from standard input (``-``), to its end.

    Damage is reported in the result, with everything that came before it.

    Args:
        max_device_bytes: the most device state that is kept in memory, with the description.

    Raises:
        OSError: it cannot be read.

    **Cancellation:** there is no result.
    """
    async with reading(source) as read_into:
        prefix = bytearray(_PREFIX)
        have = 0
        while have < _PREFIX and (count := await read_into(memoryview(prefix)[have:])):
            have += count
        del prefix[have:]
        inspector = _Inspector(bytes(prefix), max_device_bytes)
        while have and not inspector.step():
            count = await read_into(inspector.decoder.writable())
            inspector.received(count)
            if not count:
                break
            await trio.lowlevel.checkpoint()
        return inspector.finish()


class _Inspector:
    def __init__(self, prefix: bytes, max_device_bytes: int) -> None:
        peer = peer_of(prefix)
        self.report = StreamReport(configuration=peer.send_configuration, footers=peer.send_section_footer)
        self.decoder = Decoder(
            measure=None,
            configuration=peer.send_configuration,
            footers=peer.send_section_footer,
            buffer_bytes=2 * _PREFIX,
        )
        self.tail = bytearray()
        self.tail_at: int | None = None
        self.max_tail = max_device_bytes
        self.open: SectionInfo | None = None
        self.blocks: dict[str, BlockInfo] = {}
        self.seen: dict[str, PageBitmap] | None = {}
        self.decoder.feed(prefix)
        self.report.size = len(prefix)

    def received(self, count: int) -> None:
        self.decoder.received(count)
        self.report.size += count
        if not count:
            self.decoder.receive_eof()

    def step(self) -> bool:
        """Take what the decoder has; True if nothing more can be understood."""
        report = self.report
        if report.error is not None:
            return True
        try:
            while (event := self.decoder.next_event()) is not None:
                self._take(event)
        except TrimigError as error:
            report.error = error
        report.good = self.decoder.offset
        return report.error is not None

    def finish(self) -> StreamReport:
        report = self.report
        if report.error is None:
            self.decoder.receive_eof()
            self.step()
        if self.tail_at is not None and (report.error is None or self.tail):
            self._take_tail(self.tail_at)
        if self.seen is not None:
            for name, seen in self.seen.items():
                self.blocks[name].missing = len(seen) - int(np.count_nonzero(seen))
        for block in report.blocks:
            if block.missing:
                report.problems.append(f"{block.missing} pages of RAM block {block.name!r} are not in the stream")
        return report

    def _take(self, event: ev.Event) -> None:
        report = self.report
        match event:
            case ev.PageRun():
                self._pages(event)
            case ev.ZeroRun():
                self._pages(event)
            case ev.FileHeader():
                report.version = event.version
            case ev.Configuration():
                report.machine, report.subsections = event.machine, event.subsections
            case ev.RamList():
                self._ram_list(event)
            case ev.CommandElement():
                self._command(event.number, event.payload, event.at)
            case ev.Package():
                self._package(event)
            case ev.SectionHeader():
                self._header(event)
            case ev.RamEnd():
                if self.open is not None:
                    self.open.size = event.at + 8 - self.open.offset
            case ev.SectionFooter():
                if self.open is not None:
                    self.open.size = event.at + 5 - self.open.offset
            case ev.TailBytes():
                self.tail_at = event.at if self.tail_at is None else self.tail_at
                if len(self.tail) + len(event.data) > self.max_tail:
                    raise RemoteProtocolError(
                        f"the device state goes on after {self.max_tail} bytes, the most accepted", offset=event.at
                    )
                self.tail += event.data
            case ev.EndOfStream():
                report.eof_offset = event.at
            case ev.Description():
                report.description = event.text if event.complete else None
                if not event.complete:
                    report.problems.append("the description of the devices is missing or cut short")

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
        total = sum(length for _, length in event.blocks)
        self.blocks = {name: BlockInfo(name=name, length=length) for name, length in event.blocks}
        self.report.blocks = list(self.blocks.values())
        self.seen = None
        if total <= _REMEMBERED:
            self.seen = {name: np.zeros(length // PAGE_SIZE, np.bool_) for name, length in event.blocks}

    def _pages(self, event: ev.PageRun | ev.ZeroRun) -> None:
        block, count = self.blocks[event.block], len(event.offsets)
        if isinstance(event, ev.PageRun):
            block.pages += count
        else:
            block.zero_pages += count
        if self.open is not None:
            if isinstance(event, ev.PageRun):
                self.open.pages += count
            else:
                self.open.zero_pages += count
        if self.seen is not None:
            self.seen[event.block][event.offsets // PAGE_SIZE] = True

    def _package(self, event: ev.Package) -> None:
        """What postcopy sends at the switch: devices between commands, without a description of them."""
        inside = split_tail(
            event.data + bytes((Section.EOF,)), footers=self.report.footers, offset=event.at, damaged=True
        )
        for section, offset in zip(inside.sections, inside.offsets, strict=True):
            self._device(section, offset)
        for number, payload, offset in inside.commands:
            self._command(number, payload, offset)
        if inside.error is not None:
            self.report.problems.append(f"the package at byte {event.at} cannot be taken apart: {inside.error.reason}")

    def _take_tail(self, at: int) -> None:
        report = self.report
        split = split_tail(self.tail, footers=report.footers, offset=at, damaged=True)
        report.good = at + split.eof_offset
        problems = list(split.problems)
        for section, offset in zip(split.sections, split.offsets, strict=True):
            self._device(section, offset)
        for number, payload, offset in split.commands:
            self._command(number, payload, offset)
        error = split.error
        if error is None:
            report.eof_offset = at + split.eof_offset
            report.description = split.description_text
            report.good += 1 + (0 if split.description_text is None else 5 + len(split.description_text))
            report.trailing = report.size - report.good
            where = find_description(self.tail)
            if (where is None and report.trailing) or (where is not None and not where.complete):
                report.trailing = 0
                report.error = TransportFailed(
                    f"the stream ends at byte {report.size} (0x{report.size:x}), inside the description of the devices"
                )
        elif report.error is None:
            end = at + len(self.tail)
            # Inside the last section: its end could not be found because it is not there.
            cut = split.description_text is None
            report.error = (
                TransportFailed(
                    f"the stream ends at byte {end} (0x{end:x}), before the guest was complete ({error.reason})"
                )
                if cut
                else error
            )
        report.problems += problems

    def _device(self, section: DeviceSection, offset: int) -> None:
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
        if self._room():
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
            try:
                device.fields = json_text.decode_payload(section.description, section.payload)
            except RemoteProtocolError as error:
                device.problem = error.reason
        if section.idstr == globalstate.IDSTR:
            try:
                self.report.run_state = globalstate.decode(section.payload, section.version_id)
            except RemoteProtocolError as error:
                device.problem = error.reason
