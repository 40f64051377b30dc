"""``python -m bench postcopy``: how long a guest waits for a missing page, and the cost of the switch.

The guest of trimig is a workload whose worker records the time of each touch of a missing page. A QEMU has no processor
here (``-M none``), so its monitor touches the memory: ``xp`` reads a page, and waits as a processor would. The time for
a present page is subtracted. Both count the touches that had to wait. Each pair runs with one connection and with
postcopy-preempt's second one, without a limit and with 1 MiB/s for the pages without a request. Under the limit the
rounds end after a number of faults, because the rest would take minutes.

Processor time is that of both sides from the command to the end of the migration (of a QEMU under the limit: to the
last touch), without the guest's own worker.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import trio

from bench.child import start_python_child
from bench.errors import BenchError, first_error
from bench.figures import GIB
from bench.goals import Verdict, judge
from bench.load import LoadLog
from bench.measure import CpuClocks, percentile
from bench.memory import MEMORY_KINDS
from bench.programs import QemuProgram
from bench.qemu import QemuSide, open_qemu_side
from bench.sides import Setup
from bench.table import format_table
from bench.table import number as number_text

#: Bytes per second of the limited rows.
CAP: Final = 1 << 20
#: Guest RAM of the limited rows.
CAPPED_SIZE: Final = 24 << 20
#: A touch that took this much longer than a touch of a present page has waited.
WAITED_S: Final = 20e-6
#: Touches of a QEMU's memory under the limit, where each takes about 100 ms.
_CAPPED_TOUCHES: Final = 40
_PAGE: Final = 4096
#: The suffix of the name of a pair.
PREEMPT: Final = " preempt"
PRECOPY: Final = " precopy"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One migration. Times in ms; None for values that were not measured."""

    pair: str
    cap: int
    faults: int
    fault_median_ms: float | None
    fault_p99_ms: float | None
    downtime_ms: float | None
    total_s: float | None
    bytes_per_s: float | None
    size: int = GIB
    #: Processor seconds of the source and of the destination.
    cpu: tuple[float, float] = (0.0, 0.0)
    #: The load average at the end.
    load: float = 0.0
    #: Waits for the interpreter lock of the source and of the destination, see :mod:`bench.lockwait`; empty if not measured.
    lock: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {})


async def trimig_run(
    size: int, cap: int, *, postcopy: bool = True, preempt: bool = False, lock: bool = False
) -> Result:
    """One migration from trimig to trimig. BenchError if it fails, or if the guest finds a wrong page.

    Args:
        preempt: with a second connection for requested pages.
        lock: measure the waits for the interpreter lock, which costs time.

    **Cancellation:** the processes of both sides are killed.
    """
    found: list[Result] = []
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            found.append(await _trimig_run(nursery, size, cap, postcopy=postcopy, preempt=preempt, lock=lock))
            nursery.cancel_scope.cancel("measured")
    except* BenchError as group:
        raise first_error(group) from None
    return found[0]


async def _trimig_run(
    nursery: trio.Nursery, size: int, cap: int, *, postcopy: bool, preempt: bool, lock: bool
) -> Result:
    names = (*(("postcopy-ram",) if postcopy else ()), *(("postcopy-preempt",) if preempt else ()))
    # Nearly all pages are left to postcopy, as with QEMU, which switches to postcopy at once.
    parameters = ["max-bandwidth=0"]
    if postcopy:
        parameters = [f"max-postcopy-bandwidth={cap}", f"max-bandwidth={64 << 20}", "downtime-limit=0"]
    how = {"capabilities": names, "parameters": parameters}
    rate = 4 << 20 if postcopy else 0
    words = [str(size), str(rate), "lock" if lock else "plain"]
    source, destination = [
        await start_python_child(nursery, f"trimig {role}", "bench.workload_side", [role, *words])
        for role in ("source", "destination")
    ]
    for side in (source, destination):
        await side.answer("ready")
    await destination.send({"do": "listen", "at": "tcp:127.0.0.1:0", **how})
    uri = await destination.answer("listening")
    clocks = CpuClocks(source.pid, destination.pid)
    clocks.start()
    await source.send({"do": "migrate", "uri": uri, **how, **({"postcopy_after": 0.01} if postcopy else {})})
    for side in (source, destination):
        await side.answer("finished")
    here, there = clocks.read()
    for side in (source, destination):
        await side.send({"do": "report"})
    gave, got = [await side.answer("report") for side in (source, destination)]
    if postcopy and "faults" not in got:
        raise BenchError("the guest was moved in precopy, before the switch to postcopy")
    await destination.send({"do": "verify"})
    proof = await destination.receive()
    if not proof.get("verified"):
        raise BenchError(f"the guest is not what it was: {proof.get('text', proof.get('failed'))}")
    return Result(
        pair=f"trimig-trimig{PREEMPT if preempt else '' if postcopy else PRECOPY}",
        cap=cap,
        faults=got.get("faults", 0),
        fault_median_ms=got.get("fault_median_ms"),
        fault_p99_ms=got.get("fault_p99_ms"),
        downtime_ms=gave["downtime_ms"],
        total_s=gave["total_s"],
        bytes_per_s=size / gave["total_s"],
        size=size,
        cpu=(here, there),
        lock=(gave["lock"], got["lock"]),
    )


