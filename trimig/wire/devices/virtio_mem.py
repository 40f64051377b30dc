"""Finds memory that a virtio-mem device has not plugged in: it is never sent, its pages are absent by rule.

The device state has a bitmap of the plugged memory, with a bit for each block of the device, and figures around it:
address, size of the region, size of a block, node, [usable size,] plugged size [and requested size]. Up to QEMU 7.2
they are inside data that the description does not divide, later in a separate section before the RAM. So they are found
by their values, which depend on each other: the plugged size is that of the bits, and all figures fit the RAM block.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np

from ...guest import PAGE_SIZE, DeviceSection, PageBitmap
from ..postcopy import runs_of

_U64: Final = struct.Struct(">Q")
#: Address, region size, block size, node.
_HEAD: Final = struct.Struct(">QQQI")
_DEVICE: Final = "virtio-mem"
#: Blocks of a virtio-mem device have at least the size of a huge page, or of a page on hosts without huge pages.
_LEAST_BLOCK: Final = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Unplugged:
    """The memory of one RAM block that is not plugged in.

    Attributes:
        bits: bool for each block of the device: True if it is not plugged in.
        pages: number of pages in a block.
    """

    bits: PageBitmap
    pages: int

    def bitmap(self) -> PageBitmap:
        """One bit for each page of the RAM block."""
        return np.repeat(self.bits, self.pages)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs of pages: the first page, and the page after the last."""
        for first, end in runs_of(self.bits).tolist():
            yield first * self.pages, end * self.pages


def overlap(some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> int:
    """Number of pages that are in *some* and in *others*; both are runs in ascending order."""
    count = 0
    left, right = iter(some), iter(others)
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        count += max(0, min(a[1], b[1]) - max(a[0], b[0]))
        if a[1] < b[1]:
            a = next(left, None)
        else:
            b = next(right, None)
    return count


def absent_by_rule(blocks: Mapping[str, int], sections: Iterable[DeviceSection]) -> dict[str, Unplugged]:
    """Memory of RAM blocks that virtio-mem devices have not plugged in, by the block's name; only blocks that have some.

    A device's memory is the block whose name begins with the path of the device. If there is no such name (backends
    with names of their own), it is the only block of its size.

    Args:
        blocks: lengths in bytes by name.
        sections: all device sections.
    """
    found: dict[str, Unplugged] = {}
    for section in sections:
        path, slash, kind = section.idstr.rpartition("/")
        if not kind.startswith(_DEVICE):
            continue
        own = [name for name in blocks if slash and name.startswith(f"{path}/")] or list(blocks)
        fitting = {name: bits for name in own if (bits := _unplugged(section.payload, blocks[name])) is not None}
        if len(fitting) == 1:
            found.update(fitting)
    return {name: unplugged for name, unplugged in found.items() if unplugged.bits.any()}


def _unplugged(payload: bytes, length: int) -> Unplugged | None:
    """The part of a block of *length* bytes that is not plugged in; None if *payload* does not describe such a block."""
    wanted = _U64.pack(length)
    at = payload.find(wanted)
    while at >= 0:
        bits = _at(payload, at - 8, length) if at >= 8 else None
        if bits is not None:
            return Unplugged(~bits, length // len(bits) // PAGE_SIZE)
        at = payload.find(wanted, at + 1)
    return None


def _at(payload: bytes, start: int, length: int) -> PageBitmap | None:
    """The bitmap after the figures at *start*, one bit for each block of the device; None if the values do not fit."""
    if len(payload) < start + _HEAD.size:
        return None
    address, region, block, _node = _HEAD.unpack_from(payload, start)
    if block < _LEAST_BLOCK or block & (block - 1) or region % block or address % block or region != length:
        return None
    count = region // block
    size = (count + 63) // 64 * 8
    # With the usable and the requested size around the plugged size, or without them.
    for before, behind in ((0, 0), (8, 8)):
        plugged_at = start + _HEAD.size + before
        begin = plugged_at + 8 + behind
        if len(payload) < begin + size:
            continue
        plugged = _U64.unpack_from(payload, plugged_at)[0]
        words = np.frombuffer(payload, ">u8", size // 8, begin).astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(np.bool_)
        if int(np.count_nonzero(bits)) * block == plugged and not bits[count:].any():
            return bits[:count]
    return None
