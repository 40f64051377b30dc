"""What the destination says to the source in postcopy, over the connection that there is at present."""

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
    """The return path of a migration whose connection may be lost and replaced.

    Args:
        channel: the present connection.
        broke: told why it is of no use any more.
    """

    def __init__(self, channel: Channel, broke: Callable[[str], None]) -> None:
        self._channel = channel
        self._broke = broke
        self._connected = True
        self._sending = trio.Lock()

    async def use(self, channel: Channel) -> None:
        """Speak over *channel* from here on.

        **Cancellation:** the old one is still used.
        """
        async with self._sending:
            self._channel, self._connected = channel, channel.sends

    def drop(self) -> None:
        """The connection is lost: what is said before :meth:`use` is not sent. What is asked for is asked again then."""
        self._connected = False

    async def say(self, message: Message) -> None:
        """Send *message*, if there is a connection.

        **Cancellation:** a part of it may have been sent.
        """
        await self.say_bytes(encode(message))

    async def say_bytes(self, data: bytes) -> None:
        """The same for messages that are encoded.

        **Cancellation:** as for :meth:`say`.
        """
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if not self._connected:
                return
            # The kernel mostly takes a short message at once, and the guest waits for the page that it asks for.
            if rest := data[self._channel.send_now(data) :]:
                await self._channel.send(rest)
        except TrimigError as error:
            self._connected = False
            self._broke(str(error))
        finally:
            self._sending.release()

    async def say_last(self, message: Message, grace: float) -> None:
        """Send *message* as the last one on this connection, within *grace* seconds.

        **Cancellation:** before it begins; then held off.
        """
        async with self._sending:
            self._connected = False
            await closing.farewell(self._channel, encode(message), grace)
