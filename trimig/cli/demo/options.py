"""The options of ``trimig demo``, checked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from trimig import formats

if TYPE_CHECKING:
    import trimig


_PAGE: Final = 4096
#: Bytes of a page that a write changes if the capability xbzrle is on: its differences are short then.
_SMALL_WRITE: Final = 64
#: Bytes per second that the guest writes, and the same if the capability compress is on: zlib would not keep up with more.
_DIRTY_RATE: Final = 50 << 20
_SLOW_DIRTY_RATE: Final = 10 << 20


def default_write_size(config: trimig.Config) -> int:
    """The bytes of a page that a write changes, unless an option says so."""
    return _SMALL_WRITE if config.capabilities.xbzrle else _PAGE


def default_dirty_rate(config: trimig.Config) -> int:
    """The bytes per second that the guest writes, unless an option says so."""
    return _SLOW_DIRTY_RATE if config.capabilities.compress else _DIRTY_RATE


def default_bandwidth(config: trimig.Config, dirty_rate: int) -> int | None:
    """A bandwidth limit that plain pages exceed, for the capabilities that help then; None for that of *config*."""
    capabilities = config.capabilities
    if dirty_rate and (capabilities.auto_converge or capabilities.xbzrle) and not config.parameters.max_bandwidth:
        return max(1, dirty_rate * 9 // 10)
    return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the demonstration."""

    size: int
    hot: int
    dirty_rate: int
    #: Bytes of a page that a write changes.
    write_size: int = 4096
    hops: int
    config: trimig.Config
    #: Shares, see :class:`trimig.cli.postcopy.PostcopySchedule`; None for no postcopy, and for no cut.
    postcopy_after: float | None = None
    cut_after: float | None = None

    @property
    def writes(self) -> str:
        """What the guest writes, in words."""
        part = f", {formats.size(self.write_size)} of a page at a time" if self.write_size < _PAGE else ""
        return f"{formats.rate(self.dirty_rate)} in {formats.size(self.hot)}{part}"

    @property
    def reported(self) -> tuple[str, ...]:
        """The members of the hosts' reports that belong to the features that are on."""
        found: tuple[str, ...] = ()
        if self.postcopy_after is not None:
            found += ("page_faults", "fault_median_ms", "fault_p99_ms", "recoveries")
        if self.config.capabilities.auto_converge:
            found += ("throttle_percent",)
        return found
