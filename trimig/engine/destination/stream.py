"""The main stream of an incoming migration: its elements, in the order that the table allows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import trio

from ...status import SENDING_RAM, Stream, after
from ...wire import events as ev
from ...wire.constants import Section
from ...wire.pages.size import wrong_page_size
from ..order import item_of
from ..ram.placement import ENOUGH

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...wire.decoder import Decoder
    from .incoming import Incoming

#: Elements handled before other tasks get a turn; one takes up to some tens of microseconds.
_SLICE_EVENTS: Final = 32
#: How long a connection in a recovery may be silent before RESUME, where the time for the recovery is short: a quarter of
#: that, but not less than this. A silent connection may be a stranger's that has asked for the pages of a block, and must not
#: use the time up. A source waits there for the bitmaps, which may be long, and for a turn of a busy machine.
_ASKING_SECONDS: Final = 10.0

#: The kernel may place pages: the guest does not run.
_PLACED: Final = SENDING_RAM | {Stream.ENDING}
_POSTCOPY: Final = frozenset({Stream.FOLLOWING, Stream.RECOVERING})


class IncomingStream:
    """Reads the stream of one connection.

    Attributes:
        state: behind the last element that :meth:`next` returned.
        ended: nothing follows on this connection.
    """

    def __init__(self, into: Incoming, channel: Channel, decoder: Decoder, state: Stream = Stream.OPENING) -> None:
        self._into = into
        self.channel = channel
        self.decoder = decoder
        self.state = state
        self.ended = False
        self._loader = into.loaders["ram"]
        self._handled = 0
        self._between = False  # the last element was the end of a section

    async def next(self, seconds: float = math.inf) -> ev.Element | None:
        """The next element; None if nothing came for *seconds*, or if the connection ends where a stream may end.

        Pages in the last element are valid until this is called.

        Raises:
            RemoteProtocolError: it is not legal here, or no element.
            TransportFailed: the connection is lost.

        **Cancellation:** the stream must be given up.
        """
        while (event := self.decoder.next_event()) is None:
            if self.ended or not await self._read(seconds):
                return None
        self._handled += 1
        if self._handled % _SLICE_EVENTS == 0:
            await trio.lowlevel.checkpoint()
        section = "postcopy" if self.state in _POSTCOPY else None
        self.state = after(self.state, item_of(event), offset=event.at, section=section)
        if isinstance(event, ev.SectionHeader) and event.kind is not Section.FULL:
            self._loader = self._into.loaders[event.idstr]
        # A command changes nothing: a source that is going to switch to postcopy sends a PING before it is held.
        if not isinstance(event, ev.CommandElement):
            self._between = isinstance(event, ev.SectionFooter | ev.RamEnd)
        return event

    def enter(self, state: Stream) -> None:
        """Another reader has read up to *state*: that of a package."""
        self.state = state

    async def load(self, event: ev.Element) -> None:
        """Take an element of the content of the last iterative section; see :class:`trimig.engine.sections.SectionLoader`.

        **Cancellation:** as there.
        """
        await self._loader.load(event)

    async def _read(self, seconds: float) -> bool:
        """Read once; False if nothing came for *seconds*."""
        into, channel, decoder = self._into, self.channel, self.decoder
        bulk = False
        if self.state in _PLACED:
            if await into.ram.place_run(channel, decoder):
                return True
            run = decoder.open_run
            bulk = run is not None and run[2] >= ENOUGH
        count = None
        with trio.move_on_after(seconds):
            count = await channel.receive_into(decoder.writable(), stall_timeout=self._patience(), bulk=bulk)
        if count is None:
            return False
        if count:
            decoder.received(count)
        else:
            self.ended = True
            decoder.receive_eof()
        return True

    def _patience(self) -> float | None:
        """How long the source may be silent now; None for the usual time.

        A source that is held before the switchover (pause-before-switchover) sends nothing for as long as its user likes,
        and only the source needs that capability, so nothing here tells whether it is held. It is behind a section of
        RAM, or a command behind one, and nowhere else. A host that is gone is noticed by the transport (keepalive).
        """
        if self.state is Stream.RECOVERING:
            config = self._into.config  # a source that is a trimig gives the handshake up after handover_timeout
            shared = max(_ASKING_SECONDS, config.recovery_timeout / 4)
            return min(config.stall_timeout, config.handover_timeout, shared)
        return math.inf if self._between and self.state in SENDING_RAM else None

    def check_page_size(self) -> None:
        """Pages of another size are not taken for memory with holes. Unsupported."""
        if (size := self.decoder.page_size) is not None:
            raise wrong_page_size(size, section="ram")
