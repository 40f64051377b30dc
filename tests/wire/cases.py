"""The cases of the main stream: events and the bytes they are, written down once and used in both directions.

The bytes are literal, from the worked examples of the protocol documents and from its tables; none were made by the
code under test. A case stands behind a prefix that brings the decoder to where the element is legal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from trimig.errors import RemoteProtocolError, TransportFailed
from trimig.guest import PAGE_SIZE, ConfigSubsection
from trimig.wire import Command, Decoder, Encoder, Section, events
from trimig.wire.pages.compressed import CompressedRun
from trimig.wire.pages.xbzrle import DeltaRun

PAYLOADS: Final = {"timer": 24, "globalstate": 104, "cpu_common": 8}


def measure(idstr: str, instance_id: int, version_id: int, data: memoryview) -> int | None:
    """Lengths of the few devices that the cases have."""
    if idstr not in PAYLOADS:
        raise RemoteProtocolError(f"unknown device {idstr!r}, instance {instance_id}")
    if version_id > 2:
        raise RemoteProtocolError(f"version {version_id} of {idstr!r} is too new")
    return PAYLOADS[idstr] if len(data) >= PAYLOADS[idstr] else None


def hexed(text: str) -> bytes:
    """Bytes of a hex dump's digits; what stands in quotes is text."""
    parts = text.split('"')
    return b"".join(part.encode() if i % 2 else bytes.fromhex(part) for i, part in enumerate(parts))


def page(seed: int) -> bytes:
    """A page of content that is not the same byte throughout."""
    return np.random.default_rng(seed).integers(0, 256, PAGE_SIZE, np.uint8).tobytes()


def pages(block: str, offsets: Sequence[int], content: Sequence[bytes], *, named: bool) -> events.PageRun:
    """A run of raw pages."""
    data = np.frombuffer(b"".join(content), np.uint8).reshape(-1, PAGE_SIZE)
    return events.PageRun(block=block, named=named, offsets=np.array(offsets, np.int64), data=data)


def zeros(block: str, offsets: Sequence[int], *, named: bool, fills: Sequence[int] | None = None) -> events.ZeroRun:
    """A run of pages of one byte value each."""
    values = np.array(fills if fills is not None else [0] * len(offsets), np.uint8)
    return events.ZeroRun(block=block, named=named, offsets=np.array(offsets, np.int64), fills=values)


def deltas(block: str, offsets: Sequence[int], content: Sequence[str], *, named: bool) -> DeltaRun:
    """A run of XBZRLE pages; the deltas are hexadecimal."""
    found = tuple(bytes.fromhex(delta) for delta in content)
    return DeltaRun(block=block, named=named, offsets=np.array(offsets, np.int64), deltas=found)


def compressed(block: str, offsets: Sequence[int], content: Sequence[str], *, named: bool) -> CompressedRun:
    """A run of compressed pages; the zlib streams are hexadecimal."""
    found = tuple(bytes.fromhex(stream) for stream in content)
    return CompressedRun(block=block, named=named, offsets=np.array(offsets, np.int64), streams=found)


#: The zlib stream of the worked example of ram.md part 4.
EXAMPLE_STREAM: Final = (
    "78 01 ed d0 81 0c 00 00 00 02 b0 a8 f2 47 cb a3 fd 08 6f 30 60 c0 80 01 03 06 0c 18 30 60 c0 80 01 03 06 de 07 "
    "06 70 2d 00 37"
)


def ram_header(kind: Section, section_id: int = 2) -> events.SectionHeader:
    """Header of a section of RAM."""
    return events.SectionHeader(kind=kind, section_id=section_id, idstr="ram", instance_id=0, version_id=4)


Plain = tuple[Any, ...]


def flat(found: Iterable[events.Element], *, at: bool = False) -> list[Plain]:
    """Events as values that compare, runs taken apart into records (how long a run is depends on the pieces)."""
    out: list[Plain] = []
    for event in found:
        match event:
            case events.PageRun() | events.ZeroRun():
                content = event.data if isinstance(event, events.PageRun) else event.fills[:, None]
                for i, offset in enumerate(event.offsets.tolist()):
                    where = (event.at,) if at and i == 0 else ()
                    row = (type(event).__name__, event.block, event.named and i == 0, offset, content[i].tobytes())
                    out.append(row if not at else (*row, *where))
            case DeltaRun():
                for i, offset in enumerate(event.offsets.tolist()):
                    where = (event.at,) if at and i == 0 else ()
                    out.append(("DeltaRun", event.block, event.named and i == 0, offset, event.deltas[i], *where))
            case CompressedRun():
                for i, offset in enumerate(event.offsets.tolist()):
                    where = (event.at,) if at and i == 0 else ()
                    out.append(("CompressedRun", event.block, event.named and i == 0, offset, event.streams[i], *where))
            case events.TailBytes(data=data) if out and out[-1][0] == "TailBytes":
                out[-1] = ("TailBytes", out[-1][1] + data)
            case events.TailBytes(data=data):
                out.append(("TailBytes", data))
            case _:
                fields = dataclasses.fields(event)
                out.append((type(event).__name__, *(getattr(event, f.name) for f in fields if at or f.name != "at")))
    return out


