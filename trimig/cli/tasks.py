"""Runs two tasks; one of them serves the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def alongside(call: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[None]]) -> T:
    """The result of *call*, while *other* runs; *other* is cancelled when *call* is done.

    An error of either propagates as itself, not in a group.

    **Cancellation:** as for *call*. If *call* has returned, its result is returned: the result says what has happened,
    and a cancellation that came too late must not hide that.
    """
    results: list[T] = []
    failure: BaseException | None = None
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            nursery.start_soon(other)
            results.append(await call())
            nursery.cancel_scope.cancel("done")
    except BaseExceptionGroup as group:
        failure = _only_one(group)
    except trio.Cancelled:
        if not results:
            raise
    # Raised outside of the group, so that the error does not get the group as its context.
    if failure is not None and not (results and _is_cancelled(failure)):
        raise failure
    return results[0]


def _is_cancelled(error: BaseException) -> bool:
    """Whether *error* is a cancellation, or a group of cancellations."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def _only_one(error: BaseException) -> BaseException:
    """The exception in a group of a single one, without Cancelled, which says nothing; otherwise the group."""
    while isinstance(error, BaseExceptionGroup):
        _, real = error.split(trio.Cancelled)
        inner = (real or error).exceptions
        if len(inner) != 1:
            return error
        error = inner[0]
    return error
