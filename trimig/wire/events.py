"""The elements of a stream, one frozen record per element.

:class:`trimig.wire.Decoder` returns the same records that :class:`trimig.wire.Encoder` takes, so a stream that was read
can be written again byte for byte. Every event carries ``at``: the offset of its first byte in the stream (-1 for an
event that was not read from one).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..guest import ConfigSubsection
    from .constants import Section
    from .encoder import RecordWriter

#: Returns the present content of a page: the block's name and the page's number -> uint8, shape (page size,).
ReadPage: TypeAlias = Callable[[str, int], NDArray[np.uint8] | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """Base of all elements of the main stream."""

    at: int = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader(Element):
    """Magic and version."""

    version: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Configuration(Element):
    """The configuration section, which names the machine of the stream."""

    machine: str
    subsections: tuple[ConfigSubsection, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SectionHeader(Element):
    """Header of a START, PART, END or FULL section.

    For PART and END, ``idstr``, ``instance_id`` and ``version_id`` are those of the START with the same id.
    """

    kind: Section
    section_id: int
    idstr: str
    instance_id: int
    version_id: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackageElement(Element):
    """The content of a command PACKAGED: a fragment of the stream, to be read by a separate decoder."""

    data: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SectionFooter(Element):
    """The end mark of a section."""

    section_id: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CommandElement(Element):
    """A COMMAND with its payload."""

    number: int
    payload: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RamList(Element):
    """The size list of RAM START: names and used lengths in bytes, in the sender's order.

    ``page_sizes`` has the host page size in bytes of the blocks for which the list contains it: after ADVISE, if it is
    not the usual one.
    """

    blocks: tuple[tuple[str, int], ...]
    page_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageElement(Element, abc.ABC):
    """Pages of one block, in one encoding. Each encoding has a class of its own.

    Attributes:
        named: the first record contained the block's name (no CONTINUE); all others continue.
        offsets: int64, shape (n,): byte offsets inside the block, multiples of the page size, checked to be inside it.
    """

    block: str
    named: bool
    offsets: NDArray[np.int64]

    @abc.abstractmethod
    def content(self, read: ReadPage) -> PageRun | ZeroRun:
        """The same pages without an encoding.

        Args:
            read: returns the present content of a page, for an encoding of differences; None if the page has not come.

        Raises:
            RemoteProtocolError: the encoded bytes are malformed, or a difference is from a page that has not come.
        """

    @abc.abstractmethod
    def records(self, writer: RecordWriter) -> bytes:
        """The bytes of these records."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageRun(PageElement):
    """Raw pages of one block.

    Attributes:
        data: uint8, shape (n, page size). A decoder's runs are views into its buffer: use them before the next call
            that gives the decoder bytes.
    """

    data: NDArray[np.uint8]

    def content(self, read: ReadPage) -> PageRun:
        """This element."""
        return self

    def records(self, writer: RecordWriter) -> bytes:
        """The bytes of these records."""
        return writer.page_records(self.block, self.offsets, self.data)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZeroRun(PageElement):
    """Pages of one block, each filled with one byte value.

    Attributes:
        fills: uint8, shape (n,): the value; every known sender uses 0.
    """

    fills: NDArray[np.uint8]

    def content(self, read: ReadPage) -> ZeroRun:
        """This element."""
        return self

    def records(self, writer: RecordWriter) -> bytes:
        """The bytes of these records."""
        return writer.zero_records(self.block, self.offsets, self.fills)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RamEnd(Element):
    """The word that ends the records of one RAM section."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RamSync(Element):
    """The word behind which a receiver waits until each data channel of multifd has come to its packet with SYNC."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DevicePayload(Element):
    """The whole payload of a FULL section of a device whose length could be measured."""

    payload: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TailBytes(Element):
    """Undivided bytes from the first FULL section on, if the devices are not known."""

    data: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndOfStream(Element):
    """The end-of-file byte: all of the guest has been sent, and the source has decided to hand it over."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DescriptionElement(Element):
    """The JSON text after the end of file.

    Attributes:
        complete: False if the connection ended inside the text, which is harmless: the guest was complete before.
    """

    text: bytes
    complete: bool = True
