"""The connection of an incoming migration."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import trio

from ...channel.channels import MAIN
from ...channel.first_bytes import judge_first, judge_other
from ...guest import OpaqueGuest
from ...status import Status
from ...wire.decoder import Decoder
from ...wire.sections.table import SECTIONS, SECTIONS_WITH_MULTIFD
from .announced import refined
from .section import measure_device
from .stream import IncomingStream

if TYPE_CHECKING:
    from ...wire import events as ev
    from .incoming import Incoming


async def connect(into: Incoming, nursery: trio.Nursery) -> IncomingStream:
    """Wait for the connection of the source, and return its stream.

    Args:
        nursery: of the attempt; the tasks that read other connections run in it.

    Raises:
        TransportFailed: no connection came, and none can come any more.

    **Cancellation:** the end of the attempt closes the connections that were opened.
    """
    config, reception = into.config, into.reception

    def acceptable(event: ev.Configuration) -> None:
        refined(into, event)

    channel = await reception.first(
        nursery, judge_first(config, reception.beside, acceptable), judge_other(reception.beside)
    )
    into.channels.add(MAIN, channel)
    into.monitor.listening()
    for loader in into.loaders.values():
        loader.begin(nursery)
    stream = IncomingStream(into, channel, _decoder(into))
    into.counters.setup_done = trio.current_time()
    await trio.lowlevel.checkpoint_if_cancelled()  # a cancel may have come since the last checkpoint
    into.monitor.advance(Status.ACTIVE)
    return stream


def _decoder(into: Incoming) -> Decoder:
    config, opaque = into.config, isinstance(into.guest, OpaqueGuest)
    return Decoder(
        measure=None if opaque else functools.partial(measure_device, into.guest),
        # For an unknown machine the decoder finds the framing in the stream (None). For a known one it demands the framing.
        configuration=None if opaque or not config.peer.send_configuration else True,
        footers=None if opaque or not config.peer.send_section_footer else True,
        description=not config.peer.suppress_vmdesc,
        max_device_bytes=config.max_device_bytes,
        max_description_bytes=config.max_description_bytes,
        reorder=True,
        sections=SECTIONS_WITH_MULTIFD if into.data.wanted else SECTIONS,
    )
