"""Starts the guest at the destination."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from ...guest import OpaqueGuest
from ...status import Status
from .. import guest_calls
from ..phase import phase

if TYPE_CHECKING:
    from .incoming import Incoming


async def activate(
    into: Incoming,
    run_state: str,
    then: Status = Status.COMPLETED,
    alive: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Bring the guest into its run state here. On return this side is the owner, and the status is *then*.

    Args:
        run_state: the run state that the source has sent.
        alive: called when the guest runs, before the status *then* is set.

    Raises:
        GuestFailed: the guest could not be activated.

    **Cancellation:** held off, for at most ``handover_timeout``.
    """
    monitor, grace, guest = into.monitor, into.config.handover_timeout, into.guest
    await trio.lowlevel.checkpoint_if_cancelled()
    monitor.advance(Status.HANDOVER)
    state = run_state
    if state == "running" and not monitor.config.autostart:
        state = "paused"
    with phase(monitor, "activate") as activated:
        failure = await guest_calls.bring_back("brought to life", functools.partial(guest.activate, state), grace)
        if failure is not None and not (state == "running" == guest.run_state):
            raise failure
    if failure is not None:
        # The call has failed, but the guest runs. It must not be given back, or it would run on both sides.
        monitor.warn(f"{failure}; but it runs")
    into.resume_seconds = activated.seconds
    if state == "running" and not isinstance(guest, OpaqueGuest):
        monitor.emit("RESUME")  # not for an opaque guest: it is parked and does not run here
    if alive is not None:
        await alive()
    monitor.advance(then)
