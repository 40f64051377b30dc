"""The destination's second connection (postcopy-preempt): pages that the guest waits for.

It is accepted while the first one is read already; :meth:`UrgentArrival.wait` is where it has to be there. The first
connection that is accepted is the main one, as in QEMU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from ..config import Config
from ..errors import RemoteProtocolError, TransportFailed, TrimigError
from ..monitor import Counters
from ..wire import Decoder
from ..wire import events as ev
from . import teardown
from .channel import Channel
from .connections import Connections
from .postcopy_in import PostcopyReceiver

#: Seconds in which the end word may follow the last page; who sends none closes the connection.
_LAST_WORD_SECONDS = 1.0


class UrgentArrival:
    """The second connection of one attempt, over as many main connections as it takes.

    Args:
        nursery: of the attempt.
    """

    def __init__(self, connections: Connections, config: Config, counters: Counters, nursery: trio.Nursery) -> None:
        self._beside = connections.for_preempt(config)
        self._config = config
        self._counters = counters
        self._nursery = nursery
        self._accepting: trio.CancelScope | None = None
        self._channel: Channel | None = None
        self._failure: TrimigError | None = None
        self._news = trio.Event()
        self._ended = trio.Event()

    @property
    def wanted(self) -> bool:
        """There is to be one."""
        return self._beside is not None

    def expect(self) -> None:
        """The main connection is there: accept this one when it comes."""
        self._failure = None
        self._news = trio.Event()
        if self.wanted:
            self._accepting = trio.CancelScope()
            self._nursery.start_soon(self._accept, self._accepting, name="trimig.accept_urgent")

    async def _accept(self, scope: trio.CancelScope) -> None:
        assert self._beside is not None
        with scope:
            try:
                self._channel = Channel(await self._beside(), stall_timeout=self._config.stall_timeout)
            except TrimigError as error:
                self._failure = error
        self._news.set()

    async def wait(self) -> None:
        """Wait until it is there, if it is to be.

        Raises:
            TransportFailed: it cannot be accepted, or did not come within ``handover_timeout``.

        **Cancellation:** no effect.
        """
        if not self.wanted:
            return
        with trio.move_on_after(self._config.handover_timeout):
            await self._news.wait()
        if self._failure is not None:
            raise TransportFailed(f"the second connection, for postcopy-preempt, failed: {self._failure}")
        if self._channel is None:
            raise TransportFailed(
                f"the second connection, for postcopy-preempt, did not come within {self._config.handover_timeout:g} s: "
                "the capability must be on at the source, too"
            )

    async def close(self) -> None:
        """Close it, or stop waiting for it. Idempotent.

        **Cancellation:** held off.
        """
        if self._accepting is not None:
            self._accepting.cancel("the main connection has ended")
        channel, self._channel = self._channel, None
        if channel is not None:
            await teardown.close(channel.stream)

    async def take_pages(self, receiver: PostcopyReceiver, main: Decoder, broke: Callable[[str], None]) -> None:
        """Place what comes, until the end of it.

        Args:
            main: has read the list of blocks.
            broke: told why nothing more will come, where that is before the end.

        Raises:
            GuestFailed: a page cannot be placed.

        **Cancellation:** stops reading.
        """
        self._ended = trio.Event()
        await self._news.wait()
        if self._channel is None:
            return  # :meth:`wait` says why
        try:
            await self._take(receiver, self._channel, main)
        except (TransportFailed, RemoteProtocolError) as error:
            broke(f"the connection for urgent pages: {error}")
        self._ended.set()

    async def _take(self, receiver: PostcopyReceiver, channel: Channel, main: Decoder) -> None:
        decoder = Decoder(measure=None, continues=main, records_only=True, buffer_bytes=1 << 18)
        while True:
            while (event := decoder.next_event()) is not None:
                match event:
                    case ev.PageRun():
                        receiver.pages(event)
                    case ev.ZeroRun():
                        receiver.zeros(event)
                    case ev.RamEnd():
                        return
            # However long it is silent: perhaps the guest touches nothing that is missing.
            count = await channel.receive_into(decoder.writable(), stall_timeout=math.inf)
            self._counters.earlier += count
            if count:
                decoder.received(count)
            elif receiver.missing:
                decoder.receive_eof()  # and it says where
            else:
                return

    async def wait_last(self, receiver: PostcopyReceiver) -> None:
        """The main connection has said that everything was sent: wait for what is still on this one.

        **Cancellation:** no effect.
        """
        if not self.wanted:
            return
        if receiver.missing:
            with trio.move_on_after(self._config.stall_timeout):
                await self._ended_or_whole(receiver)
        with trio.move_on_after(_LAST_WORD_SECONDS):
            await self._ended.wait()

    async def _ended_or_whole(self, receiver: PostcopyReceiver) -> None:
        async with trio.open_nursery() as nursery:

            async def ended() -> None:
                await self._ended.wait()
                nursery.cancel_scope.cancel("nothing more will come")

            nursery.start_soon(ended)
            await receiver.wait_whole()
            nursery.cancel_scope.cancel("it is whole")
