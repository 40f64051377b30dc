"""Finds the description in the end of a stream whose devices are not known, by its structure.

The *tail* of a stream is everything from the type byte of its first FULL section on: FULL sections, commands between
them, the end-of-file byte and the description. The stream does not say where the description begins, so it is searched:
the end-of-file byte, the type, a length, and a text of that length that is one JSON object and describes devices. The
spacing of the text and the order of keys differ between versions of QEMU and do not matter.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from typing import Final

from ...errors import RemoteProtocolError
from ..constants import Command, Section
from .description import Description, Limits, parse

_U32: Final = struct.Struct(">I")
_FOOTER_SIZE: Final = 5
#: Bytes of EOF, type and length before the text of a description.
BEFORE_TEXT: Final = 6
_START: Final = bytes((Section.EOF, Section.VMDESCRIPTION))
_NOT_BLANK: Final = re.compile(rb"[^ \t\r\n]")
#: If a text is longer than accepted, this many bytes must look like a description before it is an error.
_CERTAIN: Final = 4096
_PING: Final = bytes((Section.COMMAND, 0, Command.PING, 0, 4))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """The position of the description, in bytes from the start of the tail."""

    #: The end-of-file byte.
    eof_offset: int
    #: Offset of the text, and its announced length.
    text_offset: int
    text_length: int
    #: False if the tail ends inside the text.
    complete: bool


class TailBuffer:
    """Keeps the tail of a stream until its description is whole.

    Feeding costs time in proportion to the bytes fed, for any content: a text contains no NUL byte, and the bytes
    before a text do, so two texts never overlap, and no byte is parsed twice. A stream without description
    (``suppress-vmdesc``, postcopy) never completes: it ends when the sender closes.

    The tail contains device state that the guest controls, so a guest could forge a description. A text of the right
    form is accepted here; :class:`trimig.wire.devices.sections.TailSplitter` then finds that the sections do not fit.
    """

    def __init__(
        self,
        *,
        footers: bool = True,
        max_bytes: int = 256 * 1024 * 1024,
        limits: Limits | None = None,
        inline_bytes: int | None = None,
        described: bool = True,
    ) -> None:
        """
        Args:
            footers: whether sections have footers.
            max_bytes: the most bytes that are kept.
            limits: limits of the description.
            inline_bytes: a longer text is not parsed by :meth:`feed`, but left to the caller (:attr:`undecided`).
            described: a description may come; there is none in a package of postcopy.
        """
        #: Whether sections have footers.
        self.footers = footers
        self._max_bytes = max_bytes
        self.limits = limits or Limits()
        self._inline_bytes = inline_bytes
        self._described = described
        self._data = bytearray()
        #: Position at which the search for a description goes on.
        self._searched = 0
        #: Beginning and end of the text that is being received.
        self._text: tuple[int, int] | None = None
        #: Position up to which that text has been checked, and whether its first character was checked.
        self._checked = 0
        self._opened = False
        #: The last whole text that was no description, and the reason.
        self._refused_text: tuple[int, int] | None = None
        self._why_refused = ""
        self._end: int | None = None
        #: The description, once it is complete.
        self.description: Description | None = None
        #: Number of bytes after the description; they are not kept (QEMU ignores them as well).
        self.excess = 0

    def __len__(self) -> int:
        return len(self._data)

    def last(self, count: int) -> bytes:
        """The last *count* bytes, or all there are."""
        return bytes(self._data[-count:])

    @property
    def complete(self) -> bool:
        """Whether end of file and the whole description are there."""
        return self._end is not None

    @property
    def location(self) -> Location | None:
        """The position of the description, also of an incomplete one; None if there is none.

        An unusable text counts as the description if it ends with the tail: see :attr:`refusal`.
        """
        text = self._refused_text if self.refusal is not None else self._text
        if text is None:
            return None
        start, stop = text
        return Location(
            eof_offset=start - BEFORE_TEXT,
            text_offset=start,
            text_length=stop - start,
            complete=stop <= len(self._data),
        )

    @property
    def refusal(self) -> str | None:
        """The reason why the text at the end of the tail cannot be used; None if there is no text, or it can be used."""
        if self.complete or self._refused_text is None or self._refused_text[1] != len(self._data):
            return None
        return self._why_refused

    @property
    def text(self) -> bytes | None:
        """The text of the complete description."""
        if self._text is None or not self.complete:
            return None
        return bytes(self._data[slice(*self._text)])

    def mentions(self, text: bytes) -> bool:
        """Whether the received bytes contain *text*."""
        return text in self._data

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the stream.

        Raises:
            RemoteProtocolError: more than *max_bytes*, or a description that is longer than accepted.
        """
        if self._end is None:
            if len(self._data) + len(data) > self._max_bytes:
                raise RemoteProtocolError(f"the device state goes on after {self._max_bytes} bytes, the most accepted")
            self._data += data
            if self._described:
                self._search()
        else:
            self.excess += len(data)

    @property
    def undecided(self) -> bytes | None:
        """A whole text that :meth:`feed` has left to the caller to parse; :meth:`judge` takes the result."""
        if self.complete or self._text is None or len(self._data) < self._text[1]:
            return None
        return bytes(self._data[slice(*self._text)])

    def judge(self, found: Description | RemoteProtocolError) -> None:
        """Take the parsed description of :attr:`undecided`, or the error of parsing; after an error the search goes on.

        Raises:
            RemoteProtocolError: as for :meth:`feed`.
        """
        if isinstance(found, Description):
            self._accept(found)
        else:
            self._refuse(found)
            self._search()

    def prepare_ping(self) -> int | None:
        """The number of the PING at the end of the received bytes, if it follows the end of a section; else None.

        A sender that asks whether everything so far was loaded waits for the answer to that PING, so the PING is at the
        very end.
        """
        size = len(_PING) + 4
        data = self._data
        at = len(data) - size
        if self._end is not None or at < 0 or not data.startswith(_PING, at) or not self._behind_a_section(at):
            return None
        return int(_U32.unpack_from(data, at + len(_PING))[0])

    def _behind_a_section(self, at: int) -> bool:
        """Whether a section may end at *at*: with footers, a footer of a section in the tail must end there."""
        if not self.footers:
            return True
        data, start = self._data, at - _FOOTER_SIZE
        if start < 0 or data[start] != Section.FOOTER:
            return False
        return data.find(bytes((Section.FULL,)) + data[start + 1 : at], 0, start) >= 0

    @property
    def perhaps_ended(self) -> bool:
        """Whether the last byte may be the end of file of a stream without description; only silence after it can prove
        this.
        """
        data = self._data
        at = len(data) - 1
        if self._end is not None or self._text is not None or at < 0 or data[at] != Section.EOF:
            return False
        ping = at - len(_PING) - 4  # the source may have asked whether all was loaded
        return self._behind_a_section(at) or (
            ping >= 0 and data.startswith(_PING, ping) and self._behind_a_section(ping)
        )

    def finish(self) -> bytearray:
        """All bytes fed, up to the end of the description; no more bytes may be fed."""
        return self._data

    def _search(self) -> None:
        while self._end is None and (self._text is not None or self._next_start()):
            found = self._look_at_text()
            if found is None:
                return
            if found is False:
                self._text = None

    def _next_start(self) -> bool:
        """Find the next position where a text may begin; False if there is none yet."""
        data = self._data
        while (at := data.find(_START, self._searched)) >= 0 and at + BEFORE_TEXT <= len(data):
            self._searched = at + 1
            length = int(_U32.unpack_from(data, at + 2)[0])
            if length >= len(b"{}"):
                start = at + BEFORE_TEXT
                self._text = (start, start + length)
                self._checked, self._opened = start, False
                return True
        # The last byte may be the first byte of the searched sequence.
        self._searched = at if at >= 0 else max(self._searched, len(data) - 1)
        return False

    def _look_at_text(self) -> bool | None:
        """Whether the text is a description; None if this is not known yet."""
        data = self._data
        assert self._text is not None
        start, stop = self._text
        # A text contains no NUL, and a NUL precedes every description: bytes with a NUL are device state.
        if data.find(b"\0", self._checked, stop) >= 0:
            return False
        if not self._opened:
            first = _NOT_BLANK.search(data, self._checked, stop)
            if first is not None and first[0] != b"{":
                return False
            self._opened = first is not None
        self._checked = min(len(data), stop)
        limit = self.limits.max_bytes
        if stop - start > limit:
            if self._opened and len(data) - start >= min(_CERTAIN, limit):
                raise RemoteProtocolError(
                    f"a description of the devices of {stop - start} bytes, at most {limit} are accepted"
                )
            return None
        if len(data) < stop:
            return None
        if self._inline_bytes is not None and stop - start > self._inline_bytes:
            return None
        try:
            description = parse(bytes(data[start:stop]), self.limits)
        except RemoteProtocolError as error:
            self._refuse(error)
            return False
        self._accept(description)
        return True

    def _refuse(self, error: RemoteProtocolError) -> None:
        self._refused_text, self._why_refused = self._text, error.reason
        self._text = None

    def _accept(self, description: Description) -> None:
        assert self._text is not None
        stop = self._text[1]
        self._end, self.description = stop, description
        self.excess = len(self._data) - stop
        del self._data[stop:]
