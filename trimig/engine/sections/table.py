"""The iterative sections of a migration: one line for each in both functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import guest_calls
from ..ram.encoding import choose_encoder
from .ram import RamLoader, RamSection

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...channel.reception import Reception
    from ...guest import Guest
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
    """
    with guest_calls.guarded("looking at the RAM blocks"):
        blocks = list(out.guest.ram)
    with guest_calls.guarded("preparing dirty tracking"):
        tracker = out.guest.dirty_tracker()
    encoder = choose_encoder(out.config, lambda: out.monitor.config.parameters, blocks, out.counters)
    ram = RamSection(out.link.channel, out.link.limiter, out.config, out.counters, blocks, tracker, encoder)
    out.sections.append(ram)
    return ram


def make_loaders(
    guest: Guest, ram: RamReceiver, reception: Reception, preempt: PreemptReceiver
) -> Mapping[str, SectionLoader]:
    """The loaders of all sections, by their idstr."""
    return {"ram": RamLoader(guest, ram, reception, preempt)}
