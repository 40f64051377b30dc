"""The iterative sections of a migration: one line for each in both functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...channel.channels import MULTIFD
from ...wire.pages.multifd import Hello, write_hello
from .. import guest_calls
from ..device_writer import machine_uuid
from ..ram.encoding import choose_encoder
from ..ram.multifd_scheme import SchemeCheck
from ..ram.multifd_sender import Manner, MultifdSender
from ..ram.records import PageSender
from ..ram.sample import PageSampler, unused_encodings
from .ram import RamLoader, RamSection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ...channel.channel import Channel
    from ...channel.reception import Reception
    from ...config.parameters import Parameters
    from ...guest import Guest
    from ..ram.multifd_receiver import MultifdReceiver
    from ..ram.preempt_receiver import PreemptReceiver
    from ..ram.receiver import RamReceiver
    from ..source.outgoing import Outgoing
    from . import SectionLoader


def make_handlers(out: Outgoing) -> RamSection:
    """Add the handlers of all sections to ``out.sections``, in the order in which the stream has them.

    Returns:
        That of the RAM, which a switch to postcopy needs by itself.

    Raises:
        GuestFailed: the guest's code failed.
        ConfigError: there is not enough memory for the encoder of the pages.
    """
    with guest_calls.guarded("looking at the RAM blocks"):
        blocks = list(out.guest.ram)
    tracker = guest_calls.new_tracker(out.guest)
    link = out.link
    encoder = choose_encoder(
        out.config, lambda: out.monitor.config.parameters, blocks, out.counters, lambda: link.channels.delivered
    )
    channel, limiter = link.channel, link.limiter
    sampler = PageSampler(out.counters) if encodings_off(out) else None
    ram = RamSection(channel, limiter, out.config, out.counters, blocks, tracker, encoder, _data_channels(out), sampler)
    out.sections.append(ram)
    return ram


def encodings_off(out: Outgoing) -> tuple[str, ...]:
    """See :func:`.ram.sample.unused_encodings`."""
    return unused_encodings(out.config, several_channels=out.link.ways.beside is not None)


def _data_channels(out: Outgoing) -> MultifdSender | None:
    """The writer of pages to the data channels; None if there are none."""
    if not out.link.wants(MULTIFD):
        return None
    with guest_calls.guarded("looking at the machine's UUID"):
        uuid = machine_uuid(out.guest)

    def open_channel(number: int) -> Awaitable[Channel]:
        return out.link.open_data_channel(write_hello(Hello(uuid=uuid, number=number)))

    pages = PageSender(out.link.channel, out.counters)
    manner, link = Manner.of(out.config), out.link
    check = (
        SchemeCheck(link.channel, link.reader, out.config.peer.name) if manner.each_section and link.answers else None
    )
    return MultifdSender(manner, pages, link.limiter, out.counters, open_channel, check)


def make_loaders(
    guest: Guest,
    ram: RamReceiver,
    reception: Reception,
    preempt: PreemptReceiver,
    data: MultifdReceiver,
    parameters: Callable[[], Parameters],
) -> Mapping[str, SectionLoader]:
    """The loaders of all sections, by their idstr.

    Args:
        parameters: returns the present parameters.
    """
    return {"ram": RamLoader(guest, ram, reception, preempt, data, lambda: parameters().decompress_threads)}
