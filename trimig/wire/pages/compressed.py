"""Compressed pages (capability compress, ram.md part 4): each page is one whole zlib stream.

QEMU has removed these records in 9.1. A receiver needs no setting for them: nothing of a page depends on another one.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
import zlib
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE
from ..constants import RamFlag
from ..events import PageElement, PageRun

if TYPE_CHECKING:
    from ..encoder import RecordWriter
    from ..events import Element, ReadPage
    from ..sections.reader import Window
    from .state import PageState

#: Behind the word, and the name: the number of bytes of the zlib stream.
_LENGTH: Final = struct.Struct(">I")
_BE64: Final = struct.Struct(">Q")
_FLAGS: Final = PAGE_SIZE - 1
_AGAIN: Final = int(RamFlag.COMPRESS_PAGE | RamFlag.CONTINUE)
#: Bytes of the longest stream of one page: zlib's ``compressBound``, as in QEMU.
MOST_BYTES: Final = PAGE_SIZE + (PAGE_SIZE >> 12) + (PAGE_SIZE >> 14) + (PAGE_SIZE >> 25) + 13
#: Records of one event. Their pages take 1 to 5 ms to inflate.
MOST_RECORDS: Final = 128


def deflate(page: bytes | memoryview, level: int) -> bytes:
    """The content of a record: the length, and the stream of *page*, which has the size of a page.

    Args:
        level: 0 to 9; with 0 the stream is a few bytes longer than the page.
    """
    stream = zlib.compress(page, level)
    return _LENGTH.pack(len(stream)) + stream


def inflate(stream: bytes, at: int) -> bytes:
    """The page in *stream*. No more than a byte above a page is ever inflated.

    Args:
        at: offset of the record in the main stream, for the error.

    Raises:
        RemoteProtocolError: it is no zlib stream, is cut, has bytes behind its end, or has not the size of a page.
    """
    inflater = zlib.decompressobj()
    try:
        page = inflater.decompress(stream, PAGE_SIZE + 1)
    except zlib.error as error:
        raise _malformed(f"no zlib stream ({error})", at) from error
    if len(page) > PAGE_SIZE:
        raise _malformed(f"more than {PAGE_SIZE} bytes", at)
    if not inflater.eof:
        raise _malformed(f"a stream that is cut behind {len(page)} bytes", at)
    if len(page) < PAGE_SIZE:
        raise _malformed(f"only {len(page)} bytes", at)
    if inflater.unused_data:
        raise _malformed(f"{len(inflater.unused_data)} bytes behind the end of the stream", at)
    return page


def _malformed(what: str, at: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"a compressed page of {PAGE_SIZE} bytes inflates to {what}", offset=at, section="ram")


def read_compressed(state: PageState, window: Window, block: str, head: int) -> tuple[Element | None, int]:
    """Read COMPRESS_PAGE records; see :data:`trimig.wire.sections.ram.PageEncoding`."""
    memory, pos, end, at = window.array.data, window.pos, window.end, window.offset
    offsets: list[int] = []
    streams: list[bytes] = []
    place, skip = pos, head
    while len(offsets) < MOST_RECORDS and end - place >= skip + _LENGTH.size:
        size = int(_LENGTH.unpack_from(memory, place + skip)[0])
        if size > MOST_BYTES:
            if offsets:  # the records in front of it are good
                break
            raise RemoteProtocolError(
                f"compressed page of {size} bytes; the longest has {MOST_BYTES}", offset=at, section="ram"
            )
        start = place + skip + _LENGTH.size
        if end - start < size:
            break
        offsets.append(_BE64.unpack_from(memory, place)[0] & ~_FLAGS)
        streams.append(bytes(memory[start : start + size]))
        place, skip = start + size, 8
        if end - place < 8 or _BE64.unpack_from(memory, place)[0] & _FLAGS != _AGAIN:
            break
    if not offsets:
        return None, 0
    # Through uint64: the highest bit of a word may be set.
    where = state.inside(block, np.array(offsets, np.uint64).astype(np.int64), at)
    count = len(where)
    state.end_run()
    run = CompressedRun(block=block, named=head > 8, offsets=where, streams=tuple(streams[:count]), at=at)
    return run, run.size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedRun(PageElement):
    """Pages of one block, each in a zlib stream of its own.

    Attributes:
        streams: one for each page, not looked at yet.
    """

    streams: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of the records."""
        return self._places()[-1] - self.at

    def _places(self) -> list[int]:
        """The offset of each record in the main stream, and of the end of the last one."""
        name = 1 + len(self.block.encode("utf-8", "surrogateescape")) if self.named else 0
        sizes = [8 + _LENGTH.size + len(stream) for stream in self.streams]
        return list(itertools.accumulate([sizes[0] + name, *sizes[1:]], initial=self.at))

    def inflate_into(self, data: NDArray[np.uint8], first: int, end: int) -> None:
        """Inflate the pages *first* to *end* - 1 of this run into these rows of *data*. It may be called in a thread.

        Args:
            data: uint8, shape (n, page size).

        Raises:
            RemoteProtocolError: see :func:`inflate`.
        """
        places = self._places()
        for row in range(first, end):
            data[row] = np.frombuffer(inflate(self.streams[row], places[row]), np.uint8)

    def with_pages(self, data: NDArray[np.uint8]) -> PageRun:
        """The same pages without an encoding.

        Args:
            data: all pages, inflated, shape (n, page size).
        """
        return PageRun(block=self.block, named=self.named, offsets=self.offsets, data=data, at=self.at)

    def content(self, read: ReadPage) -> PageRun:
        """The pages, inflated."""
        data = np.empty((len(self.streams), PAGE_SIZE), np.uint8)
        self.inflate_into(data, 0, len(self.streams))
        return self.with_pages(data)

    def records(self, writer: RecordWriter) -> bytes:
        """The bytes of these records."""
        contents = [_LENGTH.pack(len(stream)) + stream for stream in self.streams]
        return writer.records(self.block, self.offsets, RamFlag.COMPRESS_PAGE, contents)
