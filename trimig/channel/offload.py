"""Blocking calls away from the run loop: the only place that starts threads.

A call is a slice of work: reading or writing some MiB of a file, one fsync. A cancellation takes effect between two
calls and never inside a call. So the caller counts exactly the work that was done (rule C12). Only a call that changes
nothing may end early on a cancellation, by :func:`check_cancelled`.

A *pump* is the exception: a call that moves bytes of one connection for as long as there are any. It is told of a cancellation,
and then ends within one system call, with an exact count. Pumps wait for their peers, perhaps for long and perhaps for each
other. So they have threads of their own number, and :func:`pump` starts none rather than to wait for one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import trio

if TYPE_CHECKING:
    import outcome

P = ParamSpec("P")
T = TypeVar("T")

#: Calls that run at the same time. Each call has a thread; more threads do not make files faster.
MAX_CALLS: Final = 8
#: Pumps that run at the same time. What more of them would move is moved by trio.
MAX_PUMPS: Final = 16

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trimig.offload")
_pumps: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trimig.pumps")


def _of_this_run(variable: trio.lowlevel.RunVar[trio.CapacityLimiter], most: int) -> trio.CapacityLimiter:
    try:
        return variable.get()
    except LookupError:
        made = trio.CapacityLimiter(most)
        variable.set(made)
        return made


def limiter() -> trio.CapacityLimiter:
    """The capacity limiter of the present run of trio. A borrowed token is a thread in which a call of trimig runs."""
    return _of_this_run(_limiter, MAX_CALLS)


def pumps() -> trio.CapacityLimiter:
    """The same for pumps."""
    return _of_this_run(_pumps, MAX_PUMPS)


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


async def pump(function: Callable[[], bool], stop: Callable[[], None]) -> None:
    """Run *function* in a thread of its own. Its errors are raised unchanged.

    Args:
        function: returns True if it has done everything, False if *stop* kept it from that.
        stop: called at most once, in the thread of trio, when the task is cancelled; *function* must then end soon.

    Raises:
        trio.WouldBlock: there are MAX_PUMPS pumps already, or no more threads; *function* was not called.

    **Cancellation:** *stop* is called, and *function* has ended. If it had done everything by then, the next checkpoint raises.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    tokens, holder = pumps(), object()
    tokens.acquire_on_behalf_of_nowait(holder)
    task, trio_token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
    cancelled: list[Callable[[], None]] = []

    def deliver(result: outcome.Outcome[bool]) -> None:
        trio_token.run_sync_soon(trio.lowlevel.reschedule, task, result)

    def abort(raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        cancelled.append(raise_cancel)
        stop()
        return trio.lowlevel.Abort.FAILED

    try:
        try:
            trio.lowlevel.start_thread_soon(function, deliver, "trimig pump")
        except RuntimeError as error:  # the system has no more threads
            raise trio.WouldBlock from error
        everything = await trio.lowlevel.wait_task_rescheduled(abort)
    finally:
        tokens.release_on_behalf_of(holder)
    if not everything:
        cancelled[0]()
