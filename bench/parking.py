"""``python -m bench parking``: how long a QEMU's guest is stopped while ``trimig receive --save`` parks it in a file.

The pause is the downtime that QEMU reports: from the stop of its guest until the destination has confirmed the guest.
The destination confirms when the file is on the disk under its name. For comparison the same guest goes to another
QEMU, which writes nothing. An *idle* guest has never touched its memory; a *used* guest has random data in a sixteenth
of it, scattered singly over all of it.

Processor time is that of the source and of a receiving QEMU during the migration, and that of a receiving trimig from
its start to its end. The load average is that of the machine at the end of a run: on a busy machine and a busy disk
everything takes longer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import trio

from bench.child import JsonObject, start_child
from bench.errors import BenchError
from bench.figures import GIB, MIB
from bench.goals import Verdict, judge
from bench.load import LoadLog
from bench.measure import CpuClocks
from bench.memory import MEMORY_KINDS, as_pages, fill
from bench.programs import QemuProgram
from bench.qemu import QemuSide, open_qemu_side, qemu_command
from bench.sides import Setup
from bench.table import format_table

Target = Literal["trimig receive --save", "QEMU"]
TARGETS: Final[tuple[Target, ...]] = ("trimig receive --save", "QEMU")
GUESTS: Final = ("idle", "used")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One migration; None for values that were not measured."""

    target: Target
    guest: str
    size: int
    pause_ms: float
    total_s: float
    #: Processor seconds of the source and of the destination.
    cpu: tuple[float, float]
    file_bytes: int | None
    #: The load average at the end.
    load: float = 0.0


class _Source(QemuSide):
    """A source QEMU. Its memory is not touched unless the guest has used it."""

    async def _wait(self) -> JsonObject:
        while True:
            answer: JsonObject = await self.command("query-migrate")
            if answer.get("status") == "completed":
                return answer
            if answer.get("status") in ("failed", "cancelled"):
                raise BenchError(f"{self._child.name}: {answer.get('error-desc', answer['status'])}")
            await trio.sleep(0.005)

    async def give(self, uri: str) -> JsonObject:
        """Migrate to *uri*; returns the last ``query-migrate``. BenchError."""
        await self.command("migrate", {"uri": uri})
        return await self._wait()

    def use(self) -> None:
        """Write random data into a sixteenth of the memory."""
        fill(as_pages(self._map_ram()), "absent")


async def _source(nursery: trio.Nursery, guest: str, size: int, qemu: QemuProgram) -> _Source:
    setup = Setup(size=size, memory=MEMORY_KINDS["memfd-cold"], pages="absent", qemu=qemu)
    command = qemu_command(qemu.command, size, setup.memory, incoming=False, prealloc=False)
    side = _Source(await start_child(nursery, "QEMU source", command, qemu.environment), "untouched", setup)
    await side.prepare()
    if guest == "used":
        side.use()
    return side


