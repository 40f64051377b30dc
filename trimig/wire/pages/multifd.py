"""multifd: the bytes of a data channel (multifd.md parts 2 to 5, newer.md part 3).

A data channel begins with a hello of 64 bytes. Packets follow: a header of fixed size that names up to 128 pages of one
block, and then the content of these pages, perhaps compressed. Nothing comes back on a data channel.

Two schemes exist. The old one is QEMU's up to 8.2: zero pages go on the main channel, and a packet that synchronises may have
pages. The new one begins with 9.0: zero pages are named in packets, and a packet that synchronises has nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE

#: The first bytes of the hello, and of each packet.
MAGIC: Final = bytes.fromhex("11223344")
VERSION: Final = 1
#: Bytes of the hello.
HELLO_BYTES: Final = 64
#: The most pages in one packet.
PACKET_PAGES: Final = (512 << 10) // PAGE_SIZE
#: Bytes of a packet's header, however many pages it names.
HEADER_BYTES: Final = 320 + 8 * PACKET_PAGES
#: The most channels that a source may open.
MOST_CHANNELS: Final = 255

_HELLO: Final = struct.Struct(">4sI16sB39x")
# magic, version, flags, most pages, pages, bytes of the content, number, zero pages, block
_HEADER: Final = struct.Struct(">4sIIIIIQI28x256s")
_NAME_BYTES: Final = 255
_NUMBER: Final = slice(24, 32)
assert _HELLO.size == HELLO_BYTES
assert _HEADER.size + 8 * PACKET_PAGES == HEADER_BYTES

#: The offsets of a full packet, as one number of 8 * PACKET_PAGES bytes: those of consecutive pages are _ONES times the first offset,
#: plus _STEPS.
_ONES: Final = sum(1 << 64 * place for place in range(PACKET_PAGES))
_STEPS: Final = sum(PAGE_SIZE * number << 64 * (PACKET_PAGES - 1 - number) for number in range(PACKET_PAGES))


class PacketFlag(enum.IntFlag):
    """Flags of a packet."""

    SYNC = 0x01
    ZLIB = 0x02
    ZSTD = 0x04
    QPL = 0x08
    UADK = 0x10
    QATZIP = 0x20
    #: The state of a device instead of pages (newer.md part 3.2).
    DEVICE = 0x40


#: The bits that name the compression.
COMPRESSION: Final = PacketFlag.ZLIB | PacketFlag.ZSTD | PacketFlag.QPL | PacketFlag.UADK | PacketFlag.QATZIP
_NAMES: Final[Mapping[int, str]] = {
    0: "none", PacketFlag.ZLIB: "zlib", PacketFlag.ZSTD: "zstd", PacketFlag.QPL: "qpl", PacketFlag.UADK: "uadk",
    PacketFlag.QATZIP: "qatzip",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first element of a data channel."""

    #: The UUID of the machine, 16 bytes; all zero if it has none.
    uuid: bytes
    #: The number of the channel, from 0 on.
    number: int


def write_hello(hello: Hello) -> bytes:
    """The bytes of *hello*."""
    return _HELLO.pack(MAGIC, VERSION, hello.uuid, hello.number)


def read_hello(data: bytes, *, channels: int) -> Hello:
    """Read a hello from ``HELLO_BYTES`` bytes.

    Args:
        channels: the number of the data channels of this migration.

    Raises:
        RemoteProtocolError: it is malformed, or of a channel that is not wanted.
    """
    magic, version, uuid, number = _HELLO.unpack(data)
    _check_magic(magic, version, 0, "data channel")
    if number >= channels:
        raise RemoteProtocolError(
            f"the data channel has the number {number}, and multifd-channels is {channels} here: set it to the same number at both sides",
            offset=24,
            section="multifd",
        )
    return Hello(uuid=uuid, number=number)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packet:
    """The header of a packet.

    Attributes:
        number: of the packet, over all channels.
        sync: the receiver waits behind this packet until all channels have come to theirs.
        compression: one of the bits of :data:`COMPRESSION`; 0 for none.
        block: the block of all its pages; empty without pages.
        offsets: int64, shape (n,): byte offsets of the pages whose content follows, in its order.
        zeros: int64, shape (m,): byte offsets of pages that are zero.
        size: bytes of the content that follows.
    """

    number: int
    sync: bool = False
    compression: int = 0
    block: str = ""
    offsets: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    zeros: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    size: int = 0


