"""``python -m bench encodings``: a busy guest over a slow network, with each encoding, trimig and QEMU side by side.

The network has 1 Gbit/s (:mod:`bench.shaped`), the guest (:mod:`bench.busy`) writes more than that. So plain pages do not
converge, and an encoding does if it saves enough bytes and has the processor for it. A migration that has not converged
within the limit is ended. Each run ends with a look at every page of the destination: no write was lost.

- *time*, *downtime*: as the source reports them;
- *sent*: bytes to the destination, as the network counts them, for trimig and QEMU alike;
- *CPU*: of source and destination, without the guest's own: its worker is another process, and the thread of a QEMU's
  virtual processor is subtracted.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from bench.busy import FIRST, Workload
from bench.busy_boot import boot_sector
from bench.child import JsonChild, JsonObject, start_child, start_python_child
from bench.errors import BenchError, first_error
from bench.figures import GIB
from bench.goals import Verdict, judge
from bench.load import LoadLog
from bench.measure import CpuClocks
from bench.memory import MEMORY_KINDS, PAGE_SIZE, Pages, as_pages
from bench.programs import QemuProgram, find_qemu
from bench.qemu import RAM_BLOCK, QemuSide
from bench.shaped import Link
from bench.sides import Setup
from bench.table import format_table, number
from bench.ways import ENCODINGS, Way

ENGINES: Final = ("trimig", "qemu")
#: A disk with less than one cylinder is none for the BIOS.
_DISK_BYTES: Final = 1 << 20
#: Seconds between two looks at a QEMU.
_POLL: Final = 0.01
#: Seconds for a guest of a QEMU to boot.
_BOOTING: Final = 60.0
#: Seconds beyond the limit for the start, the end and the look at the memory.
_AROUND: Final = 120.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What all runs have in common."""

    workload: Workload
    #: ms.
    downtime_limit: int
    #: Seconds after which a migration has not converged.
    limit: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One migration."""

    encoding: str
    #: "trimig", or "qemu" with its version.
    engine: str
    size: int
    converged: bool
    total_s: float
    #: None if it has not converged.
    downtime_ms: float | None
    passes: int
    sent_bytes: int
    #: Processor seconds of the source and of the destination.
    cpu: tuple[float, float]
    #: The load average at the end.
    load: float = 0.0


Run = Callable[[], Awaitable[Result]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """An encoding that was not measured, and why."""

    encoding: str
    engine: str
    reason: str


def way_of(encoding: str, conditions: Conditions) -> Way:
    """The encoding with the parameters of the conditions."""
    way = ENCODINGS[encoding]
    parameters = {"max-bandwidth": 0, "downtime-limit": conditions.downtime_limit, **way.parameters}
    return dataclasses.replace(way, parameters=parameters)


# -- trimig ------------------------------------------------------------------------------------------------------------


async def trimig_run(way: Way, conditions: Conditions, link: Link) -> Result:
    """One migration from trimig to trimig. BenchError if it fails, or if a write was lost.

    **Cancellation:** both processes are killed.
    """
    found: list[Result] = []
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            found.append(await _trimig_run(nursery, way, conditions, link))
            nursery.cancel_scope.cancel("measured")
    except* BenchError as group:
        raise first_error(group) from None
    return found[0]


async def _trimig_run(nursery: trio.Nursery, way: Way, conditions: Conditions, link: Link) -> Result:
    workload = conditions.workload
    words = [str(word) for word in (workload.size, workload.hot, workload.rate)]
    sides: list[JsonChild] = []
    for role, prefix in (("source", link.source), ("destination", link.destination)):
        child = await start_python_child(nursery, f"trimig {role}", "bench.busy_side", [role, *words], prefix)
        await child.answer("ready")
        sides.append(child)
    source, destination = sides
    how = {"capabilities": way.capabilities, "parameters": way.parameter_options(), "choose": way.choose}
    await destination.send({"do": "listen", "at": link.address, **how})
    uri = await link.address_for_source(str(await destination.answer("listening")))
    clocks = CpuClocks(source.pid, destination.pid)
    before = await link.sent()
    clocks.start()
    await source.send({"do": "migrate", "uri": uri, "limit": conditions.limit, **how})
    figures = await source.answer("finished")
    here, there = clocks.read()
    sent = await link.sent() - before
    if figures["converged"]:
        await destination.answer("finished")
        await destination.send({"do": "verify"})
        await destination.answer("writes")
    return Result(
        encoding=way.name,
        engine="trimig",
        size=workload.size,
        converged=figures["converged"],
        total_s=figures["total_s"],
        downtime_ms=figures.get("downtime_ms"),
        passes=figures["passes"],
        sent_bytes=sent,
        cpu=(here, there),
    )


# -- QEMU --------------------------------------------------------------------------------------------------------------


class BusyQemu(QemuSide):
    """A QEMU with the busy guest. Its role as a source is "untouched": the guest fills its memory itself."""

    def pages(self) -> Pages:
        """The guest's RAM, shared with QEMU."""
        return as_pages(self._map_ram())

    async def boot(self, workload: Workload) -> None:
        """Fill the memory, start the guest and wait for its first write.

        **Cancellation:** kill it.
        """
        pages = self.pages()
        workload.fill(pages)
        before = bytes(pages[FIRST, :4])
        await self.command("cont")
        with trio.move_on_after(_BOOTING) as limit:
            while bytes(pages[FIRST, :4]) == before:  # noqa: ASYNC110 - another process
                await trio.sleep(_POLL)
        if limit.cancelled_caught:
            raise BenchError(f"the guest of {self._child.name} has written nothing within {_BOOTING:g} s")

    async def guest_seconds(self) -> float:
        """Processor seconds of the virtual processors.

        **Cancellation:** as for a command.
        """
        threads = await self.command("query-cpus-fast")
        return sum(_thread_seconds(self.pid, thread["thread-id"]) for thread in threads)

    async def migrate(self, uri: str, limit: float) -> JsonObject:
        """Migrate, and return the last answer to ``query-migrate``: ``active`` if the limit was reached.

        **Cancellation:** kill it.
        """
        await self.command("migrate", {"uri": uri})
        ends = time.monotonic() + limit
        while True:
            answer: JsonObject = await self.command("query-migrate")
            status = answer.get("status")
            if status == "completed" or (status == "active" and time.monotonic() >= ends):
                return answer
            if status in ("failed", "cancelled"):
                raise BenchError(f"{self._child.name}: {answer.get('error-desc', status)}")
            await trio.sleep(_POLL)

    async def running(self) -> None:
        """Wait until the guest runs at a destination.

        **Cancellation:** no effect.
        """
        while (await self.command("query-status"))["status"] != "running":  # noqa: ASYNC110 - another process
            await trio.sleep(_POLL)