async def _parked(nursery: trio.Nursery, source: _Source, file: Path) -> tuple[JsonObject, float]:
    """QEMU's figures, and the processor seconds of the receiver."""
    command = [sys.executable, "-m", "trimig", "receive", "tcp:127.0.0.1:0", "--save", str(file), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said: list[str] = []
    try:
        async with process.stdout, process.stderr:
            nursery.start_soon(_read, process.stdout, [])
            uri = await _address(process.stderr, said)
            nursery.start_soon(_read, process.stderr, said)
            answer = await source.give(uri)
            code = await process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    if code:
        raise BenchError(f"trimig receive: exit code {code}: {''.join(said)[-300:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return answer, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def _read(pipe: trio.abc.ReceiveStream, said: list[str]) -> None:
    try:
        async for part in pipe:
            said.append(bytes(part).decode(errors="replace"))
    except trio.ClosedResourceError:
        pass


async def _address(pipe: trio.abc.ReceiveStream, said: list[str]) -> str:
    text = ""
    while part := await pipe.receive_some():
        text += bytes(part).decode(errors="replace")
        for line in text.splitlines(keepends=True):
            if line.endswith("\n") and line.startswith("{") and "address" in (note := json.loads(line)):
                return str(note["address"])
    said.append(text)
    raise BenchError(f"trimig receive does not listen: {text[-300:]}")


async def one(target: Target, guest: str, size: int, qemu: QemuProgram, directory: Path) -> Result:
    """One migration. BenchError.

    **Cancellation:** every process is killed, and the file removed.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix="trimig-bench-") as folder:
        file = Path(folder, "guest")
        length: int | None = None
        answer: JsonObject = {}
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            source = await _source(nursery, guest, size, qemu)
            clocks = CpuClocks(source.pid)
            clocks.start()
            if target == "QEMU":
                setup = Setup(size=size, memory=MEMORY_KINDS["memfd-cold"], pages="absent", qemu=qemu)
                destination = await open_qemu_side(nursery, "destination", setup)
                clocks = CpuClocks(source.pid, destination.pid)
                clocks.start()
                answer = await source.give(await destination.listen())
                here, there = clocks.read()
            else:
                answer, there = await _parked(nursery, source, file)
                (here,) = clocks.read()
                length = (await trio.Path(file).stat()).st_size
            nursery.cancel_scope.cancel("measured")
        return Result(
            target=target,
            guest=guest,
            size=size,
            pause_ms=float(answer["downtime"]),
            total_s=answer["total-time"] / 1000,
            cpu=(here, there),
            file_bytes=length,
        )


async def run(
    sizes: Sequence[int],
    repeat: int,
    qemu: QemuProgram,
    directory: Path,
    timeout: float,
    progress: Callable[[str], None],
    loads: LoadLog,
) -> list[Result]:
    """All runs, interleaved; a failed run is reported and left out."""
    results: list[Result] = []
    for number in range(repeat):
        for size in sizes:
            for guest in GUESTS:
                for target in TARGETS:
                    what = f"round {number + 1}/{repeat} {size >> 20} MiB, {guest}, to {target}"
                    try:
                        with trio.fail_after(timeout):
                            result = await one(target, guest, size, qemu, directory)
                    except* (BenchError, trio.TooSlowError) as group:
                        progress(f"{what}: FAILED: {_words(group)}")
                    else:
                        results.append(dataclasses.replace(result, load=loads.read()))
                        progress(f"{what}: pause {result.pause_ms:.0f} ms, load {results[-1].load:.1f}")
    return results


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or "not done in time"


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Medians of the runs of each target, guest and size; the pause also at its worst, the load at its highest."""
    found = []
    for key in dict.fromkeys((r.guest, r.size, r.target) for r in results):
        mine = [r for r in results if (r.guest, r.size, r.target) == key]
        row: dict[str, Any] = dict(zip(("guest", "size", "target"), key, strict=True), runs=len(mine))
        for field in ("pause_ms", "total_s", "file_bytes"):
            values = [value for r in mine if (value := getattr(r, field)) is not None]
            row[field] = statistics.median(values) if values else None
        for side, name in enumerate(("cpu_source_s_per_gib", "cpu_destination_s_per_gib")):
            row[name] = statistics.median(r.cpu[side] * GIB / r.size for r in mine)
        row["worst_pause_ms"] = max(r.pause_ms for r in mine)
        row["load"] = max(r.load for r in mine)
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text. Processor time is in seconds for each GiB of guest RAM."""
    lines = [["guest", "to", "size", "runs", "pause", "worst", "time", "CPU src", "CPU dst", "file", "load"]]
    for row in found:
        size = row["file_bytes"]
        lines.append(
            [
                row["guest"],
                row["target"],
                f"{row['size'] >> 20} MiB",
                str(row["runs"]),
                f"{row['pause_ms']:.0f} ms",
                f"{row['worst_pause_ms']:.0f} ms",
                f"{row['total_s']:.2f} s",
                f"{row['cpu_source_s_per_gib']:.2f}",
                f"{row['cpu_destination_s_per_gib']:.2f}",
                "-" if size is None else f"{size / MIB:.1f} MiB",
                f"{row['load']:.1f}",
            ]
        )
    return format_table(lines, left=2)


def verdicts(found: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The pause of an idle guest, of each size."""
    return [
        judge("parking", row["pause_ms"], f"{row['size'] >> 20} MiB")
        for row in found
        if row["guest"] == "idle" and row["target"] == TARGETS[0]
    ]
