"""The command line of the benchmarks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import trio

from bench import cancel as cancelling
from bench import encodings as encoding
from bench import image
from bench import parking as park
from bench import postcopy as post
from bench import scale as scaling
from bench import transports as transport
from bench.errors import BenchError
from bench.figures import PAIRS, make_rows, make_verdicts, rows_table
from bench.goals import Verdict, report, verdicts_table
from bench.load import LoadLog
from bench.measure import machine
from bench.memory import MEMORY_KINDS, PAGE_PATTERNS
from bench.options import (
    Counts,
    Size,
    Sizes,
    json_option,
    names_option,
    qemu_option,
    repeat_option,
    timeout_option,
)
from bench.precopy import Outcome, Plan, run_plan
from bench.programs import QemuProgram, find_qemu
from bench.shaped import Shape, open_link
from bench.ways import ENCODINGS, WAYS


@click.group()
def main() -> None:
    """Measure trimig beside QEMU and a raw socket, in one run."""


@main.command()
@click.option("--size", type=Size(), default="1G", show_default=True, help="Guest RAM: 256M, 1G, …")
@repeat_option(5)
@names_option("--memory", "memories", tuple(MEMORY_KINDS), "memfd-cold,memfd-populated", "Destination memory")
@names_option("--pages", "pages", PAGE_PATTERNS, "random,zero", "Contents of the source's memory")
@names_option("--ways", "ways", tuple(WAYS), "tcp", "Connections")
@names_option("--pairs", "pairs", PAIRS, ",".join(PAIRS), "What to compare")
@json_option
@qemu_option
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the memory after each run.")
@timeout_option(300.0)
def precopy(
    size: int,
    repeat: int,
    memories: tuple[str, ...],
    pages: tuple[str, ...],
    ways: tuple[str, ...],
    pairs: tuple[str, ...],
    json_file: Path | None,
    qemu_path: str | None,
    verify: bool,
    timeout: float,
) -> None:
    """Throughput, CPU time, memory and downtime of a precopy migration, for each pair of ends.

    The interval lasts from the start command to the source until both sides report completion, by CLOCK_MONOTONIC, the
    same for every pair. The source's memory is always a populated memfd. Contents: random; zero: 1/16 random, the rest
    written with zeros; absent: the rest never touched; eighth: 1/8 random, the rest never touched; image: binaries and
    text files of this system.
    """
    plan = Plan(
        size=size,
        repeat=repeat,
        memories=memories,
        pages=pages,
        pairs=pairs,
        ways=ways,
        qemu=_find(qemu_path),
        verify=verify,
        timeout=timeout,
    )
    with _image(size, needed="image" in pages):
        outcome = trio.run(run_plan, plan, _progress)
    _print_precopy(plan, outcome)
    if json_file is not None:
        write_json(json_file, as_json(plan, outcome))
    if outcome.failed:
        sys.exit(1)


@main.command()
@click.option("--points", type=click.IntRange(min=1), default=50, show_default=True, help="Points in each status.")
@click.option("--size", type=Size(), default="256M", show_default=True, help="Guest RAM.")
@names_option("--modes", "modes", tuple(cancelling.MODES), ",".join(cancelling.MODES), "Kinds of migrations")
@click.option("--seed", type=int, default=1, show_default=True, help="Chooses the points.")
@json_option
@click.option("--timeout", type=click.FloatRange(min=1), default=3600.0, show_default=True, help="Seconds for it all.")
def cancel(points: int, size: int, modes: tuple[str, ...], seed: int, json_file: Path | None, timeout: float) -> None:
    """The time from cancel to "guest runs again", in every status and mode."""
    loads = LoadLog()
    loads.read()

    async def limited() -> list[cancelling.Cancelled]:
        with trio.fail_after(timeout):
            return await cancelling.run(guest, size, modes, points, seed, _progress, loads)

    guest = cancelling.prepare_guest(size)
    try:
        found = trio.run(limited)
    except (BenchError, trio.TooSlowError) as exc:
        raise click.ClickException(str(exc) or f"not done after {timeout:g} s") from exc
    lines = cancelling.summarise(found)
    print(f"\n{size >> 20} MiB of random pages; times in ms; seed {seed}\n")
    print(cancelling.cancel_table(lines))
    for one in found:
        print(f"{one.mode}: undisturbed {one.undisturbed.total_s * 1000:.0f} ms; {one.too_late} cancels came too late")
    _end(cancelling.verdicts(lines), loads, json_file, [dataclasses.asdict(line) for line in lines])


@main.command()
@click.option("--size", type=Size(), default="256M", show_default=True, help="Guest RAM.")
@repeat_option(5)
@names_option("--transports", "names", transport.TRANSPORTS, ",".join(transport.TRANSPORTS), "What to compare")
@json_option
@timeout_option(120.0)
def transports(size: int, repeat: int, names: tuple[str, ...], json_file: Path | None, timeout: float) -> None:
    """Throughput of trimig to trimig over each transport, side by side."""
    loads = LoadLog()
    loads.read()
    found = transport.rows(trio.run(transport.run, names, size, repeat, timeout, _progress, loads))
    print(f"\n{size >> 20} MiB of random pages into populated memory, medians of {repeat} interleaved rounds\n")
    print(transport.table(found))
    _end(transport.verdicts(found), loads, json_file, [dataclasses.asdict(row) for row in found])
    if len(found) < len(names):
        sys.exit(1)


@main.command()
@click.option("--size", type=Size(), default="256M", show_default=True, help="Guest RAM of the rows without a limit.")
@repeat_option(3)
@json_option
@qemu_option
@timeout_option(200.0)
@click.option("--lock", is_flag=True, help="Measure only the waits for the interpreter lock in both processes.")
def postcopy(
    size: int, repeat: int, json_file: Path | None, qemu_path: str | None, timeout: float, *, lock: bool
) -> None:
    """How long a guest waits for its pages in postcopy, with and without a limit; downtime and time."""
    if lock:
        print(trio.run(post.lock_table, size, repeat, timeout))
        return
    loads = LoadLog()
    loads.read()
    qemu = _find(qemu_path)
    found = post.rows(trio.run(post.run, size, repeat, qemu, timeout, _progress, loads))
    print(f"\n{size >> 20} MiB (24 MiB under the limit), medians of {repeat} interleaved rounds\n")
    print(post.table(found))
    if qemu is None:
        print("not measured: qemu-qemu, there is no QEMU")
    _end(post.verdicts(found), loads, json_file, found)


@main.command()
@click.option("--sizes", type=Sizes(), default="256M,1G,4G", show_default=True, help="Guest RAM.")
@repeat_option(3)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default="/tmp",
    show_default=True,
    help="Where the guest is saved: the disk counts.",
)
@json_option
@qemu_option
@timeout_option(200.0)
def parking(
    sizes: tuple[int, ...], repeat: int, directory: Path, json_file: Path | None, qemu_path: str | None, timeout: float
) -> None:
    """How long a QEMU's guest is stopped while it is parked in a file."""
    loads = LoadLog()
    loads.read()
    qemu = _find(qemu_path)
    if qemu is None:
        raise click.ClickException("there is no QEMU here; --qemu names one")
    found = park.rows(trio.run(park.run, sizes, repeat, qemu, directory, timeout, _progress, loads))
    print(f"\nmedians of {repeat} interleaved rounds; files in {directory}\n")
    print(park.table(found))
    _end(park.verdicts(found), loads, json_file, found)


