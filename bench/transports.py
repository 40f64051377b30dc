"""``python -m bench transports``: the same RAM from trimig to trimig over every transport in turn, round by round.

The interval is that of :mod:`bench.precopy`. TLS has its own baseline: a plain copy over Python's blocking TLS
sockets (``raw-tls``), because encryption limits its speed.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from bench.errors import BenchError, first_error
from bench.figures import GIB
from bench.goals import Verdict, judge
from bench.load import LoadLog
from bench.measure import CpuClocks
from bench.memory import MEMORY_KINDS
from bench.sides import PythonSide, Setup, open_python_side
from bench.table import format_table

#: The measured transports, in the order of each round.
TRANSPORTS: Final = ("tcp", "unix", "exec", "ws", "tls", "wss", "raw", "raw-tls")

#: (transport, baseline, name in :mod:`bench.goals`): the figures to reach.
RATIOS: Final = (("ws", "tcp", "ws"), ("tls", "raw-tls", "tls"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One migration."""

    transport: str
    size: int
    seconds: float
    #: Processor seconds of the source and of the destination.
    cpu: tuple[float, float]
    #: The load average at the end.
    load: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The addresses and settings for one transport."""

    engine: str
    listen: Mapping[str, Any]
    #: The source's URI; None for the URI that the destination reports.
    to: str | None
    migrate: Mapping[str, Any]


def way(transport: str, directory: Path) -> Way:
    """The addresses and settings of *transport*, with files in *directory*."""
    tls = {"tls": str(directory)} if transport in ("tls", "wss", "raw-tls") else {}
    if transport.startswith("raw"):
        return Way(engine="raw", listen=tls, to=None, migrate=tls)
    at, to, more = "tcp:127.0.0.1:0", None, {}
    if transport == "unix":
        at = f"unix:{directory / 'socket'}"
    elif transport in ("ws", "wss"):
        at = f"{transport}://127.0.0.1:0/"
    elif transport == "exec":
        fifo = directory / "fifo"
        if not fifo.exists():
            os.mkfifo(fifo)
        at, to, more = f"exec:exec cat {fifo}", f"exec:exec cat > {fifo}", {"return_path": False}
    return Way(engine="trimig", listen={"at": at, **tls}, to=to, migrate={**tls, **more})


def make_certificates(directory: Path) -> None:
    """Certificates for both sides, in QEMU's layout.

    Raises:
        BenchError: trustme is not installed.
    """
    try:
        import trustme
    except ImportError:
        raise BenchError("the certificates need trustme: pip install -e '.[dev]'") from None
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca-cert.pem")
    for side in ("server", "client"):
        certificate = authority.issue_cert("localhost", "127.0.0.1", common_name=side)
        certificate.cert_chain_pems[0].write_to_path(directory / f"{side}-cert.pem")
        certificate.private_key_pem.write_to_path(directory / f"{side}-key.pem")


async def measure(transport: str, size: int, directory: Path) -> Result:
    """One migration.

    Raises:
        BenchError: a side failed, or the memory differs.

    **Cancellation:** both processes are killed.
    """
    result: list[Result] = []
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            result.append(await _measure(nursery, transport, size, directory))
            nursery.cancel_scope.cancel()
    except* BenchError as group:
        raise first_error(group) from None
    return result[0]


async def _measure(nursery: trio.Nursery, transport: str, size: int, directory: Path) -> Result:
    how = way(transport, directory)
    setup = Setup(size=size, memory=MEMORY_KINDS["memfd-populated"], pages="random")
    source = await open_python_side(nursery, how.engine, "source", setup)
    destination = await open_python_side(nursery, how.engine, "destination", setup)
    uri = await destination.listen(**how.listen)
    clocks = CpuClocks(source.pid, destination.pid)
    clocks.start()
    began = time.monotonic()
    await source.begin(how.to or uri, **how.migrate)
    await _both(source, destination)
    seconds = time.monotonic() - began
    here, there = clocks.read()
    if wrong := await destination.mismatches():
        raise BenchError(f"{transport}: {wrong} pages of the destination are not what the source had")
    return Result(transport=transport, size=size, seconds=seconds, cpu=(here, there))


async def _both(source: PythonSide, destination: PythonSide) -> None:
    async with trio.open_nursery(strict_exception_groups=True) as nursery:
        nursery.start_soon(source.finished)
        nursery.start_soon(destination.finished)


async def run(
    transports: Sequence[str], size: int, repeat: int, timeout: float, progress: Callable[[str], None], loads: LoadLog
) -> list[Result]:
    """Every run; a failed one is reported and left out."""
    found: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="trimig-bench-") as name:
        directory = Path(name)
        make_certificates(directory)
        for number in range(repeat):
            for transport in transports:
                label = f"round {number + 1}/{repeat} {transport}"
                try:
                    with trio.fail_after(timeout):
                        result = await measure(transport, size, directory)
                except (BenchError, trio.TooSlowError) as error:
                    progress(f"{label}: FAILED: {str(error) or 'not done in time'}")
                    continue
                load = loads.read()
                found.append(dataclasses.replace(result, load=load))
                progress(f"{label}: {size / result.seconds / 1e9:.2f} GB/s, load {load:.1f}")
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The medians of all runs of one transport."""

    transport: str
    runs: int
    bytes_per_s: float
    bytes_per_s_min: float
    bytes_per_s_max: float
    cpu_source_s_per_gib: float
    cpu_destination_s_per_gib: float
    #: The highest load average at the end of a run.
    load: float


