"""What a caller gets of a monitor, and what only the engine has."""

from __future__ import annotations

import trio
import trio.testing

from tests.test_monitor import brought_to
from trimig.monitor.core import MonitorCore
from trimig.monitor.monitor import Monitor, core_of
from trimig.status import Status as S


def test_the_engines_side_is_not_public() -> None:
    """A caller cannot move the status of a migration."""
    engine_only = {name for name in vars(MonitorCore) if not name.startswith("_")} - set(vars(Monitor))
    assert engine_only == {
        "advance",
        "begin",
        "cancel_reason",
        "control",
        "count",
        "emit",
        "given_up",
        "interrupt",
        "listening",
        "postcopy_wanted",
        "recovery_wanted",
        "set_guest",
        "take_recovery",
        "warn",
    } | (engine_only & {"yanked", "cut"})
    assert {name for name in vars(Monitor) if not name.startswith("_")} - set(vars(MonitorCore)) == set()


async def test_a_monitor_shows_and_steers_what_the_engine_moves(autojump_clock: trio.testing.MockClock) -> None:
    monitor = Monitor()
    core = brought_to(S.ACTIVE, monitor=core_of(monitor))
    assert (monitor.status, monitor.role, monitor.owner) == (core.status, core.role, core.owner)
    assert monitor.info() == core.info()
    assert monitor.statistics() == core.statistics()
    monitor.counters.normal = 7
    assert core.counters.normal == 0
    monitor.cancel("enough")
    assert (core.status, core.cancel_reason) == (S.CANCELLING, "enough")
