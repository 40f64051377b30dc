"""Functions that are told of each event, and that cannot hurt the migration."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import trio.testing

import trimig
from tests.engine.pair import Pair
from trimig.monitor.core import MonitorCore
from trimig.status import UNSUCCESSFUL, Status


def statuses(into: list[str]) -> Callable[[trimig.Event], None]:
    """A listener that notes the statuses."""

    def listener(event: trimig.Event) -> None:
        if event.name == "MIGRATION":
            into.append(event.data["status"])

    return listener


async def test_listener_hears_setup_and_end_and_no_more_once_removed(autojump_clock: trio.testing.MockClock) -> None:
    """H5."""
    pair = Pair()
    kept: list[str] = []
    removed: list[str] = []
    pair.here.add_listener(statuses(kept))
    remove = pair.here.add_listener(statuses(removed))
    await pair.both()
    assert kept == removed == ["setup", "active", "device", "handover", "completed"]
    remove()
    remove()
    again = Pair(pair.target, pair.source)
    again.here = pair.here
    await again.both()
    assert len(kept) == 2 * len(removed)


async def test_listener_is_called_at_the_very_moment(autojump_clock: trio.testing.MockClock) -> None:
    """H6, H7: what it sees is the status of which it is told, and the predicates say what it may rely on."""
    pair = Pair()
    seen: list[tuple[str, bool, bool, bool]] = []

    def listener(event: trimig.Event) -> None:
        if event.name == "MIGRATION":
            now = pair.here.status
            assert now.value == event.data["status"]
            seen.append((now.value, now is Status.SETUP, now is Status.COMPLETED, now in UNSUCCESSFUL))

    pair.here.add_listener(listener)
    await pair.both()
    assert seen[0] == ("setup", True, False, False)
    assert seen[-1] == ("completed", False, True, False)
    assert [entry[1:] for entry in seen[1:-1]] == [(False, False, False)] * 3


async def test_listener_that_fails_is_removed_and_hurts_no_other(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """H5: the migration goes on, the others hear everything, and the log says what happened."""
    pair = Pair()
    calls: list[str] = []
    heard: list[str] = []

    def bad(event: trimig.Event) -> None:
        calls.append(event.name)
        raise ArithmeticError("a listener's own mistake")

    pair.here.add_listener(bad)
    pair.here.add_listener(statuses(heard))
    with caplog.at_level(logging.ERROR, "trimig.monitor.monitor"):
        await pair.both()
    assert calls == ["MIGRATION"]
    assert heard[-1] == "completed"
    assert "a listener failed at the event MIGRATION" in caplog.text
    assert "a listener's own mistake" in caplog.text


async def test_cancel_out_of_a_listener(autojump_clock: trio.testing.MockClock) -> None:
    """Every listener hears the events in one order, also those that are caused by a listener."""
    pair = Pair()
    first: list[str] = []
    last: list[str] = []

    def cancel(event: trimig.Event) -> None:
        if event.data.get("status") == "active":
            pair.here.cancel("seen enough")

    pair.here.add_listener(statuses(first))
    pair.here.add_listener(cancel)
    pair.here.add_listener(statuses(last))
    here, _ = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    assert first == last == ["setup", "active", "cancelling", "cancelled"]
    assert pair.source.running


async def test_listener_may_remove_another_one() -> None:
    """Which is then not called any more, not even for the event at hand."""
    monitor = MonitorCore()
    heard: list[str] = []
    removers: list[Callable[[], None]] = []
    monitor.add_listener(lambda event: removers[0]())
    removers.append(monitor.add_listener(statuses(heard)))
    monitor.emit("MIGRATION", status="setup")
    assert heard == []
