"""The connection of an outgoing migration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ... import formats
from ...channel.channel import Channel
from ...channel.channels import MAIN
from ...channel.limiter import Limiter
from ...channel.return_path import ReturnPathReader
from ...channel.streams import PerhapsSilent
from ...errors import ConfigError, Loss, TransportFailed
from .. import guest_calls
from ..ram.encoding import check_encoding
from ..sections.ram import beside_of
from .link import Link, Ways, one_way

if TYPE_CHECKING:
    from ...channel.channels import Channels
    from ...channel.connections import Connections
    from ...config.config import Config
    from ...guest import Guest
    from ...monitor.core import MonitorCore
    from .outgoing import Outgoing

#: Seconds without a first answer, which normally takes one round trip. After the first number there is a warning; after
#: the second the attempt ends. Half of a longer stall timeout replaces the second number.
_ANSWER_SECONDS: Final = 5.0
_ANSWER_MOST_SECONDS: Final = 30.0

_ONE_DIRECTION: Final = "needs a return path, and this transport has one direction only"


async def connect(
    guest: Guest, connections: Connections, config: Config, monitor: MonitorCore, channels: Channels
) -> Link:
    """Connect to the destination, and make the channel, the limiter and the reader of the return path.

    Args:
        channels: each opened connection is added to it, also if this function fails.

    Raises:
        ConfigError: a capability needs answers, and the transport has one direction only; or ``encoding = "auto"`` has nothing to
            choose.
        TransportFailed: the connection could not be opened.

    **Cancellation:** the connections that were opened are in *channels*.
    """
    counters, capabilities = monitor.counters, config.capabilities
    check_encoding(config)
    wanted = beside_of(config)
    connections.check_beside(wanted)
    stream = await connections.first()
    channel = Channel(stream, stall_timeout=config.stall_timeout)
    channels.add(MAIN, channel)
    with guest_calls.guarded("looking at the RAM blocks"):
        lengths = {block.name: block.length for block in guest.ram}
    counters.total = counters.remaining = sum(lengths.values())
    if not channel.receives and capabilities.postcopy_ram:
        raise ConfigError(f"postcopy {_ONE_DIRECTION}", name="postcopy-ram")
    if not channel.receives and capabilities.switchover_ack:
        raise ConfigError(f"switchover-ack {_ONE_DIRECTION}", name="switchover-ack")
    asks = (capabilities.return_path or capabilities.postcopy_ram) and channel.receives
    silent = isinstance(stream, PerhapsSilent) and stream.perhaps_silent
    if not asks:
        monitor.warn(
            one_way("no return path" if channel.receives else "no return path (the transport has one direction only)")
        )
    link = Link(
        Ways(
            stall_timeout=config.stall_timeout,
            lengths=lengths,
            beside=connections.beside,
            wanted=wanted,
            again=connections.again,
            acks=config.peer.switchover_acks if asks and capabilities.switchover_ack else 0,
        ),
        channels,
        channel,
        Limiter(channels, monitor.config.parameters.max_bandwidth, counters),
        ReturnPathReader(channel, lengths, perhaps_silent=silent, acks=capabilities.switchover_ack),
        asks=asks,
        answers=asks and not silent,
    )
    await link.open_beside(early=True)
    return link


async def await_first_answer(out: Outgoing) -> None:
    """Warn about a destination that does not answer the first PING, and later end the attempt.

    A destination answers the first PING before it loads anything.

    Raises:
        TransportFailed: no message came for too long.

    **Cancellation:** no effect.
    """
    reader, stall = out.link.reader, out.config.stall_timeout
    most = min(stall, max(_ANSWER_MOST_SECONDS, stall / 2))
    with trio.move_on_after(most) as limit:
        with trio.move_on_after(_ANSWER_SECONDS) as patience:
            await reader.wait_life()
        if patience.cancelled_caught:
            out.monitor.warn(
                f"the destination has answered nothing for {formats.duration(_ANSWER_SECONDS)}: {out.link.silence}"
            )
            await reader.wait_life()
    if limit.cancelled_caught:
        raise TransportFailed(f"the destination has answered nothing for {formats.duration(most)}", loss=Loss.SILENT)
