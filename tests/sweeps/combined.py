"""Two disturbances at once: a link that breaks, and a cancel at every edge before and after that.

:func:`trimig.testing.run_sweep` compares each run with the undisturbed one, which is impossible with a fault before the
edge. Here the other runs are compared with the run that has only the fault.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests import tiers
from tests.sweeps.sampled import SEEDS, some
from trimig.testing import CancelAt, Fault, FaultKind, Point, Run, Scenario, SweepFailure, replay

#: Faults under one interleaving, and edges under one fault, that a sample has besides the first and the last.
FAULTS = 6
EDGES = 5


def around_the_decision(baseline: Run[Any], kinds: Sequence[FaultKind]) -> Iterator[Fault]:
    """Faults in the middle of memory, before and after the commit (the last byte), and around the answer."""
    last, answer = baseline.sent["a->b"], baseline.sent["b->a"]
    for kind in kinds:
        for after in (last // 2, last - 1, last):
            yield Fault(direction="a->b", after=after, kind=kind)
        for after in (answer - 16, answer - 8, answer - 1):
            yield Fault(direction="b->a", after=after, kind=kind)


def sweep_cancels_and_faults(
    scenario: Scenario[Any],
    faults: Callable[[Run[Any]], Iterator[Fault]],
    *,
    victims: tuple[str, ...],
    every: int,
) -> int:
    """Cancel *victims* at each *every*-th edge of each run with a fault. Prints and returns the number of runs.

    Without ``-m full`` this takes a sample of the faults, and of the edges under each of them.

    Raises:
        SweepFailure: a rule was broken, or the schedule did not repeat up to the edge.
    """
    outcomes: collections.Counter[Any] = collections.Counter()
    for seed in SEEDS:
        # The sample always has the first fault and the last.
        every_fault = list(faults(replay(scenario, Point(seed=seed))))
        for fault in some(every_fault, FAULTS, scenario, seed, always=(0, -1)):
            broken = replay(scenario, Point(seed=seed, inject=(fault,)))
            outcomes[broken.outcome] += 1
            for cancel in _some_edges(broken, victims, every):
                point = Point(seed=seed, inject=(fault, cancel))
                run = replay(scenario, point)
                outcomes[run.outcome] += 1
                if run.traces[cancel.kind][: cancel.n] != broken.traces[cancel.kind][: cancel.n]:
                    raise SweepFailure(point, "the schedule is not repeatable up to the edge")
    runs = sum(outcomes.values())
    lines = [f"cancel of {'+'.join(victims)} and fault: {runs} runs, {len(SEEDS)} seeds"]
    lines += [f"  {count:6} x {outcome}" for outcome, count in outcomes.most_common()]
    sys.stdout.write("\n".join(lines) + "\n")
    return runs


def _some_edges(run: Run[Any], victims: tuple[str, ...], every: int) -> list[CancelAt]:
    edges = list(_edges(run, victims))
    if tiers.everything():
        return edges[run.point.seed % every :: every]
    return some(edges, EDGES, run.point, victims, always=(0, -1) if edges else ())


def _edges(run: Run[Any], victims: tuple[str, ...]) -> Iterator[CancelAt]:
    for kind, trace in run.traces.items():
        last = max(run.exits[victim][kind] for victim in victims)
        for n, task in enumerate(trace[:last], 1):
            yield CancelAt(kind=kind, n=n, victims=victims, task=task)
