"""``process[:…]``: the workload of the demo, in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import trimig
from trimig.guests import GuestKind, GuestRequest

_SIZES: Final = ("size", "dirty-rate", "hot", "write-size")


def default_hot(size: int) -> int:
    """The default size of the working set of a worker with so many bytes."""
    return min(32 << 20, size // 8)


@contextlib.asynccontextmanager
async def _open(request: GuestRequest) -> AsyncIterator[trimig.Guest]:
    options = options_of(request.text)
    if request.name:
        options["name"] = request.name
    async with trimig.WorkloadGuest.open(running=not request.waiting, stopped=request.stopped, **options) as guest:
        yield guest


def options_of(text: str) -> dict[str, Any]:
    """The arguments of :meth:`trimig.WorkloadGuest.open` in *text*. ConfigError."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key == "seed" and equals and value.isdigit():
            options["seed"] = int(value)
            continue
        if key not in _SIZES or not equals:
            raise trimig.ConfigError(
                f"{part!r} is not one of {', '.join(f'{name}=SIZE' for name in _SIZES)}, seed=NUMBER"
            )
        try:
            options[key.replace("-", "_")] = trimig.parse_size(value)
        except trimig.ConfigError as error:
            raise trimig.ConfigError(f"{key}: {error}") from None
    if "size" in options:
        options.setdefault("hot", default_hot(options["size"]))
    return options


KIND: Final = GuestKind(
    name="process",
    syntax="process[:size=256M,dirty-rate=50M,hot=32M,write-size=4K,seed=N]",
    summary="The workload of the demo, in a process of its own.",
    open=_open,
)
