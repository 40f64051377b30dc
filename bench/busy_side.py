"""One side of a migration of the busy guest by trimig. Run by :mod:`bench.encodings`.

The guest's worker is a process of its own, so the processor time of this process is that of the migration alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Awaitable, Mapping
from typing import Any

import trio

import trimig
from bench.busy import Workload
from bench.errors import BenchError
from bench.trimig_side import announce, commands, config_of, say


class BusySide:
    """Answers the coordinator's commands."""

    def __init__(self, guest: trimig.ProcessGuest, workload: Workload) -> None:
        self._guest = guest
        self._workload = workload

    async def serve(self) -> None:
        """Answer commands until the coordinator is gone."""
        async for command in commands():
            match command["do"]:
                case "listen":
                    await self._listen(command)
                case "migrate":
                    await self._migrate(command)
                case "verify":
                    await self._verify()

    async def _listen(self, command: Mapping[str, Any]) -> None:
        monitor = trimig.Monitor()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce, monitor.events())
            await _tell(trimig.receive(self._guest, command["at"], config_of(command), monitor=monitor), monitor)
            nursery.cancel_scope.cancel()

    async def _migrate(self, command: Mapping[str, Any]) -> None:
        monitor = trimig.Monitor()
        config = dataclasses.replace(config_of(command), max_total_time=command["limit"])
        await _tell(trimig.migrate(self._guest, command["uri"], config, monitor=monitor), monitor)

    async def _verify(self) -> None:
        await self._guest.pause()
        try:
            say(writes=self._workload.count(self._guest.ram[0].pages))
        except BenchError as exc:
            say(failed=str(exc))


async def _tell(migration: Awaitable[trimig.Summary], monitor: trimig.Monitor) -> None:
    """Report the end of the migration."""
    try:
        summary = await migration
    except trimig.NotConverging:
        now = monitor.statistics()
        say(finished={"converged": False, "total_s": now.elapsed, "passes": now.iteration})
    except trimig.TrimigError as exc:
        say(failed=f"{type(exc).__name__}: {exc}")
    else:
        say(
            finished={
                "converged": True,
                "total_s": summary.total_time,
                "downtime_ms": summary.downtime * 1000,
                "passes": summary.iterations,
            }
        )


async def run(role: str, workload: Workload) -> None:
    """Make the guest and serve."""
    settings = json.dumps({"made": 0, **dataclasses.asdict(workload)}).encode()
    opened = trimig.ProcessGuest.open(
        [sys.executable, "-m", "bench.busy_worker"],
        ram=workload.size,
        running=role == "source",
        name="busy",
        settings=settings,
    )
    async with opened as guest:
        say(ready=True)
        await BusySide(guest, workload).serve()


def main() -> None:
    role, size, hot, rate = sys.argv[1:]
    trio.run(run, role, Workload(size=int(size), hot=int(hot), rate=int(rate)), strict_exception_groups=True)


if __name__ == "__main__":
    main()
