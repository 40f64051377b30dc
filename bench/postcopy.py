"""``python -m bench postcopy``: how long a guest waits for a missing page, and the cost of the switch.

trimig is measured by its own demo: two hosts, and a guest whose worker records the time of each touch of a missing
page. A QEMU has no processor here (``-M none``), so its monitor touches the memory: ``xp`` reads a page, and waits as a
processor would. The time for a present page is subtracted. Both count the touches that had to wait. Each pair runs with
one connection and with postcopy-preempt's second one, without a limit and with 1 MiB/s for the pages without a request.
Under the limit the rounds end after a number of faults, because the rest would take minutes.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from bench.child import JsonObject
from bench.errors import BenchError
from bench.measure import percentile
from bench.memory import MEMORY_KINDS
from bench.qemu import QemuSide, open_qemu_side
from bench.sides import Setup

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


async def trimig_run(size: int, cap: int, *, postcopy: bool = True, preempt: bool = False) -> Result:
    """One demo. BenchError if the demo's verification fails.

    Args:
        preempt: with a second connection for requested pages.

    **Cancellation:** the processes of the demo are killed.
    """
    command = [sys.executable, "-m", "trimig", "demo", "--json", "--size", str(size), "--hot", str(size)]
    command += ["--dirty-rate", "4M" if postcopy else "0"]
    if postcopy:
        command += ["--postcopy-after", "1%", "-p", f"max-postcopy-bandwidth={cap}"]
        command += ["-c", f"postcopy-preempt={'on' if preempt else 'off'}"]
        # Nearly all pages are left to postcopy, as with QEMU, which switches to postcopy at once.
        command += ["--bandwidth", "64M"]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    try:
        found: JsonObject = json.loads(done.stdout)
    except ValueError:
        raise BenchError(f"trimig demo: {done.stderr.decode()[-300:]}") from None
    if not found["verified"]:
        raise BenchError(f"trimig demo: {found['error']}")
    seconds = found["total_ms"] / 1000
    return Result(
        pair=f"trimig-trimig{PREEMPT if preempt else '' if postcopy else PRECOPY}",
        cap=cap,
        faults=found.get("page_faults", 0),
        fault_median_ms=found.get("fault_median_ms"),
        fault_p99_ms=found.get("fault_p99_ms"),
        downtime_ms=found["downtime_ms"],
        total_s=seconds,
        bytes_per_s=size / seconds,
    )


async def qemu_run(size: int, cap: int, qemu: str, *, preempt: bool = False) -> Result:
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
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return found[0]


async def _qemu_run(nursery: trio.Nursery, size: int, cap: int, qemu: str, *, preempt: bool) -> Result:
    setup = Setup(size=size, memory=MEMORY_KINDS["memfd-cold"], pages="random", qemu=qemu)
    source = await open_qemu_side(nursery, "source", setup)
    destination = await open_qemu_side(nursery, "destination", setup)
    names = ("postcopy-ram", *(("postcopy-preempt",) if preempt else ()))
    on = {"capabilities": [{"capability": name, "state": True} for name in names]}
    for side in (source, destination):
        await side.command("migrate-set-capabilities", on)
    await source.command(
        "migrate-set-parameters", {"max-bandwidth": 64 << 20, "max-postcopy-bandwidth": cap, "downtime-limit": 0}
    )
    uri = await destination.listen()
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
    size: int, repeat: int, qemu: str | None, timeout: float, progress: Callable[[str], None]
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
            results.append(result)
            median = "-" if result.fault_median_ms is None else f"{result.fault_median_ms:.2f} ms"
            progress(f"round {number + 1}/{repeat} {name}: {result.faults} faults, median {median}")
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
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The table as text, with the figures to reach."""
    lines = [
        f"{'pair':<22} {'limit':>8} {'runs':>4} {'faults':>6} {'median':>9} {'99 %':>9} {'downtime':>9} {'GB/s':>5}"
    ]
    for row in found:
        limit = f"{row['cap'] >> 20} MiB/s" if row["cap"] else "none"
        median, p99 = (_ms(row[key]) for key in ("fault_median_ms", "fault_p99_ms"))
        speed = "-" if row["bytes_per_s"] is None or row["cap"] else f"{row['bytes_per_s'] / 1e9:.2f}"
        lines.append(
            f"{row['pair']:<22} {limit:>8} {row['runs']:>4} {row['faults']:>6.0f} {median:>9} {p99:>9} "
            f"{_ms(row['downtime_ms']):>9} {speed:>5}"
        )
    by = {(row["pair"], row["cap"]): row for row in found}
    lines += ["", "Figures to reach:"]
    for text, one, other, key, at_most in (
        *(
            (
                f"fault median{also}, {where}, trimig / QEMU",
                (f"trimig-trimig{also}", cap),
                (f"qemu-qemu{also}", cap),
                "fault_median_ms",
                most,
            )
            for also in ("", PREEMPT)
            for cap, where, most in ((0, "no limit", 1.0), (CAP, "1 MiB/s", 0.05))
        ),
        ("downtime, trimig / QEMU", ("trimig-trimig", 0), ("qemu-qemu", 0), "downtime_ms", 1.0),
        *(
            (
                f"time, postcopy{also} / precopy",
                (f"trimig-trimig{also}", 0),
                (f"trimig-trimig{PRECOPY}", 0),
                "total_s",
                1.25,
            )
            for also in ("", PREEMPT)
        ),
    ):
        if one in by and other in by and by[one][key] and by[other][key]:
            ratio = by[one][key] / by[other][key]
            word = "reached" if ratio <= at_most else "not reached"
            lines.append(f"{text}: {ratio:.3g}, at most {at_most:g}: {word}")
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"
