"""Finding the device sections in what follows the RAM, when the devices are not known.

The *tail* of a stream is everything from the type byte of its first FULL section on: FULL sections, commands between
them, the end-of-file byte and the description. A FULL section has no length, so without the devices' own declarations
its end is found through the description, which comes last; :class:`TailBuffer` keeps the bytes until it is there, and
:func:`split_tail` then cuts them up (vmstate.md part 7).

A section whose size the description does not give (part 7.6) is delimited by looking for its footer, followed by
something that can stand there. That is a guess, if a good one, and is reported in :attr:`SplitTail.problems`.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ..errors import LocalProtocolError, RemoteProtocolError
from ..guest import DeviceSection
from .constants import MAX_CSTR, Command, Section
from .description import OPENING, Description, Limits, measure_payload, parse, section_name

#: Sections and commands in one tail. A machine with a thousand processors has about five thousand.
MAX_ELEMENTS: Final = 65536

_U32: Final = struct.Struct(">I")
_COMMAND: Final = struct.Struct(">BHH")
_FOOTER_SIZE: Final = 5
#: EOF, type and length in front of the text of a description.
_BEFORE_TEXT: Final = 6
_COMMANDS: Final = frozenset(int(command) for command in Command)
_AFTER_FOOTER: Final = frozenset({Section.FULL, Section.COMMAND, Section.EOF})
_PING: Final = bytes((Section.COMMAND, 0, Command.PING, 0, 4))


class Undelimited(RemoteProtocolError):
    """The end of a section could not be found; the tail can only be kept whole."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where the description stands, in bytes from the start of the tail."""

    #: The end-of-file byte.
    eof_offset: int
    #: The text, and how long it says it is.
    text_offset: int
    text_length: int
    #: False if the tail ends inside the text.
    complete: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SplitTail:
    """A tail, cut up."""

    #: In stream order, with their objects of the description.
    sections: tuple[DeviceSection, ...]
    #: Commands between them: number, payload, offset in the stream.
    commands: tuple[tuple[int, bytes, int], ...]
    #: Where each section begins in the stream.
    offsets: tuple[int, ...]
    #: The end-of-file byte, in bytes from the start of the tail; with :attr:`error`, where it goes wrong.
    eof_offset: int
    #: The whole text of the description; None if there is none, or only a part of it.
    description_text: bytes | None
    #: What was not as it should be, in sentences.
    problems: tuple[str, ...]
    #: Why there is nothing more, if a damaged tail was asked for as far as it goes.
    error: RemoteProtocolError | None = None


def find_description(tail: bytes | bytearray) -> Location | None:
    """Find the description of a stream that ends with it, from behind.

    A text that is cut short is found too, as is one that something follows (QEMU reads nothing behind it).
    """
    end = len(tail)
    while (start := tail.rfind(OPENING, 0, end)) >= 0:
        length = _announced_length(tail, start)
        if length is not None:
            stop = start + length
            # Something behind the text is possible, but then at least the text must look whole.
            if stop >= len(tail) or tail[stop - 1 : stop] == b"}":
                return Location(
                    eof_offset=start - _BEFORE_TEXT,
                    text_offset=start,
                    text_length=length,
                    complete=stop <= len(tail),
                )
        end = start + len(OPENING) - 1
    return None


def _announced_length(tail: bytes | bytearray, start: int) -> int | None:
    """Length of a description whose text begins at *start*; None if what precedes it is not its header."""
    if start < _BEFORE_TEXT or tail[start - 6] != Section.EOF or tail[start - 5] != Section.VMDESCRIPTION:
        return None
    length = int(_U32.unpack_from(tail, start - 4)[0])
    return length if length >= len(OPENING) else None


def split_tail(
    tail: bytes | bytearray | memoryview,
    *,
    footers: bool = True,
    offset: int = 0,
    limits: Limits | None = None,
    damaged: bool = False,
) -> SplitTail:
    """Cut a tail into device sections and commands.

    Args:
        tail: from the first section's type byte to the end-of-file byte, and the description if there is one.
        footers: whether sections have footers (``send-section-footer``).
        offset: where the tail begins in the stream, for messages and commands.
        limits: what the description may be.
        damaged: give what could be read of a damaged tail instead of raising, with the error in it.

    Raises:
        Undelimited: the end of a section could not be found.
        RemoteProtocolError: the tail is damaged.
    """
    splitter = _Splitter(bytes(tail), footers, offset, limits, damaged=damaged)
    error = splitter.run()
    if error is not None and not damaged:
        raise error
    return splitter.result(error)


