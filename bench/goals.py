"""The figures to reach, with the least value and the goal of each: one table for all benchmarks.

A benchmark judges the figures that it has measured (:func:`judge`), prints its own verdicts, and writes them into the
document of ``--json``. ``python -m bench goals FILE...`` puts the verdicts of several documents into one table, in
which a figure without a value is shown as not measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.errors import BenchError
from bench.table import format_table


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One figure to reach."""

    key: str
    what: str
    #: "" for a ratio.
    unit: str = ""
    floor: float
    goal: float
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A measured value of a figure."""

    goal: Goal
    value: float
    #: The conditions of the value, or the row that decided it.
    where: str = ""

    @property
    def result(self) -> str:
        """``"goal"``, ``"floor"`` or ``"below"`` (neither)."""
        sign = 1 if self.goal.higher_is_better else -1
        if sign * self.value >= sign * self.goal.goal:
            return "goal"
        return "floor" if sign * self.value >= sign * self.goal.floor else "below"

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.goal), "value": self.value, "where": self.where, "result": self.result}


def _ms(key: str, what: str, floor: float, goal: float) -> Goal:
    return Goal(key=key, what=what, unit="ms", floor=floor, goal=goal, higher_is_better=False)


def _most(key: str, what: str, floor: float, goal: float) -> Goal:
    return Goal(key=key, what=what, floor=floor, goal=goal, higher_is_better=False)


def _least(key: str, what: str, floor: float, goal: float) -> Goal:
    return Goal(key=key, what=what, floor=floor, goal=goal)


#: In the order of the table. A figure with "CPU" compares the processor time of both sides, another ratio the wall clock.
GOALS: Final[tuple[Goal, ...]] = (
    _least("populated-cpu", "populated, CPU: QEMU-QEMU / trimig-trimig", 1.2, 1.4),
    _least("populated", "populated: trimig-trimig / QEMU-QEMU", 1.15, 1.35),
    _least("raw", "populated: trimig-trimig / raw copy", 0.80, 0.92),
    _least("cold", "cold: trimig-trimig / QEMU-QEMU", 1.7, 2.0),
    _least("from-qemu", "populated: QEMU-trimig / QEMU-QEMU", 1.2, 1.35),
    _least("from-qemu-cold", "cold: QEMU-trimig / QEMU-QEMU", 1.8, 2.0),
    _least("to-qemu", "populated: trimig-QEMU / QEMU-QEMU", 1.2, 1.35),
    _least("zero", "mostly zero, populated: trimig-trimig / QEMU-QEMU", 1.0, 1.2),
    _least("zero-cold", "mostly zero, cold: trimig-trimig / QEMU-QEMU", 5.0, 6.0),
    _least("multifd-cpu", "multifd, 2 channels, CPU: QEMU-QEMU / trimig-trimig", 1.15, 1.3),
    _least("multifd", "multifd, 2 channels: trimig-trimig / QEMU-QEMU", 1.0, 1.2),
    _least("unix-cpu", "trimig-trimig, CPU: tcp / unix", 1.2, 1.35),
    _least("ws", "trimig-trimig: ws / tcp", 0.45, 0.6),
    _least("tls", "trimig-trimig over TLS / raw copy over TLS", 0.75, 0.9),
    _ms("fault", "postcopy, no limit: wait for a page, median", 0.4, 0.2),
    _ms("fault-p99", "postcopy, no limit: wait for a page, 99 %", 3.0, 1.0),
    _most("fault-preempt", "postcopy-preempt: wait for a page, median, trimig / QEMU", 1.0, 0.5),
    _most("fault-limited", "postcopy, 1 MiB/s: wait for a page, median, trimig / QEMU", 0.05, 0.02),
    _most("postcopy-time", "time, postcopy / precopy", 1.25, 1.1),
    _ms("cancel", "cancel until the guest runs, 99 %, worst status", 10.0, 5.0),
    _ms("slice-p99", "run loop held by one slice, 99 %, worst pair", 2.0, 1.0),
    _ms("slice-worst", "run loop held by one slice, longest, worst pair", 5.0, 2.0),
    _ms("scale", "200 migrations at once: downtime, median", 60.0, 30.0),
    Goal(
        key="memory",
        what="memory above the guest's, worst trimig side",
        unit="MiB",
        floor=64.0,
        goal=32.0,
        higher_is_better=False,
    ),
    _most("xbzrle-bytes", "1 Gbit/s, busy guest, xbzrle: bytes, trimig / QEMU 7.2", 1.0, 1.0),
    _most("xbzrle-downtime", "1 Gbit/s, busy guest, xbzrle: downtime, trimig / QEMU 7.2", 1.0, 1.0),
    _most("zstd-bytes", "1 Gbit/s, busy guest, multifd zstd: bytes, trimig / QEMU 11.1", 1.0, 1.0),
    _most("zstd-downtime", "1 Gbit/s, busy guest, multifd zstd: downtime, trimig / QEMU 11.1", 1.0, 1.0),
    _ms("parking", "pause of an idle guest that is parked in a file", 300.0, 50.0),
)

_BY_KEY: Final = {goal.key: goal for goal in GOALS}


def judge(key: str, value: float, where: str = "") -> Verdict:
    """The verdict on a value of the figure *key*."""
    return Verdict(goal=_BY_KEY[key], value=value, where=where)


def verdicts_table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as text; empty if there are none."""
    lines = [_line(verdict.goal, verdict) for verdict in verdicts]
    return _table(lines) if lines else ""


def complete_table(verdicts: Sequence[Verdict]) -> str:
    """Every figure to reach, in the order of GOALS; one without a verdict is "not measured"."""
    lines = []
    for goal in GOALS:
        mine = [verdict for verdict in verdicts if verdict.goal.key == goal.key]
        lines += [_line(goal, verdict) for verdict in mine] or [_line(goal, None)]
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return format_table([["figure", "where", "reached", "at least", "goal", "result"], *lines], left=2)


def _line(goal: Goal, verdict: Verdict | None) -> list[str]:
    unit = f" {goal.unit}" if goal.unit else ""
    least = ">=" if goal.higher_is_better else "<="
    limits = [f"{least} {goal.floor:g}{unit}", f"{least} {goal.goal:g}{unit}"]
    if verdict is None:
        return [goal.what, "", "-", *limits, "not measured"]
    return [goal.what, verdict.where, f"{verdict.value:.2f}{unit}", *limits, verdict.result]


def verdicts_of(document: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts in a document of ``--json``; figures that are no goal any more are left out."""
    found = document.get("verdicts", [])
    return [judge(one["key"], one["value"], one["where"]) for one in found if one["key"] in _BY_KEY]


def report(files: Sequence[Path]) -> str:
    """One table of the verdicts in *files*, and the load of each run.

    Raises:
        BenchError: a file cannot be read, or is no document of a benchmark.
    """
    verdicts: list[Verdict] = []
    runs = []
    for file in files:
        try:
            document = json.loads(file.read_text())
            verdicts += verdicts_of(document)
            load = document["load"]
            runs.append(f"{file.name}: {_load_text(load)}")
        except OSError as exc:
            raise BenchError(f"{file} cannot be read: {exc.strerror}") from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BenchError(f"{file} is not a document that --json of a benchmark has written") from exc
    return "\n".join([complete_table(verdicts), "", *runs])


def _load_text(load: Mapping[str, Any]) -> str:
    if "most" not in load:
        return "the load was not read"
    return (
        f"{'quiet' if load['quiet'] else 'NOT quiet'}, load {load['before']:.2f} before it, {load['most']:.2f} at most"
    )
