"""Runs the job of a command, and lets a signal cancel it.

A command that migrates a guest looks like this::

    @click.command()
    @click.argument("uri")
    @migration_options
    def send(uri: str, config: trimig.Config, as_json: bool) -> int:
        async def job() -> int:
            ...
            return 0

        return run(job, as_json=as_json)

The job raises :class:`trimig.TrimigError`, OSError or click's errors; :class:`trimig.cli.Group` turns them into
sentences and exit codes (:mod:`trimig.cli.errors`). The result of the job is the exit code.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from . import signals
from .exit_codes import CANCELLED, DONE
from .output import say, write_json
from .tasks import alongside

if TYPE_CHECKING:
    from trimig.errors import TrimigError


def run(
    job: Callable[[], Awaitable[int | None]],
    *,
    as_json: bool = False,
    interrupt: Callable[[str], None] | None = None,
    doing: Callable[[], str] = lambda: "ending",
    decide: Callable[[], tuple[str, bool] | None] | None = None,
    truth: Callable[[], TrimigError | None] = lambda: None,
) -> int:
    """Run *job* in trio and return the exit code: the result of *job*, or 130 if a signal cancelled it.

    SIGINT, SIGTERM and SIGHUP (a closed terminal) cancel *job* through a cancel scope, so that the guest is restored
    first. Further signals change nothing: the remaining work is bounded in time and must not be cut short. A job that
    finishes in spite of the signal, because the guest had been handed over already, counts as finished. Errors
    propagate unchanged.

    Args:
        interrupt: called with the name of the first signal instead, for a job that has to ask other processes to stop;
            the exit code is then the result of *job*.
        doing: called at the first signal; returns its consequences, in words.
        decide: called at each signal until one is obeyed; returns the text to print, and whether the signal is obeyed;
            None for *doing*.
        truth: called when a signal has cancelled the job; returns the error that says what became of a changed guest.
    """
    life = signals.current()
    call = functools.partial(_run, job, life, as_json, interrupt, doing, decide, truth)
    life.hold()
    return trio.run(call, strict_exception_groups=True)


async def _run(
    job: Callable[[], Awaitable[int | None]],
    life: signals.ProcessSignals,
    as_json: bool,
    interrupt: Callable[[str], None] | None,
    doing: Callable[[], str],
    decide: Callable[[], tuple[str, bool] | None] | None,
    truth: Callable[[], TrimigError | None],
) -> int:
    with trio.open_signal_receiver(*life.numbers) as received:
        scope = trio.CancelScope()

        async def cancellable() -> int | None:
            with scope:
                return await job()
            return None

        async def watch() -> None:
            await _first_signal(received, interrupt or scope.cancel, doing, decide)

        life.watched()
        try:
            code = await alongside(cancellable, watch)
        finally:
            life.decided()
    if not scope.cancelled_caught:
        return code or DONE
    if (error := truth()) is not None:
        raise error
    if as_json:
        write_json({"error": "cancelled by a signal", "kind": "Cancelled", "exit_code": CANCELLED})
    say("cancelled")
    return CANCELLED


async def _first_signal(
    signals: AsyncIterator[int],
    cancel: Callable[[str], None],
    doing: Callable[[], str],
    decide: Callable[[], tuple[str, bool] | None] | None,
) -> None:
    asked = False
    async for number in signals:
        name = signal.Signals(number).name
        if not asked:
            text, asked = (decide() if decide is not None else None) or (doing(), True)
            say(f"{name}: {text}")
            if asked:
                cancel(name)
        else:
            say(f"{name}: that is being done already")