def join_sections(sections: Iterable[DeviceSection], *, footers: bool = True) -> bytes:
    """The bytes of FULL sections, one behind the other.

    Raises:
        LocalProtocolError: a section without number, or a name or number that does not fit.
    """
    out = bytearray()
    for section in sections:
        name = section.idstr.encode()
        if section.section_id is None:
            raise LocalProtocolError(f"section {section.idstr!r} has no section id")
        if not 1 <= len(name) <= MAX_CSTR:
            raise LocalProtocolError(f"section {section.idstr!r:.80}: a name has 1 to {MAX_CSTR} bytes")
        try:
            number = _U32.pack(section.section_id)
            ids = struct.pack(">II", section.instance_id, section.version_id)
        except struct.error as error:
            raise LocalProtocolError(f"section {section.idstr!r}: {error}") from None
        out += bytes((Section.FULL,)) + number + bytes((len(name),)) + name + ids + section.payload
        if footers:
            out += bytes((Section.FOOTER,)) + number
    return bytes(out)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    #: Where the payload begins.
    end: int


class _Splitter:
    def __init__(self, tail: bytes, footers: bool, offset: int, limits: Limits | None, *, damaged: bool) -> None:
        self.tail = tail
        self.view = memoryview(tail)
        self.footers = footers
        self.offset = offset
        self.damaged = damaged
        self.problems: list[str] = []
        self.sections: list[DeviceSection] = []
        self.offsets: list[int] = []
        self.commands: list[tuple[int, bytes, int]] = []
        self.position = 0
        self.location = find_description(tail)
        self.text: bytes | None = None
        #: Objects of the description by name and instance; several only if the stream repeats a section.
        self.devices: defaultdict[tuple[str, int], deque[Mapping[str, Any]]] = defaultdict(deque)
        description = self._read_description(limits)
        for device in () if description is None else description.devices:
            self.devices[device["name"], device["instance_id"]].append(device)
        self.known = frozenset(self.devices)

    def _read_description(self, limits: Limits | None) -> Description | None:
        where = self.location
        if where is None:
            self.problems.append("the stream has no description of its devices")
            return None
        if not where.complete:
            self.problems.append("the description of the devices is cut short")
            return None
        stop = where.text_offset + where.text_length
        if stop < len(self.tail):
            self.problems.append(f"{len(self.tail) - stop} bytes follow the description of the devices")
        self.text = self.tail[where.text_offset : stop]
        try:
            return parse(self.text, limits)
        except RemoteProtocolError as error:
            self.problems.append(error.reason)
            return None

    def run(self) -> RemoteProtocolError | None:
        """Go through the tail, up to its end or to what is wrong with it, which is returned."""
        try:
            while self._element():
                pass
        except RemoteProtocolError as error:
            return error
        for name, left in self.devices.items():
            if left:
                self.problems.append(f"section {name[0]!r} ({name[1]}) is described, but not in the stream")
        return None

    def _element(self) -> bool:
        """Take the next section or command; False at the end-of-file byte."""
        position = self.position
        if len(self.sections) + len(self.commands) > MAX_ELEMENTS:
            raise RemoteProtocolError(f"more than {MAX_ELEMENTS} device sections", offset=self.offset + position)
        kind = self._type_at(position)
        if kind == Section.FULL:
            section, end = self._section(position)
            self.sections.append(section)
            self.offsets.append(self.offset + position)
        elif kind == Section.COMMAND:
            number, payload, end = self._command(position)
            self.commands.append((number, payload, self.offset + position))
        elif kind == Section.EOF and self._is_end(position):
            return False
        else:
            what = "the stream ends" if kind is None else f"type byte 0x{kind:02x} stands"
            raise Undelimited(
                f"{what} where a section, a command or the end should be",
                offset=self.offset + position,
                section=self.sections[-1].idstr if self.sections else None,
            )
        self.position = end
        return True

    def result(self, error: RemoteProtocolError | None) -> SplitTail:
        """What was found."""
        return SplitTail(
            sections=tuple(self.sections),
            commands=tuple(self.commands),
            offsets=tuple(self.offsets),
            eof_offset=self.position,
            description_text=self.text,
            problems=tuple(self.problems),
            error=error,
        )

    def _is_end(self, position: int) -> bool:
        if self.location is not None:
            return position == self.location.eof_offset
        # Without a description the byte is the last one, or what follows is the beginning of one.
        rest = self.tail[position + 1 : position + _BEFORE_TEXT + len(OPENING)]
        return not rest or (
            rest[0] == Section.VMDESCRIPTION and rest[_BEFORE_TEXT - 1 :] == OPENING[: max(0, len(rest) - 5)]
        )

    def _command(self, position: int) -> tuple[int, bytes, int]:
        start = position + _COMMAND.size
        if len(self.tail) < start:
            raise RemoteProtocolError("a command is cut short", offset=self.offset + position)
        _, number, size = _COMMAND.unpack_from(self.tail, position)
        if len(self.tail) < start + size:
            raise RemoteProtocolError(f"command {number} is cut short", offset=self.offset + position)
        return number, self.tail[start : start + size], start + size

    def _header(self, position: int) -> _Header | None:
        """The header of a FULL section at *position*; None if there is none, or none that makes sense."""
        fixed = position + 6
        if len(self.tail) < fixed or self.tail[position] != Section.FULL or not self.tail[fixed - 1]:
            return None
        end = fixed + self.tail[fixed - 1]
        if len(self.tail) < end + 8:
            return None
        try:
            idstr = self.tail[fixed:end].decode()
        except UnicodeDecodeError:
            return None
        if not idstr.isprintable():
            return None
        instance, version = struct.unpack_from(">II", self.tail, end)
        section_id = _U32.unpack_from(self.tail, position + 1)[0]
        return _Header(section_id=section_id, idstr=idstr, instance_id=instance, version_id=version, end=end + 8)

    def _section(self, position: int) -> tuple[DeviceSection, int]:
        header = self._header(position)
        if header is None:
            raise Undelimited("the header of a section makes no sense", offset=self.offset + position)
        queue = self.devices[header.idstr, header.instance_id]
        description = queue.popleft() if queue else None
        if description is None:
            what = "it is not described"
            end = None
        else:
            end, what = self._described_end(header, description)
        if end is None:
            end = self._scanned_end(header, position, what)
        section = DeviceSection(
            idstr=header.idstr,
            instance_id=header.instance_id,
            version_id=header.version_id,
            payload=self.tail[header.end : end],
            section_id=header.section_id,
            description=description,
        )
        return section, end + (_FOOTER_SIZE if self.footers else 0)

    def _described_end(self, header: _Header, description: Mapping[str, Any]) -> tuple[int | None, str]:
        """The end of a payload by its description, checked by what follows; or None and why not."""
        try:
            end = header.end + measure_payload(description, self.view[header.end :])
        except RemoteProtocolError as error:
            return None, error.reason
        if not self.footers:
            return end, ""
        if self.tail[end : end + _FOOTER_SIZE] != _footer(header.section_id):
            return None, f"by its description it has {end - header.end} bytes, but no footer stands there"
        if self._type_at(end + _FOOTER_SIZE) not in _AFTER_FOOTER:
            return None, f"by its description it has {end - header.end} bytes, but nothing legal follows its footer"
        return end, ""

    def _scanned_end(self, header: _Header, position: int, why: str) -> int:
        """The end of a payload by its footer and what follows it (vmstate.md part 7.5 b)."""
        name = section_name({"name": header.idstr, "instance_id": header.instance_id})
        if not self.footers:
            raise Undelimited(
                f"its end cannot be found: {why}, and there are no footers", offset=self.offset + position, section=name
            )
        footer = _footer(header.section_id)
        stop = len(self.tail) if self.location is None else self.location.eof_offset
        end = self.tail.find(footer, header.end, stop)
        while end >= 0:
            if self._can_follow(end + _FOOTER_SIZE):
                self.problems.append(f"section {name!r} was delimited by looking for its footer: {why}")
                return end
            end = self.tail.find(footer, end + 1, stop)
        raise Undelimited(
            f"its end cannot be found: {why}, and no footer fits", offset=self.offset + position, section=name
        )

    def _can_follow(self, position: int) -> bool:
        """Whether something that can stand behind a footer stands at *position*."""
        kind = self._type_at(position)
        if kind == Section.FULL:
            header = self._header(position)
            return header is not None and (not self.known or (header.idstr, header.instance_id) in self.known)
        if kind == Section.COMMAND and position + _COMMAND.size <= len(self.tail):
            _, number, size = _COMMAND.unpack_from(self.tail, position)
            end = position + _COMMAND.size + size
            # One level only: a chain of made-up commands must not cost more than its length.
            return number in _COMMANDS and self._type_at(end) in _AFTER_FOOTER
        if kind is None:
            return self.damaged  # cut exactly here
        return kind == Section.EOF and self._is_end(position)

    def _type_at(self, position: int) -> int | None:
        return self.tail[position] if position < len(self.tail) else None


