"""Results of a guest's own code, checked where they come in: a mistake there is one error that names the block or device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ..errors import GuestFailed
from ..guest import PAGE_SIZE, DeviceSection, PageBitmap, RamBlock

_SEE: Final = "(trimig docs own_guest)"
_U32: Final = 2**32
#: The most bytes in the name of a device.
_NAME_BYTES: Final = 255


def written_pages(result: object, blocks: Sequence[RamBlock]) -> Mapping[str, PageBitmap]:
    """The result of ``sync()`` of a dirty tracker.

    Raises:
        GuestFailed: it is not a mapping that has, for each block by name, an array of dtype bool with one element for each
            page.
    """
    if not isinstance(result, Mapping):
        raise GuestFailed(
            f"sync() of the dirty tracker returned {_kind(result)}: it must return a dict by block {_SEE}"
        )
    for block in blocks:
        pages = block.length // PAGE_SIZE
        if block.name not in result:
            raise GuestFailed(f"sync() of the dirty tracker returned nothing for RAM block {block.name!r} {_SEE}")
        if not _is_bitmap(bitmap := result[block.name], pages):
            raise GuestFailed(
                f"sync() of the dirty tracker returned {_kind(bitmap)} for RAM block {block.name!r}: it must be a NumPy "
                f"array of dtype bool and shape ({pages},) {_SEE}"
            )
    return result


def absent_pages(result: PageBitmap | None, block: RamBlock) -> PageBitmap | None:
    """The result of ``absent()`` of *block*.

    Raises:
        GuestFailed: it is neither None nor an array of dtype bool with one element for each page.
    """
    pages = block.length // PAGE_SIZE
    if result is None or _is_bitmap(result, pages):
        return result
    raise GuestFailed(
        f"absent() of RAM block {block.name!r} returned {_kind(result)}: it must return None, or a NumPy array of dtype bool and "
        f"shape ({pages},) {_SEE}"
    )


def _is_bitmap(result: object, pages: int) -> bool:
    return isinstance(result, np.ndarray) and result.dtype == np.bool_ and result.shape == (pages,)


def saved_devices(result: object) -> Sequence[DeviceSection]:
    """The result of ``save_devices()`` of a guest.

    Raises:
        GuestFailed: it is no sequence of :class:`trimig.guest.DeviceSection`, or a field of one has a value that cannot be
            sent.
    """
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        raise GuestFailed(f"save_devices() returned {_kind(result)}: it must return a list of DeviceSection {_SEE}")
    for number, section in enumerate(result):
        if not isinstance(section, DeviceSection):
            raise GuestFailed(
                f"save_devices() returned {_kind(section)} as number {number}: each must be a DeviceSection {_SEE}"
            )
        if (problem := _problem(section)) is not None:
            raise GuestFailed(
                f"save_devices() returned device {section.idstr!r} (number {number}) with {problem} {_SEE}"
            )
    return result


def _problem(section: Any) -> str | None:  # its fields may have any type
    """The field of a DeviceSection that cannot be sent, in words."""
    if (
        not isinstance(section.idstr, str)
        or not 1 <= len(section.idstr.encode(errors="surrogateescape")) <= _NAME_BYTES
    ):
        return f"a name that is no str of 1 to {_NAME_BYTES} bytes"
    for name in ("instance_id", "version_id"):
        value = getattr(section, name)
        if not isinstance(value, int) or not 0 <= value < _U32:
            return f"{name} {value!r:.40}: it must be an integer from 0 to 2^32-1"
    if section.section_id is not None and (
        not isinstance(section.section_id, int) or not 0 <= section.section_id < _U32
    ):
        return f"section_id {section.section_id!r:.40}: it must be an integer from 0 to 2^32-1, or None"
    if section.description is not None and not isinstance(section.description, Mapping):
        return f"{_kind(section.description)} as description: it must be a dict, or None"
    if not isinstance(section.payload, bytes | bytearray | memoryview):
        return f"{_kind(section.payload)} as payload: it must be bytes"
    return None


def _kind(value: object) -> str:
    """*value* in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of dtype {value.dtype} and shape {value.shape}"
    return f"{value!r:.60} ({type(value).__name__})"
