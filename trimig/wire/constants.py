"""Numbers of the wire format (stream.md part 2, ram.md part 2, commands.md part 2, return_path.md part 3)."""

from __future__ import annotations

import enum
from typing import Final

MAGIC: Final = b"QEVM"
VERSION: Final = 3
RAM_VERSION: Final = 4

#: The most bytes of a counted string, whose length is one byte.
MAX_CSTR: Final = 255


class Section(enum.IntEnum):
    """Tag of an element of the main stream."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class Command(enum.IntEnum):
    """Number of a COMMAND element."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


class RamFlag(enum.IntFlag):
    """Low bits of a record's first word inside the section ``ram``."""

    FULL = 0x01
    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


class ReturnPath(enum.IntEnum):
    """Type of a return-path message."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7
