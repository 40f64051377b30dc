"""Finds the device sections after the RAM, when the devices are not known.

A FULL section has no length. Without the declarations of the devices, its end is found by the description, which comes
last: :class:`trimig.wire.devices.tail.TailBuffer` keeps the bytes until the description is there, and
:class:`TailSplitter` then splits them into sections (vmstate.md part 7).

If the description does not give the size of a section (part 7.6), its end is found by searching its footer with a legal
element after it. This is a guess, although a good one, and is reported in :attr:`SplitTail.problems`.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ...errors import LocalProtocolError, RemoteProtocolError
from ...guest import DeviceSection
from ..constants import MAX_CSTR, Command, Section
from .decoding import Allowance, Pieces, measuring
from .description import Limits, section_name
from .tail import BEFORE_TEXT, TailBuffer

#: Sections and commands in one tail. A machine with a thousand processors has about five thousand.
MAX_ELEMENTS: Final = 65536

_U32: Final = struct.Struct(">I")
_COMMAND: Final = struct.Struct(">BHH")
_FOOTER_SIZE: Final = 5
_COMMANDS: Final = frozenset(int(command) for command in Command)
_AFTER_FOOTER: Final = frozenset({Section.FULL, Section.COMMAND, Section.EOF})
#: Fields and elements that may be examined in one tail, in addition to those for its bytes (see Allowance).
_FREE_STEPS: Final = 1 << 16
#: One piece of work: sections and commands, possible positions of a footer, and bytes searched for a footer.
_ELEMENTS, _PLACES, _SEARCHED = 64, 1024, 4 << 20


class Undelimited(RemoteProtocolError):
    """The end of a section could not be found; the tail can only be kept as a whole."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SplitTail:
    """A tail that was split into sections and commands."""

    #: In stream order, with their objects of the description.
    sections: tuple[DeviceSection, ...]
    #: Commands between them: number, payload, offset in the stream.
    commands: tuple[tuple[int, bytes, int], ...]
    #: The offset of each section in the stream.
    offsets: tuple[int, ...]
    #: Offset of the end-of-file byte from the start of the tail; with :attr:`error`, the offset of the error.
    eof_offset: int
    #: The whole text of the description; None if there is none, or only a part of it.
    description_text: bytes | None
    #: Irregularities, one sentence each.
    problems: tuple[str, ...]
    #: The given sections before the RAM, with their objects of the description.
    early: tuple[DeviceSection, ...] = ()
    #: The error that ends a damaged tail, if *damaged* was set.
    error: RemoteProtocolError | None = None


def split_tail(
    tail: bytes | bytearray | memoryview,
    *,
    footers: bool = True,
    offset: int = 0,
    limits: Limits | None = None,
    damaged: bool = False,
) -> SplitTail:
    """Split a tail into device sections and commands.

    Args:
        tail: from the first section's type byte to the end-of-file byte, and the description if there is one.
        footers: whether sections have footers (``send-section-footer``).
        offset: offset of the tail in the stream, for messages and commands.
        limits: limits of the description.
        damaged: return the readable part of a damaged tail, with its error, instead of raising.

    Raises:
        Undelimited: the end of a section could not be found.
        RemoteProtocolError: the tail is damaged.
    """
    buffer = TailBuffer(footers=footers, max_bytes=len(tail), limits=limits)
    buffer.feed(tail)
    splitter = TailSplitter(buffer, offset=offset, damaged=damaged)
    while not splitter.step():
        pass
    return splitter.result()


