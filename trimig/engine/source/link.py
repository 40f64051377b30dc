"""What an outgoing migration has of its connections once the first one is there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from ...channel.channel import Channel
from ...channel.channels import ChannelKind, Channels
from ...channel.return_path import ReturnPathReader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...channel.channel import AnyStream, OpenStream
    from ...channel.connections import Reopen
    from ...channel.limiter import Limiter

#: The likely reason if a destination has connected and says nothing at all.
SILENT_PEER: Final = "if multifd is on there, it waits for further connections: turn multifd off there"


def one_way(what: str) -> str:
    """The warning that the destination cannot answer, because of *what*."""
    return f"{what}: the destination cannot confirm that it has the guest, nor refuse it"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What stays the same over all connections of the attempt.

    Attributes:
        stall_timeout: see :class:`trimig.channel.channel.Channel`.
        lengths: used length of the RAM blocks by name.
        beside: opens the connection for urgent pages; None without postcopy-preempt.
        again: opens another main connection; None where that cannot be.
        acks: SWITCHOVER_ACK messages that the switchover waits for.
    """

    stall_timeout: float
    lengths: Mapping[str, int]
    beside: OpenStream | None
    again: Reopen | None
    acks: int


class Link:
    """The connections of one outgoing migration.

    Args:
        channels: the set that *channel* is in.
        channel: the first connection.
        reader: of that.
        asks: the destination is asked to answer.
        answers: it must; otherwise its first answer shows that it does.

    Attributes:
        channels: all open ones.
        channel: the main one, also when it has been closed and there is no other yet.
        reader: what the destination has said on the present main connection. Without *asks* it does not run.
        asks: the destination is asked to answer.
        answers: the destination answers. That it is asked does not show that: a stream may be stored at the other end.
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
        return next(iter(self.channels.of(ChannelKind.PREEMPT)), None)

    @property
    def is_silent(self) -> bool:
        """The destination must answer, and has not said a word."""
        return self.answers and not self.reader.heard

    def decide_return_path(self) -> bool:
        """From here on the return path counts, or it does not. False if it turns out that there is none."""
        if not self.asks or self.answers:
            return True
        self.answers = self.reader.heard
        return self.answers

    async def open_preempt(self) -> None:
        """Open the second connection of postcopy-preempt, if it is on and not there. TransportFailed.

        **Cancellation:** there is none.
        """
        if self.ways.beside is not None and not self.channels.has(ChannelKind.PREEMPT):
            channel = Channel(await self.ways.beside(), stall_timeout=self.ways.stall_timeout)
            self.channels.add(ChannelKind.PREEMPT, channel)

    def replace(self, stream: AnyStream, rate: int) -> None:
        """Go on over *stream*; the connections before it were closed.

        Args:
            rate: bytes per second; 0 for no limit.
        """
        self.channel = Channel(stream, stall_timeout=self.ways.stall_timeout)
        self.channels.add(ChannelKind.MAIN, self.channel)
        self.reader = ReturnPathReader(self.channel, self.ways.lengths)
        self.limiter.move_to(self.channel, rate)
