"""A migration that waits until it may stop its guest, cancelled at every edge, or with a connection that breaks."""

from __future__ import annotations

import dataclasses

from tests.sweeps.migration import Outcome, migrate_once, scenario
from tests.sweeps.sampled import sweep
from trimig.engine.source.turns import MOST, Turn
from trimig.testing import CancelSweep, FaultSweep, Scenario, SweepContext


async def behind_others(context: SweepContext) -> Outcome:
    """One migration, where other attempts have all turns and keep them."""
    for _ in range(MOST):
        await Turn().take()
    return await migrate_once(context, pages=2)


def waiting() -> Scenario[Outcome]:
    return dataclasses.replace(scenario(), body=behind_others)


def test_cancel_at_every_edge_of_a_migration_that_waits_for_its_turn() -> None:
    """L12: the guest runs on, and a second migration of the same guest succeeds."""
    report = sweep(waiting(), CancelSweep(victims=("source",)))
    assert "cancelled" in " ".join(map(str, report.outcomes))
    assert ("returned", "returned", "destination") in report.outcomes


def test_a_connection_that_breaks_during_the_wait() -> None:
    """T3: the attempt that waits fails, and leaves nothing behind."""
    report = sweep(waiting(), FaultSweep(kinds=("reset", "silence")), every=7)
    assert report.runs > 10
