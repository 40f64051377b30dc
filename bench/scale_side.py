"""Many migrations at once in one process: all sources and all destinations. Run by :mod:`bench.scale`.

The process opens all guests, lets all destinations listen, and then starts all sources in one step of the run loop.
Each guest's source memory is random, and the destination's was touched before.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import trio

import trimig
from bench.measure import SliceInstrument
from bench.memory import fill_in_fork, mismatches, populate
from bench.trimig_side import add_machine, make_config, wait_address


class Fleet:
    """The guests of one run."""

    def __init__(self, count: int, size: int) -> None:
        self._size = size
        self._sources = [trimig.AppGuest("none") for _ in range(count)]
        self._destinations = [trimig.AppGuest("none", running=False) for _ in range(count)]
        self._pages = [add_machine(guest, size) for guest in self._sources]
        self._arrived = [add_machine(guest, size) for guest in self._destinations]
        self._addresses = [""] * count
        self._summaries: list[trimig.Summary | None] = [None] * count
        for pages in self._pages:
            fill_in_fork(pages, "random")
        for pages in self._arrived:
            populate(pages)

    async def run(self) -> dict[str, Any]:
        """The report of all migrations."""
        instrument = SliceInstrument()
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            async with trio.open_nursery(strict_exception_groups=True) as listening:
                for number in range(len(self._sources)):
                    await self._listen(nursery, listening, number)
            trio.lowlevel.add_instrument(instrument)
            cpu, began = time.process_time(), time.perf_counter()
            async with trio.open_nursery(strict_exception_groups=True) as sources:
                for number in range(len(self._sources)):
                    sources.start_soon(self._migrate, number)
            seconds = time.perf_counter() - began
            cpu = time.process_time() - cpu
            trio.lowlevel.remove_instrument(instrument)
        slices = instrument.slices()
        done = [summary for summary in self._summaries if summary is not None]
        return {
            "seconds": seconds,
            "cpu_s": cpu,
            "downtimes_ms": [summary.downtime * 1000 for summary in done],
            "parts_ms": [
                {name: value * 1000 for name, value in dataclasses.asdict(summary.downtime_parts).items()}
                for summary in done
            ],
            "totals_ms": [summary.total_time * 1000 for summary in done],
            "slices": None if slices is None else dataclasses.asdict(slices),
            "wrong": sum(mismatches(pages, "random") for pages in self._arrived),
        }

    async def _listen(self, nursery: trio.Nursery, listening: trio.Nursery, number: int) -> None:
        monitor = trimig.Monitor()
        events = monitor.events()

        async def address() -> None:
            self._addresses[number] = await wait_address(events)

        listening.start_soon(address)
        nursery.start_soon(self._receive, number, monitor)
        await trio.lowlevel.checkpoint()

    async def _receive(self, number: int, monitor: trimig.Monitor) -> None:
        await trimig.receive(self._destinations[number], "tcp:127.0.0.1:0", make_config(), monitor=monitor)

    async def _migrate(self, number: int) -> None:
        self._summaries[number] = await trimig.migrate(self._sources[number], self._addresses[number], make_config())


def main() -> None:
    count, size = (int(word) for word in sys.argv[1:])
    fleet = Fleet(count, size)
    try:
        report = trio.run(fleet.run, strict_exception_groups=True)
    except* trimig.TrimigError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), flush=True)
    else:
        print(json.dumps({"report": report}), flush=True)


if __name__ == "__main__":
    main()
