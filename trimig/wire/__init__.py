"""Bytes <-> events of QEMU's migration stream. No I/O, no clock, no trio.

All code here works on buffers that the caller fills and empties, so it can be tested at every split and fuzzed without
a run loop. RAM moves in batches: arrays of page offsets and buffers of pages, never page by page.

:class:`Decoder` and :class:`Encoder` speak the main stream, in the records of :mod:`trimig.wire.events`;
:mod:`trimig.wire.return_path` has the messages from the destination to the source.
"""

from .constants import Command as Command
from .constants import RamFlag as RamFlag
from .constants import ReturnPath as ReturnPath
from .constants import Section as Section
from .decoder import Decoder as Decoder
from .encoder import Encoder as Encoder
from .encoder import RecordWriter as RecordWriter
from .pages.xbzrle_pages import XBZRLE_ENCODER as XBZRLE_ENCODER