def copied(event: events.Element) -> events.Element:
    """The event with arrays of its own: those of a decoder are views of its buffer."""
    match event:
        case events.PageRun():
            return dataclasses.replace(event, data=event.data.copy(), offsets=event.offsets.copy())
        case events.ZeroRun():
            return dataclasses.replace(event, fills=event.fills.copy(), offsets=event.offsets.copy())
    return event


@dataclasses.dataclass
class Read:
    """What a decoder made of some bytes."""

    found: list[events.Element]
    error: RemoteProtocolError | TransportFailed | None
    decoder: Decoder


def read(data: bytes, *, pieces: Sequence[int] = (), step: int | None = None, eof: bool = True, **options: Any) -> Read:
    """Decode *data*, cut at *pieces* or every *step* bytes; an error ends it and is returned."""
    decoder = Decoder(**{"measure": measure, **options})
    found: list[events.Element] = []
    cuts = [0, *(range(step, len(data), step) if step else pieces), len(data)]

    def drain() -> None:
        while (event := decoder.next_event()) is not None:
            found.append(copied(event))

    try:
        for start, end in itertools.pairwise(cuts):
            piece = memoryview(data)[start:end]
            while piece:
                room = decoder.writable()
                take = min(len(room), len(piece))
                assert take > 0, "a decoder that needs more has room for more"
                room[:take] = piece[:take]
                decoder.received(take)
                piece = piece[take:]
                drain()
        if eof:
            decoder.receive_eof()
            drain()
    except (RemoteProtocolError, TransportFailed) as error:
        return Read(found, error, decoder)
    return Read(found, None, decoder)


def encode(found: Iterable[events.Element]) -> bytes:
    """The bytes of events that follow each other."""
    encoder = Encoder()
    return b"".join(encoder.encode(event) for event in found)


@dataclasses.dataclass(frozen=True)
class Case:
    """Events, their bytes, and what comes before them."""

    name: str
    found: tuple[events.Element, ...]
    data: bytes
    before: bytes = b""
    before_events: tuple[events.Element, ...] = ()

    def __str__(self) -> str:
        return self.name


HEADER: Final = hexed("51 45 56 4d 00 00 00 03")
HEADER_EVENT: Final = events.FileHeader(version=3)
MACHINE: Final = hexed('07 00 00 00 04 "none"')
MACHINE_EVENT: Final = events.Configuration(machine="none")
OPENING: Final = HEADER + MACHINE
OPENING_EVENTS: Final = (HEADER_EVENT, MACHINE_EVENT)

END_WORD: Final = hexed("00 00 00 00 00 00 00 10")
FOOTER: Final = hexed("7e 00 00 00 02")
FOOTER_EVENT: Final = events.SectionFooter(section_id=2)
START_HEAD: Final = hexed('01 00 00 00 02 03 "ram" 00 00 00 00 00 00 00 04')
LIST: Final = hexed('00 00 00 00 00 18 00 04 06 "pc.ram" 00 00 00 00 00 10 00 00 03 "rom" 00 00 00 00 00 08 00 00')
LIST_EVENT: Final = events.RamList(blocks=(("pc.ram", 0x100000), ("rom", 0x80000)))
START: Final = START_HEAD + LIST + END_WORD + FOOTER
START_EVENTS: Final = (ram_header(Section.START), LIST_EVENT, events.RamEnd(), FOOTER_EVENT)
PART: Final = hexed("02 00 00 00 02")

IN_RAM: Final = OPENING + START + PART
IN_RAM_EVENTS: Final = (*OPENING_EVENTS, *START_EVENTS, ram_header(Section.PART))

