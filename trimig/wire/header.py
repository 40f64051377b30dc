"""The first eight bytes of a stream (stream.md part 3)."""

from __future__ import annotations

from typing import Final

from ..errors import RemoteProtocolError
from .constants import MAGIC, VERSION
from .formats import LOOK, may_become_known, what_is
from .refusals import Unsupported

#: Bytes of the header.
LENGTH: Final = 8


def read_file_header(data: memoryview, *, final: bool) -> int | None:
    """Read the version of the stream that begins with *data*.

    Args:
        final: no bytes follow *data*.

    Returns:
        None if more bytes are needed.

    Raises:
        Unsupported: without an offset; *data* is not a migration stream; its format is named if it is known.
        RemoteProtocolError: without an offset; the stream is of another version.
    """
    have = min(len(data), len(MAGIC))
    if bytes(data[:have]) != MAGIC[:have]:
        first = bytes(data[:LOOK])
        if (what := what_is(first)) is not None:
            raise Unsupported(f"not a migration stream but {what}")
        if may_become_known(first) and not final:
            return None
        raise Unsupported(f"not a migration stream: it starts with {first[:4]!r} instead of {MAGIC!r}")
    if len(data) < LENGTH:
        return None
    version = int.from_bytes(data[4:8])
    if version == 2:
        raise RemoteProtocolError("stream version 2 is obsolete and cannot be read; version 3 is needed")
    if version != VERSION:
        raise RemoteProtocolError(f"stream version {version} is not supported; version {VERSION} is needed")
    return version
