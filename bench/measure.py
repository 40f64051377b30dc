"""CPU time, memory and run-loop slices: how they are measured, for this process or another one.

CPU time is the kernel's per-process CPU clock (user and system, all threads, also ended ones), in nanoseconds. Any
process may read the clock of any other. ``/proc/PID/stat`` has the same figure in ticks of 10 ms.

Memory above the guest's: anonymous and shared memory of the process outside its guest RAM, at its peak during the
migration. It includes the data of interpreter and libraries, but not program text and other file mappings. There are
two readings, and the larger one counts:

- ``RssAnon`` of ``/proc/PID/status`` every 10 ms, if the guest's RAM is a memfd and so not in it;
- the high-water mark ``VmHWM``, reset at the start through ``/proc/PID/clear_refs``, less file mappings and less
  the resident part of the guest's RAM, by ``/proc/PID/smaps``. It misses no short peak, but uses the guest's RAM of
  the end.
"""

from __future__ import annotations

import array
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from bench.errors import BenchError

SAMPLE_INTERVAL = 0.010


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of *pid* since it started."""
    # CPUCLOCK_SCHED of a process, as clock_getcpuclockid(3) computes it; Python has no name for it.
    return time.clock_gettime((~pid << 3) | 2)


class CpuClocks:
    """The processor time of some processes over one interval."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._at_start: list[float] = []

    def start(self) -> None:
        """Begin the interval."""
        self._at_start = [cpu_seconds(pid) for pid in self._pids]

    def read(self) -> list[float]:
        """Seconds of each process since the start. The processes must still exist."""
        return [cpu_seconds(pid) - then for pid, then in zip(self._pids, self._at_start, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that at least *percent* % of all are not above."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """The needed values of one mapping in ``/proc/PID/smaps``."""

    start: int
    length: int
    resident: int
    path: str


def parse_smaps(text: str) -> list[Mapping]:
    """The readable and writable mappings in the text of a smaps file."""
    found: list[Mapping] = []
    head: list[str] | None = None
    for line in text.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            head = words if words[1].startswith("rw-") else None
        elif head is not None and words[0] == "Rss:":
            start, end = (int(number, 16) for number in head[0].split("-"))
            path = " ".join(head[5:])
            found.append(Mapping(start=start, length=end - start, resident=int(words[1]) * 1024, path=path))
    return found


def guest_mapping(pid: int, size: int, *, shared: bool) -> Mapping:
    """The mapping that holds the guest's RAM: the smallest of its kind that is large enough."""
    fitting = [
        mapping
        for mapping in parse_smaps(Path(f"/proc/{pid}/smaps").read_text())
        if mapping.length >= size and ("memfd:" in mapping.path) is shared
    ]
    if not fitting:
        raise BenchError(f"process {pid} has no mapping that could be its guest's RAM")
    return min(fitting, key=lambda mapping: mapping.length)


def parse_status(text: str) -> dict[str, int]:
    """The memory lines of a ``/proc/PID/status``, in bytes."""
    pairs = (line.split(":", 1) for line in text.splitlines() if line.startswith(("Vm", "Rss")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def memory_status(pid: int) -> dict[str, int]:
    """:func:`parse_status` of a running process."""
    return parse_status(Path(f"/proc/{pid}/status").read_text())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The resources that one side used between :meth:`Meter.start` and :meth:`Meter.stop`."""

    cpu_seconds: float
    #: Peak memory above the guest's, bytes; see the module's text.
    extra_memory: int
    #: The part of it above the usage at the start.
    extra_memory_growth: int
    #: Bytes of the guest's RAM that were resident at the start.
    resident_at_start: int


class Meter:
    """Measures one process over one interval.

    :meth:`prepare` and :meth:`finish` cost milliseconds and lie outside the interval; :meth:`start` and :meth:`stop`
    are a single clock reading each.
    """

    def __init__(self, pid: int, guest_size: int, *, shared: bool) -> None:
        self._pid = pid
        self._size = guest_size
        self._shared = shared
        self._peak_anonymous = 0
        self._extra_at_start = 0
        self._resident_at_start = 0
        self._cpu_start = 0.0
        self._cpu_stop = 0.0

    def prepare(self) -> None:
        """Read the guest's RAM, and reset the high-water mark."""
        self._resident_at_start = self._resident()
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        status = memory_status(self._pid)
        self._extra_at_start = self._extra(status, status["VmRSS"], self._resident_at_start)

    def start(self) -> None:
        self._cpu_start = cpu_seconds(self._pid)

    def sample(self) -> None:
        """Take one sample of the memory."""
        if self._shared:
            self._peak_anonymous = max(self._peak_anonymous, memory_status(self._pid)["RssAnon"])

    def stop(self) -> None:
        self._cpu_stop = cpu_seconds(self._pid)

    def finish(self) -> Usage:
        """Take the remaining readings. The process must still exist."""
        self.sample()
        status = memory_status(self._pid)
        resident = max(self._resident_at_start, self._resident())
        extra = max(self._peak_anonymous, self._extra(status, status["VmHWM"], resident))
        return Usage(
            cpu_seconds=self._cpu_stop - self._cpu_start,
            extra_memory=extra,
            extra_memory_growth=max(0, extra - self._extra_at_start),
            resident_at_start=self._resident_at_start,
        )

    def _resident(self) -> int:
        return min(self._size, guest_mapping(self._pid, self._size, shared=self._shared).resident)

    def _extra(self, status: dict[str, int], total: int, resident: int) -> int:
        return max(0, total - status["RssFile"] - resident)


async def sample_forever(meters: Sequence[Meter]) -> None:
    """Sample all *meters* every 10 ms, until cancelled."""
    while True:
        for meter in meters:
            meter.sample()
        await trio.sleep(SAMPLE_INTERVAL)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """How long the steps of trio tasks held the run loop, in milliseconds of wall time."""

    steps: int
    p99_ms: float
    max_ms: float


class SliceInstrument(trio.abc.Instrument):
    """Measures every task step, from the moment a task is resumed to the moment it yields.

    The time is wall time: a step during which the kernel ran something else counts in full, because other tasks waited
    for that long.
    """

    def __init__(self) -> None:
        self._began = 0
        self._durations = array.array("q")

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.perf_counter_ns()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        # The step that installs the instrument has no beginning.
        if self._began:
            self._durations.append(time.perf_counter_ns() - self._began)

    def slices(self) -> Slices | None:
        """The figures so far; None if no step was seen."""
        if not self._durations:
            return None
        return Slices(
            steps=len(self._durations),
            p99_ms=percentile(self._durations, 99) / 1e6,
            max_ms=max(self._durations) / 1e6,
        )


def thp_setting(name: str) -> str:
    """The kernel's choice in ``/sys/kernel/mm/transparent_hugepage/NAME``; "unknown" where there is none."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage", name).read_text()
    except OSError:
        return "unknown"
    chosen = [word.strip("[]") for word in text.split() if word.startswith("[")]
    return chosen[0] if chosen else "unknown"


def machine() -> dict[str, str | int]:
    """The conditions that the figures depend on, for the head of the table."""
    system = os.uname()
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": system.release,
        "machine": system.machine,
        "thp_anonymous": thp_setting("enabled"),
        "thp_shmem": thp_setting("shmem_enabled"),
    }
