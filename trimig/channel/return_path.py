"""The task on the source that reads the return path, and passes its messages to the migration task.

A refusal of the destination, an invalid message or the end of the connection ends the attempt at once, in every phase
(QEMU reads the return path's result only at the very end: return_path.md part 5). After the decision was sent, an ended
connection raises no error here: then the answer is missing, and the migration task decides what follows.

Some transports lead to a program that never answers, such as a command that stores the stream. There the end of the
return path before the first message is no error. From the first message on it is an error, as with other transports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import trio

from ..errors import Loss, PeerFailed, RemoteProtocolError, TransportFailed
from ..status import Item, ReturnPath, after
from ..wire.marks import shown_reason
from ..wire.return_path import (
    Attempt,
    Clock,
    Message,
    PageRequest,
    Pong,
    Reason,
    ReceivedPages,
    ResumeAck,
    ReturnPathDecoder,
    Shut,
    SwitchoverAck,
)

if TYPE_CHECKING:
    from .channel import Channel


class ReturnPathReader:
    """Reads the return path of one attempt.

    Args:
        blocks: used length of the RAM blocks by name.
        perhaps_silent: True if the transport may lead to a program that never answers.
        acks: True if the destination may send SWITCHOVER_ACK (capability switchover-ack).
    """

    def __init__(
        self, channel: Channel, blocks: Mapping[str, int], *, perhaps_silent: bool = False, acks: bool = False
    ) -> None:
        self._channel = channel
        #: Held by a thread that reads the return path, and by :meth:`run` while it reads.
        self.owner = trio.Lock()
        self._buffer = memoryview(bytearray(4096))
        self._kept: list[Message] = []
        self._error: TransportFailed | RemoteProtocolError | None = None
        self._decoder = ReturnPathDecoder(blocks, marks=True)
        #: The reason for which the destination gave the migration up, from its message REASON; empty without the message.
        self.reason = ""
        self._pongs: set[int] = set()
        self._news = trio.Event()
        self._perhaps_silent = perhaps_silent
        self._acks_wanted = acks
        #: How many SWITCHOVER_ACK have come.
        self.acks = 0
        #: True once a message has come.
        self.heard = False
        #: True once the return path ended without any message.
        self.silent = False
        #: The status in SHUT; None until SHUT has come.
        self.shut: int | None = None
        #: The error that ended the return path; set only in a state after :attr:`ReturnPath.BEFORE`.
        self.lost: TransportFailed | RemoteProtocolError | None = None
        #: The state of the return path. In a state after BEFORE an ended connection does not end the attempt by itself.
        self.state = ReturnPath.BEFORE
        #: Called with each message of postcopy, and with None when no message can come any more. It is a call and not
        #: an event, because a page request must be answered within microseconds.
        self.listener: Callable[[Message | None], None] | None = None

    def expect_bitmap(self, block: str) -> None:
        """Expect the bitmap of received pages of *block*; call this before the request for it is sent."""
        self._decoder.expect_bitmap(block)

    def enter(self, state: ReturnPath, listener: Callable[[Message | None], None] | None = None) -> None:
        """Set the state of the return path, and the *listener* that is called with each message from now on."""
        self.state, self.listener = state, listener

    def lose(self, why: TransportFailed) -> None:
        """Record that the return path has ended because of *why*. An earlier reason stays."""
        if self.lost is None:
            self.lost = why

    def has_ponged(self, value: int) -> bool:
        """True if the PONG for PING(*value*) has come."""
        return value in self._pongs

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_life(self) -> None:
        """Wait until :attr:`heard` or :attr:`silent` is set.

        **Cancellation:** no effect.
        """
        while not self.heard and not self.silent:
            await self._news.wait()

    async def wait_acks(self, count: int) -> None:
        """Wait until :attr:`acks` is *count* at least.

        **Cancellation:** no effect.
        """
        while self.acks < count:
            await self._news.wait()

    async def wait_pong(self, value: int) -> None:
        """Wait for the answer to PING(*value*).

        **Cancellation:** no effect.
        """
        while value not in self._pongs:
            await self._news.wait()

    async def wait_pong_or_mark(self, value: int) -> None:
        """Wait for the answer to PING(*value*), or until the destination is known as a trimig.

        **Cancellation:** no effect.
        """
        while value not in self._pongs and not self.marked:
            await self._news.wait()

    async def wait_answer(self) -> None:
        """Wait until :attr:`shut` or :attr:`lost` is set.

        **Cancellation:** no effect.
        """
        while self.shut is None and self.lost is None:
            await self._news.wait()

    async def run(self) -> None:
        """Read until SHUT, or until the connection ends.

        Raises:
            PeerFailed: the destination refused.
            RemoteProtocolError: an invalid message came before the decision was sent.
            TransportFailed: the connection ended before the decision was sent.

        **Cancellation:** stops reading.
        """
        buffer = self._buffer
        try:
            while not self.silent and self.shut is None and self.lost is None:
                # No timeout here: a destination sends nothing while memory is sent. If an answer is due, the migration
                # task waits for it with a timeout of its own.
                if not self._channel.direct:
                    self._came(buffer, await self._channel.receive_into(buffer, stall_timeout=math.inf))
                elif await self._has_nothing(buffer):
                    await self._channel.wait_readable()
        except (TransportFailed, RemoteProtocolError) as error:
            if self.state is ReturnPath.BEFORE:
                raise
            self._lose(error)

    async def _has_nothing(self, buffer: memoryview) -> bool:
        """Take what a kernel socket has; True if it has nothing."""
        async with self.owner:
            if self.shut is not None or self.lost is not None:  # a thread has read that meanwhile
                return False
            count = self._channel.receive_now(buffer)
            if count is not None:
                self._came(buffer, count)
        return count is None

    def _came(self, buffer: memoryview, count: int) -> None:
        if count:
            for message in self._decoder.feed(buffer[:count]):
                self.heard = True
                self._take(message)
        elif self._perhaps_silent and not self.heard and not self._decoder.pending:
            self.silent = True
        else:
            raise TransportFailed(self._ended(), loss=Loss.CLOSED)
        self._tell()

    def _lose(self, error: TransportFailed | RemoteProtocolError) -> None:
        self.lost = error
        self._tell()
        if self.listener is not None:
            self.listener(None)

    # -- by a thread, in the state FOLLOWING ---------------------------------------------------------------------------

    def requests_now(self) -> Iterator[PageRequest]:
        """The requests for pages that a kernel socket has. All behind the first other message is kept for :meth:`take_kept`."""
        try:
            count = self._channel.receive_now(self._buffer)
            if count is None:
                return
            if not count:
                raise TransportFailed(self._ended(), loss=Loss.CLOSED)
            for message in self._decoder.feed(self._buffer[:count]):
                if self._kept or not isinstance(message, PageRequest):
                    self._kept.append(message)
                    continue
                self.state = after(self.state, Item.REQ_PAGES, section="return path")
                yield message
        except (TransportFailed, RemoteProtocolError) as error:
            self._error = error

    @property
    def keeps(self) -> bool:
        """There is something for :meth:`take_kept`."""
        return bool(self._kept) or self._error is not None

    def take_kept(self) -> None:
        """Take the messages, and the error, that :meth:`requests_now` has kept: as :meth:`run` does. For a task."""
        kept, self._kept = self._kept, []
        try:
            for message in kept:
                self._take(message)
            if kept:
                self._tell()
            if self._error is not None:
                raise self._error
        except (TransportFailed, RemoteProtocolError) as error:
            self._lose(error)

    @property
    def marked(self) -> bool:
        """True if the destination is a trimig: it has answered the mark."""
        return self._decoder.marked

    @property
    def why(self) -> str:
        """The destination's reason as the end of a sentence; without a reason, a hint to the destination's log."""
        return f": {self.reason}" if self.reason else "; its own log says why"

    def _ended(self) -> str:
        if self.reason:
            return f"the destination closed the connection: {self.reason}"
        inside = f" in the middle of a message ({self._decoder.pending} bytes of it)" if self._decoder.pending else ""
        return f"the destination closed the connection{inside} without an answer"

    def _take(self, message: Message) -> None:
        before, self.state = self.state, after(self.state, _item_of(message), section="return path")
        match message:
            case Pong(value=value):
                self._pongs.add(value)
                if len(self._pongs) > 1024:
                    raise RemoteProtocolError("more than 1024 different PONG values", section="return path")
            case SwitchoverAck() if self._acks_wanted:
                self.acks += 1
                return
            case SwitchoverAck():
                raise RemoteProtocolError(
                    "SWITCHOVER_ACK was not asked for: the capability switchover-ack is off here, and on at the destination",
                    section="return path",
                )
            case Reason(payload=payload):
                self.reason = shown_reason(payload)
            case Shut(status=status):
                self.shut = status
                if before is ReturnPath.BEFORE:
                    raise PeerFailed(
                        f"the destination refused the migration (it sent SHUT {status}){self.why}", code=status
                    )
        if self.listener is not None:
            self.listener(message)


_ITEMS: Final = MappingProxyType(
    {
        Pong: Item.PONG,
        SwitchoverAck: Item.SWITCHOVER_ACK,
        PageRequest: Item.REQ_PAGES,
        ReceivedPages: Item.RECEIVED_PAGES,
        ResumeAck: Item.RESUME_ACK,
        Reason: Item.REASON,
        Clock: Item.CLOCK,
        Attempt: Item.ATTEMPT,
    }
)


def _item_of(message: Message) -> Item:
    """The name of *message* in the table of the order."""
    if isinstance(message, Shut):
        return Item.REFUSED if message.status else Item.ARRIVED
    return _ITEMS[type(message)]