def _thread_seconds(pid: int, thread: int) -> float:
    return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9


def busy_command(qemu: Sequence[str], workload: Workload, disk: Path, *, incoming: bool) -> list[str]:
    """The command line of a QEMU with the busy guest on *disk*."""
    memory = f"memory-backend-memfd,share=on,id={RAM_BLOCK},size={workload.size}"
    command = [*qemu, "-accel", "tcg", "-M", f"pc,memory-backend={RAM_BLOCK}", "-m", f"size={workload.size}b"]
    command += ["-object", memory, "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]
    command += ["-drive", f"if=ide,format=raw,file={disk}"]
    return [*command, "-incoming", "defer"] if incoming else [*command, "-S"]


async def qemu_run(way: Way, conditions: Conditions, link: Link, qemu: QemuProgram) -> Result:
    """One migration from QEMU to QEMU. BenchError if it fails, or if a write was lost.

    **Cancellation:** both QEMUs are killed.
    """
    found: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="trimig-bench-") as directory:
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                found.append(await _qemu_run(nursery, way, conditions, link, qemu, Path(directory)))
                nursery.cancel_scope.cancel("measured")
        except* BenchError as group:
            raise first_error(group) from None
    return found[0]


async def _qemu_run(
    nursery: trio.Nursery, way: Way, conditions: Conditions, link: Link, qemu: QemuProgram, directory: Path
) -> Result:
    workload = conditions.workload
    setup = Setup(
        size=workload.size,
        memory=MEMORY_KINDS["memfd-cold"],
        pages="absent",
        qemu=qemu,
        way=way,
        directory=str(directory),
    )
    sides: list[BusyQemu] = []
    for role, prefix in (("untouched", link.source), ("destination", link.destination)):
        disk = directory / role
        disk.write_bytes(boot_sector(workload).ljust(_DISK_BYTES, b"\0"))
        command = [*prefix, *busy_command(qemu.command, workload, disk, incoming=role == "destination")]
        side = BusyQemu(await start_child(nursery, f"QEMU {role}", command, qemu.environment), role, setup)
        await side.prepare()
        sides.append(side)
    source, destination = sides
    await source.boot(workload)
    uri = await link.address_for_source(await destination.listen(link.address))
    clocks = CpuClocks(source.pid, destination.pid)
    before, guest = await link.sent(), await source.guest_seconds()
    clocks.start()
    answer = await source.migrate(uri, conditions.limit)
    here, there = clocks.read()
    here -= await source.guest_seconds() - guest
    sent = await link.sent() - before
    converged = answer["status"] == "completed"
    if converged:
        await destination.running()
        await destination.command("stop")
        workload.count(destination.pages())
    return Result(
        encoding=way.name,
        engine=f"qemu {way.qemu}",
        size=workload.size,
        converged=converged,
        total_s=answer["total-time"] / 1000,
        downtime_ms=answer["downtime"] if converged else None,
        passes=answer["ram"]["dirty-sync-count"],
        sent_bytes=sent,
        cpu=(here, there),
    )


# -- all ---------------------------------------------------------------------------------------------------------------


