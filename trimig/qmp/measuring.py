"""The present or last measurement of the dirty rate."""

from __future__ import annotations

import dataclasses
import logging
from typing import Final

log: Final = logging.getLogger("trimig.qmp")


@dataclasses.dataclass(slots=True, kw_only=True)
class Measurement:
    """One measurement: what was asked for, and what came of it."""

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

    def failed(self, why: str) -> None:
        """There is no result: the status is the first one again, and the reason is in the log."""
        self.status = "unstarted"
        log.warning("the dirty rate was not measured: %s", why)
