"""``python -m bench precopy``: the same RAM moved by every pair in turn, round by round.

A *cell* is a way (tcp, unix, multifd with several channels), a kind of destination memory and a content. Pairs are
compared within a cell.

**The interval** is the same for every pair. Before it, both processes are up, their memory is allocated (and the
source's filled), and the destination listens. The coordinator reads ``CLOCK_MONOTONIC``, writes the start command to
the source (QMP ``migrate``, or a line to the Python side), and reads the clock again when *both* sides have reported
completion (QMP event ``MIGRATION``/``completed``, or a line). Connecting is inside the interval, starting processes is
not. CPU time is read from the kernel at the same two moments.

**Order**: each round measures every combination once, and each round starts with another pair, so that slow drifts of
the machine and the place in the order affect all pairs alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence

import trio

from bench.errors import BenchError, first_error
from bench.figures import Measurement, engines
from bench.load import LoadLog
from bench.measure import Meter, sample_forever
from bench.memory import MEMORY_KINDS
from bench.programs import QemuProgram
from bench.qemu import open_qemu_side
from bench.sides import Setup, Side, open_python_side
from bench.ways import TCP, WAYS, Way

#: Why a combination of an engine and a kind of destination memory cannot be measured; "" if it can.
TRIMIG_NEEDS_MEMFD = "AppGuest's memory is a memfd, so trimig is not measured as the destination into anonymous memory"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The combinations to run, and how often."""

    size: int
    repeat: int
    memories: Sequence[str]
    pages: Sequence[str]
    pairs: Sequence[str]
    qemu: QemuProgram | None
    ways: Sequence[str] = ("tcp",)
    verify: bool = True
    #: Time limit of one run, in seconds.
    timeout: float = 300.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A combination without a figure, or one failed run of it, and the reason."""

    pair: str
    memory: str
    pages: str
    reason: str
    way: str = "tcp"
    #: From 1; None: there was no run at all.
    round: int | None = None


@dataclasses.dataclass(slots=True)
class Outcome:
    """The results of a plan."""

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    skipped: list[Left] = dataclasses.field(default_factory=list)
    failed: list[Left] = dataclasses.field(default_factory=list)
    loads: LoadLog = dataclasses.field(default_factory=LoadLog)


def reason_to_skip(pair: str, memory: str, qemu: QemuProgram | None, way: Way = TCP) -> str:
    """Why this pair cannot be measured into this memory on this way; empty if it can."""
    source, destination = engines(pair)
    if source == "raw" and way.capabilities:
        return "the raw copy has one connection"
    if "trimig" in (source, destination) and (refusal := way.refusal()):
        return refusal
    if "qemu" in (source, destination) and qemu is None:
        return "there is no QEMU on this machine (Debian: qemu-system-x86; or give --qemu PATH)"
    if destination == "trimig" and not MEMORY_KINDS[memory].shared:
        return TRIMIG_NEEDS_MEMFD
    return ""


def round_order(pairs: Sequence[str], number: int) -> list[str]:
    """The pairs, starting with another one in each round."""
    at = number % len(pairs)
    return [*pairs[at:], *pairs[:at]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The conditions in which pairs are compared."""

    way: str
    memory: str
    pages: str


async def run_plan(plan: Plan, progress: Callable[[str], None]) -> Outcome:
    """Measure everything; a run that fails is listed and does not stop the others."""
    outcome = Outcome()
    outcome.loads.read()
    todo: dict[Cell, list[str]] = {}
    for way, memory, pages in itertools.product(plan.ways, plan.memories, plan.pages):
        for pair in plan.pairs:
            if reason := reason_to_skip(pair, memory, plan.qemu, WAYS[way]):
                outcome.skipped.append(Left(pair=pair, way=way, memory=memory, pages=pages, reason=reason))
            else:
                todo.setdefault(Cell(way=way, memory=memory, pages=pages), []).append(pair)
    for number in range(plan.repeat):
        for cell, pairs in todo.items():
            for pair in round_order(pairs, number):
                await _run_one(plan, cell, pair, number + 1, outcome, progress)
    return outcome


async def _run_one(
    plan: Plan, cell: Cell, pair: str, number: int, outcome: Outcome, progress: Callable[[str], None]
) -> None:
    label = f"round {number}/{plan.repeat} {pair} {cell.way} {cell.memory} {cell.pages}"
    with tempfile.TemporaryDirectory(prefix="trimig-bench-") as directory:
        setup = Setup(
            size=plan.size,
            memory=MEMORY_KINDS[cell.memory],
            pages=cell.pages,
            qemu=plan.qemu,
            way=WAYS[cell.way],
            directory=directory,
        )
        try:
            with trio.fail_after(plan.timeout):
                one = await measure(pair, setup, verify=plan.verify)
        except (BenchError, trio.TooSlowError) as exc:
            reason = str(exc) or f"not done after {plan.timeout:g} s"
            outcome.failed.append(
                Left(pair=pair, way=cell.way, memory=cell.memory, pages=cell.pages, reason=reason, round=number)
            )
            progress(f"{label}: FAILED: {reason}")
            return
    load = outcome.loads.read()
    outcome.measurements.append(dataclasses.replace(one, load=load))
    progress(f"{label}: {plan.size / one.seconds / 1e9:.2f} GB/s, load {load:.1f}")


async def measure(pair: str, setup: Setup, *, verify: bool) -> Measurement:
    """One run of one pair, in two new processes.

    Raises:
        BenchError: a side did not start or failed, or the destination's memory differs from the source's.

    **Cancellation:** both processes are killed.
    """
    result: list[Measurement] = []
    try:
        async with trio.open_nursery() as nursery:
            result.append(await _measure(nursery, pair, setup, verify=verify))
            nursery.cancel_scope.cancel()
    except* BenchError as group:
        raise first_error(group) from None
    return result[0]


async def _measure(nursery: trio.Nursery, pair: str, setup: Setup, *, verify: bool) -> Measurement:
    source_engine, destination_engine = engines(pair)
    source = await _open(nursery, source_engine, "source", setup)
    destination = await _open(nursery, destination_engine, "destination", setup)
    uri = await destination.listen()
    meters = [
        Meter(side.pid, setup.size, shared=setup.kind(role).shared)
        for role, side in (("source", source), ("destination", destination))
    ]
    for meter in meters:
        meter.prepare()
    async with trio.open_nursery() as sampling:
        sampling.start_soon(sample_forever, meters)
        for meter in meters:
            meter.start()
        began = time.monotonic()
        await source.begin(uri)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(source.finished)
            waiting.start_soon(destination.finished)
        seconds = time.monotonic() - began
        for meter in meters:
            meter.stop()
        sampling.cancel_scope.cancel()
    usages = [meter.finish() for meter in meters]
    reports = [await side.report() for side in (source, destination)]
    if verify and (wrong := await destination.mismatches()):
        raise BenchError(f"{wrong} pages of the destination are not what the source had")
    return Measurement(
        pair=pair,
        way=setup.way.name,
        memory=setup.memory.name,
        pages=setup.pages,
        size=setup.size,
        seconds=seconds,
        source=usages[0],
        destination=usages[1],
        downtime_ms=reports[0].downtime_ms,
        slices=tuple(report.slices for report in reports if report.slices is not None),
    )


async def _open(nursery: trio.Nursery, engine: str, role: str, setup: Setup) -> Side:
    if engine == "qemu":
        return await open_qemu_side(nursery, role, setup)
    return await open_python_side(nursery, engine, role, setup)
