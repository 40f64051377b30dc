"""The options of ``trimig demo``, checked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trimig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the demonstration."""

    size: int
    hot: int
    dirty_rate: int
    hops: int
    config: trimig.Config
    #: Shares, see :class:`trimig.cli.postcopy.PostcopySchedule`; None for no postcopy, and for no cut.
    postcopy_after: float | None = None
    cut_after: float | None = None

    @property
    def reported(self) -> tuple[str, ...]:
        """The members of the hosts' reports that belong to the features that are on."""
        found: tuple[str, ...] = ()
        if self.postcopy_after is not None:
            found += ("page_faults", "fault_median_ms", "fault_p99_ms", "recoveries")
        if self.config.capabilities.auto_converge:
            found += ("throttle_percent",)
        return found