def _footer(section_id: int) -> bytes:
    return bytes((Section.FOOTER,)) + _U32.pack(section_id)


class TailBuffer:
    """Keeps the tail of a live stream until its description is whole.

    Feeding costs time in proportion to the bytes fed, whatever is in them; JSON is parsed only when the announced
    length is there. A stream without description (``suppress-vmdesc``, postcopy) never completes: it ends when the
    sender closes.

    What a guest keeps in its devices is in the tail, and could be made to look like a description; one with the right
    shape is believed. :func:`split_tail` then finds that the sections do not fit.
    """

    def __init__(
        self, *, footers: bool = True, max_bytes: int = 256 * 1024 * 1024, limits: Limits | None = None
    ) -> None:
        """
        Args:
            footers: whether sections have footers.
            max_bytes: the most that is kept.
            limits: what the description may be.
        """
        self._footers = footers
        self._max_bytes = max_bytes
        self._limits = limits or Limits()
        self._data = bytearray()
        #: Where to go on looking for the beginning of a description.
        self._searched = 0
        #: Beginning and end of the text that is being received.
        self._text: tuple[int, int] | None = None
        #: How much of that text has been looked at.
        self._checked = 0
        self._end: int | None = None
        #: Bytes that came behind the description; they are not kept (QEMU ignores them as well).
        self.excess = 0

    def __len__(self) -> int:
        return len(self._data)

    @property
    def complete(self) -> bool:
        """Whether end of file and the whole description are there."""
        return self._end is not None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the stream.

        Raises:
            RemoteProtocolError: more than *max_bytes*.
        """
        if self._end is None:
            if len(self._data) + len(data) > self._max_bytes:
                raise RemoteProtocolError(f"the device state goes on after {self._max_bytes} bytes, the most accepted")
            self._data += data
            self._search()
        else:
            self.excess += len(data)

    def prepare_ping(self) -> int | None:
        """The number of the PING that ends what is there, if it follows the end of a section; else None.

        A sender that wants to know whether everything so far was loaded sends nothing behind that PING until it is
        answered, so it stands at the very end.
        """
        size = len(_PING) + 4
        data = self._data
        at = len(data) - size
        if self._end is not None or at < 0 or not data.startswith(_PING, at):
            return None
        if self._footers:
            start = at - _FOOTER_SIZE
            if start < 0 or data[start] != Section.FOOTER:
                return None
            # The footer of a section that began in here.
            if data.find(bytes((Section.FULL,)) + data[start + 1 : at], 0, start) < 0:
                return None
        return int(_U32.unpack_from(data, at + len(_PING))[0])

    def finish(self) -> bytes:
        """Everything that was fed, up to the end of the description."""
        return bytes(self._data)

    def _search(self) -> None:
        data = self._data
        while self._end is None:
            if self._text is None:
                start = data.find(OPENING, self._searched)
                if start < 0:
                    self._searched = max(self._searched, len(data) - len(OPENING) + 1)
                    return
                self._searched = start + 1
                length = _announced_length(data, start)
                if length is None or length > self._limits.max_bytes:
                    continue
                self._text = (start, start + length)
                self._checked = start
            start, stop = self._text
            # No control character can be in the text; what has one is device state that looks like a description.
            # The real one would have to come behind it, and begins with such bytes, so no text is parsed twice.
            if data.find(b"\0", self._checked, stop) >= 0:
                self._text = None
                continue
            self._checked = min(len(data), stop)
            if len(data) < stop:
                return
            try:
                parse(bytes(data[start:stop]), self._limits)
            except RemoteProtocolError:
                self._text = None
                continue
            self._end = stop
            self.excess = len(data) - stop
            del data[stop:]
