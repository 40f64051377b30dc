"""Commands and messages for the switch to postcopy and its recovery (commands.md parts 4.3 to 4.10, ram.md part 12).

Payloads of commands that belong to postcopy, and the bitmaps of received pages that follow RECV_BITMAP on the return
path. Ranges and bitmaps are NumPy arrays in both directions: a guest of a terabyte has 268 million pages.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import LocalProtocolError, RemoteProtocolError
from ..guest import PAGE_SIZE, PageBitmap
from .constants import Command
from .encoder import command, name_bytes

_BE64 = struct.Struct(">Q")
_BE64X2 = struct.Struct(">QQ")
_BE32 = struct.Struct(">I")

#: Ranges in one discard command; QEMU sends no more, and longer lists become several commands.
RANGES_PER_COMMAND: Final = 12
#: The word after a bitmap of received pages.
BITMAP_END: Final = 0x0123456789ABCDEF
#: Bytes around a bitmap: the length before it, the end mark after it.
BITMAP_FRAME: Final = 16
#: The length of a package has 32 bits.
MAX_PACKAGE: Final = 0xFFFFFFFF

_DISCARD_VERSION: Final = 0

#: Rows of start and end, in pages; the end is the first page after the run.
Runs = NDArray[np.int64]


def runs_of(bitmap: PageBitmap) -> Runs:
    """The runs of set pages, shape (k, 2), in ascending order."""
    edges = np.flatnonzero(np.diff(bitmap.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
    return edges.reshape(-1, 2)


# -- ADVISE --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The source's announcement before its first page: postcopy may follow.

    ``page_sizes`` is the bitwise or of the host page sizes of all RAM blocks, ``target_page`` the size of the tracked
    pages; both in bytes, and both must be the same on the two sides.
    """

    page_sizes: int = PAGE_SIZE
    target_page: int = PAGE_SIZE


def advise(advice: Advice) -> bytes:
    """The POSTCOPY_ADVISE command."""
    return command(Command.POSTCOPY_ADVISE, _BE64X2.pack(advice.page_sizes, advice.target_page))


def decode_advise(payload: bytes, *, offset: int) -> Advice | None:
    """Read the advice; None for the empty form, which announces dirty bitmaps of disks and no RAM.

    Raises:
        RemoteProtocolError: an illegal length, or illegal page sizes.
    """
    if not payload:
        return None
    if len(payload) != _BE64X2.size:
        raise RemoteProtocolError(f"POSTCOPY_ADVISE with {len(payload)} bytes, expected 16 or none", offset=offset)
    page_sizes, target_page = _BE64X2.unpack(payload)
    if not page_sizes or not target_page or target_page & (target_page - 1):
        raise RemoteProtocolError(
            f"POSTCOPY_ADVISE with the page sizes {page_sizes:#x} and the target page {target_page:#x}", offset=offset
        )
    return Advice(page_sizes=page_sizes, target_page=target_page)


# -- RAM_DISCARD ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Pages of one block whose content at the destination is out of date: they will be sent again."""

    block: str
    runs: Runs


def discards(block: str, stale: PageBitmap) -> Iterator[bytes]:
    """The POSTCOPY_RAM_DISCARD commands for the set pages of a block; none if no page is set.

    Raises:
        LocalProtocolError: a block's name that is empty or longer than 255 bytes.
    """
    name = name_bytes(block)
    if not 0 < len(name) < 256:
        raise LocalProtocolError(f"the name {block[:40]!r} has {len(name)} bytes, a discard needs 1 to 255")
    head = bytes([_DISCARD_VERSION, len(name)]) + name + b"\0"
    runs = runs_of(stale)
    starts_and_lengths = np.stack((runs[:, 0], runs[:, 1] - runs[:, 0]), axis=1) * PAGE_SIZE
    for first in range(0, len(runs), RANGES_PER_COMMAND):
        ranges = starts_and_lengths[first : first + RANGES_PER_COMMAND].astype(">u8").tobytes()
        yield command(Command.POSTCOPY_RAM_DISCARD, head + ranges)


