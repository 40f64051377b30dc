"""The configuration section (stream.md part 4): the machine of a stream, and the settings needed to read the stream."""

from __future__ import annotations

import struct
from typing import Final

from ..config.capabilities import CAPABILITY_NAMES
from ..errors import RemoteProtocolError
from ..guest import PAGE_SIZE, ConfigSubsection
from .constants import Section
from .refusals import Unsupported, wrong_page_size

_BE32: Final = struct.Struct(">I")
_PAGE_BITS: Final = PAGE_SIZE.bit_length() - 1
#: A machine type name is an identifier of a few dozen characters; the wire would allow 4 GiB.
MAX_MACHINE_NAME: Final = 255
#: QEMU 7.2 knows 21 capabilities.
MAX_CAPABILITIES: Final = 256

#: Capabilities that the configuration section may name and that do not change the stream.
_HARMLESS_CAPABILITIES: Final = frozenset(CAPABILITY_NAMES) - {
    "x-ignore-shared",
    "mapped-ram",
    "multifd",
    "block",
    "x-colo",
    "dirty-bitmaps",
    "background-snapshot",
}
#: Advice for some unsupported capabilities; for the others: turn them off at the source.
_INSTEAD: Final = {
    "x-ignore-shared": "shared memory stays with the source: turn x-ignore-shared off there",
    "mapped-ram": "its pages stand at fixed places of a file: save it again with mapped-ram off",
}


def read_configuration(data: memoryview, offset: int) -> tuple[str, tuple[ConfigSubsection, ...], int] | None:
    """Read the machine's name and the subsections; the third value is the number of bytes used.

    Args:
        data: bytes from the type byte of the section on.
        offset: offset of *data* in the stream.

    Returns:
        None if more bytes are needed.

    Raises:
        RemoteProtocolError: without an offset; the section is malformed.
        Unsupported: it announces a feature that cannot be read.
    """
    if len(data) < 5:
        return None
    length = int(_BE32.unpack_from(data, 1)[0])
    if length > MAX_MACHINE_NAME:
        raise RemoteProtocolError(f"machine name of {length} bytes, at most {MAX_MACHINE_NAME} are accepted")
    ahead = 5 + length
    subsections: list[ConfigSubsection] = []
    # The first byte of the next element decides whether the configuration goes on.
    while len(data) > ahead:
        name = _cstr(data, ahead + 1) if data[ahead] == Section.SUBSECTION else ""
        if name is None:
            return None
        if not name.startswith("configuration"):
            machine = bytes(data[5 : 5 + length]).decode("utf-8", "surrogateescape")
            return machine, tuple(subsections), ahead
        if any(name == other.name for other in subsections):
            # A repeated subsection has no meaning, and an endless repetition would fill the memory.
            raise RemoteProtocolError(f"the configuration subsection {name!r} comes twice")
        found = _subsection(data, name, ahead + 2 + data[ahead + 1], offset)
        if found is None:
            return None
        subsection, ahead = found
        subsections.append(subsection)
    return None


def _cstr(data: memoryview, at: int) -> str | None:
    if len(data) <= at or len(data) < at + 1 + data[at]:
        return None
    return bytes(data[at + 1 : at + 1 + data[at]]).decode("utf-8", "surrogateescape")


def _subsection(data: memoryview, name: str, ahead: int, offset: int) -> tuple[ConfigSubsection, int] | None:
    if len(data) < ahead + 4:
        return None
    version = int(_BE32.unpack_from(data, ahead)[0])
    if version > 1:
        raise RemoteProtocolError(f"subsection {name!r} has version {version}, 1 is the newest known")
    start = ahead = ahead + 4
    match name:
        case "configuration/target-page-bits":
            ahead += 4
        case "configuration/uuid":
            ahead += 16
        case "configuration/capabilities":
            if len(data) < ahead + 4:
                return None
            count = int(_BE32.unpack_from(data, ahead)[0])
            if count > MAX_CAPABILITIES:
                raise RemoteProtocolError(f"{count} capabilities announced, at most {MAX_CAPABILITIES} are accepted")
            ahead += 4
            for _ in range(count):
                capability = _cstr(data, ahead)
                if capability is None:
                    return None
                check_capability(capability, offset)
                ahead += 1 + data[ahead]
        case _:
            raise RemoteProtocolError(f"unknown configuration subsection {name!r}")
    if len(data) < ahead:
        return None
    if name == "configuration/target-page-bits" and (bits := int(_BE32.unpack_from(data, start)[0])) != _PAGE_BITS:
        if bits > 32:
            raise RemoteProtocolError(f"target pages of 2^{bits} bytes are announced")
        raise wrong_page_size(1 << bits, offset=offset, section="configuration")
    return ConfigSubsection(name=name, version=version, payload=bytes(data[start:ahead])), ahead


def check_capability(name: str, offset: int) -> None:
    """Check that a stream whose configuration names the capability *name* can be read.

    Raises:
        Unsupported: the capability changes the stream, or is not known; with an advice.
    """
    if name in _HARMLESS_CAPABILITIES:
        return
    if name in CAPABILITY_NAMES or name in _INSTEAD:
        instead = _INSTEAD.get(name, f"turn {name} off at the source")
        text = f"the stream uses the capability {name}, which is not supported: {instead}"
    else:
        text = f"the stream uses the capability {name!r:.60}, which is not known here: turn it off at the source"
    raise Unsupported(text, offset=offset, section="configuration")
