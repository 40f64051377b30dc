"""The source: its phases in their order.

The guest runs here until `pause`. The phase `commit` hands it over. In precopy the commit is the end of the stream. In
postcopy it is the package with the devices, and the memory follows. :mod:`trimig.status` has the statuses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import trio

from ...channel.channels import Channels
from ...guest import MortalGuest
from ...monitor import blockers
from ...owner import check_here
from ...status import Role
from ..device_writer import profile_of
from ..guest_calls import watch_guest
from ..outcome import Outcome
from ..phase import phase
from ..sections.table import make_handlers
from .announce import announce
from .answer import take_refusal
from .connect import await_first_answer, connect
from .outcome import conclude, end_unconnected, summary, unwind
from .outgoing import CommitHook, FenceHook, Outgoing
from .precopy import copy_passes
from .switchover import PostcopySwitchover, PrecopySwitchover, Switchover, check_stopped, hold, stop_guest
from .throttle import end_throttle

if TYPE_CHECKING:
    from ...channel.connections import Connections
    from ...config.config import Config
    from ...guest import Guest
    from ...monitor.core import MonitorCore
    from ...monitor.statistics import Summary
    from .link import Link


async def migrate_stream(
    guest: Guest,
    connections: Connections,
    config: Config,
    monitor: MonitorCore,
    *,
    commit: CommitHook | None = None,
    fence: FenceHook | None = None,
) -> Summary:
    """Move *guest* to the destination at the other end of *connections*.

    :func:`trimig.migrate` is the public form and has the contract.

    **Cancellation:** before the decision, the guest is as it was. After the decision, the call ends within
    ``handover_timeout`` + ``teardown_grace`` with the answer or HandoverUncertain. In postcopy the cancellation is held off
    while there is a connection.
    """
    guest.claim("an outgoing migration")
    try:
        check_here(guest)
        config = dataclasses.replace(config, peer=profile_of(guest, config.peer))
        blockers.check_outgoing(guest)
        monitor.begin(Role.SOURCE, config, guest)
        link = await _connected(guest, connections, config, monitor)
        out = Outgoing(guest, config, monitor, commit, fence, link)
        with contextlib.closing(out.turn):
            return await _run(out)
    finally:
        guest.release()


async def _phases(out: Outgoing, nursery: trio.Nursery) -> None:
    """The phases after `connect`."""
    ram = make_handlers(out)
    _start_children(out, nursery)
    with out.phase("announce"):  # setup: header, configuration, list of RAM blocks
        await announce(out)
    with out.phase("precopy"):  # active: passes over the RAM
        ahead = await copy_passes(out)
    switch: Switchover = PostcopySwitchover(out, ram) if ahead else PrecopySwitchover(out)
    with out.phase("drain"):  # active
        await switch.drain()
    with out.phase("pause"):  # device, or pre-switchover: the guest is stopped from here on
        await stop_guest(out)
    if out.config.capabilities.pause_before_switchover:
        with out.phase("hold"):  # pre-switchover, then device
            await hold(out)
    with out.phase("rest"):  # device: the last pages, or for postcopy the list of pages that follow
        check_stopped(out)
        await switch.send_rest()
    with out.phase("devices"):  # device
        await switch.send_devices()
    with out.phase("prepare"):  # device: PING, and the PONG that proves that everything was loaded
        await switch.prepare()
    with out.phase("commit"):  # handover
        following = await switch.commit(nursery)
    out.turn.close()
    with out.phase("follow"):  # postcopy-active, -paused, -recover: the rest of the memory, in postcopy
        if out.in_postcopy:
            nursery.start_soon(end_throttle, out, name="trimig.throttle")
        await following.run()


def _start_children(out: Outgoing, nursery: trio.Nursery) -> None:
    """Start the tasks that run beside the phases. All of them end with the attempt's nursery."""
    nursery.start_soon(out.link.limiter.run, name="trimig.limiter")
    if isinstance(out.guest, MortalGuest):
        nursery.start_soon(watch_guest, out.guest, name="trimig.guest")
    if out.link.asks:
        nursery.start_soon(out.link.reader.run, name="trimig.return_path")
    if out.link.answers:
        nursery.start_soon(await_first_answer, out, name="trimig.first_answer")
    for section in out.sections:
        for name, run in section.tasks.items():
            nursery.start_soon(run, name=name)


async def _connected(guest: Guest, connections: Connections, config: Config, monitor: MonitorCore) -> Link:
    """The phase `connect`. If it fails, the attempt ends here."""
    outcome, channels, scope = Outcome(), Channels(), trio.CancelScope()
    monitor.count(lambda: channels.sent)
    with outcome.watch(), scope:
        monitor.control(scope.cancel, None, channels.cut)
        if (reason := monitor.cancel_reason) is not None:
            scope.cancel(reason)  # a listener has cancelled at the event of `setup`, before this scope existed
        with phase(monitor, "connect"):  # setup
            return await connect(guest, connections, config, monitor, channels)
    monitor.control(None, None)
    return await end_unconnected(monitor, channels, outcome.failure)


async def _run(out: Outgoing) -> Summary:
    """The whole attempt: the phases, then its end, which :mod:`.outcome` decides."""
    outcome = Outcome()
    with outcome.watch():
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            scope = nursery.cancel_scope
            out.monitor.control(scope.cancel, out.retune, out.link.channels.cut)
            if (reason := out.monitor.cancel_reason) is not None:
                scope.cancel(reason)  # the cancel came after the last checkpoint
            out.retune()  # a parameter may have changed since the limiter was made
            await _phases(out, nursery)
            scope.cancel("the migration is over")
    out.monitor.control(None, None)
    # The answer may have come in the moment in which the time for it ended. Then it counts.
    refusal = take_refusal(out)
    failure = refusal if outcome.failure is None else outcome.failure
    guest_failure = await unwind(out, failure)
    await conclude(out, failure, guest_failure)
    return summary(out)
