"""A schedule that repeats: the one place that touches trio's private scheduler seed.

trio shuffles the tasks that are ready at the same time, on purpose. A sweep injects an event at edge n and presumes
that everything before edge n is the same as in the run before. Without a seed that is false for most runs, and the
sweep does not cover what it claims.

trio offers no public way to fix the order (its issues 32, 239 and 2022 ask for one). This module sets the same
attributes as trio's own test of determinism; ``tests/testing/test_determinism.py`` fails if a new trio changes them.

A fixed schedule covers tasks and :class:`trio.testing.MockClock`. Real sockets, threads and wall clocks are outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio

_FLAG = "_ALLOW_DETERMINISTIC_SCHEDULING"
_RANDOM = "_r"


@contextlib.contextmanager
def deterministic_schedule(seed: int) -> Iterator[None]:
    """Let every :func:`trio.run` in this block start from the schedule that *seed* stands for.

    Equal seeds give equal schedules, different seeds give different interleavings of the same program. The block's end
    restores the state of the generator and the flag, whatever happens in the block. Enter it around one ``trio.run``,
    not inside one. The setting is process-wide, so only one block at a time.

    Raises:
        RuntimeError: this version of trio has no such seed any more.

    Example::

        with deterministic_schedule(7):
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    """
    namespace = vars(trio._core._run)
    if _FLAG not in namespace or _RANDOM not in namespace:
        raise RuntimeError(
            f"trio {trio.__version__} has no scheduler seed where it was: trio._core._run.{_FLAG} and .{_RANDOM}"
        )
    generator = namespace[_RANDOM]
    flag, state = namespace[_FLAG], generator.getstate()
    namespace[_FLAG] = True
    generator.seed(seed)
    try:
        yield
    finally:
        generator.setstate(state)
        namespace[_FLAG] = flag
