"""The task on the source that reads the return path, and what the migration task learns from it.

A refusal of the destination, an invalid message or the end of the connection ends the attempt at once, wherever the
migration task is (QEMU looks only at the very end: return_path.md part 5). Only after the decision has been sent does
an ended connection not raise: then it is an answer that is missing, and the migration task must judge it.

Behind some transports no program answers (a command that stores the stream). There the end of this
direction before the first message only says so; from the first message on it is a return path like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import trio

from ..errors import PeerFailed, RemoteProtocolError, TransportFailed
from ..monitor.statistics import WHY_CLOSED
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
        perhaps_silent: perhaps no program answers.
        acks: the destination may allow the switchover (capability switchover-ack).
    """

    def __init__(
        self, channel: Channel, blocks: Mapping[str, int], *, perhaps_silent: bool = False, acks: bool = False
    ) -> None:
        self._channel = channel
        self._decoder = ReturnPathDecoder(blocks, marks=True)
        #: Why the destination gives the migration up, as it has said; empty if it has not.
        self.reason = ""
        self._pongs: set[int] = set()
        self._news = trio.Event()
        self._perhaps_silent = perhaps_silent
        self._acks_wanted = acks
        #: How many SWITCHOVER_ACK have come.
        self.acks = 0
        #: An answer has come.
        self.heard = False
        #: This direction ended before an answer had come.
        self.silent = False
        #: The status of SHUT once it has come.
        self.shut: int | None = None
        #: Why nothing will come any more; set only behind :attr:`ReturnPath.BEFORE`.
        self.lost: TransportFailed | RemoteProtocolError | None = None
        #: How far the return path is. Behind BEFORE an ended connection is not an error of its own any more.
        self.state = ReturnPath.BEFORE
        #: Called with each message of postcopy, and with None when nothing more will come. Set while the guest runs at
        #: the destination, when the pages it asks for are a matter of microseconds.
        self.listener: Callable[[Message | None], None] | None = None

    def expect_bitmap(self, block: str) -> None:
        """The destination is about to be asked which pages of *block* it has."""
        self._decoder.expect_bitmap(block)

    def enter(self, state: ReturnPath, listener: Callable[[Message | None], None] | None = None) -> None:
        """The migration has come to *state*; *listener* hears what the destination says from here on."""
        self.state, self.listener = state, listener

    def lose(self, why: TransportFailed) -> None:
        """Nothing will come any more. An earlier reason stays."""
        if self.lost is None:
            self.lost = why

    def has_ponged(self, value: int) -> bool:
        """PING(*value*) has been answered."""
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

    async def wait_answer(self) -> None:
        """Wait until :attr:`shut` or :attr:`lost` is set.

        **Cancellation:** no effect.
        """
        while self.shut is None and self.lost is None:
            await self._news.wait()

    async def run(self) -> None:
        """Read until SHUT or the end of the connection, or until it is certain that no answer comes.

        Raises:
            PeerFailed: the destination refused.
            RemoteProtocolError: an invalid message.
            TransportFailed: the connection ended before the decision was sent.

        **Cancellation:** stops reading.
        """
        buffer = memoryview(bytearray(4096))
        try:
            while self.shut is None:
                # However long it is silent: while memory is sent, a destination has nothing to say. Where an answer is
                # due, the migration task waits for it no longer than it should.
                count = await self._channel.receive_into(buffer, stall_timeout=math.inf)
                if not count:
                    if self._perhaps_silent and not self.heard and not self._decoder.pending:
                        self.silent = True
                        self._tell()
                        return
                    raise TransportFailed(self._ended())
                for message in self._decoder.feed(buffer[:count]):
                    self.heard = True
                    self._take(message)
                self._tell()
        except (TransportFailed, RemoteProtocolError) as error:
            if self.state is ReturnPath.BEFORE:
                raise
            self.lost = error
            self._tell()
            if self.listener is not None:
                self.listener(None)

    @property
    def marked(self) -> bool:
        """The destination is a trimig: it has answered the mark."""
        return self._decoder.marked

    @property
    def why(self) -> str:
        """The destination's reason as the end of a sentence; without one, where to look for it."""
        return f": {self.reason}" if self.reason else "; its own log says why"

    def _ended(self) -> str:
        if self.reason:
            return f"the destination closed the connection: {self.reason}"
        inside = f" in the middle of a message ({self._decoder.pending} bytes of it)" if self._decoder.pending else ""
        return f"the destination closed the connection{inside} without an answer; {WHY_CLOSED}"

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
