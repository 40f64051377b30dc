"""``worker:PROGRAM``: a guest whose code is a program of the user, in a process of its own."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import AsyncIterator
from typing import Final

import trimig
from trimig.guests import GuestKind, GuestRequest

_DEFAULT_RAM: Final = 64 * trimig.MiB
_PREFIX: Final = "ram="


@contextlib.asynccontextmanager
async def _open(request: GuestRequest) -> AsyncIterator[trimig.Guest]:
    ram, text = _DEFAULT_RAM, request.text
    if text.startswith(_PREFIX):
        size, _, text = text.removeprefix(_PREFIX).partition(",")
        ram = trimig.parse_size(size)
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise trimig.ConfigError(f"worker:{request.text}: {error}") from error
    if not argv:
        raise trimig.ConfigError("worker: needs a program: worker:[ram=64M,]PROGRAM ARGUMENTS…")
    opened = trimig.ProcessGuest.open(
        argv,
        ram=ram,
        running=not request.waiting,
        stopped=request.stopped,
        name=request.name or "trimig-worker",
    )
    async with opened as guest:
        yield guest


KIND: Final = GuestKind(
    name="worker",
    syntax="worker:[ram=64M,]PROGRAM ARGUMENTS…",
    summary="A program of yours in a process of its own; the page protocol/worker says what it answers.",
    open=_open,
)
