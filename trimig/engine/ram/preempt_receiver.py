"""The destination's second connection (postcopy-preempt): pages that the guest waits for.

It has no header, and may be silent for as long as it likes. So every connection that comes beside the main one is kept in
the lobby until one of them brings a page; :meth:`PreemptReceiver.wait` is where at least one has to be there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from ... import formats
from ...channel.channel import Channel
from ...channel.channels import PREEMPT
from ...channel.first_bytes import judge_second
from ...errors import RemoteProtocolError, TransportFailed
from ...wire.decoder import Decoder
from .postcopy_receiver import URGENT_FAILED
from .urgent_pages import UrgentPages

if TYPE_CHECKING:
    from ...channel.channels import Channels
    from ...channel.reception import Reception
    from ...config.config import Config
    from .postcopy_receiver import PostcopyReceiver

#: Seconds in which the end word may follow the last page; who sends none closes the connection.
_LAST_WORD_SECONDS = 1.0
#: Seconds without any connection beside the main one, before a page came on one, after which the source has none.
_LONELY_SECONDS = 1.0


class PreemptReceiver:
    """The second connection of one attempt, over as many main connections as it takes."""

    def __init__(self, reception: Reception, config: Config, channels: Channels) -> None:
        self._reception = reception
        self._config = config
        self._channels = channels
        self._there = trio.Event()
        self._ended = trio.Event()
        #: What comes on it; None until it is known.
        self.pages: UrgentPages | None = None

    @property
    def wanted(self) -> bool:
        """There is to be one."""
        return any(wanted.kind == PREEMPT for wanted in self._reception.beside)

    @property
    def _has_come(self) -> bool:
        return self._channels.has(PREEMPT)

    def expect(self, nursery: trio.Nursery) -> None:
        """The main connection is there: this one may come, and is judged in *nursery*."""
        self.pages = None
        self._there = trio.Event()
        self._reception.expect_beside(nursery)

    async def wait(self) -> None:
        """Wait until one is there that can be it, if it is to be.

        Raises:
            TransportFailed: none can be accepted, or none came within ``handover_timeout``.

        **Cancellation:** no effect.
        """
        lobby = self._reception.lobby
        if not self.wanted or self._has_come:
            return
        assert lobby is not None
        with trio.move_on_after(self._config.handover_timeout) as limit:
            try:
                await lobby.wait_visitor()
            except TransportFailed as error:
                raise TransportFailed(f"the second connection, for postcopy-preempt, failed: {error}") from error
        if limit.cancelled_caught:
            raise TransportFailed(
                f"the second connection, for postcopy-preempt, did not come within {formats.duration(self._config.handover_timeout)}: "
                "the capability must be on at the source, too"
            )
        self._there.set()

    async def close(self) -> None:
        """Close it, or stop waiting for it. Idempotent.

        **Cancellation:** held off.
        """
        self._reception.close()
        await self._channels.close_beside()

    async def take_pages(
        self,
        receiver: PostcopyReceiver,
        main: Decoder,
        known: Callable[[], None],
        broke: Callable[[str], None],
    ) -> None:
        """Place what comes, until the end of it.

        Args:
            main: has read the list of blocks.
            known: called when :attr:`pages` is set.
            broke: told why nothing more will come, where that is before the end.

        Raises:
            GuestFailed: a page cannot be placed.

        **Cancellation:** stops reading.
        """
        self._ended = trio.Event()
        lobby = self._reception.lobby
        assert lobby is not None
        await self._there.wait()
        try:
            chosen = await lobby.choose(judge_second(main, receiver.wants, self._ended.set), lonely=_LONELY_SECONDS)
            channel = Channel(chosen.stream, stall_timeout=self._config.stall_timeout, first=chosen.first)
            self._channels.add(PREEMPT, channel)
            lobby.close()
            self.pages = UrgentPages(receiver, channel, main)
            known()
            await self.pages.run()
        except (TransportFailed, RemoteProtocolError) as error:
            if not self._has_come and (self._ended.is_set() or not receiver.missing):
                return  # it was not needed
            broke(f"{URGENT_FAILED}: {error}")
        self._ended.set()

    async def wait_last(self, receiver: PostcopyReceiver) -> None:
        """The main connection has said that everything was sent: wait for what is still on this one.

        **Cancellation:** no effect.
        """
        if not self.wanted:
            return
        if receiver.missing:
            with trio.move_on_after(self._config.stall_timeout):
                await self._ended_or_whole(receiver)
        if self._has_come or self._config.peer.preempt_pre_7_2:
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
