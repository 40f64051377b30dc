"""The destination: its phases in their order, in one nursery.

The decision is the end of the stream, or in postcopy the package. Before the decision the source can keep its guest: an
error here is sent to the source as SHUT 1, and raised. After the decision this side owns the guest. It is started, or
stored on disk, in a shield with a time limit. Then SHUT 0 confirms that to the source. :mod:`trimig.status` has the
statuses and the order of the stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ...channel.channels import Channels
from ...channel.reception import Reception
from ...errors import Owner, StateError
from ...guest import Guest, OpaqueGuest, StoringGuest
from ...monitor import blockers
from ...owner import refusal
from ...status import Role, Stream
from ..outcome import Outcome
from ..ram.multifd_receiver import MultifdReceiver
from ..ram.preempt_receiver import PreemptReceiver
from ..ram.receiver import RamReceiver
from ..sections.ram import beside_of
from ..sections.table import make_loaders
from .activate import activate
from .announced import machine_of, take_announcement
from .connect import connect
from .devices import IncomingDevices, take_devices
from .incoming import Incoming
from .lazy import check_guest
from .memory import take_memory
from .outcome import conclude, summary, unwind
from .postcopy import follow

if TYPE_CHECKING:
    from ...channel.connections import Connections
    from ...config.config import Config
    from ...monitor.core import MonitorCore
    from ...monitor.statistics import Summary


async def receive_stream(guest: Guest, connections: Connections, config: Config, monitor: MonitorCore) -> Summary:
    """Fill *guest* from the first of *connections*, and take it over.

    :func:`trimig.receive` is the public form and has the contract.

    **Cancellation:** before the decision the source keeps its guest. After the decision this side owns the guest, and the
    call ends within ``teardown_grace``.
    """
    guest.claim("an incoming migration")
    try:
        if guest.owner is Owner.UNKNOWN:
            raise refusal("be filled with another one", guest.owner)
        if guest.run_state == "running" and not isinstance(guest, OpaqueGuest):
            raise StateError(f"guest {guest.name!r} runs here: it cannot be filled with another one")
        blockers.check_incoming(guest)
        if config.capabilities.postcopy_ram:
            check_guest(guest)
        if isinstance(guest, StoringGuest):
            guest.check_store()
        monitor.begin(Role.DESTINATION, config, guest)
        blockers.lacks(guest, 0)
        reception = Reception(connections, config, monitor, beside_of(config))
        channels = Channels()
        monitor.count(lambda: channels.received)
        preempt = PreemptReceiver(reception, config, channels)
        # Data channels bring pages, too: a page that is not received yet may come there meanwhile.
        ram = RamReceiver(monitor.counters, predicts=not config.capabilities.multifd)
        data = MultifdReceiver(reception, config, channels, ram, monitor.counters, machine_of(guest))
        loaders = make_loaders(guest, ram, reception, preempt, data, lambda: monitor.config.parameters)
        return await _run(Incoming(guest, config, monitor, channels, reception, preempt, data, ram, loaders))
    finally:
        guest.release()


async def _phases(into: Incoming, nursery: trio.Nursery) -> None:
    devices = IncomingDevices(into)
    with into.phase("connect"):  # setup
        stream = await connect(into, nursery)
    with into.phase("announce"):  # active: header, configuration, list of RAM blocks
        announced = await take_announcement(into, stream, devices)
    with into.phase("ram"):  # active: pages, until the end of the RAM or a package
        taken = await take_memory(into, stream, devices, announced, nursery)
    if stream.state is Stream.PACKAGE:
        with into.phase("follow"):  # handover, postcopy-*: the guest is started, then its memory comes
            await follow(into, stream, devices, taken, nursery)
        return
    with into.phase("devices"):  # active: devices, until the end of the stream
        await take_devices(into, stream, devices, taken)
    await into.data.stop()
    await activate(into, devices.run_state)  # the phase "activate": handover, completed


async def _run(into: Incoming) -> Summary:
    """The whole attempt: the phases, then its end, which :mod:`.outcome` decides."""
    outcome, monitor = Outcome(), into.monitor
    with outcome.watch():
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            scope = nursery.cancel_scope
            monitor.control(scope.cancel, None, into.channels.cut)
            if (reason := monitor.cancel_reason) is not None:
                scope.cancel(reason)  # a listener has cancelled at the event of `setup`, before this nursery existed
            await _phases(into, nursery)
            scope.cancel("the migration is over")
    monitor.control(None, None)
    missing = await into.following.end()
    await unwind(into, outcome.failure)
    conclude(into, outcome.failure, missing)
    return summary(into)
