"""Passes over the RAM while the guest runs, until the rest fits into the downtime limit."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import trio

from ...errors import NotConverging
from ...guest import PAGE_SIZE
from ...policy import convergence
from ...policy.eta import Stall
from ...policy.rate import WINDOW
from ..sections.table import encodings_off
from .throttle import Throttle

if TYPE_CHECKING:
    from .outgoing import Outgoing

#: Seconds for the first message of a peer that may never answer. The guest runs during this wait.
SILENCE_SECONDS = 2.0
#: A pass that sent at most this many bytes does not change the expected downtime that is shown (states.md part 13).
TELLING_BYTES = 10_000


async def copy_passes(out: Outgoing) -> bool:
    """Send the dirty pages in passes, until the rest fits into the downtime limit or a bound is reached.

    Returns:
        True for a switch to postcopy: it was requested, and the rest does not fit.
    """
    c, stall, throttle = out.counters, Stall(), Throttle(out)
    while True:
        c.iteration += 1
        began, sent, this_pass = trio.current_time(), delivered(out), Pass(out)
        for section in out.sections:
            await section.iterate(lambda: postcopy_begins(out))
        this_pass.end()
        moved, busy = delivered(out) - sent, this_pass.seconds
        if not c.first_copy_done:
            c.first_copy_done = True
            await wait_first_answer(out)
        await out.find_pending()
        now = trio.current_time()
        c.dirty_rate = c.remaining / max(now - began, 1e-6)
        if not c.bandwidth or busy < 0.1 or c.iteration == 1:
            # Before the first whole window of the limiter the pass is the best measurement of the bandwidth.
            c.bandwidth = max(c.bandwidth, moved / busy)
        if decide(out, progress_of(out, stall, now, this_pass), stall, moved) is convergence.Decision.SWITCH_OVER:
            if await may_stop(out, stall, this_pass):
                return False
        elif postcopy_begins(out):
            await out.turn.take()
            return True
        else:
            out.turn.close()
        await throttle.adjust()
        await wait_allowed(out)
        await drain_before_pass(out)


async def may_stop(out: Outgoing, stall: Stall, last: Pass) -> bool:
    """Wait until the guest may be stopped (:mod:`.turns`).

    Returns:
        False if the guest has written too much during the wait. Then the attempt keeps its turn for another pass.
    """
    if not await out.turn.take():
        return True
    await out.find_pending()
    progress = progress_of(out, stall, trio.current_time(), last)
    return convergence.decide(progress, bounds_of(out)) is convergence.Decision.SWITCH_OVER


def postcopy_begins(out: Outgoing) -> bool:
    """True if postcopy was requested, and the destination has allowed the switchover."""
    return out.monitor.postcopy_wanted and switchover_allowed(out)


def switchover_allowed(out: Outgoing) -> bool:
    """True if the destination has allowed the switchover, or need not allow it (switchover-ack is off)."""
    return out.link.reader.acks >= out.link.ways.acks


async def wait_allowed(out: Outgoing) -> None:
    """Wait a moment if only the permission of the destination is missing: a pass now would find few dirty pages."""
    if not switchover_allowed(out) and out.counters.convergence is convergence.NOT_ALLOWED:
        with trio.move_on_after(WINDOW):
            await out.link.reader.wait_acks(out.link.ways.acks)


async def wait_first_answer(out: Outgoing) -> None:
    """Wait for the first message of the destination, while the guest still runs.

    For a destination that must answer, this waits without a limit: :func:`.connect.await_first_answer` ends the attempt if
    no message comes. For a peer that may never answer, it waits up to SILENCE_SECONDS.
    """
    if out.link.asks:
        with trio.move_on_after(math.inf if out.link.answers else SILENCE_SECONDS):
            await out.link.reader.wait_life()


async def drain_before_pass(out: Outgoing) -> None:
    """Wait a moment before the next pass if the transport has a long queue: a pass now would find few dirty pages."""
    seconds = out.link.channels.backlog / out.counters.bandwidth if out.counters.bandwidth else 0.0
    if seconds > out.monitor.config.parameters.downtime_limit / 1000:
        await trio.sleep(min(seconds, WINDOW))


def delivered(out: Outgoing) -> int:
    return out.link.channels.delivered


class Pass:
    """The bytes and the time of one pass, and how many bytes of guest memory went with each byte that was sent.

    Attributes:
        seconds: from the begin to the end of the pass.
        memory_per_byte: bytes of guest memory for each byte sent; 1 if no page went in another encoding than PAGE and ZERO.
        rate: bytes sent per second; infinite in the same case.
    """

    def __init__(self, out: Outgoing) -> None:
        self._counters = c = out.counters
        self._began = trio.current_time()
        self._before = (c.transferred, c.handled, c.encoded)
        self.seconds = 0.0
        self.memory_per_byte = 1.0
        self.rate = math.inf

    def end(self) -> None:
        """Measure."""
        c = self._counters
        self.seconds = max(trio.current_time() - self._began, 1e-6)
        sent, handled, encoded = self._before
        if c.encoded > encoded:
            size = max(1, c.transferred - sent)
            self.memory_per_byte = (c.handled - handled) * PAGE_SIZE / size
            self.rate = size / self.seconds


def progress_of(out: Outgoing, stall: Stall, now: float, last: Pass) -> convergence.Progress:
    """The measurements after a pass, which is *last*.

    Encoding may take longer than sending, and then the last pages do not go faster than those of the pass.
    """
    c = out.counters
    return convergence.Progress(
        remaining=c.remaining,
        bandwidth=min(c.bandwidth, last.rate),
        memory_per_byte=last.memory_per_byte,
        iteration=c.iteration,
        elapsed=now - c.started,
        dirty_rate=c.dirty_rate,
        queued=out.link.channels.backlog,
        least=stall.least,
        throttle=c.throttle,
        samples=dict(c.samples),
        switchover_bandwidth=out.monitor.config.parameters.avail_switchover_bandwidth,
    )


def bounds_of(out: Outgoing) -> convergence.Bounds:
    """The limits of the passes, from the configuration."""
    config = out.monitor.config
    return convergence.Bounds(
        downtime_limit=config.parameters.downtime_limit / 1000,
        max_bandwidth=config.parameters.max_bandwidth,
        max_iterations=config.max_iterations,
        max_total_time=config.max_total_time,
        switch_over=config.on_bound == "switchover",
        postcopy=config.capabilities.postcopy_ram,
        auto_converge=config.capabilities.auto_converge,
        max_throttle=config.parameters.max_cpu_throttle,
        encodings=encodings_off(out),
        processors=len(os.sched_getaffinity(0)),
    )


def decide(out: Outgoing, progress: convergence.Progress, stall: Stall, moved: int) -> convergence.Decision:
    """Decide by the policy whether another pass follows. Updates the counters, and emits the event PASS.

    Args:
        moved: bytes that the last pass has sent.

    Raises:
        NotConverging: a bound was reached.
    """
    c, bounds = out.counters, bounds_of(out)
    why, decision = convergence.explain(progress, bounds), convergence.decide(progress, bounds)
    over = convergence.reached(progress, bounds)
    ready = decision is convergence.Decision.SWITCH_OVER
    if (ready or out.monitor.postcopy_wanted) and not switchover_allowed(out):
        why = convergence.NOT_ALLOWED
    if ready and not switchover_allowed(out):
        decision = convergence.Decision.GIVE_UP if over is not None else convergence.Decision.ITERATE
    c.convergence = why
    c.expected_downtime = convergence.expected_downtime(progress)
    if c.dirty_rate and moved > TELLING_BYTES:
        c.shown_downtime = c.expected_downtime
    c.convergence_progress = max(c.convergence_progress, convergence.convergence_progress(progress, bounds))
    out.monitor.emit(
        "PASS", iteration=c.iteration, sent=c.transferred, remaining=c.remaining, dirty_rate=c.dirty_rate,
        bandwidth=c.bandwidth, expected_downtime=c.expected_downtime, memory_per_byte=progress.memory_per_byte,
    )  # fmt: skip
    told = stall.passed(c.remaining, helped=bounds.auto_converge and c.throttle < bounds.max_throttle)
    if told and decision is convergence.Decision.ITERATE and not why.converging:
        out.monitor.warn(convergence.stalled(why))
    if decision is convergence.Decision.GIVE_UP:
        raise NotConverging(
            f"no convergence within {over}: {convergence.sentence(why)}", reason=why.reason, advice=why.advice
        )
    return decision
