"""Blocking calls away from the run loop: the only place that starts threads.

A call is a slice of work: reading or writing some MiB of a file, one fsync. A cancellation takes effect between two
calls and never inside a call. So the caller counts exactly the work that was done (rule C12). Only a call that changes
nothing may end early on a cancellation, by :func:`check_cancelled`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")

#: Calls that run at the same time. Each call has a thread; more threads do not make files faster.
MAX_CALLS: Final = 8

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trimig.offload")


def limiter() -> trio.CapacityLimiter:
    """The capacity limiter of the present run of trio. A borrowed token is a thread in which a call of trimig runs."""
    try:
        return _limiter.get()
    except LookupError:
        made = trio.CapacityLimiter(MAX_CALLS)
        _limiter.set(made)
        return made


async def offload(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run *function* in a thread and return its result. Its errors are raised unchanged.

    **Cancellation:** cancelled before *function* begins, or not at all: once begun it runs to its end, its result is
    returned, and the next checkpoint raises.
    """
    call = functools.partial(function, *args, **kwargs)
    return await trio.to_thread.run_sync(call, abandon_on_cancel=False, limiter=limiter())


def check_cancelled() -> None:
    """End the calling function if the task that waits for it was cancelled.

    Only a function that :func:`offload` runs and that changes nothing may call this.

    Raises:
        trio.Cancelled: the task was cancelled; the function must not catch this.
    """
    trio.from_thread.check_cancelled()