JSON: Final = (
    b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, '
    b'"fields": [{"name": "cpu_ticks_offset", "type": "int64", "size": 8}, {"name": "unused", "type": '
    b'"unused_buffer", "size": 8}, {"name": "cpu_clock_offset", "type": "int64", "size": 8}]}, {"name": '
    b'"globalstate", "instance_id": 0, "vmsd_name": "globalstate", "version": 1, "fields": [{"name": "size", '
    b'"type": "uint32", "size": 4}, {"name": "runstate", "type": "buffer", "size": 100}]}]}'
)

_GLOBALSTATE: Final = hexed('00 00 00 0a "prelaunch" 00') + bytes(90)

#: Everything of worked example A behind the configuration section (stream.md part 12).
_A_REST: Final = (
    hexed('01 00000002 03 "ram" 00000000 00000004  00000000 00000004  00000000 00000010  7e 00000002')
    + hexed("03 00000002 00000000 00000010 7e 00000002")
    + hexed('04 00000000 05 "timer" 00000000 00000002')
    + bytes(24)
    + hexed('7e 00000000 04 00000004 0b "globalstate" 00000000 00000001')
    + _GLOBALSTATE
    + hexed("7e 00000004 00 06 000001e6")
    + JSON
)
_A_REST_EVENTS: Final = (
    ram_header(Section.START),
    events.RamList(blocks=()),
    events.RamEnd(),
    FOOTER_EVENT,
    ram_header(Section.END),
    events.RamEnd(),
    FOOTER_EVENT,
    events.SectionHeader(kind=Section.FULL, section_id=0, idstr="timer", instance_id=0, version_id=2),
    events.DevicePayload(payload=bytes(24)),
    events.SectionFooter(section_id=0),
    events.SectionHeader(kind=Section.FULL, section_id=4, idstr="globalstate", instance_id=0, version_id=1),
    events.DevicePayload(payload=_GLOBALSTATE),
    events.SectionFooter(section_id=4),
    events.EndOfStream(),
    events.DescriptionElement(text=JSON),
)
EXAMPLE_A: Final = Case("example A", (*OPENING_EVENTS, *_A_REST_EVENTS), OPENING + _A_REST)
EXAMPLE_B: Final = Case(
    "example B",
    (
        *OPENING_EVENTS,
        events.CommandElement(number=Command.OPEN_RETURN_PATH),
        events.CommandElement(number=Command.PING, payload=bytes([0, 0, 0, 1])),
        *_A_REST_EVENTS,
    ),
    OPENING + hexed("08 0001 0000  08 0002 0004 00000001") + _A_REST,
)
#: The first 0xc4 bytes of worked example C and its six blocks (stream.md part 14).
EXAMPLE_C: Final = Case(
    "example C, beginning",
    (
        HEADER_EVENT,
        events.Configuration(machine="pc-i440fx-7.2"),
        ram_header(Section.START),
        events.RamList(
            blocks=(
                ("/rom@etc/acpi/tables", 0x20000),
                ("pc.ram", 0x100000),
                ("pc.bios", 0x40000),
                ("pc.rom", 0x20000),
                ("/rom@etc/table-loader", 0x1000),
                ("/rom@etc/acpi/rsdp", 0x1000),
            )
        ),
        events.RamEnd(),
        FOOTER_EVENT,
    ),
    hexed(
        """
        51 45 56 4d 00 00 00 03 07 00 00 00 0d 70 63 2d 69 34 34 30 66 78 2d 37 2e 32 01 00 00 00 02 03
        72 61 6d 00 00 00 00 00 00 00 04 00 00 00 00 00 18 20 04 14 2f 72 6f 6d 40 65 74 63 2f 61 63 70
        69 2f 74 61 62 6c 65 73 00 00 00 00 00 02 00 00 06 70 63 2e 72 61 6d 00 00 00 00 00 10 00 00 07
        70 63 2e 62 69 6f 73 00 00 00 00 00 04 00 00 06 70 63 2e 72 6f 6d 00 00 00 00 00 02 00 00 15 2f
        72 6f 6d 40 65 74 63 2f 74 61 62 6c 65 2d 6c 6f 61 64 65 72 00 00 00 00 00 00 10 00 12 2f 72 6f
        6d 40 65 74 63 2f 61 63 70 69 2f 72 73 64 70 00 00 00 00 00 00 10 00 00 00 00 00 00 00 00 10 7e
        00 00 00 02
        """
    ),
)

