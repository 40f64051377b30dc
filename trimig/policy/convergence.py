"""Iterate once more, switch over, or give up? And why.

Precopy converges when what is left can be sent within the downtime limit. All quantities: bytes, bytes per second,
seconds.
"""

from __future__ import annotations

import dataclasses
import enum
import math


class Decision(enum.Enum):
    """What follows a pass."""

    ITERATE = "iterate"
    SWITCH_OVER = "switch over"
    GIVE_UP = "give up"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long a caller is willing to chase.

    Attributes:
        downtime_limit: longest acceptable time to send the rest with the guest stopped, in seconds.
        max_iterations: passes over the memory; None for no bound.
        max_total_time: seconds since the start; None for no bound.
        switch_over: reaching a bound forces the switchover, whatever the downtime, instead of giving up.
    """

    downtime_limit: float
    max_iterations: int | None = None
    max_total_time: float | None = None
    switch_over: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a migration stands after a pass.

    Attributes:
        remaining: bytes of guest memory still to be sent.
        bandwidth: bytes per second that the transport takes; 0 where nothing was measured yet.
        iteration: passes made.
        elapsed: seconds since the start.
        dirty_rate: bytes of guest memory dirtied per second during the last pass.
        queued: bytes that the transport has taken and not delivered: they go first.
    """

    remaining: int
    bandwidth: float
    iteration: int
    elapsed: float
    dirty_rate: float = 0.0
    queued: int = 0


def expected_downtime(progress: Progress) -> float:
    """Seconds to send the rest with the guest stopped; infinite where the bandwidth is not known."""
    ahead = progress.remaining + progress.queued
    if not ahead:
        return 0.0
    return ahead / progress.bandwidth if progress.bandwidth > 0 else float("inf")


def decide(progress: Progress, bounds: Bounds) -> Decision:
    """What to do after a pass."""
    if expected_downtime(progress) <= bounds.downtime_limit:
        return Decision.SWITCH_OVER
    if reached(progress, bounds) is None:
        return Decision.ITERATE
    return Decision.SWITCH_OVER if bounds.switch_over else Decision.GIVE_UP


def reached(progress: Progress, bounds: Bounds) -> str | None:
    """The bound that has been reached, in words; None if there is none."""
    if bounds.max_iterations is not None and progress.iteration >= bounds.max_iterations:
        return f"{progress.iteration} iterations (the limit is {bounds.max_iterations})"
    if bounds.max_total_time is not None and progress.elapsed >= bounds.max_total_time:
        return f"{progress.elapsed:.1f} s (the limit is {bounds.max_total_time:g} s)"
    return None


def explain(progress: Progress, bounds: Bounds) -> str:
    """One sentence on why it does not converge, with the figures that decide it."""
    floor = expected_downtime(progress)
    if math.isinf(floor):
        return (
            f"{progress.remaining / 1e6:.1f} MB are left, and nothing has been sent that a bandwidth could be told from; "
            f"give it more time, or raise max-bandwidth"
        )
    sent = f"{progress.bandwidth / 1e6:.1f} MB/s can be sent"
    dirtied = f"{progress.dirty_rate / 1e6:.1f} MB/s are dirtied"
    advice = (
        "raise max-bandwidth or slow the guest down"
        if progress.dirty_rate >= progress.bandwidth
        else f"a downtime-limit of {floor * 1000:.0f} ms would do"
    )
    return (
        f"{dirtied} and {sent}: {progress.remaining / 1e6:.1f} MB are left, which is {floor * 1000:.0f} ms of downtime "
        f"against a limit of {bounds.downtime_limit * 1000:.0f} ms; {advice}"
    )
