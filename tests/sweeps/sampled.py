"""The points of a sweep that run: all with ``-m full``; else the outermost, and a sample drawn by the commit's id.

The outermost points of each kind are always the same ones: the first and the last edge of each task, the first and the
last two bytes of each direction for each kind of fault, the first call of each name. So a test can rely on the outcomes
of these points; the sample adds others from commit to commit (:func:`tests.tiers.seed`).
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Final, TypeVar

import numpy as np

from tests import tiers
from trimig.testing import (
    CancelAt,
    FailCall,
    Fault,
    FaultSweep,
    LeapAt,
    Point,
    Run,
    Scenario,
    Sweep,
    SweepReport,
    run_sweep,
)

T = TypeVar("T")

#: The number of interleavings of each sweep.
SEEDS: Final = (0, 1, 2)
#: The number of points of one sweep under one interleaving, besides the outermost.
SAMPLE: Final = 20


def some(points: Sequence[T], size: int, *key: object, always: Sequence[int] = ()) -> list[T]:
    """In order: *size* of the points, drawn by the commit's id and *key*, and those at the indices *always*; or all."""
    if tiers.everything():
        return list(points)
    draw = random.Random(f"{tiers.seed()} {key}")
    chosen = set(draw.sample(range(len(points)), min(size, len(points)))) | {index % len(points) for index in always}
    return [points[index] for index in sorted(chosen)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A part of another sweep: its outermost points, and *size* drawn ones."""

    sweep: Sweep
    size: int

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """The points, in the order of the other sweep."""
        every = list(self.sweep.points(baseline))
        yield from some(every, self.size, baseline.point.seed, self.sweep, always=outermost(every))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NearChanges:
    """A fault sweep without the bytes far inside a run of equal bytes, such as the content of a page: they are all alike.

    Attributes:
        sent: what goes from a to b when nothing is disturbed. All bytes of the other direction are kept.
        near: the bytes that are kept at both ends of a run.
    """

    sweep: FaultSweep
    sent: bytes
    near: int = 12

    def points(self, baseline: Run[Any]) -> Iterator[Point]:
        """The points that are left, in the order of the other sweep."""
        assert baseline.sent["a->b"] == len(self.sent)
        values = np.frombuffer(self.sent, np.uint8)
        changes = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
        kept = {at for change in changes for at in range(change - self.near, change + self.near + 1)}
        for point in self.sweep.points(baseline):
            (fault,) = point.inject
            assert isinstance(fault, Fault)
            if fault.direction == "b->a" or fault.after in kept:
                yield point


def outermost(points: Sequence[Point]) -> list[int]:
    """Indices of the first and the last ones of each kind."""
    kinds: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index, point in enumerate(points):
        kinds[_kind(point)].append(index)
    return [index for of_one in kinds.values() for index in of_one[:1] + of_one[-2:]]


def _kind(point: Point) -> Hashable:
    (injection,) = point.inject
    match injection:
        case CancelAt() | LeapAt():
            return injection.kind, injection.task
        case Fault():
            return injection.direction, injection.kind
        case FailCall():
            return injection.name, injection.error
    return type(injection).__name__


def sweep(
    scenario: Scenario[T], *sweeps: Sweep, seeds: Sequence[int] = SEEDS, every: int = 1, size: int = SAMPLE
) -> SweepReport:
    """:func:`trimig.testing.run_sweep` over the points of this tier, shown.

    Args:
        every: with ``-m full``, only each *every*-th point.
        size: otherwise the number of drawn points, for each sweep and each seed.
    """
    if tiers.everything():
        return run_sweep(scenario, *sweeps, seeds=seeds, every=every).show()
    sampled = [Sampled(sweep=each, size=size) for each in sweeps]
    return run_sweep(scenario, *sampled, seeds=seeds).show()
