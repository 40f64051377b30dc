"""The command line of the benchmarks."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import click
import trio

from bench.cancel import Cancelled, cancel_table, prepare_guest, run_points, summarise
from bench.errors import BenchError
from bench.figures import PAIRS, make_rows, make_verdicts, rows_table, verdicts_table
from bench.measure import machine
from bench.memory import MEMORY_KINDS, PAGE_PATTERNS, parse_size
from bench.parking import rows as parking_rows
from bench.parking import run as run_parking
from bench.parking import table as parking_table
from bench.postcopy import rows
from bench.postcopy import run as run_postcopy
from bench.postcopy import table as postcopy_table
from bench.precopy import Outcome, Plan, run_plan
from bench.qemu import find_qemu
from bench.transports import TRANSPORTS, table
from bench.transports import run as run_transports


class Size(click.ParamType[int]):
    """256M, 1G or bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except BenchError as exc:
            self.fail(str(exc), param, ctx)


class Names(click.ParamType[tuple[str, ...]]):
    """A comma-separated choice of names, each once."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r} is not one of {', '.join(self._known)}", param, ctx)
        return names


@click.group()
def main() -> None:
    """Measure trimig beside QEMU and a raw socket, in one run."""


@main.command()
@click.option("--size", type=Size(), default="1G", show_default=True, help="Guest RAM: 256M, 1G, …")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds.")
@click.option(
    "--memory",
    "memories",
    type=Names(tuple(MEMORY_KINDS)),
    default="memfd-cold,memfd-populated",
    show_default=True,
    help=f"Destination memory, of {', '.join(MEMORY_KINDS)}.",
)
@click.option(
    "--pages",
    type=Names(PAGE_PATTERNS),
    default="random,zero",
    show_default=True,
    help="random; zero: 1/16 random, the rest written with zeros; absent: the rest never touched.",
)
@click.option("--pairs", type=Names(PAIRS), default=",".join(PAIRS), show_default=True, help="What to compare.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
@click.option("--qemu", "qemu_path", help="The QEMU to use (else qemu-system-x86_64 of PATH).")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the memory after each run.")
@click.option("--timeout", type=click.FloatRange(min=1), default=300.0, show_default=True, help="Seconds for one run.")
def precopy(
    size: int,
    repeat: int,
    memories: tuple[str, ...],
    pages: tuple[str, ...],
    pairs: tuple[str, ...],
    json_file: Path | None,
    qemu_path: str | None,
    verify: bool,
    timeout: float,
) -> None:
    """Throughput, CPU time, memory and downtime of a precopy migration, for each pair of ends.

    The interval lasts from the start command to the source until both sides report completion, by CLOCK_MONOTONIC, the
    same for every pair. The source's memory is always a populated memfd.
    """
    plan = Plan(
        size=size,
        repeat=repeat,
        memories=memories,
        pages=pages,
        pairs=pairs,
        qemu=find_qemu(qemu_path),
        verify=verify,
        timeout=timeout,
    )
    outcome = trio.run(run_plan, plan, _progress)
    _print(plan, outcome)
    if json_file is not None:
        write_json(json_file, as_json(plan, outcome))
    if outcome.failed:
        sys.exit(1)


@main.command()
@click.option("--points", type=click.IntRange(min=1), default=50, show_default=True, help="Migrations to cancel.")
@click.option("--size", type=Size(), default="256M", show_default=True, help="Guest RAM.")
@click.option("--seed", type=int, default=1, show_default=True, help="Chooses the points.")
@click.option("--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Seconds for it all.")
def cancel(points: int, size: int, seed: int, timeout: float) -> None:
    """The time from cancel to "guest runs again", over many points of a migration."""

    async def limited() -> Cancelled:
        with trio.fail_after(timeout):
            return await run_points(guest, size, points, seed, _progress)

    guest = prepare_guest(size)
    try:
        result = trio.run(limited)
    except (BenchError, trio.TooSlowError) as exc:
        raise click.ClickException(str(exc) or f"not done after {timeout:g} s") from exc
    print(
        f"\n{size >> 20} MiB of random pages; undisturbed: {result.total_s * 1000:.0f} ms, "
        f"guest stopped after {result.stopped_after_s * 1000:.0f} ms; seed {seed}\n"
    )
    if result.points:
        print(cancel_table(summarise(result.points)))
    print(f"too late, the decision to hand over had been sent: {result.too_late} more")


@main.command()
@click.option("--size", type=Size(), default="256M", show_default=True, help="Guest RAM.")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds.")
@click.option(
    "--transports",
    "names",
    type=Names(TRANSPORTS),
    default=",".join(TRANSPORTS),
    show_default=True,
    help="What to compare.",
)
@click.option("--timeout", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Seconds for one run.")
def transports(size: int, repeat: int, names: tuple[str, ...], timeout: float) -> None:
    """Throughput of trimig to trimig over each transport, side by side."""
    found = trio.run(run_transports, names, size, repeat, timeout, _progress)
    print(f"\n{size >> 20} MiB of random pages into populated memory, medians of {repeat} interleaved rounds\n")
    print(table(found))
    if not all(found.values()):
        sys.exit(1)


@main.command()
@click.option("--size", type=Size(), default="256M", show_default=True, help="Guest RAM of the rows without a limit.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
@click.option("--qemu", "qemu_path", help="The QEMU to use (else qemu-system-x86_64 of PATH).")
@click.option("--timeout", type=click.FloatRange(min=1), default=200.0, show_default=True, help="Seconds for one run.")
def postcopy(size: int, repeat: int, json_file: Path | None, qemu_path: str | None, timeout: float) -> None:
    """How long a guest waits for its pages in postcopy, with and without a limit; downtime and time."""
    qemu = find_qemu(qemu_path)
    found = rows(trio.run(run_postcopy, size, repeat, qemu, timeout, _progress))
    print(f"\n{size >> 20} MiB (24 MiB under the limit), medians of {repeat} interleaved rounds\n")
    print(postcopy_table(found))
    if qemu is None:
        print("not measured: qemu-qemu, there is no QEMU")
    if json_file is not None:
        write_json(json_file, {"rows": found, "machine": machine()})


class Sizes(click.ParamType[tuple[int, ...]]):
    """Several sizes, separated by commas."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(parse_size(part.strip()) for part in value.split(","))
        except BenchError as exc:
            self.fail(str(exc), param, ctx)