def decode_discard(payload: bytes, blocks: Mapping[str, int], *, offset: int) -> Discard:
    """Read the runs of one command, checked against the lengths in bytes of the RAM blocks.

    Ranges may come in any order and may overlap: discarding a page twice has the same effect as once.

    Raises:
        RemoteProtocolError: wrong version or form, an unknown block, a range that is empty, misaligned or outside.
    """

    def bad(what: str) -> RemoteProtocolError:
        return RemoteProtocolError(what, offset=offset, section="RAM discard")

    if len(payload) < 4 or payload[0] != _DISCARD_VERSION:
        version = payload[0] if payload else "none"
        raise bad(f"discard of {len(payload)} bytes with the version {version}; known is {_DISCARD_VERSION}")
    end = 2 + payload[1]
    if end == 2 or len(payload) <= end or payload[end]:
        raise bad(f"discard of {len(payload)} bytes without a whole name of a block")
    name = payload[2:end].decode("utf-8", "surrogateescape")
    ranges = payload[end + 1 :]
    if not ranges or len(ranges) % _BE64X2.size:
        raise bad(f"{len(ranges)} bytes of ranges in the discard of {name!r}, expected 16 for each")
    if name not in blocks:
        raise bad(f"discard in the unknown RAM block {name!r}")
    words = np.frombuffer(ranges, ">u8").reshape(-1, 2).astype(np.uint64)
    starts, lengths = words[:, 0], words[:, 1]
    length = blocks[name]
    # The order of comparisons prevents an overflow: a start outside of the block is found before the addition.
    wrong = (
        (starts % PAGE_SIZE != 0)
        | (lengths % PAGE_SIZE != 0)
        | (lengths == 0)
        | (starts >= length)
        | (lengths > length)
    )
    wrong |= ~wrong & (starts + lengths > length)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise bad(
            f"discard of {int(starts[at]):#x}+{int(lengths[at]):#x} in {name!r} of {length:#x} bytes: "
            "empty, misaligned or outside"
        )
    runs = np.stack((starts, starts + lengths), axis=1).astype(np.int64) // PAGE_SIZE
    return Discard(block=name, runs=runs)


# -- PACKAGED ------------------------------------------------------------------------------------------------------


def packaged(blob: bytes) -> bytes:
    """The PACKAGED command and its blob: a fragment of the main stream that is read as a whole before any of it is
    loaded.

    Raises:
        LocalProtocolError: the blob does not fit 32 bits of length.
    """
    if len(blob) > MAX_PACKAGE:
        raise LocalProtocolError(f"the devices need a package of {len(blob)} bytes, the wire allows {MAX_PACKAGE}")
    return command(Command.PACKAGED, _BE32.pack(len(blob))) + blob


# -- bitmaps of received pages -------------------------------------------------------------------------------------


def bitmap_bytes(pages: int) -> int:
    """Bytes of the bitmap of a block of *pages* pages, without the words around it."""
    return (pages + 63) // 64 * 8


def received_bitmap(bitmap: PageBitmap) -> bytes:
    """The data after a RECV_BITMAP message: length, bits (page k is bit k mod 8 of byte k div 8), end mark."""
    size = bitmap_bytes(len(bitmap))
    bits = np.packbits(bitmap, bitorder="little").tobytes()
    return _BE64.pack(size) + bits.ljust(size, b"\0") + _BE64.pack(BITMAP_END)


def _bad_bitmap(what: str, offset: int, block: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"bitmap of the RAM block {block!r}: {what}", offset=offset, section="return path")


def check_bitmap_size(data: bytes | bytearray, pages: int, *, offset: int, block: str) -> None:
    """Check the length at the start of a bitmap, so that a wrong bitmap is refused before its bits have come.

    Raises:
        RemoteProtocolError: the length is not that of a block of *pages* pages.
    """
    if len(data) >= _BE64.size and (size := _BE64.unpack_from(data)[0]) != bitmap_bytes(pages):
        raise _bad_bitmap(f"{size} bytes announced, {bitmap_bytes(pages)} belong to {pages} pages", offset, block)


def decode_received_bitmap(data: bytes, pages: int, *, offset: int, block: str) -> PageBitmap:
    """Read the bitmap of a block of *pages* pages from all bytes after the message.

    Raises:
        RemoteProtocolError: wrong length or end mark, or a set bit after the last page.
    """

    expected = bitmap_bytes(pages)
    check_bitmap_size(data, pages, offset=offset, block=block)
    if len(data) != expected + BITMAP_FRAME:
        raise _bad_bitmap(f"{len(data)} bytes, expected {expected + BITMAP_FRAME}", offset, block)
    if (mark := _BE64.unpack_from(data, _BE64.size + expected)[0]) != BITMAP_END:
        raise _bad_bitmap(f"ends with {mark:#018x} instead of {BITMAP_END:#018x}", offset, block)
    bits = np.unpackbits(np.frombuffer(data, np.uint8, expected, _BE64.size), bitorder="little").astype(np.bool_)
    if bits[pages:].any():
        raise _bad_bitmap(f"a page behind the last of {pages} is marked", offset, block)
    return bits[:pages]
