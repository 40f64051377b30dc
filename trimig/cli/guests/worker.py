"""``worker:PROGRAM``: a guest whose code is a program of the user, in a process of its own."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import AsyncIterator
from typing import Final

import trimig
from trimig.guests import GuestKind, GuestRequest

_DEFAULT_RAM: Final = 64 * trimig.MiB
_PREFIX: Final = "ram="
#: An option before the program, as ``size=16M,``: the name is what no program's path begins with.
_OPTION: Final = re.compile(r"([a-z][a-z-]*)=[^,\s/]*,")


@contextlib.asynccontextmanager
async def _open(request: GuestRequest) -> AsyncIterator[trimig.Guest]:
    ram, text = _DEFAULT_RAM, request.text
    if text.startswith(_PREFIX):
        size, _, text = text.removeprefix(_PREFIX).partition(",")
        ram = trimig.parse_size(size)
    if option := _OPTION.match(text):
        raise trimig.ConfigError(f"worker: has no option {option[1]}; there is ram=SIZE, once, before the program")
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
