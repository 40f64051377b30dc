"""Turns single runs into medians, ratios against the figures to reach, tables and JSON. Pure arithmetic.

Throughput is guest RAM bytes over the interval, whatever went over the wire. So a guest of zero pages can have more
than the socket could carry.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.goals import Verdict, judge
from bench.measure import Slices, Usage
from bench.table import format_table, number

PAIRS = ("raw", "qemu-qemu", "trimig-trimig", "qemu-trimig", "trimig-qemu")

GIB = 1 << 30
MIB = 1 << 20


def engines(pair: str) -> tuple[str, str]:
    """The engines at the source and at the destination of a pair."""
    source, _, destination = pair.partition("-")
    return source, destination or source


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one pair."""

    pair: str
    memory: str
    pages: str
    size: int
    #: Length of the interval; :mod:`bench.precopy` defines its begin and end.
    seconds: float
    source: Usage
    destination: Usage
    #: A name of :data:`bench.ways.WAYS`.
    way: str = "tcp"
    #: The load average at the end.
    load: float = 0.0
    #: As reported by the source; None without a guest to stop.
    downtime_ms: float | None = None
    #: Of each trimig side.
    slices: tuple[Slices, ...] = ()

    def trimig_usages(self) -> list[Usage]:
        """The usage of the trimig sides."""
        sides = zip(engines(self.pair), (self.source, self.destination), strict=True)
        return [usage for engine, usage in sides if engine == "trimig"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The medians of all runs of one pair in the same conditions; None: not measurable here."""

    pair: str
    way: str
    memory: str
    pages: str
    runs: int
    size_bytes: int
    bytes_per_s: float
    bytes_per_s_min: float
    bytes_per_s_max: float
    cpu_source_s_per_gib: float
    cpu_destination_s_per_gib: float
    #: Of both sides together.
    cpu_s_per_gib: float
    #: The highest load average at the end of a run.
    load: float
    #: Of the side that used more.
    extra_memory_bytes: float
    extra_memory_source_bytes: float
    extra_memory_destination_bytes: float
    extra_memory_growth_bytes: float
    #: Of the trimig side that used more.
    extra_memory_trimig_bytes: float | None
    #: The part of the destination's RAM that was resident when the interval began.
    resident_at_start_bytes: float
    downtime_ms: float | None
    slice_p99_ms: float | None
    slice_max_ms: float | None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_rows(measurements: Iterable[Measurement]) -> list[Row]:
    """Group by conditions and pair, and compute medians; the rows keep the order of first appearance."""
    groups: dict[tuple[str, str, str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.way, one.memory, one.pages, one.pair), []).append(one)
    rows = [_row(group) for group in groups.values()]
    order = {key[:3]: at for at, key in reversed(list(enumerate(groups)))}
    return sorted(rows, key=lambda row: (order[row.way, row.memory, row.pages], PAIRS.index(row.pair)))


def _row(group: Sequence[Measurement]) -> Row:
    first = group[0]
    speeds = [one.size / one.seconds for one in group]
    return Row(
        pair=first.pair,
        way=first.way,
        memory=first.memory,
        pages=first.pages,
        runs=len(group),
        size_bytes=first.size,
        bytes_per_s=statistics.median(speeds),
        bytes_per_s_min=min(speeds),
        bytes_per_s_max=max(speeds),
        cpu_source_s_per_gib=statistics.median(one.source.cpu_seconds * GIB / one.size for one in group),
        cpu_destination_s_per_gib=statistics.median(one.destination.cpu_seconds * GIB / one.size for one in group),
        load=max(one.load for one in group),
        cpu_s_per_gib=statistics.median(
            (one.source.cpu_seconds + one.destination.cpu_seconds) * GIB / one.size for one in group
        ),
        extra_memory_bytes=statistics.median(
            max(one.source.extra_memory, one.destination.extra_memory) for one in group
        ),
        extra_memory_source_bytes=statistics.median(one.source.extra_memory for one in group),
        extra_memory_destination_bytes=statistics.median(one.destination.extra_memory for one in group),
        extra_memory_growth_bytes=statistics.median(
            max(one.source.extra_memory_growth, one.destination.extra_memory_growth) for one in group
        ),
        extra_memory_trimig_bytes=_median_of_known(
            max((usage.extra_memory for usage in one.trimig_usages()), default=None) for one in group
        ),
        resident_at_start_bytes=statistics.median(one.destination.resident_at_start for one in group),
        downtime_ms=_median_of_known(one.downtime_ms for one in group),
        slice_p99_ms=_median_of_known(max((part.p99_ms for part in one.slices), default=None) for one in group),
        slice_max_ms=_median_of_known(max((part.max_ms for part in one.slices), default=None) for one in group),
    )


def _median_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RatioGoal:
    """The figure *key* of :mod:`bench.goals`: a pair on a way compared with another one in the same conditions."""

    key: str
    over: str
    under: str
    over_way: str = "tcp"
    under_way: str = "tcp"
    pages: str = "random"
    populated: bool = True
    #: Compare the processor time of both sides, and not the throughput.
    cpu: bool = False


RATIO_GOALS = (
    RatioGoal(key="populated-cpu", over="trimig-trimig", under="qemu-qemu", cpu=True),
    RatioGoal(key="populated", over="trimig-trimig", under="qemu-qemu"),
    RatioGoal(key="raw", over="trimig-trimig", under="raw"),
    RatioGoal(key="cold", over="trimig-trimig", under="qemu-qemu", populated=False),
    RatioGoal(key="from-qemu", over="qemu-trimig", under="qemu-qemu"),
    RatioGoal(key="from-qemu-cold", over="qemu-trimig", under="qemu-qemu", populated=False),
    RatioGoal(key="to-qemu", over="trimig-qemu", under="qemu-qemu"),
    RatioGoal(key="zero", over="trimig-trimig", under="qemu-qemu", pages="zero"),
    RatioGoal(key="zero-cold", over="trimig-trimig", under="qemu-qemu", pages="zero", populated=False),
    RatioGoal(
        key="multifd-cpu",
        over="trimig-trimig",
        under="qemu-qemu",
        over_way="multifd-2",
        under_way="multifd-2",
        cpu=True,
    ),
    RatioGoal(key="multifd", over="trimig-trimig", under="qemu-qemu", over_way="multifd-2", under_way="multifd-2"),
    RatioGoal(key="unix-cpu", over="trimig-trimig", under="trimig-trimig", over_way="unix", cpu=True),
)


def make_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every figure to reach for which these rows have the data."""
    by_key = {(row.pair, row.way, row.memory, row.pages): row for row in rows}
    verdicts: list[Verdict] = []
    for ratio in RATIO_GOALS:
        for memory in dict.fromkeys(row.memory for row in rows):
            over = by_key.get((ratio.over, ratio.over_way, memory, ratio.pages))
            under = by_key.get((ratio.under, ratio.under_way, memory, ratio.pages))
            if over is None or under is None or memory.endswith("-populated") is not ratio.populated:
                continue
            if ratio.cpu:
                value = under.cpu_s_per_gib / over.cpu_s_per_gib
            else:
                value = over.bytes_per_s / under.bytes_per_s
            verdicts.append(judge(ratio.key, value, f"{memory} {ratio.pages}"))
    verdicts += _worst("memory", [(row, row.extra_memory_trimig_bytes) for row in rows], MIB)
    verdicts += _worst("slice-p99", [(row, row.slice_p99_ms) for row in rows], 1)
    verdicts += _worst("slice-worst", [(row, row.slice_max_ms) for row in rows], 1)
    return verdicts


def _worst(key: str, values: Iterable[tuple[Row, float | None]], divisor: float) -> list[Verdict]:
    known = [(value, row) for row, value in values if value is not None]
    if not known:
        return []
    value, row = max(known, key=lambda pair: pair[0])
    return [judge(key, value / divisor, f"{row.pair} {row.way} {row.memory} {row.pages}")]


def rows_table(rows: Sequence[Row]) -> str:
    """The rows as text. Processor time is in seconds for each GiB of guest RAM."""
    head = ["pair", "way", "memory", "pages", "runs", "GB/s", "(min-max)", "CPU src", "CPU dst", "both", "load"]
    head += ["extra src", "extra dst", "downtime", "slice p99", "max", "resident before"]
    lines = [
        [
            row.pair,
            row.way,
            row.memory,
            row.pages,
            str(row.runs),
            f"{row.bytes_per_s / 1e9:.2f}",
            f"{row.bytes_per_s_min / 1e9:.2f}-{row.bytes_per_s_max / 1e9:.2f}",
            f"{row.cpu_source_s_per_gib:.2f}",
            f"{row.cpu_destination_s_per_gib:.2f}",
            f"{row.cpu_s_per_gib:.2f}",
            f"{row.load:.1f}",
            f"{row.extra_memory_source_bytes / MIB:.0f} MiB",
            f"{row.extra_memory_destination_bytes / MIB:.0f} MiB",
            number(row.downtime_ms, 1, "ms"),
            number(row.slice_p99_ms, 1, "ms"),
            number(row.slice_max_ms, 1, "ms"),
            f"{100 * row.resident_at_start_bytes / row.size_bytes:.0f} %",
        ]
        for row in rows
    ]
    return format_table([head, *lines], left=4)