def join_sections(sections: Iterable[DeviceSection], *, footers: bool = True) -> bytes:
    """The bytes of FULL sections, one after the other.

    Raises:
        LocalProtocolError: a section without a number, or a name or number that does not fit.
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
    #: Offset of the payload.
    end: int


class TailSplitter:
    """Splits the bytes of a :class:`TailBuffer`, in pieces of work of about ten milliseconds.

    The total work is bounded by the bytes of the tail, for any content of the description.

    Args:
        buffer: the filled buffer; it must not be fed any more.
        offset: offset of the tail in the stream, for messages and commands.
        damaged: return the readable part of a damaged tail, with its error, instead of raising.
        early: sections before the RAM; the description shows whether their ends were found correctly.
    """

    def __init__(
        self, buffer: TailBuffer, *, offset: int = 0, damaged: bool = False, early: Sequence[DeviceSection] = ()
    ) -> None:
        self._early = tuple(early)
        self._tail = tail = buffer.finish()
        self._view = memoryview(tail)
        self._footers = buffer.footers
        self._offset = offset
        self._damaged = damaged
        self._problems: list[str] = []
        self._sections: list[DeviceSection] = []
        self._offsets: list[int] = []
        self._commands: list[tuple[int, bytes, int]] = []
        self._position = 0
        self._location = buffer.location
        self._text = buffer.text
        self._allowance = Allowance(free=_FREE_STEPS)
        #: Objects of the description by name and instance; more than one only if the stream repeats a section.
        self._devices: defaultdict[tuple[str, int], deque[Mapping[str, Any]]] = defaultdict(deque)
        for device in () if buffer.description is None else buffer.description.devices:
            self._devices[device["name"], device["instance_id"]].append(device)
        self._known = frozenset(self._devices)
        if self._location is None:
            self._problems.append("the stream has no description of its devices")
        elif buffer.refusal is not None:
            self._problems.append(buffer.refusal)
        elif not self._location.complete:
            self._problems.append("the description of the devices is cut short")
        elif buffer.excess:
            self._problems.append(f"{buffer.excess} bytes follow the description of the devices")
        self._error: RemoteProtocolError | None = None
        self._work = self._run()

    @property
    def steps(self) -> int:
        """Number of fields and elements examined so far."""
        return self._allowance.spent

    def step(self) -> bool:
        """Do one piece of the work; returns True when the work is done."""
        try:
            next(self._work)
        except StopIteration:
            return True
        return False

    def result(self) -> SplitTail:
        """The result; only after the last :meth:`step`.

        Raises:
            Undelimited: the end of a section could not be found.
            RemoteProtocolError: the tail is damaged.
        """
        if self._error is not None and not self._damaged:
            raise self._error
        return SplitTail(
            sections=tuple(self._sections),
            commands=tuple(self._commands),
            early=self._early,
            offsets=tuple(self._offsets),
            eof_offset=self._position,
            description_text=self._text,
            problems=tuple(self._problems),
            error=self._error,
        )

    def _run(self) -> Pieces[None]:
        """Walk through the tail, up to its end or to the first error."""
        try:
            self._early = yield from self._check_early(self._early)
            elements = 0
            while (yield from self._element()):
                elements += 1
                if elements % _ELEMENTS == 0:
                    yield
        except RemoteProtocolError as error:
            self._error = error
            return
        for name, left in self._devices.items():
            if left:
                self._problems.append(f"section {name[0]!r} ({name[1]}) is described, but not in the stream")

    def _check_early(self, sections: Sequence[DeviceSection]) -> Pieces[tuple[DeviceSection, ...]]:
        """The early *sections* with their objects of the description, which must give the same lengths."""
        checked: list[DeviceSection] = []
        for section in sections:
            name = section_name({"name": section.idstr, "instance_id": section.instance_id})
            queue = self._devices[section.idstr, section.instance_id]
            if not queue:
                self._problems.append(f"section {name!r} was delimited by looking for its footer: it is not described")
                checked.append(section)
                continue
            description = queue.popleft()
            size = yield from measuring(description, section.payload, self._allowance, before=len(section.payload))
            if size != len(section.payload):
                raise RemoteProtocolError(
                    f"by its description it has {size} bytes, by its footer {len(section.payload)}", section=name
                )
            checked.append(dataclasses.replace(section, description=description))
        return tuple(checked)

    def _element(self) -> Pieces[bool]:
        """Take the next section or command; False at the end-of-file byte."""
        position = self._position
        if len(self._sections) + len(self._commands) > MAX_ELEMENTS:
            raise RemoteProtocolError(f"more than {MAX_ELEMENTS} device sections", offset=self._offset + position)
        kind = self._type_at(position)
        if kind == Section.FULL:
            section, end = yield from self._section(position)
            self._sections.append(section)
            self._offsets.append(self._offset + position)
        elif kind == Section.COMMAND:
            number, payload, end = self._command(position)
            self._commands.append((number, payload, self._offset + position))
        elif kind == Section.EOF and self._is_end(position):
            return False
        else:
            what = "the stream ends" if kind is None else f"type byte 0x{kind:02x} stands"
            raise Undelimited(
                f"{what} where a section, a command or the end should be",
                offset=self._offset + position,
                section=self._sections[-1].idstr if self._sections else None,
            )
        self._position = end
        return True

    def _is_end(self, position: int) -> bool:
        if self._location is not None:
            return position == self._location.eof_offset
        # Without a description the byte is the last one, or the beginning of a description follows.
        rest = self._view[position + 1 : position + 1 + BEFORE_TEXT]
        return not rest or (rest[0] == Section.VMDESCRIPTION and len(rest) < BEFORE_TEXT)

    def _command(self, position: int) -> tuple[int, bytes, int]:
        start = position + _COMMAND.size
        if len(self._tail) < start:
            raise RemoteProtocolError("a command is cut short", offset=self._offset + position)
        _, number, size = _COMMAND.unpack_from(self._tail, position)
        if len(self._tail) < start + size:
            raise RemoteProtocolError(f"command {number} is cut short", offset=self._offset + position)
        return number, bytes(self._view[start : start + size]), start + size

    def _header(self, position: int) -> _Header | None:
        """The header of a FULL section at *position*; None if there is no valid header."""
        fixed = position + 6
        if len(self._tail) < fixed or self._tail[position] != Section.FULL or not self._tail[fixed - 1]:
            return None
        end = fixed + self._tail[fixed - 1]
        if len(self._tail) < end + 8:
            return None
        try:
            idstr = self._tail[fixed:end].decode()
        except UnicodeDecodeError:
            return None
        if not idstr.isprintable():
            return None
        instance, version = struct.unpack_from(">II", self._tail, end)
        section_id = _U32.unpack_from(self._tail, position + 1)[0]
        return _Header(section_id=section_id, idstr=idstr, instance_id=instance, version_id=version, end=end + 8)

    def _section(self, position: int) -> Pieces[tuple[DeviceSection, int]]:
        header = self._header(position)
        if header is None:
            raise Undelimited("the header of a section makes no sense", offset=self._offset + position)
        queue = self._devices[header.idstr, header.instance_id]
        description = queue.popleft() if queue else None
        if description is None:
            what = "it is not described"
            end = None
        else:
            end, what = yield from self._described_end(header, description)
        if end is None:
            end = yield from self._scanned_end(header, position, what)
        section = DeviceSection(
            idstr=header.idstr,
            instance_id=header.instance_id,
            version_id=header.version_id,
            payload=bytes(self._view[header.end : end]),
            section_id=header.section_id,
            description=description,
        )
        return section, end + (_FOOTER_SIZE if self._footers else 0)

    def _described_end(self, header: _Header, description: Mapping[str, Any]) -> Pieces[tuple[int | None, str]]:
        """The end of a payload by its description, checked by the bytes after it; or None and the reason."""
        try:
            data = self._view[header.end :]
            end = header.end + (yield from measuring(description, data, self._allowance, before=header.end))
        except RemoteProtocolError as error:
            return None, error.reason
        if not self._footers:
            return end, ""
        if self._tail[end : end + _FOOTER_SIZE] != _footer(header.section_id):
            return None, f"by its description it has {end - header.end} bytes, but no footer stands there"
        if self._type_at(end + _FOOTER_SIZE) not in _AFTER_FOOTER:
            return None, f"by its description it has {end - header.end} bytes, but nothing legal follows its footer"
        return end, ""

    def _scanned_end(self, header: _Header, position: int, why: str) -> Pieces[int]:
        """The end of a payload by its footer and the element after it (vmstate.md part 7.5 b)."""
        name = section_name({"name": header.idstr, "instance_id": header.instance_id})
        if not self._footers:
            raise Undelimited(
                f"its end cannot be found: {why}, and there are no footers",
                offset=self._offset + position,
                section=name,
            )
        footer = _footer(header.section_id)
        stop = len(self._tail) if self._location is None else self._location.eof_offset
        at, places = header.end, 0
        while at < stop:
            limit = min(at + _SEARCHED, stop)
            end = self._tail.find(footer, at, limit)
            if end < 0:
                at = limit if limit == stop else limit - _FOOTER_SIZE + 1
                yield
                continue
            if self._can_follow(end + _FOOTER_SIZE):
                self._problems.append(f"section {name!r} was delimited by looking for its footer: {why}")
                return end
            at = end + 1
            places += 1
            if places % _PLACES == 0:
                yield
        raise Undelimited(
            f"its end cannot be found: {why}, and no footer fits", offset=self._offset + position, section=name
        )

    def _can_follow(self, position: int) -> bool:
        """Whether a legal element after a footer is at *position*."""
        kind = self._type_at(position)
        if kind == Section.FULL:
            header = self._header(position)
            return header is not None and (not self._known or (header.idstr, header.instance_id) in self._known)
        if kind == Section.COMMAND and position + _COMMAND.size <= len(self._tail):
            _, number, size = _COMMAND.unpack_from(self._tail, position)
            end = position + _COMMAND.size + size
            # Check one level only: a chain of forged commands must not cost more than its length.
            return number in _COMMANDS and self._type_at(end) in _AFTER_FOOTER
        if kind is None:
            return self._damaged  # the tail is cut exactly here
        return kind == Section.EOF and self._is_end(position)

    def _type_at(self, position: int) -> int | None:
        return self._tail[position] if position < len(self._tail) else None


def _footer(section_id: int) -> bytes:
    return bytes((Section.FOOTER,)) + _U32.pack(section_id)
