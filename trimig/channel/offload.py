"""Blocking calls away from the run loop: the only place that starts threads.

A call is a slice of work: reading or writing some MiB of a file, one fsync. A cancellation is looked at between two
calls, never inside one, so what the caller counts as done is exactly what has happened (rule C12). Only a call that changes
nothing may look at it itself, by :func:`check_cancelled`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")

#: Calls at once. Each has a thread; files do not get faster by more of them.
MAX_CALLS: Final = 8

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trimig.offload")


def limiter() -> trio.CapacityLimiter:
    """Of the present run; none of its tokens is borrowed when nothing of ours works in a thread."""
    try:
        return _limiter.get()
    except LookupError:
        made = trio.CapacityLimiter(MAX_CALLS)
        _limiter.set(made)
        return made


async def offload(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of *function*, which runs in a thread; its errors as they are.

    **Cancellation:** cancelled before *function* begins, or not at all: once begun it runs to its end, its result is
    returned, and the next checkpoint raises.
    """
    call = functools.partial(function, *args, **kwargs)
    return await trio.to_thread.run_sync(call, abandon_on_cancel=False, limiter=limiter())


def check_cancelled() -> None:
    """For a function that :func:`offload` runs and that changes nothing: end it when its caller was cancelled.

    Raises:
        trio.Cancelled: it was; the function must let that through.
    """
    trio.from_thread.check_cancelled()
