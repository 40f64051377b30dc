"""Receives the pages of postcopy, and answers the guest's page faults: in a thread where that can be done, else by trio.

What shares the run loop with a page fault delays it, more than all that is done for the page. So, once the guest runs and the
connections are kernel sockets, one thread serves the guest (:class:`PageService`): it reads the faults, asks the source, and places
what comes on both connections. It returns to trio for every element that is no page, and begins again when that was handled. See
:mod:`trimig.channel.service` for what belongs to whom meanwhile.

Other streams (TLS, a websocket), memory that is not trimig's own, and a parked guest, whose pages nothing waits for, are served
by tasks of trio, with the same objects.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ...channel.service import Attendant, Awaited
from ...errors import RemoteProtocolError, TransportFailed
from ...wire import events as ev
from ...wire.constants import Section
from ..ram.inflate import put_inflated
from ..ram.postcopy_receiver import URGENT_FAILED

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ..ram.postcopy_receiver import PostcopyReceiver
    from ..ram.urgent_pages import UrgentPages
    from .answers import Answers
    from .incoming import Incoming
    from .stream import IncomingStream


class ReadsNow(Protocol):
    """What :class:`PageService` needs of :class:`.stream.IncomingStream`."""

    @property
    def channel(self) -> Channel:
        """The connection."""

    def next_now(self) -> ev.Element | None:
        """The next element; None if more bytes are needed."""

    def read_now(self) -> bool:
        """Read what is there; False if there is nothing."""


class PageService:
    """Serves the guest without waiting: page faults first, then requested pages, then the others.

    A page that the guest waits for may stand behind others on the main connection. They are placed in their order: the socket
    holds few of them, see :meth:`trimig.channel.channel.Channel.keep_backlog_short`. To read on and to place only the awaited
    page was tried: the median of the waits became a quarter shorter, and the longest waits became twice as long.

    Args:
        say: sends what the kernel takes at once, and returns the rest.

    Attributes:
        event: an element that is left for trio, behind which nothing was read.
        unsent: a part of a message that the kernel did not take.
    """

    def __init__(self, receiver: PostcopyReceiver, stream: ReadsNow, say: Callable[[bytes], bytes]) -> None:
        self._receiver = receiver
        self._stream = stream
        self._urgent: UrgentPages | None = None
        self._say = say
        self.event: ev.Element | None = None
        self.unsent = b""

    def begin(self, urgent: UrgentPages | None) -> None:
        """Forget :attr:`event` and :attr:`unsent`, which the caller has handled.

        Args:
            urgent: what comes on the second connection, if there is one.
        """
        self._urgent = urgent
        self.event, self.unsent = None, b""

    def advance(self) -> Awaited | None:
        """See :class:`trimig.channel.service.Service`.

        Raises:
            GuestFailed: the faults cannot be read, or a page cannot be placed.
            RemoteProtocolError: what came is no stream, not legal here, or a page that is here already.
            TransportFailed: a connection is lost.
        """
        self._serve_guest()
        self._take()
        came = self.event is None and self._stream.read_now()
        if came:
            self._take()
        if self.event is not None or self.unsent:
            return None
        channel = self._stream.channel
        ports = {self._receiver.fileno(): select.POLLIN, channel.descriptor: select.POLLIN}
        if self._urgent is not None and not self._urgent.over:
            ports[self._urgent.channel.descriptor] = select.POLLIN
        return Awaited(
            ports=ports,
            progress=channel.received,
            seconds=channel.stall_timeout,
            fault="sent nothing",
            busy=came,
        )

    def _serve_guest(self) -> None:
        if not self.unsent and (requests := self._receiver.requests()):
            self.unsent = self._say(requests)
        if self._urgent is None or self._urgent.over:
            return
        try:
            self._urgent.take_now()
        except (TransportFailed, RemoteProtocolError) as error:
            raise TransportFailed(f"{URGENT_FAILED}: {error}") from error

    def _take(self) -> None:
        """Take the elements that were read, until one is left for trio."""
        while self.event is None and (event := self._stream.next_now()) is not None:
            match event:
                case ev.PageRun() | ev.ZeroRun():
                    for _ in self._receiver.place(event):
                        self._serve_guest()
                case _ if not _is_frame(event):
                    self.event = event


def _is_frame(event: ev.Element) -> bool:
    """*event* begins or ends a section of pages, and nothing is to be done for it."""
    if isinstance(event, ev.SectionHeader):
        return event.kind is Section.PART
    return isinstance(event, ev.RamEnd | ev.SectionFooter)


class PageReader:
    """Receives the pages of one main connection, and of the second one beside it.

    Args:
        ready: True once a thread may work: the guest runs, and pages may come.
    """

    def __init__(
        self,
        into: Incoming,
        stream: IncomingStream,
        receiver: PostcopyReceiver,
        answers: Answers,
        ready: Callable[[], bool],
    ) -> None:
        self._into = into
        self._stream = stream
        self._receiver = receiver
        self._answers = answers
        self._ready = ready
        # Without a preempt channel, requested pages wait behind the others on this one: no checkpoint between them.
        self._sink = receiver.sink(turns=into.preempt.wanted)
        # With one, a page that is requested may have been sent on this one already.
        stream.channel.keep_backlog_short()
        self._attendant = Attendant()
        self._service = PageService(receiver, stream, answers.say_now)
        self._settled = False  # a page has come, so the source has the same settings

    def wake(self) -> None:
        """What decides between the thread and trio may have changed."""
        self._attendant.recall()
        if self._stream.channel.direct:
            self._stream.wake()

    async def next(self) -> ev.Element:
        """The next element that is no page, when all pages before it have been placed.

        Raises:
            GuestFailed: the faults cannot be read, or a page cannot be placed.
            RemoteProtocolError: what came is no stream, not legal here, or a page that is here already.
            TransportFailed: a connection is lost.

        **Cancellation:** the stream must be given up; the pages that have been placed count.
        """
        threads = True
        while True:
            if not (threads and self._can_thread()):
                event = await self._stream.next()
            else:
                threads, event = await self._by_thread()
            if isinstance(event, ev.PageElement):
                if not isinstance(event, ev.ZeroRun):
                    self._into.reception.settle()
                    self._settled = True
                await put_inflated(self._sink, event, self._into.monitor.config.parameters.decompress_threads)
            elif event is not None and not _is_frame(event):
                return event

    def _can_thread(self) -> bool:
        urgent = self._urgent
        return (
            self._settled
            and self._ready()
            and self._receiver.threadable
            and self._stream.channel.direct
            and (urgent is None or urgent.channel.direct)
        )

    @property
    def _urgent(self) -> UrgentPages | None:
        """What comes on the second connection, as long as something does."""
        pages = self._into.preempt.pages
        return pages if pages is not None and not pages.over else None

    async def _by_thread(self) -> tuple[bool, ev.Element | None]:
        """Let a thread work. False if there is none; and an element that it has left."""
        service = self._service
        async with self._receiver.owner:
            urgent = self._urgent
            service.begin(urgent)
            channels = [self._stream.channel] + ([urgent.channel] if urgent is not None else [])
            done = await self._attendant.run(service, channels)
        if service.unsent:
            await self._answers.say_bytes(service.unsent)
        return done, service.event
