"""A guest behind a QMP socket that answers as a QEMU would, from a script."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import trio
from click.testing import Result

from trimig import qmp

ADDRESS = "unix:/run/scripted"
MB = 1_000_000
TOTAL = 100 * MB
PAGE = 4096


def ram(*, sync: int, pages: int, remaining: int, **more: Any) -> dict[str, Any]:
    """A ``ram`` member: so many pages were sent, in passes up to number *sync*."""
    return {
        "total": TOTAL,
        "transferred": pages * PAGE,
        "remaining": remaining,
        "normal": pages,
        "duplicate": 0,
        "dirty-sync-count": sync,
        "dirty-pages-rate": 0,
        "mbps": 800.0,
        "page-size": PAGE,
        **more,
    }


def step(status: str, **more: Any) -> dict[str, Any]:
    return {"status": status, "total-time": 1000, "setup-time": 2, "expected-downtime": 300, **more}


ACTIVE = step("active", ram=ram(sync=1, pages=5000, remaining=TOTAL - 5000 * PAGE))
DONE = step("completed", downtime=45, ram=ram(sync=3, pages=30000, remaining=0))


class Feed:
    """An asynchronous iterator that needs no closing."""

    def __init__(self, events: Iterator[Mapping[str, Any]]) -> None:
        self._events = events

    def __aiter__(self) -> Feed:
        return self

    async def __anext__(self) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        for event in self._events:
            return event
        raise StopAsyncIteration


@dataclasses.dataclass
class Scripted:
    """Answers as a QEMU would; ``query-migrate`` steps through *script* from ``migrate`` on, and stays at its end."""

    script: Sequence[Mapping[str, Any]] = ()
    run_state: str = "running"
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    capabilities: dict[str, bool] = dataclasses.field(
        default_factory=lambda: {
            "events": False, "pause-before-switchover": False, "return-path": True, "auto-converge": True
        }
    )  # fmt: skip
    parameters: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "max-bandwidth": 1 << 27, "downtime-limit": 300, "tls-creds": "", "cpu-throttle-tailslow": False
        }
    )  # fmt: skip
    #: The script after ``migrate_cancel``, and the refused commands: command -> desc.
    cancelled: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"status": "cancelled"})
    refuses: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Called with each command and its number of calls, before the command is executed.
    before: Callable[[str, int], None] = lambda name, count: None
    #: Called when a client has left.
    left: Callable[[], None] = lambda: None
    feed: Sequence[Mapping[str, Any]] = ()
    executed: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    #: The number of connections so far.
    connections: int = 0

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        await trio.lowlevel.checkpoint()
        self.executed.append((name, dict(arguments or {})))
        self.before(name, self.names.count(name))
        if name in self.refuses:
            raise qmp.CommandFailed(self.refuses[name])
        return getattr(self, name.replace("-", "_"), lambda **_: {})(**(arguments or {}))

    async def getfd(self, name: str, fd: int) -> None:
        await trio.lowlevel.checkpoint()
        self.executed.append(("getfd", {"fdname": name}))
        if "getfd" in self.refuses:
            raise qmp.CommandFailed(self.refuses["getfd"])

    def events(self) -> AsyncIterator[Mapping[str, Any]]:
        return Feed(iter(self.feed))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.executed]

    def query_status(self) -> Any:
        return {"status": self.run_state, "running": self.run_state == "running"}

    def query_migrate(self) -> Any:
        if self.script:
            self.info, self.script = self.script[0], self.script[1:]
        return self.info

    def migrate(self, uri: str) -> Any:
        self.info = {"status": "setup"}

    def migrate_cancel(self) -> Any:
        if self.info.get("status") not in (None, "completed", "failed", "cancelled"):
            self.info, self.script = self.cancelled, ()

    def query_migrate_capabilities(self) -> Any:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def query_migrate_parameters(self) -> Any:
        return dict(self.parameters)

    def migrate_set_capabilities(self, capabilities: Any) -> Any:
        self.capabilities |= {row["capability"]: row["state"] for row in capabilities}

    def migrate_set_parameters(self, **values: Any) -> Any:
        self.parameters |= values


Invoke = Callable[..., Result]