async def qemu_run(size: int, cap: int, qemu: QemuProgram, *, preempt: bool = False) -> Result:
    """One migration from QEMU to QEMU. BenchError.

    Args:
        preempt: as for :func:`trimig_run`.

    **Cancellation:** both QEMUs are killed.
    """
    found: list[Result] = []
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            found.append(await _qemu_run(nursery, size, cap, qemu, preempt=preempt))
            nursery.cancel_scope.cancel("measured")
    except* BenchError as group:
        raise first_error(group) from None
    return found[0]


async def _qemu_run(nursery: trio.Nursery, size: int, cap: int, qemu: QemuProgram, *, preempt: bool) -> Result:
    setup = Setup(size=size, memory=MEMORY_KINDS["memfd-cold"], pages="random", qemu=qemu)
    source = await open_qemu_side(nursery, "source", setup)
    destination = await open_qemu_side(nursery, "destination", setup)
    for side in (source, destination):
        await side.turn_on("postcopy-ram", *(("postcopy-preempt",) if preempt else ()))
    await source.command(
        "migrate-set-parameters", {"max-bandwidth": 64 << 20, "max-postcopy-bandwidth": cap, "downtime-limit": 0}
    )
    uri = await destination.listen()
    clocks = CpuClocks(source.pid, destination.pid)
    clocks.start()
    await source.command("migrate", {"uri": uri})
    await source.command("migrate-start-postcopy")
    begun = ("postcopy-active", "completed")
    while (await destination.command("query-migrate")).get("status") not in begun:  # noqa: ASYNC110 - another process
        await trio.sleep(0.001)
    touches = await _touch(destination, size, _CAPPED_TOUCHES if cap else 100_000)
    seconds = None
    if not cap:
        while (answer := await source.command("query-migrate"))["status"] != "completed":
            if answer["status"] == "failed":
                raise BenchError(f"QEMU: {answer.get('error-desc', 'failed')}")
            await trio.sleep(0.001)
        seconds = answer["total-time"] / 1000
        downtime = answer["downtime"]
    else:
        downtime = (await source.command("query-migrate")).get("downtime", 0)
    here, there = clocks.read()
    waits = [touch * 1000 for touch in touches if touch > WAITED_S]
    return Result(
        pair=f"qemu-qemu{PREEMPT if preempt else ''}",
        cap=cap,
        faults=len(waits),
        fault_median_ms=statistics.median(waits) if waits else None,
        fault_p99_ms=percentile(waits, 99) if waits else None,
        # QEMU 7.2 reports no valid downtime for a guest without processors.
        downtime_ms=downtime if 0 < downtime < 1e6 else None,
        total_s=seconds,
        bytes_per_s=size / seconds if seconds else None,
        size=size,
        cpu=(here, there),
    )


