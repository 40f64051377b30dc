"""Events -> bytes of the main stream.

RAM is the exception: for pages only the *headers* are made here (an array of words), because the page data goes from
guest memory to the transport without passing through Python (see :mod:`trimig.engine.ram.sender`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import LocalProtocolError
from .constants import MAGIC, RAM_VERSION, VERSION, RamFlag, Section
from .events import (
    CommandElement,
    Configuration,
    DescriptionElement,
    DevicePayload,
    Element,
    EndOfStream,
    FileHeader,
    PackageElement,
    PageElement,
    RamEnd,
    RamList,
    RamSync,
    SectionFooter,
    SectionHeader,
    TailBytes,
)

if TYPE_CHECKING:
    from ..guest import ConfigSubsection, DeviceSection

_BE16X2 = struct.Struct(">BHH")
_BE32 = struct.Struct(">I")
_BE64 = struct.Struct(">Q")
_TAG32 = struct.Struct(">BI")

#: The word that ends the records of a RAM section.
END_WORD = _BE64.pack(RamFlag.EOS)
#: The word behind which a receiver waits until each data channel of multifd has come to its packet with SYNC.
SYNC_WORD = _BE64.pack(RamFlag.MULTIFD_FLUSH)

Words = NDArray[np.uint64]


def name_bytes(text: str) -> bytes:
    """The bytes of a name on the wire. A name that was read from the wire and is not UTF-8 gives its original bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise LocalProtocolError(f"the name {text[:40]!r} has no form in bytes") from None


def cstr(text: str) -> bytes:
    """A counted string; LocalProtocolError if its length does not fit one byte."""
    data = name_bytes(text)
    if len(data) > 255:
        raise LocalProtocolError(f"{text[:40]!r}… has {len(data)} bytes, the wire allows 255 in a name")
    return bytes([len(data)]) + data


def file_header() -> bytes:
    """Magic and version."""
    return MAGIC + _BE32.pack(VERSION)


def configuration(machine: str, subsections: Iterable[ConfigSubsection] = ()) -> bytes:
    """The configuration section (stream.md part 4)."""
    name = name_bytes(machine)
    parts = [_TAG32.pack(Section.CONFIGURATION, len(name)), name]
    for sub in subsections:
        parts += [bytes([Section.SUBSECTION]), cstr(sub.name), _BE32.pack(sub.version), sub.payload]
    return b"".join(parts)


def section_start(kind: Section, section_id: int, idstr: str, instance_id: int, version_id: int) -> bytes:
    """Header of a START or FULL section."""
    return _TAG32.pack(kind, section_id) + cstr(idstr) + struct.pack(">II", instance_id, version_id)


def section_continue(kind: Section, section_id: int) -> bytes:
    """Header of a PART or END section."""
    return _TAG32.pack(kind, section_id)


def section_footer(section_id: int) -> bytes:
    """End mark of a section."""
    return _TAG32.pack(Section.FOOTER, section_id)


def command(number: int, payload: bytes = b"") -> bytes:
    """A COMMAND element (commands.md part 1); LocalProtocolError if the payload does not fit 16 bits of length."""
    if len(payload) > 0xFFFF:
        raise LocalProtocolError(f"a payload of {len(payload)} bytes, the wire allows 65535 in a command")
    return _BE16X2.pack(Section.COMMAND, number, len(payload)) + payload


def ping(value: int) -> bytes:
    """PING: the destination answers with PONG once everything before it is loaded."""
    return command(2, _BE32.pack(value))


def ram_list(blocks: Iterable[tuple[str, int]], page_sizes: Mapping[str, int] | None = None) -> bytes:
    """The size list of RAM START, without the end word.

    Args:
        page_sizes: host page sizes in bytes to be included, by the block's name; only after ADVISE.
    """
    total, entries = 0, b""
    for name, length in blocks:
        total += length
        entries += cstr(name) + _BE64.pack(length)
        if page_sizes and name in page_sizes:
            entries += _BE64.pack(page_sizes[name])
    return _BE64.pack(total | RamFlag.MEM_SIZE) + entries


def end_of_stream() -> bytes:
    """The end-of-file byte."""
    return bytes([Section.EOF])


def description(text: bytes) -> bytes:
    """The JSON description, sent after the end of file."""
    return _TAG32.pack(Section.VMDESCRIPTION, len(text)) + text


def device_section(section: DeviceSection, section_id: int, *, footer: bool = True) -> bytes:
    """One whole FULL section."""
    head = section_start(Section.FULL, section_id, section.idstr, section.instance_id, section.version_id)
    return head + section.payload + (section_footer(section_id) if footer else b"")


