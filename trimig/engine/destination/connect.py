"""The connection of an incoming migration."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import trio

from ...channel.channels import ChannelKind
from ...channel.first_bytes import judge_beside, judge_first, judge_surplus
from ...guest import OpaqueGuest
from ...status import Status
from ...wire.decoder import Decoder
from .announced import refined
from .section import measure_device
from .stream import IncomingStream

if TYPE_CHECKING:
    from ...wire import events as ev
    from .incoming import Incoming


async def connect(into: Incoming, nursery: trio.Nursery) -> IncomingStream:
    """Wait for the source, and begin to read what it sends.

    Args:
        nursery: of the attempt; other connections are judged in it.

    Raises:
        TransportFailed: there is no connection.

    **Cancellation:** what was opened is closed at the end of the attempt.
    """
    config, reception = into.config, into.reception

    def acceptable(event: ev.Configuration) -> None:
        refined(into, event)

    channel = await reception.first(
        nursery, judge_first(config, acceptable), judge_beside if reception.wants_second else judge_surplus
    )
    into.channels.add(ChannelKind.MAIN, channel)
    into.monitor.listening()
    into.preempt.expect(nursery)
    stream = IncomingStream(into, channel, _decoder(into))
    into.counters.setup_done = trio.current_time()
    await trio.lowlevel.checkpoint_if_cancelled()  # of a cancel since the last checkpoint
    into.monitor.advance(Status.ACTIVE)
    return stream


def _decoder(into: Incoming) -> Decoder:
    config, opaque = into.config, isinstance(into.guest, OpaqueGuest)
    return Decoder(
        measure=None if opaque else functools.partial(measure_device, into.guest),
        # What an unknown machine sends is seen from the stream; one that is known is asked for all that it must have.
        configuration=None if opaque or not config.peer.send_configuration else True,
        footers=None if opaque or not config.peer.send_section_footer else True,
        description=not config.peer.suppress_vmdesc,
        max_device_bytes=config.max_device_bytes,
        max_description_bytes=config.max_description_bytes,
        reorder=True,
    )
