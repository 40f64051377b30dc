"""The shield around the decision.

From the first byte of the decision to its answer a cancellation from outside must have no effect: it would make the owner
unknown without need. A shield around the task that waits is not enough, because the task that *reads* the answer could
still be cancelled (rule C7). So the scope of the whole nursery is shielded. It gets a deadline, so that the time is
bounded. A task of the nursery that fails still cancels the others.
"""

from __future__ import annotations

import math

import trio


def shield(nursery: trio.Nursery, seconds: float) -> None:
    """Hold off cancellation from outside from every task of *nursery*, for at most *seconds*; then cancel all of them.

    Args:
        seconds: ``math.inf`` if something else bounds the time, as the remaining memory does in postcopy.

    The shield stays after the answer. At a checkpoint without a shield a waiting cancellation would turn the finished
    migration into a cancelled one. Only a paused postcopy, which has no answer yet, calls :func:`lift_shield`.
    """
    nursery.cancel_scope.deadline = trio.current_time() + seconds
    nursery.cancel_scope.shield = True


def lift_shield(nursery: trio.Nursery) -> None:
    """Let cancellation from outside have its effect again. A waiting cancellation takes effect at the next checkpoint."""
    nursery.cancel_scope.deadline = math.inf
    nursery.cancel_scope.shield = False