def rows(results: Sequence[Result]) -> list[Row]:
    """One row for each transport, in the order of their first runs."""
    found = []
    for transport in dict.fromkeys(result.transport for result in results):
        mine = [result for result in results if result.transport == transport]
        speeds = [result.size / result.seconds for result in mine]
        source, destination = (
            statistics.median(result.cpu[side] * GIB / result.size for result in mine) for side in (0, 1)
        )
        found.append(
            Row(
                transport=transport,
                runs=len(mine),
                bytes_per_s=statistics.median(speeds),
                bytes_per_s_min=min(speeds),
                bytes_per_s_max=max(speeds),
                cpu_source_s_per_gib=source,
                cpu_destination_s_per_gib=destination,
                load=max(result.load for result in mine),
            )
        )
    return found


def verdicts(found: Sequence[Row]) -> list[Verdict]:
    """The figures to reach for which there are rows."""
    by = {row.transport: row for row in found}
    judged = [
        judge(key, by[name].bytes_per_s / by[other].bytes_per_s, f"{name} / {other}")
        for name, other, key in RATIOS
        if name in by and other in by
    ]
    if "tcp" in by and "unix" in by:
        ratio = _cpu(by["tcp"]) / _cpu(by["unix"])
        judged.append(judge("unix-cpu", ratio, "transports"))
    return judged


def _cpu(row: Row) -> float:
    return row.cpu_source_s_per_gib + row.cpu_destination_s_per_gib


def table(found: Sequence[Row]) -> str:
    """The rows as text, each with its ratio to tcp. Processor time is in seconds for each GiB of guest RAM."""
    tcp = next((row.bytes_per_s for row in found if row.transport == "tcp"), None)
    lines = [["transport", "runs", "GB/s", "(min-max)", "of tcp", "CPU src", "CPU dst", "load"]]
    lines += [
        [
            row.transport,
            str(row.runs),
            f"{row.bytes_per_s / 1e9:.2f}",
            f"{row.bytes_per_s_min / 1e9:.2f}-{row.bytes_per_s_max / 1e9:.2f}",
            "-" if tcp is None else f"{row.bytes_per_s / tcp:.2f}",
            f"{row.cpu_source_s_per_gib:.2f}",
            f"{row.cpu_destination_s_per_gib:.2f}",
            f"{row.load:.1f}",
        ]
        for row in found
    ]
    return format_table(lines, left=1)
