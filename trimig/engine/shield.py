"""The shield around the decision.

From the first byte of the decision to its answer a cancellation from outside must not strike: it would leave the owner
unknown without need. A shield around the waiting task alone would not do, because the task that *reads* the answer
could still be cancelled (rule C7); so it is the scope of the whole nursery that is shielded, and it gets a deadline, so
that the time is bounded. Cancellation from inside (a child that fails) works as ever.
"""

from __future__ import annotations

import math

import trio


def shield(nursery: trio.Nursery, seconds: float) -> None:
    """Hold off cancellation from outside from every task of *nursery*, for at most *seconds*; then all is cancelled.

    Args:
        seconds: ``math.inf`` where something else bounds the time, as in postcopy the memory that is left.

    It is not lifted behind an answer: no checkpoint outside of a shield may follow the answer, or a cancellation that waits
    outside would turn a finished migration into a cancelled one. (A paused postcopy is no answer: :func:`lift_shield`.)
    """
    nursery.cancel_scope.deadline = trio.current_time() + seconds
    nursery.cancel_scope.shield = True


def lift_shield(nursery: trio.Nursery) -> None:
    """Cancellation from outside strikes again, a waiting one at the next checkpoint."""
    nursery.cancel_scope.deadline = math.inf
    nursery.cancel_scope.shield = False
