"""The pages that come on the destination's second connection (postcopy-preempt), by trio or by a thread."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...wire import events as ev
from ...wire.decoder import Decoder
from .postcopy_receiver import no_old_page

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from .postcopy_receiver import PostcopyReceiver


class UrgentPages:
    """Places what comes on the second connection.

    Args:
        receiver: this object is used by the holder of its ``owner``.
        main: has read the list of blocks.
    """

    def __init__(self, receiver: PostcopyReceiver, channel: Channel, main: Decoder) -> None:
        self._receiver = receiver
        self.channel = channel
        self._decoder = Decoder(measure=None, continues=main, records_only=True, buffer_bytes=1 << 18)
        #: True once nothing more will come.
        self.over = False

    async def run(self) -> None:
        """Place what comes, until the end of it. A thread may do a part of that, by :meth:`take_now`.

        Raises:
            TransportFailed: the connection broke.
            RemoteProtocolError: it brought no page, or one that is here.
            GuestFailed: a page cannot be placed.

        **Cancellation:** stops reading.
        """
        # However long it is silent: perhaps the guest touches nothing that is missing.
        while not self.over:
            if not self.channel.direct:
                self._came(await self.channel.receive_into(self._decoder.writable(), stall_timeout=math.inf))
            else:
                async with self._receiver.owner:
                    taken = self.over or self.take_now()
                if not taken:
                    await self.channel.wait_readable()
            self._receiver.look()

    def take_now(self) -> bool:
        """Place what a kernel socket has, some of it; False if it has nothing. Errors as for :meth:`run`."""
        count = self.channel.receive_now(self._decoder.writable())
        if count is not None:
            self._came(count)
        return count is not None

    def _came(self, count: int) -> None:
        if count:
            self._decoder.received(count)
        elif self._receiver.missing:
            self._decoder.receive_eof()  # and it says where
        else:
            self.over = True
        while (event := self._decoder.next_event()) is not None and not self.over:
            match event:
                case ev.PageElement():
                    for _ in self._receiver.place(event.content(no_old_page)):
                        pass  # no other page is more urgent
                case ev.RamEnd():
                    self.over = True