@main.command()
@names_option("--encodings", "names", tuple(ENCODINGS), ",".join(ENCODINGS), "What to compare")
@names_option("--engines", "engines", encoding.ENGINES, ",".join(encoding.ENGINES), "Which of the two")
@click.option("--size", type=Size(), default="512M", show_default=True, help="Guest RAM.")
@click.option("--hot", type=Size(), default="64M", show_default=True, help="The part that the guest writes.")
@click.option("--dirty-rate", type=Size(), default="160M", show_default=True, help="Bytes that it dirties a second.")
@click.option("--mbit", type=click.IntRange(min=1), default=1000, show_default=True, help="Mbit/s of the network.")
@click.option("--delay", type=click.FloatRange(min=0), default=0.0, show_default=True, help="ms in each direction.")
@click.option("--relay", is_flag=True, help="Shape the network by a relay in any case.")
@click.option("--downtime-limit", type=click.IntRange(min=0), default=300, show_default=True, help="ms.")
@click.option(
    "--limit",
    type=click.FloatRange(min=1),
    default=30.0,
    show_default=True,
    help="Seconds after which a migration has not converged.",
)
@repeat_option(3)
@json_option
def encodings(
    names: tuple[str, ...],
    engines: tuple[str, ...],
    size: int,
    hot: int,
    dirty_rate: int,
    mbit: int,
    delay: float,
    relay: bool,
    downtime_limit: int,
    limit: float,
    repeat: int,
    json_file: Path | None,
) -> None:
    """A busy guest over a slow network, with each encoding, trimig beside QEMU."""
    loads = LoadLog()
    loads.read()
    shape = Shape(bits_per_s=mbit * 1_000_000, delay_ms=delay)
    how = ""

    async def run() -> tuple[list[encoding.Result], list[encoding.Left]]:
        nonlocal how
        async with open_link(shape, relay=relay) as link:
            how = link.how
            _progress(f"network: {how}")
            return await encoding.run(names, engines, conditions, link, repeat, _progress, loads)

    try:
        workload = encoding.workload_of(size, hot, dirty_rate)
        conditions = encoding.Conditions(workload=workload, downtime_limit=downtime_limit, limit=limit)
        with _image(size, needed=True):
            results, left = trio.run(run)
    except BenchError as exc:
        raise click.ClickException(str(exc)) from exc
    found = encoding.rows(results)
    print(
        f"\n{size >> 20} MiB, of which {hot >> 20} MiB are written at {dirty_rate >> 20} MiB/s; downtime limit "
        f"{downtime_limit} ms; limit {limit:g} s; medians of {repeat} interleaved rounds\nnetwork: {how}\n"
    )
    print(encoding.table(found, left))
    _end(encoding.verdicts(found), loads, json_file, found, network=how, left=[dataclasses.asdict(one) for one in left])


