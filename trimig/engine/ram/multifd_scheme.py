"""Whether a destination synchronises data channels at the end of each section, as the peer profile says (newer.md part 3.3).

A QEMU of a newer scheme goes on behind such an end, and never reads what follows on the data channels. A small guest would fit
into the buffers of the sockets: the QEMU would run it without its memory. So nothing is sent on the data channels until the
destination has shown that it waits for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ...errors import ConfigError
from ...wire import encoder as wire

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.return_path import ReturnPathReader

#: PING values that only a trimig sends: before the list of blocks, and behind the section with it.
PING_TRIP: Final = 0x74726963
PING_LISTED: Final = 0x74726964
#: Seconds, besides some round trips, in which a destination that does not wait has answered.
_SECONDS: Final = 0.2
_ROUND_TRIPS: Final = 4


class SchemeCheck:
    """The check of one attempt. It takes one round trip, and the time in which no answer comes.

    Args:
        channel: the main one.
        profile: the name of the peer profile, for the error.
    """

    def __init__(self, channel: Channel, reader: ReturnPathReader, profile: str) -> None:
        self._channel = channel
        self._reader = reader
        self._profile = profile
        self._seconds = 0.0

    async def begin(self) -> None:
        """Measure a round trip, in front of the list of blocks. A destination that never answers is found elsewhere.

        **Cancellation:** the channel is poisoned if the write was cut.
        """
        await self._channel.send(wire.ping(PING_TRIP))
        began = trio.current_time()
        await self._reader.wait_pong(PING_TRIP)
        self._seconds = _SECONDS + _ROUND_TRIPS * (trio.current_time() - began)

    async def end(self) -> None:
        """The section with the list has been sent, and nothing on the data channels: the destination must not go on.

        A trimig finds the scheme in the stream, so it is not waited for.

        Raises:
            ConfigError: the destination goes on.

        **Cancellation:** as for :meth:`begin`.
        """
        await self._channel.send(wire.ping(PING_LISTED))
        with trio.move_on_after(self._seconds):
            await self._reader.wait_pong_or_mark(PING_LISTED)
        if self._reader.has_ponged(PING_LISTED) and not self._reader.marked:
            raise ConfigError(
                "the destination does not wait for the data channels of multifd: turn multifd on there, or if it is on, "
                f"choose another peer profile than {self._profile!r}: the one that fits its machine type, and for a machine "
                "type without a version that of its program",
                name="profile",
            )
