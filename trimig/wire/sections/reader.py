"""What the decoder needs of a reader of an iterative section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import RemoteProtocolError
from ..refusals import unknown_section

if TYPE_CHECKING:
    from ..events import Element, SectionHeader
    from ..pages.state import PageState


class Window(NamedTuple):
    """The bytes of the stream that are there, from the first one that no event has consumed."""

    #: The decoder's buffer, uint8.
    array: NDArray[np.uint8]
    #: Where in the buffer the bytes begin.
    pos: int
    #: Where in the buffer they end.
    end: int
    #: The stream offset of the first.
    offset: int
    #: No more bytes will come.
    final: bool

    @property
    def have(self) -> int:
        """The number of bytes."""
        return self.end - self.pos


class SectionReader(Protocol):
    """Reads the content of one iterative section, part after part, without I/O.

    Errors are :class:`RemoteProtocolError`; after one the reader is not used again.
    """

    @property
    def ended(self) -> bool:
        """The last event was the last one of this part; a footer or another section follows."""

    def begin(self, header: SectionHeader) -> None:
        """The content of *header* follows: of the START, a PART or the END."""

    def read(self, window: Window) -> tuple[Element | None, int]:
        """Read the next event, and the number of bytes that it takes.

        ``(None, 0)``: more bytes are needed. An event must need a bounded number of bytes.
        """


class SectionFormat(NamedTuple):
    """One row of the table of iterative sections."""

    #: The only version that is read.
    version: int
    #: Makes the reader for one stream.
    reader: Callable[[PageState], SectionReader]


def check_start(
    table: Mapping[str, SectionFormat],
    started: Mapping[int, SectionHeader],
    section_id: int,
    idstr: str,
    instance_id: int,
    version_id: int,
    offset: int,
) -> None:
    """Check a START against the table, and against the sections that have started.

    Raises:
        RemoteProtocolError: the section is not read, has another version, or has the id of another section.
    """
    row = table.get(idstr)
    if row is None or instance_id != 0:
        raise unknown_section(idstr, instance_id, offset)
    problem = None
    if version_id != row.version:
        problem = f"section {idstr!r} has version {version_id}, {row.version} is needed"
    elif (other := started.get(section_id)) is not None and other.idstr != idstr:
        problem = f"section {idstr!r} with the id {section_id}, which section {other.idstr!r} has"
    if problem is not None:
        raise RemoteProtocolError(problem, offset=offset)
