"""Bytes of the main stream -> events, in batches, from a buffer that the caller fills.

Use::

    decoder = Decoder(measure=...)
    n = read_into(decoder.writable())
    decoder.received(n)                      # or decoder.receive_eof()
    while (event := decoder.next_event()) is not None:
        ...                                  # page runs are views into the buffer: use them before writable()

The invariant, which is fuzzed: any bytes give events or one :class:`RemoteProtocolError` with the offset of the
wrong element, for any division of the bytes into pieces; nothing is allocated for a length before the length was
checked. After an error the decoder is unusable: every further call raises the same error again.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Loss, RemoteProtocolError, TransportFailed
from ..guest import PAGE_SIZE
from . import commands, header
from . import events as ev
from .configuration import read_configuration
from .constants import Command, Section
from .description_text import DescriptionText
from .early import FooterSearch
from .pages.state import PageState
from .refusals import Unsupported, wrong_page_size
from .sections.reader import SectionFormat, SectionReader, Window, check_start
from .sections.table import SECTIONS

if TYPE_CHECKING:
    from .measure import Measure

_BE32 = struct.Struct(">I")


class Decoder:
    """Reads one main stream.

    Args:
        measure: finds the length of device payloads. None: everything from the first FULL section on is returned
            undivided as :class:`TailBytes`, because the wire format does not tell where an unknown device ends.
        configuration: the stream has a configuration section (``send-configuration``). None: the first byte decides.
        footers: sections end with a footer (``send-section-footer``). None: the byte after the first section decides.
        description: a JSON description may follow the end of file.
        max_device_bytes: longest accepted payload of one device.
        max_description_bytes: longest accepted description.
        max_ram_bytes: largest accepted sum of the RAM blocks.
        reorder: alternating records of pages and of zero pages may be returned as one event of each kind. This is
            faster and gives the same memory, but not the same bytes if the events are written again.
        continues: the decoder of the main stream, for a decoder that reads a later connection or a package of it. Then
            sections and RAM blocks are known, and there is no header.
        sections: the iterative sections that are read, ``ram`` among them; with *continues* those of that stream.
        records_only: for the second connection of postcopy-preempt: page records and an end word, no sections.
        buffer_bytes: size of the buffer; it grows only for an element that does not fit, and all elements are bounded.
    """

    def __init__(
        self,
        *,
        measure: Measure | None,
        configuration: bool | None = True,
        footers: bool | None = True,
        description: bool = True,
        max_device_bytes: int = 256 << 20,
        max_description_bytes: int = 64 << 20,
        max_ram_bytes: int = 1 << 48,
        reorder: bool = False,
        continues: Decoder | None = None,
        sections: Mapping[str, SectionFormat] = SECTIONS,
        records_only: bool = False,
        buffer_bytes: int = 2 << 20,
    ) -> None:
        self._measure = measure
        self._expect_configuration = configuration
        self._footers = footers
        self._expect_description = description
        self._max_device_bytes = max_device_bytes
        self._array = np.empty(max(buffer_bytes, 2 * PAGE_SIZE), np.uint8)
        self._mem = self._array.data
        self._pos = 0  # first byte that is not consumed
        self._end = 0  # first byte that is not filled
        self._base = 0  # stream offset of buffer[0]
        self._eof = False
        self._failure: Exception | None = None
        self._state: Callable[[], ev.Element | None] = self._read_file_header
        self._started: dict[int, ev.SectionHeader] = {}
        self._section: ev.SectionHeader | None = None
        self._pages = PageState(reorder=reorder, max_ram_bytes=max_ram_bytes)
        self._sections: Mapping[str, SectionFormat] = sections if continues is None else continues._sections
        self._readers = {idstr: row.reader(self._pages) for idstr, row in self._sections.items()}
        self._reader: SectionReader = self._readers["ram"]
        self._part_begun = continues is not None
        self._footer_search = FooterSearch(0)
        self._package_bytes = 0
        if continues is not None:
            self._state = self._read_content if records_only else self._read_section
            self._started = dict(continues._started)
            self._pages.know(continues.blocks)
        self._records_only = records_only
        self._marks = False
        self._text = DescriptionText(max_description_bytes)

    # -- the buffer ------------------------------------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Stream offset of the first byte that no event has consumed."""
        return self._base + self._pos

    @property
    def configuration(self) -> bool | None:
        """Whether the stream has a configuration section; None while that is not known."""
        return self._expect_configuration

    @property
    def footers(self) -> bool | None:
        """Whether sections end with a footer; None while that is not known."""
        return self._footers

    @property
    def pending(self) -> int:
        """Bytes in the buffer that no event has consumed."""
        return self._end - self._pos

    @property
    def page_size(self) -> int | None:
        """The size in bytes of the guest's pages, if the offsets of the pages show that it is not the usual one."""
        return self._pages.sizes.of_places(self._pages.blocks)

    @property
    def section(self) -> str | None:
        """The section being read, for messages."""
        return self._section.idstr if self._section is not None else None

    @property
    def blocks(self) -> Mapping[str, int]:
        """Used lengths of the announced RAM blocks, by name."""
        return self._pages.blocks

    def writable(self) -> memoryview:
        """Room for more bytes, at least one; invalidates the arrays of earlier events."""
        if self._pos == self._end:
            self._base += self._pos
            self._pos = self._end = 0
        elif len(self._mem) - self._end < len(self._mem) // 4:
            rest = self._end - self._pos
            self._array[:rest] = self._array[self._pos : self._end].copy()
            self._base += self._pos
            self._pos, self._end = 0, rest
            if rest == len(self._mem):
                self._grow(2 * rest)
        return self._mem[self._end :]

    def received(self, count: int) -> None:
        """*count* bytes were put at the start of the view from :meth:`writable`."""
        self._end += count

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Copy *data* into the buffer. Raises ValueError if *data* does not fit into :meth:`writable`."""
        view = self.writable()
        if len(data) > len(view):
            raise ValueError(f"{len(data)} bytes do not fit into the {len(view)} that are free")
        view[: len(data)] = data
        self.received(len(data))

    def accept_marks(self) -> None:
        """From now on accept the commands of :mod:`.marks`: the caller has seen the sender's mark."""
        self._marks = True

    def receive_eof(self) -> None:
        """The connection has ended after the bytes given so far."""
        self._eof = True

    # -- placing pages without the buffer (see trimig.engine.ram.receiver) ---------------------------------------------------

    @property
    def open_run(self) -> tuple[str, int, int] | None:
        """``(block, next offset, length of the run so far)`` during a run of consecutive pages of one block, else None.

        Only while the buffer holds less than one record: the next bytes belong to that record.
        """
        if self._state != self._read_content or self._end - self._pos >= 8 + PAGE_SIZE:
            return None
        return self._pages.open_run

    def take_rest(self) -> bytes:
        """Remove and return the bytes of the incomplete record in the buffer; :attr:`offset` stays at its start."""
        rest = bytes(self._mem[self._pos : self._end])
        self._base += self._pos
        self._pos = self._end = 0
        return rest

    def placed(self, pages: int) -> None:
        """The caller has consumed *pages* whole PAGE records that continue the open run."""
        self._base += pages * (8 + PAGE_SIZE)
        self._pages.extend_run(pages)

    def end_run(self) -> None:
        """End the open run, which does not go on as predicted."""
        self._pages.end_run()

    def give_back(self, data: bytes) -> None:
        """Put *data* back at :attr:`offset`. The buffer must be empty (see :meth:`take_rest`)."""
        if self._pos != self._end:
            raise ValueError("bytes can be given back to an empty buffer only")
        self._base += self._pos
        self._pos = self._end = 0
        if len(data) > len(self._mem) // 2:
            self._grow(2 * len(data))
        self._mem[: len(data)] = data
        self._end = len(data)

    # -- events ----------------------------------------------------------------------------------------------------

    def next_event(self) -> ev.Element | None:
        """The next element; None if more bytes are needed (or, after the end, no more elements follow).

        Raises:
            RemoteProtocolError: the bytes are not a stream for this guest.
            TransportFailed: the connection ended in the middle of the stream.
        """
        if self._failure is not None:
            raise self._failure
        try:
            event = self._state()
        except RemoteProtocolError as error:
            if not isinstance(error, Unsupported) and (size := self._pages.sizes.of_content()) is not None:
                error = wrong_page_size(size, section="ram")
            if error.offset is None:
                error = type(error)(error.reason, offset=self.offset, section=error.section or self.section)
            self._failure = error
            raise error from None
        if event is None and self._eof and self._state not in (self._read_nothing, self._read_tail):
            if self._state == self._read_description:
                return self._cut_description()
            where = f" in section {self.section!r}" if self.section else ""
            if self._state == self._read_file_header and self._end == self._pos == self._base == 0:
                self._failure = TransportFailed(
                    "the peer closed the connection without sending anything", loss=Loss.CLOSED
                )
            else:
                have = self._end - self._pos
                self._failure = TransportFailed(
                    f"the stream ends{where} at byte {self.offset + have} (0x{self.offset + have:x}), "
                    f"before the guest was complete",
                    loss=Loss.CLOSED,
                )
            raise self._failure
        return event

    def _error(self, text: str) -> RemoteProtocolError:
        return RemoteProtocolError(text, offset=self.offset, section=self.section)

    def _have(self, count: int) -> bool:
        return self._end - self._pos >= count

    def _be32(self, at: int) -> int:
        return int(_BE32.unpack_from(self._mem, self._pos + at)[0])

    def _consume(self, count: int) -> int:
        """Skip *count* bytes; returns the stream offset of the first."""
        at = self.offset
        self._pos += count
        return at

    def _cstr(self, at: int) -> str | None:
        """The counted string *at* bytes ahead; None if it is not complete."""
        if not (self._have(at + 1) and self._have(at + 1 + self._mem[self._pos + at])):
            return None
        start = self._pos + at + 1
        return bytes(self._mem[start : start + self._mem[start - 1]]).decode("utf-8", "surrogateescape")

    def _grow(self, size: int) -> None:
        array = np.empty(size, np.uint8)
        rest = self._end - self._pos
        array[:rest] = self._array[self._pos : self._end]
        self._base += self._pos
        self._array, self._mem = array, array.data
        self._pos, self._end = 0, rest

    def _read_file_header(self) -> ev.Element | None:
        version = header.read_file_header(self._mem[self._pos : self._end], final=self._eof)
        if version is None:
            return None
        self._state = self._read_section if self._expect_configuration is False else self._read_configuration
        return ev.FileHeader(version=version, at=self._consume(header.LENGTH))

    def _read_configuration(self) -> ev.Element | None:
        if not self._have(1):
            return None
        kind = self._mem[self._pos]
        if kind != Section.CONFIGURATION and self._expect_configuration is None:
            self._expect_configuration = False
            self._state = self._read_section
            return self._read_section()
        if kind != Section.CONFIGURATION:
            raise self._error(
                f"the configuration section is missing: found type {kind:#04x} instead of 0x07 (machine types up to 2.3 "
                "have none; the peer profile legacy-2.3 says so)"
            )
        found = read_configuration(self._mem[self._pos : self._end], self.offset)
        if found is None:
            return None
        machine, subsections, used = found
        self._state = self._read_section
        self._expect_configuration = True
        return ev.Configuration(machine=machine, subsections=subsections, at=self._consume(used))

    def _read_section(self) -> ev.Element | None:
        if not self._have(1):
            return None
        kind = self._mem[self._pos]
        match kind:
            case Section.START:
                return self._read_section_start(Section.START)
            case Section.FULL:
                if self._measure is None and (self._part_begun or self._footers is False):
                    self._state = self._read_tail
                    return self._read_tail()
                return self._read_section_start(Section.FULL)
            case Section.PART | Section.END:
                return self._read_section_continue(Section(kind))
            case Section.COMMAND:
                return self._read_command()
            case Section.EOF:
                self._state = self._read_description if self._expect_description else self._read_nothing
                return ev.EndOfStream(at=self._consume(1))
        raise self._error(f"unknown section type {kind} (0x{kind:02x})")

    def _read_section_start(self, kind: Section) -> ev.Element | None:
        idstr = self._cstr(5)
        if idstr is None:
            return None
        head = 6 + self._mem[self._pos + 5]
        if not self._have(head + 8):
            return None
        if not idstr:
            raise self._error("section with an empty device id string")
        instance_id, version_id = self._be32(head), self._be32(head + 4)
        section_id = self._be32(1)
        if kind is Section.START:
            check_start(self._sections, self._started, section_id, idstr, instance_id, version_id, self.offset)
        else:
            self._state = self._read_device if self._measure is not None else self._read_early
            self._footer_search = FooterSearch(section_id)
        at = self._consume(head + 8)
        header = ev.SectionHeader(
            kind=kind, section_id=section_id, idstr=idstr, instance_id=instance_id, version_id=version_id, at=at
        )
        self._section = header
        if kind is Section.START:
            # A repeated START replaces the earlier one, as in QEMU; so the table cannot grow.
            self._started = {n: other for n, other in self._started.items() if other.idstr != idstr}
            self._started[section_id] = header
            self._begin_content(header)
        return header

    def _begin_content(self, header: ev.SectionHeader) -> None:
        self._reader = self._readers[header.idstr]
        self._reader.begin(header)
        self._state = self._read_content

    def _read_section_continue(self, kind: Section) -> ev.Element | None:
        if not self._have(5):
            return None
        section_id = self._be32(1)
        started = self._started.get(section_id)
        if started is None:
            raise self._error(f"section {kind.name} with the id {section_id}, which no START has announced")
        self._part_begun = True
        self._section = header = dataclasses.replace(started, kind=kind, at=self._consume(5))
        self._begin_content(header)
        return header

    def _read_command(self) -> ev.Element | None:
        found = commands.read_command(self._mem[self._pos : self._end], marks=self._marks)
        if found is None:
            return None
        number, payload = found
        if number == Command.PACKAGED:
            self._package_bytes = int.from_bytes(payload)
            if self._package_bytes > self._max_device_bytes:
                raise self._error(
                    f"package of {self._package_bytes} bytes, at most {self._max_device_bytes} are accepted"
                )
            self._state = self._read_package
        if number == Command.POSTCOPY_ADVISE and len(payload) == 16:
            self._pages.host_page_sizes = int.from_bytes(payload[:8])
        return ev.CommandElement(number=number, payload=payload, at=self._consume(commands.HEAD + len(payload)))

    def _read_package(self) -> ev.Element | None:
        if not self._have(self._package_bytes):
            # Not before half of the buffer is full: the length is only announced.
            if self._package_bytes > len(self._mem) // 2 < self._end - self._pos:
                self._grow(min(2 * len(self._mem), 2 * self._package_bytes))
            return None
        data = bytes(self._mem[self._pos : self._pos + self._package_bytes])
        self._state = self._read_section
        return ev.PackageElement(data=data, at=self._consume(self._package_bytes))

    def _read_content(self) -> ev.Element | None:
        """Read the content of an iterative section."""
        event, used = self._reader.read(Window(self._array, self._pos, self._end, self.offset, self._eof))
        if event is not None:
            self._pos += used
            if self._reader.ended:
                self._end_section()
        return event

    def _read_early(self) -> ev.Element | None:
        """Read a section of an unknown device before the RAM."""
        data = self._footer_search.data
        data += self._mem[self._pos + len(data) : self._end]
        length = self._footer_search.find(self._started, final=self._eof)
        if length is None:
            return self._more_of_device(len(data))
        self._end_section()
        return ev.DevicePayload(payload=bytes(data[:length]), at=self._consume(length))

    def _read_device(self) -> ev.Element | None:
        assert self._measure is not None
        assert self._section is not None
        section = self._section
        with self._mem[self._pos : self._end] as data:
            length = self._measure(section.idstr, section.instance_id, section.version_id, data)
        if length is not None and self._have(length):
            payload = bytes(self._mem[self._pos : self._pos + length])
            self._end_section()
            return ev.DevicePayload(payload=payload, at=self._consume(length))
        return self._more_of_device(self._end - self._pos)

    def _more_of_device(self, have: int) -> ev.Element | None:
        """Make room for more of a device section of which *have* bytes are there."""
        if have >= self._max_device_bytes:
            raise self._error(f"device state of more than {self._max_device_bytes} bytes")
        if have > len(self._mem) // 2:
            self._grow(min(2 * len(self._mem), 2 * self._max_device_bytes))
        return None

    def _end_section(self) -> None:
        if self._records_only:
            self._state = self._read_nothing
            return
        self._state = self._read_section if self._footers is False else self._read_footer
        if self._footers is False:
            self._section = None

    def _read_footer(self) -> ev.Element | None:
        assert self._section is not None
        if not self._have(1):
            return None
        kind = self._mem[self._pos]
        if kind != Section.FOOTER and self._footers is None:
            self._footers = False
            self._section = None
            self._state = self._read_section
            return self._read_section()
        if kind != Section.FOOTER:
            raise self._error(f"missing section footer: found {kind:#04x} instead of 0x7e")
        if not self._have(5):
            return None
        section_id = self._be32(1)
        if section_id != self._section.section_id:
            raise self._error(f"section footer with the id {section_id}, expected {self._section.section_id}")
        self._section = None
        self._footers = True
        self._state = self._read_section
        return ev.SectionFooter(section_id=section_id, at=self._consume(5))

    def _read_tail(self) -> ev.Element | None:
        data = bytes(self._mem[self._pos : self._end])
        if not data:
            return None
        return ev.TailBytes(data=data, at=self._consume(len(data)))

    def _read_description(self) -> ev.Element | None:
        event, used = self._text.take(self._mem[self._pos : self._end], self.offset)
        self._consume(used)
        if event is not None:
            self._state = self._read_nothing
        return event

    def _cut_description(self) -> ev.Element | None:
        self._state = self._read_nothing
        event = self._text.cut(self.offset)
        self._pos = self._end
        return event

    def _read_nothing(self) -> ev.Element | None:
        self._pos = self._end  # bytes after the description are ignored (stream.md part 7)
        return None
