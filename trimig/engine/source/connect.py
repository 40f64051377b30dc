"""The connection of an outgoing migration."""

from __future__ import annotations

from typing import Final

import trio

from ... import formats
from ...channel.channel import Channel, PerhapsSilent
from ...channel.channels import ChannelKind
from ...channel.limiter import Limiter
from ...channel.return_path import ReturnPathReader
from ...errors import ConfigError, TransportFailed
from .. import guest_calls
from .outgoing import SILENT_PEER, Outgoing

#: Seconds for the first answer, which takes a round trip: then its absence is told, and then it ends the attempt. A longer
#: stall timeout lengthens the second one.
_ANSWER_SECONDS: Final = 5.0
_ANSWER_MOST_SECONDS: Final = 30.0


async def connect(out: Outgoing) -> None:
    """Connect to the destination, and make what reads, limits and counts on that connection.

    Raises:
        ConfigError: a capability needs answers, and the transport has one direction only.
        TransportFailed: there is no connection.

    **Cancellation:** what was opened is closed at the end of the attempt.
    """
    config = out.config
    out.connections.for_preempt(config)
    stream = await out.connections.first()
    channel = out.channel = Channel(stream, stall_timeout=config.stall_timeout)
    out.channels.add(ChannelKind.MAIN, channel)
    if config.peer.preempt_pre_7_2:
        await out.open_preempt()
    out.limiter = Limiter(channel, out.rate, out.counters)
    with guest_calls.guarded("looking at the RAM blocks"):
        blocks = list(out.guest.ram)
    out.counters.total = out.counters.remaining = sum(b.length for b in blocks)
    if config.capabilities.postcopy_ram and not channel.receives:
        raise ConfigError(
            "postcopy needs a return path, and this transport has one direction only", name="postcopy-ram"
        )
    if config.capabilities.switchover_ack and not channel.receives:
        raise ConfigError(
            "switchover-ack needs a return path, and this transport has one direction only", name="switchover-ack"
        )
    if (config.capabilities.return_path or config.capabilities.postcopy_ram) and channel.receives:
        silent = isinstance(stream, PerhapsSilent) and stream.perhaps_silent
        lengths = {b.name: b.length for b in blocks}
        acks = config.capabilities.switchover_ack
        out.acks = config.peer.switchover_acks if acks else 0
        out.reader = ReturnPathReader(channel, lengths, perhaps_silent=silent, acks=acks)
        out.has_return_path = not silent
    else:
        why = "" if channel.receives else " (the transport has one direction only)"
        out.warn_one_way(f"no return path{why}")


async def await_first_answer(out: Outgoing, reader: ReturnPathReader) -> None:
    """A destination answers the first PING before all else. One that has connected and does not is told of, then given up.

    Raises:
        TransportFailed: nothing at all came for too long.

    **Cancellation:** no effect.
    """
    stall = out.config.stall_timeout
    most = min(stall, max(_ANSWER_MOST_SECONDS, stall / 2))
    with trio.move_on_after(most) as limit:
        with trio.move_on_after(_ANSWER_SECONDS) as patience:
            await reader.wait_life()
        if patience.cancelled_caught:
            out.monitor.warn(
                f"the destination has answered nothing for {formats.duration(_ANSWER_SECONDS)}: {SILENT_PEER}"
            )
            await reader.wait_life()
    if limit.cancelled_caught:
        raise TransportFailed(f"the destination has answered nothing for {formats.duration(most)}")
