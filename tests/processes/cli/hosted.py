"""A ``trimig run`` and a client of its QMP socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from tests.processes.cli.command import LIMIT, first_line, started, text_of
from trimig import qmp

GUEST = "process:size=8M,dirty-rate=1M,hot=1M,seed=5"


@asynccontextmanager
async def hosting(address: str, *words: object) -> AsyncIterator[tuple[trio.Process, qmp.Client]]:
    """A ``trimig run`` and a client of its QMP socket."""
    with trio.fail_after(LIMIT):
        async with started("run", "--qmp", address, *words) as process:
            assert process.stderr is not None
            while "QMP at" not in (line := await first_line(process.stderr)):
                assert line
            real = line.rpartition(" ")[2]
            async with qmp.connect(real) as client:
                yield process, client


async def ends(process: trio.Process) -> tuple[int, str]:
    """Exit code, and the remaining output."""
    assert process.stderr is not None
    text = await text_of(process.stderr)
    assert "Traceback" not in text
    return await process.wait(), text


async def status(client: qmp.Client, *wanted: str) -> dict[str, Any]:
    """``query-migrate``, once the status is one of *wanted*."""
    while True:
        found: dict[str, Any] = await client.execute("query-migrate")
        if found.get("status") in wanted:
            return found
        await trio.sleep(0.01)