class RecordWriter:
    """Makes headers of page records. It stores the block that the last record named, so that the next may say "the
    same".

    The stored block stays valid across sections (ram.md part 4), so one writer serves a whole stream.
    """

    def __init__(self) -> None:
        self._block: str | None = None

    def words(self, block: str, offsets: NDArray[np.int64], flag: RamFlag) -> tuple[bytes, Words]:
        """Headers for one record per offset.

        Returns:
            ``(name, words)``: the first word of each record, big-endian as on the wire, and the counted block name that
            belongs directly after the *first* word; empty if that record continues the previous block.
        """
        words = offsets.astype(np.uint64) | np.uint64(flag | RamFlag.CONTINUE)
        name = b""
        if block != self._block and len(words):
            name = cstr(block)
            words[0] ^= np.uint64(RamFlag.CONTINUE)
            self._block = block
        return name, words.astype(">u8")

    def zero_records(self, block: str, offsets: NDArray[np.int64], fills: NDArray[np.uint8] | None = None) -> bytes:
        """Complete ZERO records, one per offset."""
        name, words = self.words(block, offsets, RamFlag.ZERO)
        records = np.zeros((len(words), 9), np.uint8)
        records[:, :8] = words.view(np.uint8).reshape(-1, 8)
        if fills is not None:
            records[:, 8] = fills
        data = records.tobytes()
        return data[:8] + name + data[8:] if name else data

    def page_records(self, block: str, offsets: NDArray[np.int64], data: NDArray[np.uint8]) -> bytes:
        """Complete PAGE records, one per offset; *data* has shape (n, page size)."""
        name, words = self.words(block, offsets, RamFlag.PAGE)
        records = np.empty((len(words), 8 + data.shape[1]), np.uint8)
        records[:, :8] = words.view(np.uint8).reshape(-1, 8)
        records[:, 8:] = data
        out = records.tobytes()
        return out[:8] + name + out[8:] if name else out

    def records(self, block: str, offsets: NDArray[np.int64], flag: RamFlag, contents: Iterable[bytes]) -> bytes:
        """Complete records of any encoding: for each offset the word, and one of *contents*."""
        name, words = self.words(block, offsets, flag)
        heads = words.tobytes()
        pieces = [heads[8 * n : 8 * n + 8] + content for n, content in enumerate(contents)]
        return heads[:8] + name + pieces[0][8:] + b"".join(pieces[1:]) if pieces else b""

    def forget(self) -> None:
        """The next record names its block again."""
        self._block = None


class Encoder:
    """Writes events as the decoder reads them: decoding a stream and encoding its events gives the same bytes.

    Three things that no sender writes are not kept: an offset in the end word of a RAM section, bytes after the
    description, and the announced length of a description that was cut short.
    """

    def __init__(self) -> None:
        self._records = RecordWriter()

    def encode(self, event: Element) -> bytes:
        """The bytes of one event."""
        match event:
            case FileHeader(version=version):
                return MAGIC + _BE32.pack(version)
            case Configuration():
                return configuration(event.machine, event.subsections)
            case SectionHeader(kind=Section.START | Section.FULL):
                return section_start(event.kind, event.section_id, event.idstr, event.instance_id, event.version_id)
            case SectionHeader():
                return section_continue(event.kind, event.section_id)
            case SectionFooter():
                return section_footer(event.section_id)
            case CommandElement():
                return command(event.number, event.payload)
            case PackageElement(data=data):
                return data
            case RamList():
                return ram_list(event.blocks, event.page_sizes)
            case PageElement():
                if event.named:
                    self._records.forget()
                return event.records(self._records)
            case RamEnd():
                return END_WORD
            case RamSync():
                return SYNC_WORD
            case DevicePayload(payload=payload):
                return payload
            case TailBytes(data=data):
                return data
            case EndOfStream():
                return end_of_stream()
            case DescriptionElement(text=text):
                return description(text)
        raise LocalProtocolError(f"{type(event).__name__} is not an element of the main stream")


__all__ = [
    "END_WORD",
    "RAM_VERSION",
    "SYNC_WORD",
    "Encoder",
    "RecordWriter",
    "command",
    "configuration",
    "cstr",
    "description",
    "device_section",
    "end_of_stream",
    "file_header",
    "name_bytes",
    "ping",
    "ram_list",
    "section_continue",
    "section_footer",
    "section_start",
]
