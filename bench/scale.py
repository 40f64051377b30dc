"""``python -m bench scale``: 1, 10, 50 and 200 migrations at once in one process.

A daemon that hosts many guests migrates all of them when its host is drained. Here all sources *and* all destinations
are in one process, over loopback TCP, and all sources start in the same moment, which is the hardest case. The
downtime is that of each guest, by its source; the throughput is all memory divided by the time until the last
migration has completed. Slices are the steps of trio tasks (:class:`bench.measure.SliceInstrument`).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from bench.child import JsonObject, start_python_child
from bench.errors import BenchError, first_error
from bench.figures import GIB
from bench.goals import Verdict, judge
from bench.load import LoadLog
from bench.measure import percentile
from bench.table import format_table

COUNTS: Final = (1, 10, 50, 200)
#: The number of migrations that the figure to reach is about.
_JUDGED: Final = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run."""

    count: int
    #: Bytes of one guest.
    size: int
    seconds: float
    #: Processor seconds of the process, which has both sides.
    cpu_s: float
    #: Of each migration.
    downtimes_ms: Sequence[float]
    #: The parts of the downtime, medians over the migrations.
    parts_ms: dict[str, float]
    slice_p99_ms: float
    slice_max_ms: float
    #: The load average at the end.
    load: float = 0.0


async def one(count: int, size: int) -> Result:
    """One run in a process of its own.

    Raises:
        BenchError: a migration failed, or a page is wrong.

    **Cancellation:** the process is killed.
    """
    found: list[JsonObject] = []
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            arguments = [str(count), str(size)]
            child = await start_python_child(nursery, f"{count} migrations", "bench.scale_side", arguments)
            found.append(await child.answer("report"))
            nursery.cancel_scope.cancel("measured")
    except* BenchError as group:
        raise first_error(group) from None
    return result_of(count, size, found[0])


def result_of(count: int, size: int, report: JsonObject) -> Result:
    """The result in the report of :mod:`bench.scale_side`.

    Raises:
        BenchError: a page is wrong, or a migration is missing.
    """
    if report["wrong"]:
        raise BenchError(f"{report['wrong']} pages of the destinations are not what the sources had")
    if len(report["downtimes_ms"]) != count:
        raise BenchError(f"{len(report['downtimes_ms'])} of {count} migrations have completed")
    parts = report["parts_ms"]
    return Result(
        count=count,
        size=size,
        seconds=report["seconds"],
        cpu_s=report["cpu_s"],
        downtimes_ms=report["downtimes_ms"],
        parts_ms={name: statistics.median(part[name] for part in parts) for name in parts[0]},
        slice_p99_ms=report["slices"]["p99_ms"],
        slice_max_ms=report["slices"]["max_ms"],
    )


async def run(
    counts: Sequence[int],
    size: int,
    repeat: int,
    timeout: float,
    progress: Callable[[str], None],
    loads: LoadLog,
) -> list[Result]:
    """All runs, interleaved; a failed run is reported and left out."""
    results = []
    for number in range(repeat):
        for count in counts:
            what = f"round {number + 1}/{repeat} {count} at once"
            try:
                with trio.fail_after(timeout):
                    result = await one(count, size)
            except (BenchError, trio.TooSlowError) as error:
                progress(f"{what}: FAILED: {str(error) or 'not done in time'}")
                continue
            load = loads.read()
            results.append(dataclasses.replace(result, load=load))
            middle = statistics.median(result.downtimes_ms)
            progress(f"{what}: {result.seconds:.2f} s, downtime {middle:.1f} ms in the median, load {load:.1f}")
    return results


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Medians over the runs of each number. Downtimes are over all migrations of all runs."""
    found = []
    for count in dict.fromkeys(result.count for result in results):
        mine = [result for result in results if result.count == count]
        downtimes = [value for result in mine for value in result.downtimes_ms]
        found.append(
            {
                "count": count,
                "size": mine[0].size,
                "runs": len(mine),
                "total_s": statistics.median(result.seconds for result in mine),
                "bytes_per_s": statistics.median(count * result.size / result.seconds for result in mine),
                "cpu_s_per_gib": statistics.median(result.cpu_s * GIB / (count * result.size) for result in mine),
                "downtime_median_ms": statistics.median(downtimes),
                "downtime_p99_ms": percentile(downtimes, 99),
                "downtime_max_ms": max(downtimes),
                "parts_ms": {
                    name: statistics.median(result.parts_ms[name] for result in mine) for name in mine[0].parts_ms
                },
                "slice_p99_ms": statistics.median(result.slice_p99_ms for result in mine),
                "slice_max_ms": max(result.slice_max_ms for result in mine),
                "load": max(result.load for result in mine),
            }
        )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text. Processor time is in seconds for each GiB of guest RAM, both sides together; parts of the
    downtime are medians, in ms.
    """
    parts = [name for name in (found[0]["parts_ms"] if found else {}) if name not in ("held", "resume")]
    head = ["at once", "of", "runs", "time", "GB/s", "CPU both", "downtime", "99 %", "worst"]
    lines = [[*head, *parts, "slice p99", "worst slice", "load"]]
    for row in found:
        lines.append(
            [
                str(row["count"]),
                f"{row['size'] >> 20} MiB",
                str(row["runs"]),
                f"{row['total_s']:.2f} s",
                f"{row['bytes_per_s'] / 1e9:.2f}",
                f"{row['cpu_s_per_gib']:.2f}",
                f"{row['downtime_median_ms']:.1f} ms",
                f"{row['downtime_p99_ms']:.1f} ms",
                f"{row['downtime_max_ms']:.1f} ms",
                *(f"{row['parts_ms'][name]:.1f}" for name in parts),
                f"{row['slice_p99_ms']:.2f} ms",
                f"{row['slice_max_ms']:.1f} ms",
                f"{row['load']:.1f}",
            ]
        )
    return format_table(lines, left=0)


def verdicts(found: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The median downtime of 200 migrations."""
    return [
        judge("scale", row["downtime_median_ms"], f"{row['size'] >> 20} MiB each")
        for row in found
        if row["count"] == _JUDGED
    ]