_P: Final = [page(n) for n in range(5)]
_AT_FIRST: Final = {"before": OPENING, "before_events": OPENING_EVENTS}
_AT_RECORDS: Final = {"before": IN_RAM, "before_events": IN_RAM_EVENTS}


def _ram(name: str, data: bytes, *found: events.Element) -> Case:
    return Case(name, found, data, before=IN_RAM, before_events=IN_RAM_EVENTS)


def _first(name: str, data: bytes, *found: events.Element) -> Case:
    return Case(name, found, data, before=OPENING, before_events=OPENING_EVENTS)


def _configuration(name: str, data: str, *subsections: tuple[str, str]) -> Case:
    subs = tuple(ConfigSubsection(name=n, version=1, payload=hexed(payload)) for n, payload in subsections)
    # The byte of another element tells that the configuration is over.
    return Case(
        name,
        (events.Configuration(machine="pc", subsections=subs), events.EndOfStream()),
        hexed(data) + b"\0",
        before=HEADER,
        before_events=(HEADER_EVENT,),
    )


CASES: Final = [
    EXAMPLE_A,
    EXAMPLE_B,
    EXAMPLE_C,
    _configuration("machine name", '07 00000002 "pc"'),
    _configuration(
        "page bits",
        '07 00000002 "pc" 05 1e "configuration/target-page-bits" 00000001 0000000c',
        ("configuration/target-page-bits", "0000000c"),
    ),
    _configuration(
        "capabilities and uuid",
        '07 00000002 "pc" 05 1a "configuration/capabilities" 00000001 00000002 0d "auto-converge" 06 "events"'
        '05 12 "configuration/uuid" 00000001 00112233445566778899aabbccddeeff',
        ("configuration/capabilities", '00000002 0d "auto-converge" 06 "events"'),
        ("configuration/uuid", "00112233445566778899aabbccddeeff"),
    ),
    _first("open return path", hexed("08 0001 0000"), events.CommandElement(number=1)),
    _first("ping", hexed("08 0002 0004 00000003"), events.CommandElement(number=2, payload=bytes([0, 0, 0, 3]))),
    _first(
        "postcopy advise",
        hexed("08 0003 0010 0000000000001000 0000000000001000"),
        events.CommandElement(number=3, payload=hexed("0000000000001000 0000000000001000")),
    ),
    _first("postcopy advise of bitmaps", hexed("08 0003 0000"), events.CommandElement(number=3)),
    _first("postcopy listen", hexed("08 0004 0000"), events.CommandElement(number=4)),
    _first("postcopy run", hexed("08 0005 0000"), events.CommandElement(number=5)),
    _first(
        "postcopy discard",
        hexed('08 0006 0029 00 06 "pc.ram" 00 0000000000100000 0000000000001000 0000000000300000 0000000000001000'),
        events.CommandElement(
            number=6,
            payload=hexed('00 06 "pc.ram" 00 0000000000100000 0000000000001000 0000000000300000 0000000000001000'),
        ),
    ),
    _first(
        "packaged",
        hexed("08 0007 0004 00000005 08 0004 0000"),
        events.CommandElement(number=7, payload=hexed("00000005")),
        events.PackageElement(data=hexed("08 0004 0000")),
    ),
    _first(
        "packaged nothing",
        hexed("08 0007 0004 00000000"),
        events.CommandElement(number=7, payload=bytes(4)),
        events.PackageElement(data=b""),
    ),
    _first("enable colo", hexed("08 0008 0000"), events.CommandElement(number=8)),
    _first("postcopy resume", hexed("08 0009 0000"), events.CommandElement(number=9)),
    _first(
        "received bitmap", hexed('08 000a 0007 06 "pc.ram"'), events.CommandElement(number=10, payload=b"\x06pc.ram")
    ),
    _first(
        "cpu_common of example C",
        hexed('04 00000004 0a "cpu_common" 00000000 00000001 00000000 00000010 7e00000004'),
        events.SectionHeader(kind=Section.FULL, section_id=4, idstr="cpu_common", instance_id=0, version_id=1),
        events.DevicePayload(payload=hexed("00000000 00000010")),
        events.SectionFooter(section_id=4),
    ),
    _ram("zero page, named", hexed('00 00 00 00 00 00 00 02 06 "pc.ram" 00'), zeros("pc.ram", [0], named=True)),
    _ram(
        "zero pages, continued",
        hexed('0000000000000002 06 "pc.ram" 00 0000000000001022 00 0000000000005022 00'),
        zeros("pc.ram", [0], named=True),
        zeros("pc.ram", [0x1000, 0x5000], named=False),
    ),
    _ram(
        "page of one byte value that is not zero",
        hexed('0000000000002002 06 "pc.ram" aa 0000000000001022 ff'),
        zeros("pc.ram", [0x2000], named=True, fills=[0xAA]),
        zeros("pc.ram", [0x1000], named=False, fills=[0xFF]),
    ),
    _ram(
        "page, named, and one that continues",
        hexed('0000000000011008 06 "pc.ram"') + _P[0] + hexed("0000000000012028") + _P[1],
        pages("pc.ram", [0x11000], [_P[0]], named=True),
        pages("pc.ram", [0x12000], [_P[1]], named=False),
    ),
    _ram(
        "the same block named again",
        hexed('0000000000011008 06 "pc.ram"') + _P[0] + hexed('0000000000012008 06 "pc.ram"') + _P[1],
        pages("pc.ram", [0x11000], [_P[0]], named=True),
        pages("pc.ram", [0x12000], [_P[1]], named=True),
    ),
    _ram(
        "pages of two blocks, out of order, the last page of a block",
        hexed('000000000007f008 03 "rom"') + _P[2] + hexed('00000000000ff008 06 "pc.ram"') + _P[3]
        + hexed("0000000000000028") + _P[4] + hexed('0000000000000002 03 "rom" 00'),
        pages("rom", [0x7F000], [_P[2]], named=True),
        pages("pc.ram", [0xFF000], [_P[3]], named=True),
        pages("pc.ram", [0], [_P[4]], named=False),
        zeros("rom", [0], named=True),
    ),
    _ram(
        "zero and raw pages in turn",
        hexed('0000000000000002 06 "pc.ram" 00 0000000000001028') + _P[0] + hexed("0000000000002022 00 0000000000003028")
        + _P[1] + hexed("0000000000004028") + _P[2] + hexed("0000000000005022 00 0000000000006022 00"),
        zeros("pc.ram", [0], named=True),
        pages("pc.ram", [0x1000], [_P[0]], named=False),
        zeros("pc.ram", [0x2000], named=False),
        pages("pc.ram", [0x3000, 0x4000], [_P[1], _P[2]], named=False),
        zeros("pc.ram", [0x5000, 0x6000], named=False),
    ),
    _ram(
        "XBZRLE pages, named and continued, between others",
        hexed(
            '0000000000001040 06 "pc.ram" 01 0003 000151 0000000000001060 01 0000 0000000000002022 00'
            " 0000000000003060 01 0006 1004deadbeef"
        ),
        deltas("pc.ram", [0x1000], ["000151"], named=True),
        deltas("pc.ram", [0x1000], [""], named=False),
        zeros("pc.ram", [0x2000], named=False),
        deltas("pc.ram", [0x3000], ["1004deadbeef"], named=False),
    ),
    _ram(
        "compressed pages, named and continued, between others",
        hexed(
            f'0000000000001100 06 "pc.ram" 0000002a {EXAMPLE_STREAM} 0000000000001120 00000002 7801'
            f" 0000000000002022 00 0000000000003120 0000002a {EXAMPLE_STREAM}"
        ),
        compressed("pc.ram", [0x1000], [EXAMPLE_STREAM], named=True),
        compressed("pc.ram", [0x1000], ["7801"], named=False),
        zeros("pc.ram", [0x2000], named=False),
        compressed("pc.ram", [0x3000], [EXAMPLE_STREAM], named=False),
    ),
    _ram(
        "continued across two borders of sections",
        hexed('0000000000000008 06 "pc.ram"') + _P[0] + END_WORD + FOOTER
        + PART + hexed("0000000000001028") + _P[1] + END_WORD + FOOTER
        + hexed("03 00000002 0000000000002022 00") + END_WORD + FOOTER,
        pages("pc.ram", [0], [_P[0]], named=True),
        events.RamEnd(),
        FOOTER_EVENT,
        ram_header(Section.PART),
        pages("pc.ram", [0x1000], [_P[1]], named=False),
        events.RamEnd(),
        FOOTER_EVENT,
        ram_header(Section.END),
        zeros("pc.ram", [0x2000], named=False),
        events.RamEnd(),
        FOOTER_EVENT,
    ),
    _ram(
        "a second START, which repeats the size list",
        END_WORD + FOOTER + START,
        events.RamEnd(),
        FOOTER_EVENT,
        *START_EVENTS,
    ),
]  # fmt: skip
