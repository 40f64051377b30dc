"""Sends the messages of the destination in postcopy, over the present connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from ...channel import closing
from ...errors import TrimigError
from ...wire.return_path import Message, encode

if TYPE_CHECKING:
    from ...channel.channel import Channel


class Answers:
    """The return path of a postcopy migration, whose connection may be lost and replaced.

    Args:
        channel: the present connection.
        broke: called with the reason when a message cannot be sent.
    """

    def __init__(self, channel: Channel, broke: Callable[[str], None]) -> None:
        self._channel = channel
        self._broke = broke
        self._connected = True
        self._sending = trio.Lock()

    async def use(self, channel: Channel) -> None:
        """Send over *channel* from now on.

        **Cancellation:** the old channel is still used.
        """
        async with self._sending:
            self._channel, self._connected = channel, channel.sends

    def drop(self) -> None:
        """Send nothing until :meth:`use`, because the connection is lost. Page requests are repeated after the recovery."""
        self._connected = False

    async def say(self, message: Message) -> None:
        """Send *message*, if there is a connection.

        **Cancellation:** a part of the message may have been sent.
        """
        await self.say_bytes(encode(message))

    async def say_bytes(self, data: bytes) -> None:
        """Send encoded messages, if there is a connection.

        **Cancellation:** as for :meth:`say`.
        """
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if not self._connected:
                return
            # Without a checkpoint, because the guest waits for the page of this request. The kernel mostly takes a short
            # message at once.
            if rest := data[self._channel.send_now(data) :]:
                await self._channel.send(rest)
        except TrimigError as error:
            self._connected = False
            self._broke(str(error))
        finally:
            self._sending.release()

    def say_now(self, data: bytes) -> bytes:
        """Send encoded messages, if there is a connection, as far as the kernel takes them; no task may be sending.

        Returns:
            The rest, which must be given to :meth:`say_bytes` before anything else is sent.
        """
        return data[self._channel.send_now(data) :] if self._connected else b""

    async def say_last(self, message: Message, grace: float) -> None:
        """Send *message* as the last one on this connection, within *grace* seconds.

        **Cancellation:** possible until the message is begun; then held off.
        """
        async with self._sending:
            self._connected = False
            await closing.farewell(self._channel, encode(message), grace)
