"""What of QEMU's list works today.

Every capability and every parameter value of QEMU 7.2 has a name here, but not each has its feature. The ones that have
none are refused when they are turned on, because a switch that is silently ignored is worse than none. A change that
builds a feature extends this file and nothing else of :mod:`trimig.config`.
"""

from __future__ import annotations

from typing import Final

#: Capabilities, in QMP spelling, that may be turned on.
BUILT: Final[frozenset[str]] = frozenset(
    {
        "events",
        "pause-before-switchover",
        "postcopy-blocktime",
        "postcopy-preempt",
        "postcopy-ram",
        "release-ram",
        "return-path",
        "validate-uuid",
    }
)

#: Values of ``multifd-compression`` that may be chosen.
BUILT_COMPRESSIONS: Final[frozenset[str]] = frozenset({"none"})
