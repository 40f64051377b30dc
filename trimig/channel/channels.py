"""The set of connections of one side of a migration: their bytes, and their end."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from . import closing

if TYPE_CHECKING:
    from .channel import Channel


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelKind:
    """What a connection is for. A listener has to tell that by the first bytes of each: :mod:`.first_bytes`."""

    name: str


#: The stream, and the return path. It begins with the header (:func:`.first_bytes.judge_first`), in a recovery with a
#: question for bitmaps (:func:`.first_bytes.judge_again`).
MAIN: Final = ChannelKind("main")
#: Pages that the guest waits for in postcopy. It begins with the record of such a page (:func:`.first_bytes.judge_second`).
PREEMPT: Final = ChannelKind("preempt")
#: A data channel of multifd. It begins with a hello (:func:`.first_bytes.judge_data`), and nothing comes back on it.
MULTIFD: Final = ChannelKind("multifd")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Connections beside the main one that a capability adds to a migration."""

    kind: ChannelKind
    #: The capability, in QMP spelling.
    capability: str
    #: Number of the connections.
    count: int
    #: The source opens them with the main one; otherwise when it needs them.
    early: bool
    #: The first bytes of each; empty where they are not known before.
    magic: bytes = b""


class Channels:
    """The open connections of one side, by what they are for, and the bytes over them and over those that were closed."""

    def __init__(self) -> None:
        self._open: list[tuple[ChannelKind, Channel]] = []
        self._closed_sent = 0
        self._closed_received = 0

    def add(self, kind: ChannelKind, channel: Channel) -> None:
        """*channel* belongs to the set from here on, which closes it. There is one of kind MAIN at a time."""
        assert kind != MAIN or not self.has(kind)
        self._open.append((kind, channel))

    def of(self, kind: ChannelKind) -> tuple[Channel, ...]:
        """The open ones of *kind*."""
        return tuple(channel for found, channel in self._open if found == kind)

    def has(self, kind: ChannelKind) -> bool:
        """One of *kind* is open."""
        return any(found == kind for found, _ in self._open)

    @property
    def sent(self) -> int:
        """Bytes sent over all of them, closed ones included."""
        return self._closed_sent + sum(channel.sent for _, channel in self._open)

    @property
    def received(self) -> int:
        """Bytes received over all of them, closed ones included."""
        return self._closed_received + sum(channel.received for _, channel in self._open)

    @property
    def backlog(self) -> int:
        """Bytes that the kernel has taken and the peers' kernels have not acknowledged, as far as that can be told."""
        return sum(channel.backlog() for _, channel in self._open)

    @property
    def delivered(self) -> int:
        """Bytes sent over all of them without those that still wait here."""
        return self.sent - self.backlog

    @property
    def writing(self) -> bool:
        """One is in the middle of a write that :attr:`sent` will show when it is done."""
        return any(channel.writing for _, channel in self._open)

    def cut(self) -> bool:
        """Break all of them; False if one cannot be broken. See :meth:`.channel.Channel.cut`."""
        return all(channel.cut() for _, channel in self._open)

    async def close(self, grace: float = 0.0) -> None:
        """Close all of them, the main one first. The set is empty then, and its sums stay.

        Args:
            grace: seconds for the main one to close in order, see :func:`.closing.close`.

        **Cancellation:** held off, for at most *grace* seconds.
        """
        for kind, channel in tuple(self._open):
            if kind == MAIN:
                await self._close(kind, channel, grace)
        await self.close_beside()

    async def close_beside(self) -> None:
        """Close all but the main one.

        **Cancellation:** held off.
        """
        for kind, channel in tuple(self._open):
            if kind != MAIN:
                await self._close(kind, channel, 0.0)

    async def close_of(self, kind: ChannelKind) -> None:
        """Close those of *kind*.

        **Cancellation:** held off.
        """
        for found, channel in tuple(self._open):
            if found == kind:
                await self._close(kind, channel, 0.0)

    async def _close(self, kind: ChannelKind, channel: Channel, grace: float) -> None:
        await closing.close(channel.stream, grace)
        if (kind, channel) in self._open:  # and no other task has closed it meanwhile
            self._open.remove((kind, channel))
            self._closed_sent += channel.sent
            self._closed_received += channel.received
