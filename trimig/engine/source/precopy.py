"""Passes over the RAM while the guest runs, until the rest is small enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import trio

from ...errors import NotConverging
from ...guest import PAGE_SIZE, PageBitmap
from ...memory.tracking import snapshot_of
from ...policy import convergence
from ...policy.eta import Stall
from ...policy.rate import WINDOW
from .. import guest_calls

if TYPE_CHECKING:
    from .outgoing import Outgoing

#: Seconds for the first answer of a destination that may be none; the guest runs meanwhile.
SILENCE_SECONDS = 2.0
#: A pass that sent no more than this does not change the expected downtime that is shown (states.md part 13).
TELLING_BYTES = 10_000


async def copy_passes(out: Outgoing) -> bool:
    """Passes over what is dirty, until the rest is small enough (or a bound says otherwise).

    Returns:
        Whether the guest is to go before its memory: postcopy was asked for, and the rest is not small.
    """
    c, blocks = out.counters, list(out.guest.ram)
    todo: list[PageBitmap] = [np.ones(b.length // PAGE_SIZE, np.bool_) for b in blocks]
    first, stall = True, Stall()
    assert out.sender is not None
    assert out.tracker is not None
    while True:
        c.iteration += 1
        began, sent = trio.current_time(), delivered(out)
        left: list[PageBitmap | None] = []
        for block, bitmap in zip(blocks, todo, strict=True):
            with guest_calls.guarded("looking at the guest's memory"):
                pages = snapshot_of(out.tracker, block)
                absent = block.absent() if first else None
            left.append(await out.sender.send_pass(block, pages, bitmap, absent, lambda: postcopy_begins(out)))
        moved, busy = delivered(out) - sent, max(trio.current_time() - began, 1e-6)
        if first:
            first, c.first_copy_done = False, True
            await wait_first_answer(out)
        todo = in_order(out, await out.call("finding dirty pages", out.tracker.sync))
        todo = [a if b is None else a | b for a, b in zip(todo, left, strict=True)]
        out.count_sync()
        now = trio.current_time()
        c.remaining = sum(int(np.count_nonzero(bitmap)) for bitmap in todo) * PAGE_SIZE
        c.dirty_rate = c.remaining / max(now - began, 1e-6)
        if not c.bandwidth or busy < 0.1 or c.iteration == 1:
            # Before the first whole window the pass itself is the best measurement there is.
            c.bandwidth = max(c.bandwidth, moved / busy)
        out.left = todo
        if decide(out, stall, now, moved) is convergence.Decision.SWITCH_OVER:
            return False
        if postcopy_begins(out):
            return True
        await wait_allowed(out)
        await drain_before_pass(out)


def postcopy_begins(out: Outgoing) -> bool:
    """The guest is to go before its memory, and may."""
    return out.monitor.postcopy_wanted and switchover_allowed(out)


def switchover_allowed(out: Outgoing) -> bool:
    """The destination has allowed the switchover, or is not asked."""
    return out.reader is None or out.reader.acks >= out.acks


async def wait_allowed(out: Outgoing) -> None:
    """Where nothing but that is missing: a pass now would find nothing to do."""
    if not switchover_allowed(out) and out.counters.convergence is convergence.NOT_ALLOWED:
        assert out.reader is not None
        with trio.move_on_after(WINDOW):
            await out.reader.wait_acks(out.acks)


async def wait_first_answer(out: Outgoing) -> None:
    """Where no answer has come yet, give it time, while the guest still runs.

    A destination that must answer and does not ends the attempt (:func:`.connect.await_first_answer`); another one is given a moment.
    """
    if out.reader is not None:
        with trio.move_on_after(math.inf if out.has_return_path else SILENCE_SECONDS):
            await out.reader.wait_life()


async def drain_before_pass(out: Outgoing) -> None:
    """Before another pass: what fills the transport must go first, and a pass now would find nothing to do."""
    assert out.channel is not None
    seconds = out.channel.backlog() / out.counters.bandwidth if out.counters.bandwidth else 0.0
    if seconds > out.monitor.config.parameters.downtime_limit / 1000:
        await trio.sleep(min(seconds, WINDOW))


def delivered(out: Outgoing) -> int:
    assert out.channel is not None
    return out.channel.sent - out.channel.backlog()


def in_order(out: Outgoing, written: Mapping[str, PageBitmap]) -> list[PageBitmap]:
    return [written[b.name] for b in out.guest.ram]


def decide(out: Outgoing, stall: Stall, now: float, moved: int) -> convergence.Decision:
    c, config = out.counters, out.monitor.config
    progress = convergence.Progress(
        remaining=c.remaining,
        bandwidth=c.bandwidth,
        iteration=c.iteration,
        elapsed=now - c.started,
        dirty_rate=c.dirty_rate,
        queued=out.channel.backlog() if out.channel is not None else 0,
        least=stall.least,
        switchover_bandwidth=config.parameters.avail_switchover_bandwidth,
    )
    bounds = convergence.Bounds(
        downtime_limit=config.parameters.downtime_limit / 1000,
        max_bandwidth=config.parameters.max_bandwidth,
        max_iterations=config.max_iterations,
        max_total_time=config.max_total_time,
        switch_over=config.on_bound == "switchover",
        postcopy=config.capabilities.postcopy_ram,
    )
    c.expected_downtime = convergence.expected_downtime(progress)
    if c.dirty_rate and moved > TELLING_BYTES:
        c.shown_downtime = c.expected_downtime
    c.chase = max(c.chase, convergence.chase(progress, bounds))
    why = c.convergence = convergence.explain(progress, bounds)
    decision = convergence.decide(progress, bounds)
    ready = decision is convergence.Decision.SWITCH_OVER
    if (ready or out.monitor.postcopy_wanted) and not switchover_allowed(out):
        why = c.convergence = convergence.NOT_ALLOWED
    if ready and not switchover_allowed(out):
        over = convergence.reached(progress, bounds) is not None
        decision = convergence.Decision.GIVE_UP if over else convergence.Decision.ITERATE
    out.monitor.emit(
        "PASS", iteration=c.iteration, sent=c.transferred, remaining=c.remaining, dirty_rate=c.dirty_rate,
        bandwidth=c.bandwidth, expected_downtime=c.expected_downtime,
    )  # fmt: skip
    if stall.passed(c.remaining) and decision is convergence.Decision.ITERATE and not why.converging:
        out.monitor.warn(convergence.stalled(why))
    if decision is convergence.Decision.GIVE_UP:
        bound = convergence.reached(progress, bounds)
        raise NotConverging(
            f"no convergence within {bound}: {convergence.sentence(why)}", reason=why.reason, advice=why.advice
        )
    return decision
