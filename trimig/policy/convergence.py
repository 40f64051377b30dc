"""Decides after each pass: iterate once more, switch over, or give up; and explains the decision.

Precopy converges when the remaining memory can be sent within the downtime limit. All quantities: bytes, bytes per
second, seconds.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Final

from .. import formats
from ..monitor.statistics import Convergence, PageCost
from .encoding_advice import encoding_advice
from .eta import NEARER, STALLED_PASSES


class Decision(enum.Enum):
    """The next step after a pass."""

    ITERATE = "iterate"
    SWITCH_OVER = "switch over"
    GIVE_UP = "give up"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The limits of the precopy passes.

    Attributes:
        downtime_limit: longest acceptable time to send the rest with the guest stopped, in seconds.
        max_bandwidth: bytes per second that may be sent; 0 for no limit.
        max_iterations: passes over the memory; None for no bound.
        max_total_time: seconds since the start; None for no bound.
        switch_over: at a bound, force the switchover with any downtime, instead of giving up.
        postcopy: the rest of the memory may be sent after the switchover.
        auto_converge: the guest is throttled if it writes too fast.
        max_throttle: percent of its running time that are taken from the guest at most.
        encodings: capabilities that encode pages, are off, and could be turned on.
        processors: number of processors for threads that compress pages.
    """

    downtime_limit: float
    max_bandwidth: int = 0
    max_iterations: int | None = None
    max_total_time: float | None = None
    switch_over: bool = False
    postcopy: bool = False
    auto_converge: bool = False
    max_throttle: int = 99
    encodings: tuple[str, ...] = ()
    processors: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The state of a migration after a pass.

    Attributes:
        remaining: bytes of guest memory still to be sent.
        bandwidth: bytes per second that the transport takes; 0 before the first measurement.
        iteration: passes made.
        elapsed: seconds since the start.
        dirty_rate: bytes of guest memory dirtied per second during the last pass.
        queued: bytes that the transport has taken and not delivered; they are sent first.
        least: bytes of the smallest rest that an earlier pass has left; None after the first pass.
        switchover_bandwidth: bytes per second that the user expects while the guest is stopped; 0 for *bandwidth*.
        throttle: percent of its running time that are taken from the guest.
        memory_per_byte: bytes of guest memory for each byte that was sent in the last pass: above 1 if pages were sent as
            differences, or compressed.
        samples: what a dirtied page would take in encodings that are off, see :func:`.encoding_advice.encoding_advice`.
    """

    remaining: int
    bandwidth: float
    iteration: int
    elapsed: float
    dirty_rate: float = 0.0
    queued: int = 0
    least: float | None = None
    switchover_bandwidth: int = 0
    throttle: int = 0
    memory_per_byte: float = 1.0
    samples: Mapping[str, PageCost] = dataclasses.field(default_factory=dict)

    @property
    def memory_rate(self) -> float:
        """Bytes of guest memory per second that can be sent."""
        return self.bandwidth * self.memory_per_byte


#: From this share of the bandwidth limit on, the limit and not the link is the bottleneck.
_BINDS: Final = 0.9
#: An advised value exceeds the needed value by this factor, so that it is enough with certainty.
_MARGIN: Final = 1.1
#: The largest value of downtime-limit, in seconds.
_MOST_DOWNTIME: Final = 2000.0


def expected_downtime(progress: Progress) -> float:
    """Seconds to send the rest with the guest stopped; infinite where the bandwidth is not known."""
    ahead = progress.remaining / progress.memory_per_byte + progress.queued
    if not ahead:
        return 0.0
    bandwidth = progress.switchover_bandwidth or progress.bandwidth
    return ahead / bandwidth if bandwidth > 0 else float("inf")


def decide(progress: Progress, bounds: Bounds) -> Decision:
    """The decision after a pass."""
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
        return f"{formats.duration(progress.elapsed)} (the limit is {formats.duration(bounds.max_total_time)})"
    return None


def convergence_progress(progress: Progress, bounds: Bounds) -> float:
    """The share of the rest that fits into the downtime limit, 0 to 1: the bytes that fit, divided by the bytes that
    remain.
    """
    downtime = expected_downtime(progress)
    return 1.0 if downtime <= bounds.downtime_limit else bounds.downtime_limit / downtime


#: The explanation before the end of the first pass.
FIRST_COPY: Final = Convergence(
    converging=True, reason="the memory is being copied for the first time: how fast it changes is not known yet"
)


#: The explanation where the rest is small enough, and the destination has not allowed the switchover.
NOT_ALLOWED: Final = Convergence(
    converging=False,
    reason="the capability switchover-ack is on, and the destination has not allowed the switchover (no SWITCHOVER_ACK has come)",
    advice=(
        "turn switchover-ack on at the destination",
        "turn it off here",
        "set the peer switch switchover-ack-legacy=off for a destination from QEMU 11.1 on whose machine type has no version",
    ),
)


def explain(progress: Progress, bounds: Bounds) -> Convergence:
    """Whether the migration converges, with the deciding figures, and with measures that would help."""
    downtime = expected_downtime(progress)
    if math.isinf(downtime):
        return Convergence(
            converging=False,
            reason=f"{formats.size(progress.remaining)} are left, and nothing has been sent that a bandwidth could be told from",
            advice=("give it more time", *_faster(progress, bounds, 0.0)),
        )
    figures = (
        f"{formats.rate(progress.dirty_rate)} are dirtied and {formats.rate(progress.memory_rate)} can be sent: {formats.size(progress.remaining)} "
        f"are left, which is {formats.whole_ms(downtime)} of downtime against a limit of {formats.whole_ms(bounds.downtime_limit)}"
    )
    if downtime <= bounds.downtime_limit:
        return Convergence(converging=True, reason=figures)
    nearer = progress.dirty_rate < progress.memory_rate and (
        progress.least is None or progress.remaining <= progress.least * NEARER
    )
    if not nearer:
        return Convergence(converging=False, reason=figures, advice=_advice(progress, bounds, downtime))
    figures += ", and each pass leaves less"
    if reached(progress, bounds) is None:
        return Convergence(converging=True, reason=figures)
    advice = ("allow more iterations or time", *_advice(progress, bounds, downtime))
    return Convergence(converging=False, reason=figures, advice=advice)


def sentence(convergence: Convergence) -> str:
    """Reason and advice as one sentence."""
    return f"{convergence.reason}; {' or '.join(convergence.advice)}" if convergence.advice else convergence.reason


def stalled(convergence: Convergence) -> str:
    """The warning after :class:`trimig.policy.eta.Stall` has found that the passes make no progress."""
    return (
        f"the migration does not converge: {STALLED_PASSES} passes in a row have left no less than those before them. "
        f"{sentence(convergence)}"
    )


def _advice(progress: Progress, bounds: Bounds, downtime: float) -> tuple[str, ...]:
    found = list(_faster(progress, bounds, progress.dirty_rate / progress.memory_per_byte))
    # If more is dirtied than sent, the rest is the memory that one whole pass dirties, and a downtime of that length is
    # enough.
    needed = downtime * _MARGIN
    if needed <= _MOST_DOWNTIME:
        found.append(f"raise downtime-limit to {formats.whole_ms(math.ceil(needed * 1000) / 1000)}")
    found += encoding_advice(
        progress.remaining,
        progress.switchover_bandwidth or progress.bandwidth,
        downtime,
        capabilities=bounds.encodings,
        samples=progress.samples,
        processors=bounds.processors,
    )
    if progress.dirty_rate > 0:
        found.append(_throttled(progress, bounds, downtime))
    if bounds.postcopy:
        found.append("start postcopy")
    return tuple(found)


def _faster(progress: Progress, bounds: Bounds, wanted: float) -> tuple[str, ...]:
    """The advice to raise the bandwidth limit, if the limit is the bottleneck."""
    limit = bounds.max_bandwidth
    if not limit or progress.bandwidth < limit * _BINDS:
        return ()
    enough = f", to more than {formats.rate(wanted * _MARGIN)}" if wanted * _MARGIN > limit else ""
    return (f"raise max-bandwidth ({formats.rate(limit)}){enough}",)


def _throttled(progress: Progress, bounds: Bounds, downtime: float) -> str:
    """The advice to throttle the guest: the throttle that would be enough, and its effect."""
    running = 1 - progress.throttle / 100
    if progress.dirty_rate < progress.memory_rate:
        # What is left was dirtied in the last pass, and is less as the guest runs less.
        share = _percent(1 - running * bounds.downtime_limit / downtime / _MARGIN)
        left = f"which leaves about {formats.whole_ms(downtime * (100 - share) / 100 / running)} of downtime"
    else:
        unthrottled = progress.dirty_rate / running
        share = _percent(1 - progress.memory_rate / unthrottled / _MARGIN)
        left = f"which leaves {formats.rate(unthrottled * (100 - share) / 100)} dirtied"
    if not bounds.auto_converge:
        return f"throttle the guest by {formats.percent(share / 100)} (capability auto-converge), {left}"
    if share > bounds.max_throttle:
        return f"raise max-cpu-throttle ({formats.percent(bounds.max_throttle / 100)}) to {formats.percent(share / 100)}, {left}"
    return f"let auto-converge go on from {formats.percent(progress.throttle / 100)} to {formats.percent(share / 100)}, {left}"


def _percent(share: float) -> int:
    return math.ceil(min(0.99, max(0.01, share)) * 100)
