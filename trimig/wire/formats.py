"""Recognises bytes that are not a migration stream: other files and other protocols, by their first bytes."""

from __future__ import annotations

import struct
from typing import Final

from .constants import MAGIC

#: Number of bytes that is enough to recognise all formats.
LOOK: Final = 4096

_UNPACK: Final = "unpack it first"
#: First bytes -> name of the format, and advice.
_BEGINNINGS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x1f\x8b", f"a gzip file: {_UNPACK} (gzip -dc)"),
    (b"\x28\xb5\x2f\xfd", f"a zstd file: {_UNPACK} (zstd -dc)"),
    (b"\xfd7zXZ\0", f"an xz file: {_UNPACK} (xz -dc)"),
    (b"BZh", f"a bzip2 file: {_UNPACK} (bzip2 -dc)"),
    (b"\x89LZO\0\r\n\x1a\n", f"an lzop file: {_UNPACK} (lzop -dc)"),
    (b"\x04\x22\x4d\x18", f"an lz4 file: {_UNPACK} (lz4 -dc)"),
    (b"PK\x03\x04", "a zip archive"),
    (b"QFI\xfb", "a qcow2 disk image; a snapshot in it is loaded by the QEMU that has the disk (loadvm)"),
    (b"KDMV", "a VMDK disk image"),
    (b"QED\0", "a QED disk image"),
    (b"vhdxfile", "a VHDX disk image"),
    (b"conectix", "a VHD disk image"),
    (b"<<< Oracle VM VirtualBox", "a VDI disk image"),
    (b"LUKS\xba\xbe", "an encrypted disk (LUKS)"),
    (b"KDUMP   ", "a kdump of a guest's memory (dump-guest-memory), which has no devices"),
    (b"DISKDUMP", "a kdump of a guest's memory (dump-guest-memory), which has no devices"),
    (b"makedumpfile\0", "a kdump of a guest's memory (dump-guest-memory), which has no devices"),
    (b"PAGEDU64", "a Windows dump of a guest's memory (dump-guest-memory), which has no devices"),
    (b"EMiL", "a LiME image of a guest's memory, which has no devices"),
    (b"AVML", "an AVML image of a guest's memory, which has no devices"),
    (b"VMLA", "an AVML image of a guest's memory, which has no devices"),
    (
        b"\x11\x22\x33\x44",
        "a channel of multifd: the capability multifd is on at the source, and it must be off or on at both sides",
    ),
    (b"QCPR", "a channel of the migration mode cpr-transfer, which is not built"),
    (b"GET ", "an HTTP request"),
    (b"POST ", "an HTTP request"),
    (b"HEAD ", "an HTTP request"),
    (b"PUT ", "an HTTP request"),
    (b"OPTIONS ", "an HTTP request"),
    (b"CONNECT ", "an HTTP request"),
    (b"HTTP/", "an HTTP answer"),
    (b"SSH-", "a greeting of SSH"),
    (b"<domain", "a domain definition of libvirt"),
    (b"<?xml", "an XML document"),
    (b'{"QMP"', "a greeting of QMP, which is another socket of a QEMU"),
    (b'{"execute"', "a command of QMP, which is for another socket"),
    (b"\0" * 512, "zeros: a raw disk or memory image, or a file that was never written"),
)

_LIBVIRT: Final = struct.Struct("<16s19I")
_LIBVIRT_FORMATS: Final = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
_LIBVIRT_VERSIONS: Final = (1, 2)
_ELF_CORE: Final = 4


def what_is(first: bytes | bytearray | memoryview) -> str | None:
    """The format that begins with *first*, as a part of a sentence: ``a gzip file: unpack it first (gzip -dc)``.

    Args:
        first: the first bytes, up to :data:`LOOK`; more bytes recognise more formats.

    Returns:
        None for a migration stream, and for an unknown format.
    """
    first = bytes(first[:LOOK])
    if not first:
        return "empty"
    if first.startswith((b"LibvirtQemudSave", b"LibvirtQemudPart")):
        return _libvirt(first)
    if first.startswith(b"\x7fELF"):
        return _elf(first)
    if first[:2] == b"\x16\x03" and first[2:3] in (b"\0", b"\1", b"\2", b"\3", b"\4"):
        return "a greeting of TLS: TLS is on at the other side (tls-creds) and off here"
    for beginning, what in _BEGINNINGS:
        if first.startswith(beginning):
            return what
    if first[510:512] == b"\x55\xaa" or first[512:520] == b"EFI PART":
        return "a raw disk image"
    return None


def may_become_known(first: bytes | bytearray | memoryview) -> bool:
    """Whether *first* is too short to recognise a format, and a few bytes more could be enough."""
    if bytes(first[:2]) in (b"\x16", b"\x16\x03") and len(first) < 3:
        return True
    known = [MAGIC, b"LibvirtQemudSave", b"LibvirtQemudPart", b"\x7fELF", *(b for b, _ in _BEGINNINGS)]
    return any(len(first) < len(beginning) <= 64 and beginning.startswith(bytes(first)) for beginning in known)


def _libvirt(first: bytes) -> str:
    if first.startswith(b"LibvirtQemudPart"):
        return "a save image of libvirt that is not complete: the save did not end, or still runs"
    text = "a save image of libvirt, which is not read yet"
    if len(first) < _LIBVIRT.size:
        return text
    _, *words = _LIBVIRT.unpack_from(first)
    if words[0] not in _LIBVIRT_VERSIONS:
        words = [int.from_bytes(word.to_bytes(4, "little")) for word in words]
    version, length, _, form = words[:4]
    if version not in _LIBVIRT_VERSIONS or form >= len(_LIBVIRT_FORMATS):
        return text
    begin = _LIBVIRT.size + length
    name = _LIBVIRT_FORMATS[form]
    if name == "sparse":
        return f"{text} (sparse, which is QEMU's mapped-ram)"
    behind = "" if name == "raw" else f" | {name} -dc"
    return f"{text} ({name}): its stream is what tail -c +{begin + 1} FILE{behind} writes"


def _elf(first: bytes) -> str:
    kind = first[16:18]
    if int.from_bytes(kind, "big" if first[5:6] == b"\2" else "little") == _ELF_CORE:
        return "an ELF core of a guest's memory (dump-guest-memory), which has no devices"
    return "an ELF file"