@main.command()
@click.option("--sizes", type=Sizes(), default="256M,1G,4G", show_default=True, help="Guest RAM.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default="/tmp",
    show_default=True,
    help="Where the guest is saved: the disk counts.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
@click.option("--qemu", "qemu_path", help="The QEMU to use (else qemu-system-x86_64 of PATH).")
@click.option("--timeout", type=click.FloatRange(min=1), default=200.0, show_default=True, help="Seconds for one run.")
def parking(
    sizes: tuple[int, ...], repeat: int, directory: Path, json_file: Path | None, qemu_path: str | None, timeout: float
) -> None:
    """How long a QEMU's guest is stopped while it is parked in a file."""
    qemu = find_qemu(qemu_path)
    if qemu is None:
        raise click.ClickException("there is no QEMU here; --qemu names one")
    found = parking_rows(trio.run(run_parking, sizes, repeat, qemu, directory, timeout, _progress))
    print(f"\nmedians of {repeat} interleaved rounds; files in {directory}\n")
    print(parking_table(found))
    if json_file is not None:
        write_json(json_file, {"rows": found, "machine": machine()})


def as_json(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The document of ``--json``."""
    rows = make_rows(outcome.measurements)
    return {
        "rows": [row.as_json() for row in rows],
        "ratios": [verdict.as_json() for verdict in make_verdicts(rows)],
        "skipped": [dataclasses.asdict(left) for left in outcome.skipped],
        "failed": [dataclasses.asdict(left) for left in outcome.failed],
        "plan": dataclasses.asdict(plan),
        "machine": machine(),
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write the whole document under its name, or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise click.ClickException(f"the figures cannot be written to {path}: {exc.strerror}") from exc


def _print(plan: Plan, outcome: Outcome) -> None:
    host = ", ".join(f"{name} {value}" for name, value in machine().items())
    print(f"\n{plan.size >> 20} MiB of guest RAM, medians of {plan.repeat} interleaved rounds; {host}\n")
    rows = make_rows(outcome.measurements)
    if rows:
        print(rows_table(rows))
    verdicts = make_verdicts(rows)
    if verdicts:
        print(f"\nFigures to reach:\n{verdicts_table(verdicts)}")
    for left in outcome.skipped:
        print(f"not measured: {left.pair} {left.memory} {left.pages}: {left.reason}")
    for left in outcome.failed:
        print(f"FAILED: round {left.round} {left.pair} {left.memory} {left.pages}: {left.reason}")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(prog_name="python -m bench")