async def run(
    encodings: Sequence[str],
    engines: Sequence[str],
    conditions: Conditions,
    link: Link,
    repeat: int,
    progress: Callable[[str], None],
    loads: LoadLog,
) -> tuple[list[Result], list[Left]]:
    """All runs, interleaved, and what was not measured; a failed run is reported and left out."""
    results: list[Result] = []
    calls, left = _calls(encodings, engines, conditions, link)
    for one in left:
        progress(f"{one.encoding}, {one.engine}: {one.reason}")
    for turn in range(repeat):
        for name, call in calls.items():
            what = f"round {turn + 1}/{repeat} {name}"
            try:
                with trio.fail_after(conditions.limit + _AROUND):
                    result = await call()
            except (BenchError, trio.TooSlowError) as error:
                progress(f"{what}: FAILED: {str(error) or 'not done in time'}")
                continue
            load = loads.read()
            results.append(dataclasses.replace(result, load=load))
            end = f"downtime {result.downtime_ms:.0f} ms" if result.downtime_ms is not None else "did not converge"
            progress(f"{what}: {result.total_s:.1f} s, {result.sent_bytes / 1e6:.0f} MB, {end}, load {load:.1f}")
    return results, left


def _calls(
    encodings: Sequence[str], engines: Sequence[str], conditions: Conditions, link: Link
) -> tuple[Mapping[str, Run], list[Left]]:
    """A function for each run of a round, by its name; and what cannot be run."""
    calls: dict[str, Run] = {}
    left: list[Left] = []
    for encoding in encodings:
        way = way_of(encoding, conditions)
        if "trimig" in engines:
            if refusal := way.refusal():
                left.append(Left(encoding=encoding, engine="trimig", reason=refusal))
            else:
                calls[f"{encoding}, trimig"] = functools.partial(trimig_run, way, conditions, link)
        if "qemu" in engines:
            if way.choose:
                left.append(Left(encoding=encoding, engine="qemu", reason="no QEMU chooses"))
            elif (qemu := find_qemu(way.qemu)) is None:
                left.append(Left(encoding=encoding, engine="qemu", reason=f"there is no QEMU {way.qemu} here"))
            else:
                calls[f"{encoding}, QEMU {way.qemu}"] = functools.partial(qemu_run, way, conditions, link, qemu)
    return calls, left


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Medians of the runs of each encoding and engine."""
    found = []
    for encoding, engine in dict.fromkeys((result.encoding, result.engine) for result in results):
        mine = [result for result in results if (result.encoding, result.engine) == (encoding, engine)]
        downtimes = [result.downtime_ms for result in mine if result.downtime_ms is not None]
        source, destination = (
            statistics.median(result.cpu[side] * GIB / result.size for result in mine) for side in (0, 1)
        )
        found.append(
            {
                "encoding": encoding,
                "engine": engine,
                "runs": len(mine),
                "converged": sum(result.converged for result in mine),
                "total_s": statistics.median(result.total_s for result in mine),
                "downtime_ms": statistics.median(downtimes) if downtimes else None,
                "passes": statistics.median(result.passes for result in mine),
                "sent_bytes": statistics.median(result.sent_bytes for result in mine),
                "cpu_source_s_per_gib": source,
                "cpu_destination_s_per_gib": destination,
                "load": max(result.load for result in mine),
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]], left: Sequence[Left]) -> str:
    """The rows as text. Processor time is in seconds for each GiB of guest RAM."""
    head = [
        "encoding",
        "engine",
        "runs",
        "converged",
        "time",
        "downtime",
        "passes",
        "sent",
        "CPU src",
        "CPU dst",
        "load",
    ]
    lines = [
        [
            row["encoding"],
            row["engine"],
            str(row["runs"]),
            {0: "no", row["runs"]: "yes"}.get(row["converged"], f"{row['converged']} times"),
            f"{row['total_s']:.2f} s",
            number(row["downtime_ms"], 0, "ms"),
            f"{row['passes']:.0f}",
            f"{row['sent_bytes'] / 1e6:.0f} MB",
            f"{row['cpu_source_s_per_gib']:.2f}",
            f"{row['cpu_destination_s_per_gib']:.2f}",
            f"{row['load']:.1f}",
        ]
        for row in found
    ]
    text = [format_table([head, *lines], left=2)] if lines else []
    return "\n".join([*text, *(f"{one.encoding}, {one.engine}: {one.reason}" for one in left)])


def verdicts(found: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Bytes and downtime beside QEMU's, for the encodings of which both have converged in every run."""
    by = {(row["encoding"], row["engine"].split()[0]): row for row in found if row["converged"] == row["runs"]}
    judged = []
    for encoding, name in (("xbzrle", "xbzrle"), ("multifd-zstd", "zstd")):
        ours, theirs = by.get((encoding, "trimig")), by.get((encoding, "qemu"))
        if ours is None or theirs is None:
            continue
        where = f"{ours['engine']} / {theirs['engine']}"
        judged.append(judge(f"{name}-bytes", ours["sent_bytes"] / theirs["sent_bytes"], where))
        if theirs["downtime_ms"]:
            judged.append(judge(f"{name}-downtime", ours["downtime_ms"] / theirs["downtime_ms"], where))
    return judged


def workload_of(size: int, hot: int, rate: int) -> Workload:
    """The busy guest with *size* bytes of RAM, *hot* of them hot, that writes *rate* bytes a second, in whole pages."""
    return Workload(size=size, hot=hot // PAGE_SIZE, rate=rate // PAGE_SIZE)
