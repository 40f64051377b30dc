"""The throttle of the guest (auto-converge): it is set after the passes, and ended in every outcome.

A guest that can shed load (:class:`trimig.guest.SheddingGuest`) is asked for that first. Any other guest is slowed down.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Final

import trio

from ...errors import GuestFailed, Ownership
from ...guest import SheddingGuest
from ...policy.throttle import AutoConverge, Steps
from .. import guest_calls

if TYPE_CHECKING:
    from ...config.parameters import Parameters
    from .outgoing import Outgoing

log: Final = logging.getLogger("trimig.source")


def steps_of(parameters: Parameters) -> Steps:
    """The parameters of auto-converge."""
    return Steps(
        threshold=parameters.throttle_trigger_threshold,
        initial=parameters.cpu_throttle_initial,
        increment=parameters.cpu_throttle_increment,
        tailslow=parameters.cpu_throttle_tailslow,
        maximum=parameters.max_cpu_throttle,
    )


class Throttle:
    """Auto-converge in the passes of one attempt. Made when the passes begin."""

    def __init__(self, out: Outgoing) -> None:
        self._out = out
        c = out.counters
        self._on = out.config.capabilities.auto_converge
        self._policy = AutoConverge(trio.current_time(), dirtied=c.dirtied, sent=c.transferred)

    async def adjust(self) -> None:
        """Set the throttle that the last dirty sync calls for. A guest that cannot be throttled is warned about, once.

        **Cancellation:** the old or the new throttle is in force; the end of the attempt ends it.
        """
        out, c = self._out, self._out.counters
        if not self._on:
            return
        percent = self._policy.synced(
            trio.current_time(),
            dirtied=c.dirtied,
            sent=c.transferred,
            throttle=c.throttle,
            steps=steps_of(out.monitor.config.parameters),
        )
        if percent == c.throttle:
            return
        first, out.slowed = not out.slowed, True
        try:
            shed = await out.call("throttling the guest", functools.partial(_set, out, percent))
        except GuestFailed as error:
            self._on = False
            out.monitor.warn(f"auto-converge goes on without a throttle: {error}")
            return
        if first and not shed:
            log.info(
                "auto-converge slows the guest %r down; a guest that has on_throttle could shed load instead",
                out.guest.name,
            )
        c.throttle = percent
        out.monitor.emit("THROTTLE", percent=percent)


async def _set(out: Outgoing, percent: int) -> bool:
    """Throttle the guest. True if it sheds load, False if it is slowed down."""
    guest = out.guest
    if isinstance(guest, SheddingGuest) and await guest.on_throttle(percent / 100):
        return True
    await guest.throttle(percent)
    return False


async def end_throttle(out: Outgoing) -> None:
    """End the throttle, if there is one, within ``teardown_grace`` seconds. A failure is a warning if the guest is here.

    **Cancellation:** held off.
    """
    if not out.slowed:
        return
    out.slowed = False
    failure = await guest_calls.bring_back(
        "released from its throttle", functools.partial(_end, out), out.config.teardown_grace
    )
    out.counters.throttle = 0
    out.monitor.emit("THROTTLE", percent=0)
    if failure is not None and out.monitor.owner is Ownership.SOURCE:
        out.monitor.warn(str(failure))


async def _end(out: Outgoing) -> None:
    guest = out.guest
    try:
        if isinstance(guest, SheddingGuest):
            await guest.on_throttle(0.0)
    finally:
        await guest.throttle(0)
