"""One side of a migration of a guest that checks itself (:class:`trimig.WorkloadGuest`). Run by :mod:`bench.postcopy`.

The guest's worker is a process of its own, so the processor time of this process is that of the migration alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Awaitable, Mapping
from typing import Any

import trio

import trimig
from bench.lockwait import LockWait
from bench.trimig_side import announce, commands, config_of, say
from trimig.cli.postcopy import PostcopySchedule


class WorkloadSide:
    """Answers the coordinator's commands.

    Args:
        samples: measure the waits for the interpreter lock in postcopy.
    """

    def __init__(self, guest: trimig.WorkloadGuest, *, samples: bool) -> None:
        self._guest = guest
        self._samples = samples
        self._waits: Mapping[str, float] = {}
        self._summary: trimig.Summary | None = None

    async def serve(self) -> None:
        """Answer commands until the coordinator is gone."""
        async for command in commands():
            match command["do"]:
                case "listen":
                    await self._listen(command)
                case "migrate":
                    await self._migrate(command)
                case "report":
                    say(report=self._report())
                case "verify":
                    await self._guest.pause()
                    proof = await self._guest.verify()
                    say(verified=proof.ok, text=str(proof))

    async def _listen(self, command: Mapping[str, Any]) -> None:
        monitor = trimig.Monitor()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce, monitor.events())
            incoming = trimig.receive(self._guest, command["at"], config_of(command), monitor=monitor)
            await self._watch(incoming, monitor)
            nursery.cancel_scope.cancel()

    async def _migrate(self, command: Mapping[str, Any]) -> None:
        monitor = trimig.Monitor()
        async with trio.open_nursery() as nursery:
            if (after := command.get("postcopy_after")) is not None:
                nursery.start_soon(PostcopySchedule(after=after).run, monitor)
            outgoing = trimig.migrate(self._guest, command["uri"], config_of(command), monitor=monitor)
            await self._watch(outgoing, monitor)
            nursery.cancel_scope.cancel()

    async def _watch(self, migration: Awaitable[trimig.Summary], monitor: trimig.Monitor) -> None:
        sampled = LockWait(lambda: monitor.status is trimig.Status.POSTCOPY_ACTIVE)
        try:
            with sampled if self._samples else contextlib.nullcontext():
                self._summary = await migration
            self._waits = sampled.report()
        except trimig.TrimigError as exc:
            say(failed=f"{type(exc).__name__}: {exc}")
        else:
            say(finished=True)

    def _report(self) -> dict[str, Any]:
        report: dict[str, Any] = {"lock": self._waits}
        if self._summary is not None:
            report |= {"downtime_ms": self._summary.downtime * 1000, "total_s": self._summary.total_time}
        if (times := self._guest.touch_times) is not None:
            report |= {
                "faults": times.waits,
                "fault_median_ms": times.median / 1e6 if times.waits else None,
                "fault_p99_ms": times.p99 / 1e6 if times.waits else None,
            }
        return report


async def run(role: str, size: int, dirty_rate: int, samples: str) -> None:
    """Make the guest, which writes all of its memory again and again at the source, and serve."""
    source = role == "source"
    opened = trimig.WorkloadGuest.open(
        size=size, hot=size if source else 0, dirty_rate=dirty_rate if source else 0, running=source
    )
    async with opened as guest:
        say(ready=True)
        await WorkloadSide(guest, samples=samples == "lock").serve()


def main() -> None:
    role, size, dirty_rate, samples = sys.argv[1:]
    trio.run(run, role, int(size), int(dirty_rate), samples, strict_exception_groups=True)


if __name__ == "__main__":
    main()
