"""A running ``trimig``: its start, its output, its end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

ROOT = Path(__file__).resolve().parents[3]


LIMIT = 60


LISTEN = "tcp:127.0.0.1:0"


@asynccontextmanager
async def started(*arguments: object) -> AsyncIterator[trio.Process]:
    """A running ``trimig``, with stdout and stderr as pipes; killed at the end of the block."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "trimig", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    async with process.stdout, process.stderr:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def text_of(pipe: trio.abc.ReceiveStream) -> str:
    return b"".join([bytes(part) async for part in pipe]).decode()


async def trimig_command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out: dict[str, str] = {}

    async def read(name: str, pipe: trio.abc.ReceiveStream) -> None:
        out[name] = await text_of(pipe)

    with trio.fail_after(LIMIT):
        async with started(*arguments) as process, trio.open_nursery() as nursery:
            assert process.stdout is not None
            assert process.stderr is not None
            nursery.start_soon(read, "out", process.stdout)
            nursery.start_soon(read, "err", process.stderr)
            code = await process.wait()
    assert "Traceback" not in out["err"]
    return code, out["out"], out["err"]


async def first_line(pipe: trio.abc.ReceiveStream) -> str:
    data = b""
    while not data.endswith(b"\n"):
        part = await pipe.receive_some(1)
        assert part, data
        data += part
    return data.decode().strip()