async def _touch(side: QemuSide, size: int, limit: int) -> list[float]:
    """The extra seconds over a present page, for each page that is touched while memory arrives."""

    async def touch(page: int) -> float:
        began = time.perf_counter()
        await side.command("human-monitor-command", {"command-line": f"xp /1xb {page * _PAGE:#x}"})
        return time.perf_counter() - began

    chosen = random.Random(size).sample(range(size // _PAGE), min(limit, size // _PAGE // 2))
    await touch(chosen[0])
    usual = statistics.median([await touch(chosen[0]) for _ in range(20)])
    found = []
    for number, page in enumerate(chosen[1:]):
        if number % 8 == 0 and (await side.command("query-migrate")).get("status") == "completed":
            break
        found.append(max(0.0, await touch(page) - usual))
    return found


async def run(
    size: int,
    repeat: int,
    qemu: QemuProgram | None,
    timeout: float,
    progress: Callable[[str], None],
    loads: LoadLog,
) -> list[Result]:
    """All runs, interleaved; a failed run is reported and left out."""
    results: list[Result] = []
    for number in range(repeat):
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("trimig-trimig precopy", lambda: trimig_run(size, 0, postcopy=False)),
            ("trimig-trimig", lambda: trimig_run(size, 0)),
            ("trimig-trimig preempt", lambda: trimig_run(size, 0, preempt=True)),
            ("trimig-trimig, 1 MiB/s", lambda: trimig_run(CAPPED_SIZE, CAP)),
            ("trimig-trimig preempt, 1 MiB/s", lambda: trimig_run(CAPPED_SIZE, CAP, preempt=True)),
        ]
        if qemu is not None:
            calls += [
                ("qemu-qemu", lambda: qemu_run(size, 0, qemu)),
                ("qemu-qemu preempt", lambda: qemu_run(size, 0, qemu, preempt=True)),
                ("qemu-qemu, 1 MiB/s", lambda: qemu_run(CAPPED_SIZE, CAP, qemu)),
                ("qemu-qemu preempt, 1 MiB/s", lambda: qemu_run(CAPPED_SIZE, CAP, qemu, preempt=True)),
            ]
        for name, call in calls:
            try:
                with trio.fail_after(timeout):
                    result = await call()
            except (BenchError, trio.TooSlowError) as error:
                progress(f"round {number + 1}/{repeat} {name}: FAILED: {str(error) or 'not done in time'}")
                continue
            load = loads.read()
            results.append(dataclasses.replace(result, load=load))
            median = number_text(result.fault_median_ms, 2, "ms")
            progress(f"round {number + 1}/{repeat} {name}: {result.faults} faults, median {median}, load {load:.1f}")
    return results


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Medians of the runs of each pair and limit."""
    found = []
    for pair, cap in dict.fromkeys((r.pair, r.cap) for r in results):
        mine = [r for r in results if (r.pair, r.cap) == (pair, cap)]
        row: dict[str, Any] = {"pair": pair, "cap": cap, "runs": len(mine)}
        for field in ("faults", "fault_median_ms", "fault_p99_ms", "downtime_ms", "total_s", "bytes_per_s"):
            values = [value for r in mine if (value := getattr(r, field)) is not None]
            row[field] = statistics.median(values) if values else None
        for side, name in enumerate(("cpu_source_s_per_gib", "cpu_destination_s_per_gib")):
            row[name] = statistics.median(r.cpu[side] * GIB / r.size for r in mine)
        row["load"] = max(r.load for r in mine)
        found.append(row)
    return found


async def lock_table(size: int, repeat: int, timeout: float) -> str:
    """The longest waits for the interpreter lock while the guest runs on memory that is still coming, as text. BenchError.

    **Cancellation:** the processes are killed.
    """
    lines = [["pair", "side", "samples", "median", "99 %", "longest", "above 1 ms"]]
    for preempt in (False, True):
        for _ in range(repeat):
            with trio.fail_after(timeout):
                result = await trimig_run(size, 0, preempt=preempt, lock=True)
            for side, waits in zip(("source", "destination"), result.lock, strict=True):
                if waits:
                    times = [number_text(waits[name], 2, "ms") for name in ("median_ms", "p99_ms", "max_ms")]
                    lines.append([result.pair, side, str(waits["samples"]), *times, str(waits["above_1_ms"])])
    return format_table(lines, left=2)


def table(found: Sequence[dict[str, Any]]) -> str:
    """The table as text. Processor time is in seconds for each GiB of guest RAM."""
    lines = [["pair", "limit", "runs", "faults", "median", "99 %", "downtime", "GB/s", "CPU src", "CPU dst", "load"]]
    for row in found:
        speed = None if row["bytes_per_s"] is None or row["cap"] else row["bytes_per_s"] / 1e9
        lines.append(
            [
                row["pair"],
                f"{row['cap'] >> 20} MiB/s" if row["cap"] else "none",
                str(row["runs"]),
                number_text(row["faults"], 0),
                number_text(row["fault_median_ms"], 2, "ms"),
                number_text(row["fault_p99_ms"], 2, "ms"),
                number_text(row["downtime_ms"], 2, "ms"),
                number_text(speed, 2),
                f"{row['cpu_source_s_per_gib']:.2f}",
                f"{row['cpu_destination_s_per_gib']:.2f}",
                f"{row['load']:.1f}",
            ]
        )
    return format_table(lines, left=1)


#: A name in :mod:`bench.goals`, two rows (the pair and its limit), and the member to divide.
_RATIOS: Final = (
    ("fault-preempt", (f"trimig-trimig{PREEMPT}", 0), (f"qemu-qemu{PREEMPT}", 0), "fault_median_ms"),
    ("fault-limited", ("trimig-trimig", CAP), ("qemu-qemu", CAP), "fault_median_ms"),
    ("fault-limited", (f"trimig-trimig{PREEMPT}", CAP), (f"qemu-qemu{PREEMPT}", CAP), "fault_median_ms"),
    ("postcopy-time", ("trimig-trimig", 0), (f"trimig-trimig{PRECOPY}", 0), "total_s"),
    ("postcopy-time", (f"trimig-trimig{PREEMPT}", 0), (f"trimig-trimig{PRECOPY}", 0), "total_s"),
)


def verdicts(found: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The figures to reach for which there are rows."""
    by = {(row["pair"], row["cap"]): row for row in found}
    judged = []
    if (plain := by.get(("trimig-trimig", 0))) is not None:
        for key, member in (("fault", "fault_median_ms"), ("fault-p99", "fault_p99_ms")):
            if plain[member] is not None:
                judged.append(judge(key, plain[member], "trimig-trimig"))
    for key, one, other, member in _RATIOS:
        if one in by and other in by and by[one][member] and by[other][member]:
            judged.append(judge(key, by[one][member] / by[other][member], f"{one[0]} / {other[0]}"))
    return judged
