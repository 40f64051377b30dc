"""The types of answers and events, for the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ...status import QMP_STATUSES
from ..arguments import Argument, Signature

STR: Final = Argument("str")
BOOL: Final = Argument("bool")
INT: Final = Argument("int")
NUMBER: Final = Argument("number")
MAYBE_STR: Final = Argument("str", optional=True)
MAYBE_BOOL: Final = Argument("bool", optional=True)
MAYBE_INT: Final = Argument("int", optional=True)

#: QEMU's type RunState, as far as a guest of trimig can have the state or a stream can name it.
RUN_STATES: Final = (
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch", "finish-migrate",
    "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog", "guest-panicked", "colo",
)  # fmt: skip

VERSION: Final = Argument(
    "object",
    members={
        "qemu": Argument("object", members={"major": INT, "minor": INT, "micro": INT}),
        "package": STR,
    },
)
STATUS_INFO: Final = Argument(
    "object", members={"status": Argument("str", choices=RUN_STATES), "singlestep": BOOL, "running": BOOL}
)
SOCKET_ADDRESS: Final = Argument(
    "object",
    members={"type": Argument("str", choices=("inet", "unix", "fd", "x-uri"))},
    tag="type",
    variants={
        "inet": {"host": STR, "port": STR, "ipv4": MAYBE_BOOL, "ipv6": MAYBE_BOOL},
        "unix": {"path": STR},
        "fd": {"str": STR},
        "x-uri": {"uri": STR},
    },
)
_RAM: Final[Signature] = {
    **dict.fromkeys(
        (
            "transferred", "remaining", "total", "duplicate", "skipped", "normal", "normal-bytes", "dirty-pages-rate",
            "dirty-sync-count", "postcopy-requests", "page-size", "multifd-bytes", "pages-per-second", "precopy-bytes",
            "downtime-bytes", "postcopy-bytes", "dirty-sync-missed-zero-copy",
        ),
        INT,
    ),
    "mbps": NUMBER,
}  # fmt: skip
_XBZRLE: Final[Signature] = {
    **dict.fromkeys(("cache-size", "bytes", "pages", "cache-miss", "overflow"), INT),
    **dict.fromkeys(("cache-miss-rate", "encoding-rate"), NUMBER),
}
_COMPRESSION: Final[Signature] = {
    **dict.fromkeys(("pages", "busy", "compressed-size"), INT),
    **dict.fromkeys(("busy-rate", "compression-rate"), NUMBER),
}
MIGRATION_INFO: Final = Argument(
    "object",
    members={
        "status": Argument("str", optional=True, choices=QMP_STATUSES),
        "ram": Argument("object", optional=True, members=_RAM),
        **dict.fromkeys(
            (
                "total-time",
                "expected-downtime",
                "downtime",
                "setup-time",
                "postcopy-blocktime",
                "cpu-throttle-percentage",
            ),
            MAYBE_INT,
        ),
        "xbzrle-cache": Argument("object", optional=True, members=_XBZRLE),
        "compression": Argument("object", optional=True, members=_COMPRESSION),
        "postcopy-vcpu-blocktime": Argument("list", optional=True, items=INT),
        "error-desc": MAYBE_STR,
        "blocked-reasons": Argument("list", optional=True, items=STR),
        "socket-address": Argument("list", optional=True, items=SOCKET_ADDRESS),
        # From here on: additions of trimig. This one is of a destination; at a source it stands in `ram`.
        "multifd-bytes": MAYBE_INT,
        "owner": Argument("str", optional=True, choices=("source", "destination", "unknown")),
        "dirty-tracking": MAYBE_STR,
        "warnings": Argument("list", optional=True, items=STR),
        "convergence": Argument(
            "object",
            optional=True,
            members={"converging": BOOL, "reason": STR, "advice": Argument("list", items=STR)},
        ),
    },
)

#: The events of a machine, by name.
EVENTS: Final[Mapping[str, Signature]] = {
    "STOP": {},
    "RESUME": {},
    "MIGRATION": {"status": Argument("str", choices=QMP_STATUSES)},
    "MIGRATION_PASS": {"pass": INT},
    "SHUTDOWN": {"guest": BOOL, "reason": Argument("str", choices=("host-qmp-quit", "host-signal"))},
}
