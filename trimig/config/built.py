"""The capabilities and parameter values of QEMU that trimig supports.

trimig knows the name of every capability and parameter of QEMU 7.2 to 11.1, but not all features are built. A
capability or a value that turns on a missing feature is refused. A parameter that only tunes a missing feature may be
set, and a warning says that it has no effect. A change that builds a feature extends this file and no other file of
:mod:`trimig.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Capabilities, in QMP spelling, that may be turned on.
BUILT: Final[frozenset[str]] = frozenset(
    {
        "auto-converge",
        "compress",
        "events",
        "multifd",
        "pause-before-switchover",
        "postcopy-blocktime",
        "postcopy-preempt",
        "postcopy-ram",
        "release-ram",
        "return-path",
        "switchover-ack",
        "validate-uuid",
        "xbzrle",
    }
)

#: Values of parameters that may be chosen; the other values of these parameters need features that are not built.
BUILT_VALUES: Final[Mapping[str, frozenset[object]]] = {
    "mode": frozenset({"normal"}),
}

#: Parameters without an effect yet, and the feature that they belong to. They may be set to any legal value, because
#: scripts set whole lists and the feature itself is refused when it is turned on. A migration with such a value logs a
#: warning.
UNREAD: Final[Mapping[str, str]] = {
    "x-checkpoint-delay": "the capability x-colo",
    "block-incremental": "the capability block",
    "multifd-qatzip-level": "the compression qatzip of multifd",
    "announce-initial": "the announcement of network cards",
    "announce-max": "the announcement of network cards",
    "announce-rounds": "the announcement of network cards",
    "announce-step": "the announcement of network cards",
    "block-bitmap-mapping": "the capability dirty-bitmaps",
    "direct-io": "the capability mapped-ram",
    "x-vcpu-dirty-limit-period": "the capability dirty-limit",
    "vcpu-dirty-limit": "the capability dirty-limit",
    "cpr-exec-command": "the mode cpr-exec",
    "x-rdma-chunk-size": "rdma:",
}
