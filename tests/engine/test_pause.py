"""pause-before-switchover: the guest stands still, nothing is sent, and the caller must say that it goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running, told, waiting
from trimig.status import Status
from trimig.testing import FakeDevice, Fault, ScriptedGuest, VirtualLink

HOLD = trimig.Capabilities(pause_before_switchover=True)


def held_pair(**options: Any) -> Pair:
    """Both sides know of the pause."""
    options.setdefault("link", VirtualLink(latency=0.001, record=True))
    return Pair(config_here=dataclasses.replace(config(), capabilities=HOLD), **options)


async def go_on(pair: Pair, after: float = 1.0) -> None:
    """Let it go on after some time in the pause."""
    assert await pair.here.wait_status(Status.PRE_SWITCHOVER) is Status.PRE_SWITCHOVER
    await trio.sleep(after)
    pair.here.resume()


async def test_statuses_and_stop_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """N1, F14: active, stop, pre-switchover, device; the time of the pause is shown by itself."""
    pair = held_pair()
    seen: list[tuple[str, Any]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told, pair.here, seen)
        nursery.start_soon(go_on, pair, 7.0)
        await trio.testing.wait_all_tasks_blocked()
        here, _ = await pair.both()
    order = [what for what in seen if what[0] in ("MIGRATION", "STOP")]
    assert order == [
        ("MIGRATION", "setup"),
        ("MIGRATION", "active"),
        ("STOP", None),
        ("MIGRATION", "pre-switchover"),
        ("MIGRATION", "device"),
        ("MIGRATION", "handover"),
        ("MIGRATION", "completed"),
    ]
    assert here.downtime_parts.held == pytest.approx(7.0)
    assert here.downtime == pytest.approx(here.downtime_parts.total)
    assert pair.target.running


async def test_a_cancelled_guest_runs_before_the_tracking_ends(autojump_clock: trio.testing.MockClock) -> None:
    """Ending it takes the longer, the more memory there is."""
    pair = held_pair()

    async def cancel() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        pair.here.cancel("the test")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        here, _ = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    events = pair.source.events()
    assert events[events.index("pause") :] == ["pause", "resume", "untrack", "release"]


class Bug(BaseException):
    """No error that a guest may have."""


class Broken(ScriptedGuest):
    """Its `resume` has such a bug."""

    async def resume(self) -> None:
        await super().resume()
        raise Bug


async def test_a_bug_in_resume_leaves_neither_tracking_nor_connections(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pair = held_pair(source=Broken(blocks={"ram": 4}, devices=[FakeDevice("clock", size=8, seed=1)]))

    async def cancel() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        pair.here.cancel("the test")

    with pytest.RaisesGroup(Bug, trimig.PeerFailed, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            nursery.start_soon(pair.receive)
            await pair.migrate()
    assert not pair.source.tracking
    assert not pair.source.claimed
    assert pair.link.a.closed


async def test_nothing_is_sent_while_it_is_held(autojump_clock: trio.testing.MockClock) -> None:
    """N3, N6: for an hour, and a destination that knows of the pause is patient."""
    pair = held_pair()
    sent: list[int] = []

    async def watch() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        await trio.testing.wait_all_tasks_blocked()
        sent.append(pair.link.sent("a->b"))
        assert pair.here.info()["status"] == "pre-switchover"
        assert pair.source.run_state == "paused"
        await trio.sleep(3600)
        sent.append(pair.link.sent("a->b"))
        pair.here.resume()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await pair.both()
    assert sent[0] == sent[1] > 0
    assert pair.source.digest() == pair.target.digest()


async def test_destination_that_knows_nothing_of_the_pause_is_patient_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """N6: only the source needs the capability, as in QEMU; and it may be held for an hour."""
    pair = held_pair(config_there=config(stall_timeout=20.0))
    assert not pair.config_there.capabilities.pause_before_switchover
    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on, pair, 3600.0)
        here, _ = await pair.both()
    assert here.downtime_parts.held == pytest.approx(3600.0)
    assert pair.target.running
    assert pair.source.digest() == pair.target.digest()


async def test_cancel_while_it_is_held(autojump_clock: trio.testing.MockClock) -> None:
    """N4, gaps G4 and G6: QEMU leaves some guests stopped here; ours runs again, and can be migrated."""
    pair = held_pair()

    async def cancel() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        pair.here.cancel("not today")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        here, there = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    assert isinstance(there, trimig.TrimigError)
    assert pair.source.running
    assert pair.here.status is Status.CANCELLED
    again = Pair(pair.source, waiting())
    await again.both()
    assert again.target.running


@pytest.mark.parametrize("event", ["STOP", "pre-switchover"])
async def test_cancel_at_the_moment_of_entering(autojump_clock: trio.testing.MockClock, event: str) -> None:
    """N5, gap G5: the seed of QEMU waits for ever if a cancel comes just before the pause."""
    pair = held_pair()

    def cancel(told: trimig.Event) -> None:
        if event in (told.name, told.data.get("status")):
            pair.here.cancel("at the worst moment")

    pair.here.add_listener(cancel)
    with trio.fail_after(60):
        here, _ = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    assert pair.source.running


async def test_go_on_at_the_moment_of_entering(autojump_clock: trio.testing.MockClock) -> None:
    """F14: a word that comes with the event itself is not lost."""
    pair = held_pair()

    def go_on_at_once(told: trimig.Event) -> None:
        if told.data.get("status") == "pre-switchover":
            pair.here.resume()

    pair.here.add_listener(go_on_at_once)
    here, _ = await pair.both()
    assert here.downtime_parts.held == 0
    assert pair.target.running


async def test_surplus_word_does_not_skip_a_later_pause(autojump_clock: trio.testing.MockClock) -> None:
    """F13, F15: refused outside of the pause, also twice in a row, and the next migration is held again."""
    pair = held_pair()

    async def impatient() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        pair.here.resume()
        with pytest.raises(trimig.StateError, match="the status is device"):
            pair.here.resume()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        await pair.both()
    with pytest.raises(trimig.StateError, match="the status is completed"):
        pair.here.resume()

    second = held_pair(source=pair.target, target=pair.source)
    second.here = pair.here
    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on, second, 5.0)
        here, _ = await second.both()
    assert here.downtime_parts.held == pytest.approx(5.0)


async def test_connection_that_breaks_while_it_is_held(autojump_clock: trio.testing.MockClock) -> None:
    """The guest runs again at once, and not when the caller asks."""
    pair = held_pair()

    async def cut() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        await trio.sleep(1)
        pair.link.b.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        here, _ = await pair.both()
    assert isinstance(here, trimig.TransportFailed)
    assert here.owner is trimig.Ownership.SOURCE
    assert pair.source.running


async def test_guest_that_is_resumed_meanwhile_is_stopped_again(autojump_clock: trio.testing.MockClock) -> None:
    """N3: the state of a guest that runs is never sent."""
    pair = held_pair(source=running(rate=50))

    async def meddle() -> None:
        await pair.here.wait_status(Status.PRE_SWITCHOVER)
        await pair.source.resume()
        await trio.sleep(1)
        pair.here.resume()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(meddle)
        await pair.both()
    assert pair.source.events().count("pause") == 2
    assert pair.source.misuse == []
    assert pair.source.digest() == pair.target.digest()


async def test_paused_guest_is_held_as_well(autojump_clock: trio.testing.MockClock) -> None:
    """M2: and it arrives paused."""
    pair = held_pair(source=running(run_state="paused"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on, pair)
        await pair.both()
    assert pair.target.run_state == "paused"
    assert "pause" not in pair.source.events()


async def test_decision_that_is_cut_after_the_pause_is_uncertain(autojump_clock: trio.testing.MockClock) -> None:
    """Gap G1: QEMU runs both guests then."""
    pair = held_pair(
        link=VirtualLink(latency=0.001, faults=[Fault(direction="b->a", after=8 + 16 + 8 + 1, kind="reset")])
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on, pair)
        here, _ = await pair.both()
    assert isinstance(here, trimig.HandoverUncertain)
    assert pair.source.run_state == "paused"