@main.command()
@click.option("--counts", type=Counts(), default=",".join(map(str, scaling.COUNTS)), show_default=True, help="At once.")
@click.option("--size", type=Size(), default="4M", show_default=True, help="RAM of each guest.")
@repeat_option(3)
@json_option
@timeout_option(300.0)
def scale(counts: tuple[int, ...], size: int, repeat: int, json_file: Path | None, timeout: float) -> None:
    """Many migrations at once in one process: throughput, downtime and slices of the run loop."""
    loads = LoadLog()
    loads.read()
    found = scaling.rows(trio.run(scaling.run, counts, size, repeat, timeout, _progress, loads))
    print(f"\nall sources and destinations in one process; medians of {repeat} interleaved rounds; parts in ms\n")
    print(scaling.table(found))
    _end(scaling.verdicts(found), loads, json_file, found)
    if len(found) < len(counts):
        sys.exit(1)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False, exists=True, path_type=Path))
def goals(files: tuple[Path, ...]) -> None:
    """All figures to reach in one table, from the FILES that --json of several benchmarks has written."""
    try:
        print(report(files))
    except BenchError as exc:
        raise click.ClickException(str(exc)) from exc


def as_json(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The document of ``--json`` for precopy."""
    rows = make_rows(outcome.measurements)
    return {
        **document(make_verdicts(rows), outcome.loads, [row.as_json() for row in rows]),
        "skipped": [dataclasses.asdict(left) for left in outcome.skipped],
        "failed": [dataclasses.asdict(left) for left in outcome.failed],
        "plan": dataclasses.asdict(plan),
    }


def document(verdicts: Iterable[Verdict], loads: LoadLog, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the documents of all benchmarks have."""
    return {
        "rows": list(rows),
        "verdicts": [verdict.as_json() for verdict in verdicts],
        "load": loads.as_json(),
        "machine": machine(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the whole document under its name, or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise click.ClickException(f"the figures cannot be written to {path}: {exc.strerror}") from exc


def _end(
    verdicts: Sequence[Verdict], loads: LoadLog, json_file: Path | None, rows: Sequence[dict[str, Any]], **more: Any
) -> None:
    """Print the verdicts and the load, and write the document."""
    if verdicts:
        print(f"\nFigures to reach:\n{verdicts_table(verdicts)}")
    print(f"\n{loads.sentence()}")
    if json_file is not None:
        write_json(json_file, {**document(verdicts, loads, rows), **more})


def _print_precopy(plan: Plan, outcome: Outcome) -> None:
    host = ", ".join(f"{name} {value}" for name, value in machine().items())
    print(f"\n{plan.size >> 20} MiB of guest RAM, medians of {plan.repeat} interleaved rounds; {host}\n")
    rows = make_rows(outcome.measurements)
    if rows:
        print(rows_table(rows))
    _end(make_verdicts(rows), outcome.loads, None, [])
    for left in outcome.skipped:
        print(f"not measured: {left.pair} {left.way} {left.memory} {left.pages}: {left.reason}")
    for left in outcome.failed:
        print(f"FAILED: round {left.round} {left.pair} {left.way} {left.memory} {left.pages}: {left.reason}")


@contextlib.contextmanager
def _image(size: int, *, needed: bool) -> Iterator[None]:
    if not needed:
        yield
        return
    try:
        with image.prepared(size) as digest:
            _progress(f"memory image: sha256 {digest[:16]}")
            yield
    except BenchError as exc:
        raise click.ClickException(str(exc)) from exc


def _find(wanted: str | None) -> QemuProgram | None:
    try:
        return find_qemu(wanted)
    except BenchError as exc:
        raise click.ClickException(str(exc)) from exc


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(prog_name="python -m bench")
