"""Device sections before the RAM, of unknown devices (newer.md part 2).

A device that decides which memory exists (virtio-mem) sends a FULL section before the size list or before the first
pages. Its end is found by its footer with a legal element after it. This is a guess until the description comes, which
has the length of the section: :class:`trimig.wire.devices.sections.TailSplitter` compares the two.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from typing import Final

from .constants import Section
from .refusals import NEWEST_COMMAND

_BE32: Final = struct.Struct(">I")
_FOOTER_SIZE: Final = 5


class FooterSearch:
    """Searches the end of one payload while its bytes are received. No byte is read twice."""

    def __init__(self, section_id: int) -> None:
        self._footer = bytes((Section.FOOTER,)) + _BE32.pack(section_id)
        self._searched = 0
        #: The received bytes, from the first byte of the payload on; the caller appends to it.
        self.data = bytearray()

    def find(self, started: Container[int], *, final: bool) -> int | None:
        """Length of the payload that :attr:`data` begins with; None if more bytes are needed.

        Args:
            started: ids of the sections of RAM, which may go on after the section.
            final: no more bytes will come.
        """
        data = self.data
        while (at := data.find(self._footer, self._searched)) >= 0:
            follows = _follows(data, at + _FOOTER_SIZE, started)
            if follows or (follows is None and final and at + _FOOTER_SIZE == len(data)):
                return at
            if follows is None and not final:
                self._searched = at
                return None
            self._searched = at + 1
        self._searched = max(self._searched, len(data) - len(self._footer) + 1)
        return None


def _follows(data: bytearray, at: int, started: Container[int]) -> bool | None:
    """Whether the bytes at *at* can follow a section; None if this is not known yet."""
    if len(data) < at + 5:
        return None if len(data) <= at or data[at] in _BEGINNINGS else False
    kind, number = data[at], int(_BE32.unpack_from(data, at + 1)[0])
    if kind in (Section.START, Section.FULL):
        return _header(data, at)
    if kind in (Section.PART, Section.END):
        return number in started
    if kind == Section.COMMAND:
        return 0 < number >> 16 <= NEWEST_COMMAND
    return kind == Section.EOF and data[at + 1] == Section.VMDESCRIPTION


def _header(data: bytearray, at: int) -> bool | None:
    if len(data) < at + 6:
        return None
    size = data[at + 5]
    if len(data) < at + 6 + size + 8:
        return None if size else False
    try:
        name = data[at + 6 : at + 6 + size].decode()
    except UnicodeDecodeError:
        return False
    return bool(name) and name.isprintable()


_BEGINNINGS: Final = frozenset({Section.EOF, Section.START, Section.PART, Section.END, Section.FULL, Section.COMMAND})
