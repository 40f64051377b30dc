"""Measurements of the dirty rate: one at a time, in the background."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

log: Final = logging.getLogger("trimig.qmp")


@dataclasses.dataclass(slots=True, kw_only=True)
class Measurement:
    """One measurement: the request and its result."""

    mode: str
    unit: str
    #: In *unit*.
    calc_time: int
    #: Seconds since 1970.
    began: int
    #: QEMU's ``unstarted``, ``measuring`` and ``measured``.
    status: str = "measuring"
    #: MiB per second.
    rate: int = 0

    def done(self, rate: int) -> None:
        """Record the result in MiB per second."""
        self.rate = rate
        self.status = "measured"

    def failed(self, why: str) -> None:
        """Record that there is no result: the status is the first one again, and the log has the reason."""
        self.status = "unstarted"
        log.warning("the dirty rate was not measured: %s", why)


class Measurer:
    """The present or last measurement of one machine.

    Args:
        nursery: the measurement runs there.

    Attributes:
        last: None before the first measurement.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.last: Measurement | None = None
        self._nursery = nursery
        self._present: tuple[trio.CancelScope, trio.Event] | None = None

    def begin(self, measurement: Measurement, measure: Callable[[], Awaitable[None]]) -> None:
        """Run *measure* in the background; *measure* fills *measurement*."""
        self.last = measurement
        self._present = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._run, measurement, measure, *self._present, name="trimig.qmp.commands.dirty_rate")

    async def _run(
        self,
        measurement: Measurement,
        measure: Callable[[], Awaitable[None]],
        scope: trio.CancelScope,
        ended: trio.Event,
    ) -> None:
        try:
            with scope:
                await measure()
            if scope.cancelled_caught:
                measurement.failed("a migration has begun meanwhile")
        finally:
            self._present = None
            ended.set()

    async def end(self) -> None:
        """End the present measurement, if there is one, without a result: a migration begins.

        **Cancellation:** the measurement ends all the same.
        """
        if self._present is not None:
            scope, ended = self._present
            scope.cancel("a migration begins")
            await ended.wait()
