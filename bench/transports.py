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

from bench.errors import BenchError
from bench.memory import MEMORY_KINDS
from bench.sides import PythonSide, Setup, open_python_side

#: The measured transports, in the order of each round.
TRANSPORTS: Final = ("tcp", "unix", "exec", "ws", "tls", "wss", "raw", "raw-tls")

#: (transport, baseline, lowest ratio): the figures to reach.
FLOORS: Final = (("unix", "tcp", 1.0), ("ws", "tcp", 0.5), ("tls", "raw-tls", 0.8))


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


async def measure(transport: str, size: int, directory: Path) -> float:
    """Seconds of one migration.

    Raises:
        BenchError: a side failed, or the memory differs.

    **Cancellation:** both processes are killed.
    """
    result: list[float] = []
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            result.append(await _measure(nursery, transport, size, directory))
            nursery.cancel_scope.cancel()
    except* BenchError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return result[0]


async def _measure(nursery: trio.Nursery, transport: str, size: int, directory: Path) -> float:
    how = way(transport, directory)
    setup = Setup(size=size, memory=MEMORY_KINDS["memfd-populated"], pages="random")
    source = await open_python_side(nursery, how.engine, "source", setup)
    destination = await open_python_side(nursery, how.engine, "destination", setup)
    uri = await destination.listen(**how.listen)
    began = time.monotonic()
    await source.begin(how.to or uri, **how.migrate)
    await _both(source, destination)
    seconds = time.monotonic() - began
    if wrong := await destination.mismatches():
        raise BenchError(f"{transport}: {wrong} pages of the destination are not what the source had")
    return seconds


async def _both(source: PythonSide, destination: PythonSide) -> None:
    async with trio.open_nursery(strict_exception_groups=True) as nursery:
        nursery.start_soon(source.finished)
        nursery.start_soon(destination.finished)


async def run(
    transports: Sequence[str], size: int, repeat: int, timeout: float, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Bytes per second of every run, by transport; a failed run is reported and left out."""
    found: dict[str, list[float]] = {name: [] for name in transports}
    with tempfile.TemporaryDirectory(prefix="trimig-bench-") as name:
        directory = Path(name)
        make_certificates(directory)
        for number in range(repeat):
            for transport in transports:
                label = f"round {number + 1}/{repeat} {transport}"
                try:
                    with trio.fail_after(timeout):
                        seconds = await measure(transport, size, directory)
                except (BenchError, trio.TooSlowError) as error:
                    progress(f"{label}: FAILED: {str(error) or 'not done in time'}")
                    continue
                found[transport].append(size / seconds)
                progress(f"{label}: {size / seconds / 1e9:.2f} GB/s")
    return found


def table(found: Mapping[str, Sequence[float]]) -> str:
    """The medians, each with its ratio to tcp, and TLS with its ratio to its baseline."""
    medians = {name: statistics.median(speeds) for name, speeds in found.items() if speeds}
    lines = [f"{'transport':<10} {'runs':>4}  {'GB/s':>5}  {'(min-max)':<11}  {'of tcp':>6}"]
    for name, speed in medians.items():
        part = f"{speed / medians['tcp']:.2f}" if "tcp" in medians else "-"
        spread = f"{min(found[name]) / 1e9:.2f}-{max(found[name]) / 1e9:.2f}"
        lines.append(f"{name:<10} {len(found[name]):>4}  {speed / 1e9:>5.2f}  {spread:<11}  {part:>6}")
    lines += ["", "Figures to reach:"]
    for name, other, floor in FLOORS:
        if name in medians and other in medians:
            ratio = medians[name] / medians[other]
            lines.append(f"{name} / {other}: {ratio:.2f}, at least {floor}: {'reached' if ratio >= floor else 'below'}")
    return "\n".join(lines)
