"""``app:pkg.mod:factory``: a guest of the user's own code."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import trimig
from trimig.guests import GuestKind, GuestRequest


@contextlib.asynccontextmanager
async def _open(request: GuestRequest) -> AsyncIterator[trimig.Guest]:
    """The object, or what the factory (a function, also async, or a context manager) makes."""
    text = request.text
    module_name, colon, path = text.partition(":")
    if not colon or not module_name or not path:
        raise trimig.ConfigError(f"app:{text} needs a module and a name in it: app:pkg.mod:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's module is in the working directory
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise trimig.ConfigError(f"app:{text}: {error}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise trimig.ConfigError(f"app:{text}: {module_name} has no {path}") from None
    async with contextlib.AsyncExitStack() as stack:
        try:
            if callable(found) and not isinstance(found, trimig.Guest):
                found = found(**_arguments(found, {"running": not (request.waiting or request.stopped)}))
            if inspect.isawaitable(found):
                found = await found
            if isinstance(found, contextlib.AbstractAsyncContextManager):
                found = await stack.enter_async_context(found)
            elif isinstance(found, contextlib.AbstractContextManager):
                found = stack.enter_context(found)
        except Exception as error:  # raised by the user's code
            raise trimig.ConfigError(f"app:{text} failed: {error!r}") from error
        if not isinstance(found, trimig.Guest):
            raise trimig.ConfigError(f"app:{text} gave {type(found).__name__!r}, which is no guest (see trimig.Guest)")
        yield found


def _arguments(function: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of *offered* that *function* takes by name."""
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in offered.items() if name in names}


KIND: Final = GuestKind(
    name="app",
    syntax="app:pkg.mod:factory",
    summary="Your own guest: what the function factory in the module pkg.mod returns.",
    open=_open,
)
