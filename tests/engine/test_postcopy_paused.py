"""A guest that does not run, sent by postcopy: it comes as it is to a trimig, and a QEMU would run it."""

from __future__ import annotations

import pytest
import trio

import trimig
from tests.engine.test_switchover_ack import Both, config


@pytest.mark.parametrize("state", ["running", "paused", "prelaunch"])
async def test_a_paused_guest_by_postcopy(autojump_clock: trio.testing.MockClock, state: str) -> None:
    """Gap G17: the run state travels, and its source is warned that a QEMU does not look at it."""
    each = config(here=False, postcopy=True)
    both = Both(each, each)
    if state != "running":
        await both.source.pause()
        both.source._run_state = state
    both.sender.add_listener(lambda e: both.sender.start_postcopy() if e.data.get("status") == "setup" else None)
    await both.run()
    assert not both.errors
    assert both.sender.info()["ram"]["dirty-sync-count"] > 0
    assert both.target.run_state == state
    warned = [text for text in both.sender.counters.warnings if "by postcopy" in text]
    assert bool(warned) is (state != "running"), warned
    assert both.sender.status is trimig.Status.COMPLETED
