"""Reads the main stream of an incoming migration, and checks the order of its elements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import trio

from ...status import SENDING_RAM, STREAM_IN_POSTCOPY, STREAM_PRECOPY_PAGES, Stream, after
from ...wire import events as ev
from ...wire.constants import Section
from ...wire.refusals import wrong_page_size
from ..order import item_of
from ..ram.placement import ENOUGH

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...wire.decoder import Decoder
    from .incoming import Incoming

#: Elements handled before other tasks get a turn; one takes up to some tens of microseconds.
_SLICE_EVENTS: Final = 32
#: Seconds for which a recovery connection may be silent before RESUME, unless a quarter of ``recovery_timeout`` is more. The
#: connection may come from a stranger that has sent RECV_BITMAP; it must not use up the time for the recovery. The real
#: source waits there for the bitmaps, which may be long, and perhaps for a busy machine.
_ASKING_SECONDS: Final = 10.0


class IncomingStream:
    """Reads the stream of one connection.

    Attributes:
        state: the state after the last element that :meth:`next` returned.
        ended: True once the connection has ended.
        marks: True if the source of this connection is a trimig, which may use the commands of :mod:`trimig.wire.marks`.
    """

    def __init__(self, into: Incoming, channel: Channel, decoder: Decoder, state: Stream = Stream.OPENING) -> None:
        self._into = into
        self.channel = channel
        self.decoder = decoder
        self.state = state
        self.ended = False
        self.marks = False
        self._loader = into.loaders["ram"]
        self._handled = 0
        self._between = False  # the last element was the end of a section
        self._waiting = trio.CancelScope()

    async def next(self, seconds: float = math.inf) -> ev.Element | None:
        """The next element; None after *seconds* without a byte, after :meth:`wake`, or if the connection ends where a stream
        may end.

        The pages in an element are valid until the next call.

        Raises:
            RemoteProtocolError: the next bytes are no element, or the element is not legal here.
            TransportFailed: the connection is lost.

        **Cancellation:** the stream must be given up.
        """
        while (event := self.next_now()) is None:
            with trio.CancelScope() as self._waiting:
                if self.ended or not await self._read(seconds):
                    return None
            if self._waiting.cancelled_caught:
                return None
        self._handled += 1
        if self._handled % _SLICE_EVENTS == 0:
            await trio.lowlevel.checkpoint()
        return event

    def wake(self) -> None:
        """Let a :meth:`next` that waits for bytes return None."""
        self._waiting.cancel("another task has news for the reader")

    def next_now(self) -> ev.Element | None:
        """As :meth:`next`; None if more bytes are needed."""
        if (event := self.decoder.next_event()) is None:
            return None
        section = "postcopy" if self.state in STREAM_IN_POSTCOPY else None
        self.state = after(self.state, item_of(event), offset=event.at, section=section)
        if isinstance(event, ev.SectionHeader) and event.kind is not Section.FULL:
            self._loader = self._into.loaders[event.idstr]
        # A command does not change this: before a switch to postcopy a source sends a PING, and may then be held by
        # pause-before-switchover.
        if not isinstance(event, ev.CommandElement):
            self._between = isinstance(event, ev.SectionFooter | ev.RamEnd)
        return event

    def enter(self, state: Stream) -> None:
        """Set the state after the package, which another reader has parsed."""
        self.state = state

    def accept_marks(self) -> None:
        """From now on accept marks on this connection: the source has sent its own."""
        self.marks = True
        self.decoder.accept_marks()

    async def load(self, event: ev.Element) -> None:
        """Give *event* to the loader of its section; see :class:`trimig.engine.sections.SectionLoader`.

        **Cancellation:** as for the loader.
        """
        await self._loader.load(event)

    async def _read(self, seconds: float) -> bool:
        """Read from the connection once; False if nothing came for *seconds*."""
        into, channel, decoder = self._into, self.channel, self.decoder
        bulk = False
        if self.state in STREAM_PRECOPY_PAGES:  # the guest does not run: the kernel may place pages
            if await into.ram.place_run(channel, decoder):
                return True
            run = decoder.open_run
            bulk = run is not None and run[2] >= ENOUGH
        view = decoder.writable()
        if channel.socket_fd is not None and self.state in STREAM_PRECOPY_PAGES:
            view = into.ram.shorten(view)
        count = None
        with trio.move_on_after(seconds):
            count = await channel.receive_into(view, stall_timeout=self._patience(), bulk=bulk)
        if count is None:
            return False
        self._came(count)
        return True

    def read_now(self) -> bool:
        """Read what a kernel socket has; False if it has nothing. TransportFailed."""
        count = self.channel.receive_now(self.decoder.writable())
        if count is not None:
            self._came(count)
        return count is not None

    def _came(self, count: int) -> None:
        if count:
            self.decoder.received(count)
        else:
            self.ended = True
            self.decoder.receive_eof()

    def _patience(self) -> float | None:
        """Seconds for which the source may be silent now; None for the usual ``stall_timeout``.

        The user of a source with pause-before-switchover may hold it before the switchover for any time. Then it sends
        nothing. Only the source has that capability, so the destination does not know it. Such a source is held only after
        a section of RAM, or after a command behind that section: there is no limit there. The transport (keepalive) notices
        a host that is gone.
        """
        if self.state is Stream.RECOVERING:
            config = self._into.config  # a source that is a trimig gives the handshake up after handover_timeout
            shared = max(_ASKING_SECONDS, config.recovery_timeout / 4)
            return min(config.stall_timeout, config.handover_timeout, shared)
        between = self._between and not self.decoder.pending  # no part of the next element has come
        return math.inf if between and self.state in SENDING_RAM else None

    def check_page_size(self) -> None:
        """Raise Unsupported if the stream has pages of another size, which must not be reported as missing pages."""
        if (size := self.decoder.page_size) is not None:
            raise wrong_page_size(size, section="ram")
