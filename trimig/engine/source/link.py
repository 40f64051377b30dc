"""The connections of an outgoing migration, and the objects that belong to them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from ...channel.channel import Channel
from ...channel.channels import MAIN, MULTIFD, PREEMPT, Channels
from ...channel.return_path import ReturnPathReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...channel.channel import AnyStream, OpenStream
    from ...channel.channels import Beside, ChannelKind
    from ...channel.connections import Reopen
    from ...channel.limiter import Limiter

#: The likely reason for a destination that has accepted the connection and sends no message.
_SILENT_PEER: Final = "if multifd is on there, it waits for further connections: turn multifd off there, or on here"
#: The same if this side has opened data channels.
_SILENT_PEER_MULTIFD: Final = (
    "if it waits for more data channels, or for none: set multifd and multifd-channels to the same at both sides"
)
#: The likely reason for a destination that has all pages of the data channels, and waits.
_OTHER_SCHEME: Final = (
    "; it may synchronise the data channels in another way: choose the peer profile that fits its machine type"
)


def one_way(what: str) -> str:
    """The warning that the destination cannot answer, because of *what*."""
    return f"{what}: the destination cannot confirm that it has the guest, nor refuse it"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """The settings that are the same for all connections of the attempt.

    Attributes:
        stall_timeout: see :class:`trimig.channel.channel.Channel`.
        lengths: used length of the RAM blocks by name.
        beside: opens another connection to the destination; None if the transport has only one.
        wanted: the connections beside the main one.
        again: opens a new main connection for a recovery; None if the transport cannot do that.
        acks: the number of SWITCHOVER_ACK messages for which the switchover waits.
    """

    stall_timeout: float
    lengths: Mapping[str, int]
    beside: OpenStream | None
    wanted: Sequence[Beside]
    again: Reopen | None
    acks: int


class Link:
    """The connections of one outgoing migration.

    Args:
        channels: the set of open connections, with *channel* in it.
        channel: the first connection.
        reader: reads the return path of *channel*.
        asks: True if the source opens the return path.
        answers: True if the destination must answer. If False, its first message shows that it answers.

    Attributes:
        channels: all open connections.
        channel: the main connection. After a loss it is the closed one, until :meth:`replace`.
        reader: reads the return path of the main connection. Without *asks* it does not run.
        asks: True if the source opens the return path.
        answers: True if the destination answers. An open return path does not prove that: the peer may be a program that
            stores the stream.
    """

    def __init__(
        self,
        ways: Ways,
        channels: Channels,
        channel: Channel,
        limiter: Limiter,
        reader: ReturnPathReader,
        *,
        asks: bool,
        answers: bool,
    ) -> None:
        self.ways = ways
        self.channels = channels
        self.channel = channel
        self.limiter = limiter
        self.reader = reader
        self.asks = asks
        self.answers = answers

    @property
    def preempt(self) -> Channel | None:
        """The second connection of postcopy-preempt; None while there is none."""
        return next(iter(self.channels.of(PREEMPT)), None)

    @property
    def is_silent(self) -> bool:
        """True if the destination must answer and has not sent any message."""
        return self.answers and not self.reader.heard

    def decide_return_path(self) -> bool:
        """Decide once, before the guest stops, whether the destination answers. False if it was asked and does not."""
        if not self.asks or self.answers:
            return True
        self.answers = self.reader.heard
        return self.answers

    @property
    def silence(self) -> str:
        """The likely reason for a destination that has accepted the connection and sends no message."""
        return _SILENT_PEER_MULTIFD if self.wants(MULTIFD) else _SILENT_PEER

    @property
    def hint(self) -> str:
        """What may be wrong where the destination reads and does not go on, as the end of a sentence; empty if unknown."""
        return _OTHER_SCHEME if self.wants(MULTIFD) else ""

    def wants(self, kind: ChannelKind) -> bool:
        """Connections of *kind* belong to this migration."""
        return any(wanted.kind == kind for wanted in self.ways.wanted)

    async def open_beside(self, *, early: bool = False) -> None:
        """Open the connections that are wanted beside the main one, as far as they are not open. TransportFailed.

        Data channels are left out: each is opened by its own task, see :meth:`open_data_channel`.

        Args:
            early: open only those that are opened with the main connection.

        **Cancellation:** some of them are open.
        """
        for wanted in self.ways.wanted:
            if wanted.kind == MULTIFD or (early and not wanted.early):
                continue
            for _ in range(wanted.count - len(self.channels.of(wanted.kind))):
                await self._open(wanted.kind)

    async def open_data_channel(self, hello: bytes) -> Channel:
        """Open one data channel of multifd, and send *hello* on it at once: a QEMU from 11.1 on handles nothing else
        until the first bytes of a connection have come. TransportFailed.

        **Cancellation:** it may be open.
        """
        channel = await self._open(MULTIFD)
        await channel.send(hello)
        return channel

    async def _open(self, kind: ChannelKind) -> Channel:
        assert self.ways.beside is not None, "Connections.check_beside has refused it"
        channel = Channel(await self.ways.beside(), stall_timeout=self.ways.stall_timeout)
        self.channels.add(kind, channel)
        return channel

    def replace(self, stream: AnyStream, rate: int) -> None:
        """Use *stream* as the main connection. The earlier connections are closed already.

        Args:
            rate: bytes per second; 0 for no limit.
        """
        self.channel = Channel(stream, stall_timeout=self.ways.stall_timeout)
        self.channels.add(MAIN, self.channel)
        self.reader = ReturnPathReader(self.channel, self.ways.lengths)
        self.limiter.resume(rate)