def write_packet(packet: Packet, *, new: bool) -> bytes:
    """The header of *packet*.

    Args:
        new: in the scheme of 9.0 and later.
    """
    count, zeros = len(packet.offsets), len(packet.zeros)
    bare = new and packet.sync and not count and not zeros
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        (PacketFlag.SYNC if packet.sync else 0) | (packet.compression if count or zeros else 0),
        0 if bare else PACKET_PAGES,
        count,
        packet.size,
        packet.number,
        zeros,
        packet.block.encode("utf-8", "surrogateescape"),
    )
    offsets = np.zeros(PACKET_PAGES, ">u8")
    offsets[:count] = packet.offsets
    offsets[count : count + zeros] = packet.zeros
    return head + offsets.tobytes()


def write_packets(
    block: str, offsets: NDArray[np.int64], *, number: int, zero: bool = False, compression: int = 0
) -> NDArray[np.uint8]:
    """The headers of packets of many pages: each but the last one has ``PACKET_PAGES`` of them. No packet synchronises.

    Args:
        offsets: byte offsets of the pages in *block*, at least one.
        number: of the first packet.
        zero: name zero pages, which have no content (the new scheme). If False the content follows each header as it is.
        compression: with *zero*, one of the bits of :data:`COMPRESSION`; 0 for none.

    Returns:
        uint8, shape (packets, ``HEADER_BYTES``).
    """
    count = -(-len(offsets) // PACKET_PAGES)
    last = len(offsets) - (count - 1) * PACKET_PAGES
    rows = np.zeros((count, HEADER_BYTES), np.uint8)
    head = (MAGIC, VERSION, compression, PACKET_PAGES)
    full = (0, 0, 0, PACKET_PAGES) if zero else (PACKET_PAGES, PACKET_PAGES * PAGE_SIZE, 0, 0)
    rest = (0, 0, 0, last) if zero else (last, last * PAGE_SIZE, 0, 0)
    name = block.encode("utf-8", "surrogateescape")
    rows[:, : _HEADER.size] = np.frombuffer(_HEADER.pack(*head, *full, name), np.uint8)
    rows[-1, : _HEADER.size] = np.frombuffer(_HEADER.pack(*head, *rest, name), np.uint8)
    rows[:, _NUMBER].view(">u8")[:, 0] = np.arange(number, number + count)
    padded = np.zeros(count * PACKET_PAGES, ">u8")
    padded[: len(offsets)] = offsets
    rows[:, _HEADER.size :] = padded.view(np.uint8).reshape(count, -1)
    return rows


class PacketReader:
    """Reads the headers of one data channel.

    Args:
        channel: the number of the channel, for errors.
        blocks: used length in bytes of the RAM blocks, by name.
        compression: one of the bits of :data:`COMPRESSION`; 0 for none. Both sides must have the same.
        zero_pages: a packet may name zero pages (the new scheme). In the old one these bytes have no meaning.
    """

    def __init__(self, channel: int, blocks: Mapping[str, int], *, compression: int, zero_pages: bool) -> None:
        self._what = f"data channel {channel}"
        self._blocks = blocks
        self._compression = compression
        self._zero_pages = zero_pages
        #: The name in the last header as it came, and in text.
        self._name = b"", ""

    def read_run(self, data: bytes | memoryview) -> tuple[str, int] | None:
        """Read the header of a full packet of consecutive pages as they are, of the same block as the last packet.

        It makes no arrays: those of :meth:`read` cost more than all else that is done for a packet in Python.

        Returns:
            The block, and the number of the first of ``PACKET_PAGES`` pages; None for any other packet, and for one that is
            wrong: :meth:`read` reads them.
        """
        magic, version, flags, most, count, size, _, zeros, name = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION or flags or most > PACKET_PAGES or count != PACKET_PAGES:
            return None
        if (zeros and self._zero_pages) or self._compression or size != PACKET_PAGES * PAGE_SIZE:
            return None
        block = self._name[1]
        if name != self._name[0] or block not in self._blocks:
            return None
        offsets = bytes(data[_HEADER.size :])
        first = int.from_bytes(offsets[:8])
        if first % PAGE_SIZE or first + size > self._blocks[block]:
            return None
        return (block, first // PAGE_SIZE) if int.from_bytes(offsets) == first * _ONES + _STEPS else None

    def read(self, data: bytes | memoryview, at: int) -> Packet:
        """Read a header from ``HEADER_BYTES`` bytes.

        Args:
            at: its offset in the channel.

        Raises:
            RemoteProtocolError: it is malformed, or does not fit this side's settings or the blocks.
        """
        magic, version, flags, most, count, size, number, zeros, name = _HEADER.unpack_from(data)
        _check_magic(magic, version, at, self._what)
        if not self._zero_pages:
            zeros = 0
        self._check_flags(flags, count, at)
        if most > PACKET_PAGES or count + zeros > PACKET_PAGES:
            raise self._wrong(
                f"a packet of {count} pages and {zeros} zero pages (room for {most}); the most is {PACKET_PAGES}", at
            )
        if not count and not zeros:
            # The other fields of the header may be those of an earlier packet.
            return Packet(number=number, sync=bool(flags & PacketFlag.SYNC))
        if name != self._name[0]:
            self._name = name, bytes(name[:_NAME_BYTES]).partition(b"\0")[0].decode("utf-8", "surrogateescape")
        block = self._name[1]
        if block not in self._blocks:
            raise self._wrong(f"a packet of the unknown RAM block {block!r}", at + 64)
        offsets = np.frombuffer(data, ">u8", count + zeros, 320).astype(np.uint64)
        self._check_offsets(offsets, block, at)
        found = offsets.view(np.int64)
        compression = flags & COMPRESSION
        if count and not compression and size != count * PAGE_SIZE:
            raise self._wrong(f"{count} pages in {size} bytes, not compressed", at + 20)
        if count and size > _most_bytes(count):
            raise self._wrong(
                f"{count} pages in {size} bytes; compressed they have at most {_most_bytes(count)}", at + 20
            )
        return Packet(
            number=number,
            sync=bool(flags & PacketFlag.SYNC),
            compression=compression,
            block=block,
            offsets=found[:count],
            zeros=found[count:],
            size=size if count else 0,
        )

    def _check_flags(self, flags: int, count: int, at: int) -> None:
        if flags & PacketFlag.DEVICE:
            raise self._wrong("the state of a device (x-migration-multifd-transfer), which is not supported", at + 8)
        if flags & ~int(COMPRESSION | PacketFlag.SYNC):
            raise self._wrong(f"unknown flags {flags:#x}", at + 8)
        compression = flags & COMPRESSION
        if count and compression != self._compression:
            there, here = _NAMES.get(compression, f"{compression:#x}"), _NAMES[self._compression]
            raise self._wrong(
                f"pages compressed with {there!r}, and multifd-compression is {here!r} here: set it to the same at both sides",
                at + 8,
            )

    def _check_offsets(self, offsets: NDArray[np.uint64], block: str, at: int) -> None:
        length = self._blocks[block]
        if int(np.bitwise_or.reduce(offsets)) % PAGE_SIZE or int(np.maximum.reduce(offsets)) > length - PAGE_SIZE:
            wrong = (offsets % np.uint64(PAGE_SIZE) != 0) | (offsets > np.uint64(length - PAGE_SIZE))
            row = int(wrong.argmax())
            raise self._wrong(
                f"page at {int(offsets[row]):#x} is outside of RAM block {block!r}, which has {length:#x} bytes",
                at + 320 + 8 * row,
            )

    def _wrong(self, problem: str, at: int) -> RemoteProtocolError:
        return RemoteProtocolError(f"{self._what}: {problem}", offset=at, section="multifd")


def _most_bytes(count: int) -> int:
    """More than any compressor makes of *count* pages, with the bytes of a flush."""
    raw = count * PAGE_SIZE
    return raw + (raw >> 7) + 1024


def _check_magic(magic: bytes, version: int, at: int, what: str) -> None:
    if magic != MAGIC:
        raise RemoteProtocolError(f"{what}: magic {magic.hex()}, {MAGIC.hex()} is needed", offset=at, section="multifd")
    if version != VERSION:
        raise RemoteProtocolError(f"{what}: version {version}, {VERSION} is needed", offset=at + 4, section="multifd")
