"""Turns single runs into medians, ratios against the figures to reach, tables and JSON. Pure arithmetic.

Throughput is guest RAM bytes over the interval, whatever went over the wire. So a guest of zero pages can have more
than the socket could carry.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.measure import Slices, Usage

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
    """The medians of all runs of one pair with one memory and one content; None: not measurable here."""

    pair: str
    memory: str
    pages: str
    runs: int
    size_bytes: int
    bytes_per_s: float
    bytes_per_s_min: float
    bytes_per_s_max: float
    cpu_s_per_gib: float
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
    """Group by pair, memory and pages, and compute medians; the rows keep the order of first appearance."""
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.memory, one.pages, one.pair), []).append(one)
    rows = [_row(group) for group in groups.values()]
    order = {key[:2]: at for at, key in reversed(list(enumerate(groups)))}
    return sorted(rows, key=lambda row: (order[row.memory, row.pages], PAIRS.index(row.pair)))


def _row(group: Sequence[Measurement]) -> Row:
    first = group[0]
    speeds = [one.size / one.seconds for one in group]
    return Row(
        pair=first.pair,
        memory=first.memory,
        pages=first.pages,
        runs=len(group),
        size_bytes=first.size,
        bytes_per_s=statistics.median(speeds),
        bytes_per_s_min=min(speeds),
        bytes_per_s_max=max(speeds),
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
class Verdict:
    """One figure to reach, and the measured value."""

    what: str
    memory: str
    pages: str
    value: float
    unit: str
    floor: float
    goal: float
    higher_is_better: bool = True

    @property
    def result(self) -> str:
        """``"goal"``, ``"floor"`` or ``"below"`` (neither)."""
        sign = 1 if self.higher_is_better else -1
        if sign * self.value >= sign * self.goal:
            return "goal"
        return "floor" if sign * self.value >= sign * self.floor else "below"

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "result": self.result}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RatioGoal:
    """At least *floor*, better *goal*, for the throughput of one pair over another's in the same conditions."""

    over: str
    under: str
    pages: str
    floor: float
    goal: float
    applies: Callable[[str], bool] = lambda memory: True


def _populated(memory: str) -> bool:
    return memory.endswith("-populated")


def _cold(memory: str) -> bool:
    return not _populated(memory)


RATIO_GOALS = (
    RatioGoal(over="trimig-trimig", under="qemu-qemu", pages="random", floor=1.2, goal=1.5, applies=_populated),
    RatioGoal(over="trimig-trimig", under="qemu-qemu", pages="random", floor=1.5, goal=2.0, applies=_cold),
    RatioGoal(over="trimig-trimig", under="raw", pages="random", floor=0.8, goal=0.9),
    RatioGoal(over="qemu-trimig", under="qemu-qemu", pages="random", floor=1.3, goal=1.6),
    RatioGoal(over="trimig-qemu", under="qemu-qemu", pages="random", floor=0.95, goal=1.0),
    RatioGoal(over="trimig-trimig", under="qemu-qemu", pages="zero", floor=1.0, goal=2.0),
    RatioGoal(over="trimig-trimig", under="qemu-qemu", pages="absent", floor=1.0, goal=2.0),
)

EXTRA_MEMORY_MIB = (64.0, 32.0)
SLICE_P99_MS = (5.0, 2.0)


def make_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every figure to reach for which these rows have the data."""
    by_key = {(row.pair, row.memory, row.pages): row for row in rows}
    verdicts: list[Verdict] = []
    for ratio in RATIO_GOALS:
        for memory in dict.fromkeys(row.memory for row in rows):
            over = by_key.get((ratio.over, memory, ratio.pages))
            under = by_key.get((ratio.under, memory, ratio.pages))
            if over is not None and under is not None and ratio.applies(memory):
                verdicts.append(
                    Verdict(
                        what=f"{ratio.over} / {ratio.under}",
                        memory=memory,
                        pages=ratio.pages,
                        value=over.bytes_per_s / under.bytes_per_s,
                        unit="ratio",
                        floor=ratio.floor,
                        goal=ratio.goal,
                    )
                )
    memory_rows = [(row, row.extra_memory_trimig_bytes) for row in rows]
    slice_rows = [(row, row.slice_p99_ms) for row in rows]
    verdicts += _worst("memory above the guest's, trimig side", memory_rows, "MiB", EXTRA_MEMORY_MIB, MIB)
    verdicts += _worst("run loop held by one slice, p99", slice_rows, "ms", SLICE_P99_MS, 1)
    return verdicts


def _worst(
    what: str, values: Iterable[tuple[Row, float | None]], unit: str, limits: tuple[float, float], divisor: float
) -> list[Verdict]:
    known = [(value, row) for row, value in values if value is not None]
    if not known:
        return []
    value, row = max(known, key=lambda pair: pair[0])
    verdict = Verdict(
        what=f"{what} (worst: {row.pair})",
        memory=row.memory,
        pages=row.pages,
        value=value / divisor,
        unit=unit,
        floor=limits[0],
        goal=limits[1],
        higher_is_better=False,
    )
    return [verdict]


def rows_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ["pair", "memory", "pages", "runs", "GB/s", "(min-max)", "CPU s/GiB", "extra src", "extra dst"]
    head += ["downtime", "slice p99", "max", "resident before"]
    lines = [
        [
            row.pair,
            row.memory,
            row.pages,
            str(row.runs),
            f"{row.bytes_per_s / 1e9:.2f}",
            f"{row.bytes_per_s_min / 1e9:.2f}-{row.bytes_per_s_max / 1e9:.2f}",
            f"{row.cpu_s_per_gib:.2f}",
            f"{row.extra_memory_source_bytes / MIB:.0f} MiB",
            f"{row.extra_memory_destination_bytes / MIB:.0f} MiB",
            _known(row.downtime_ms, "ms"),
            _known(row.slice_p99_ms, "ms"),
            _known(row.slice_max_ms, "ms"),
            f"{100 * row.resident_at_start_bytes / row.size_bytes:.0f} %",
        ]
        for row in rows
    ]
    return format_table([head, *lines], left=3)


def verdicts_table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as text."""
    head = ["figure", "memory", "pages", "reached", "at least", "goal", "result"]
    lines = []
    for verdict in verdicts:
        least = ">=" if verdict.higher_is_better else "<="
        unit = "" if verdict.unit == "ratio" else f" {verdict.unit}"
        lines.append(
            [
                verdict.what,
                verdict.memory,
                verdict.pages,
                f"{verdict.value:.2f}{unit}",
                f"{least} {verdict.floor:g}{unit}",
                f"{least} {verdict.goal:g}{unit}",
                verdict.result,
            ]
        )
    return format_table([head, *lines], left=3)


def format_table(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns of equal width; the first *left* of them are aligned to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def one(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(one(line) for line in lines)


def _known(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f} {unit}"
