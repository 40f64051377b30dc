"""Turns: of many attempts in one run of trio, only a few have their guests stopped at the same time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running
from trimig.engine.source.turns import MOST, PATIENCE, Turn
from trimig.status import Status
from trimig.testing import VirtualLink

# -- alone -------------------------------------------------------------------------------------------------------------


async def test_a_turn_is_had_at_once_and_kept_until_it_is_given_back(autojump_clock: trio.testing.MockClock) -> None:
    turns = [Turn() for _ in range(MOST)]
    assert [await turn.take() for turn in turns] == [False] * MOST
    assert [await turn.take() for turn in turns] == [False] * MOST
    for turn in turns:
        turn.close()
        turn.close()
    assert [await Turn().take() for _ in range(MOST)] == [False] * MOST
    assert trio.current_time() == 0


async def test_the_others_come_one_after_the_other(autojump_clock: trio.testing.MockClock) -> None:
    order: list[tuple[int, float]] = []

    async def attempt(number: int) -> None:
        turn = Turn()
        assert await turn.take() is (number >= MOST)
        order.append((number, trio.current_time()))
        await trio.sleep(0.1)
        turn.close()

    async with trio.open_nursery() as nursery:
        for number in range(2 * MOST + 1):
            nursery.start_soon(attempt, number)
            await trio.testing.wait_all_tasks_blocked()
    times = [round(time, 3) for _, time in sorted(order)]
    assert times == [0.0] * MOST + [0.1] * MOST + [0.2]


async def test_turns_that_do_not_end_hold_up_each_other_attempt_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    for _ in range(MOST):
        await Turn().take()
    times: list[float] = []

    async def attempt() -> None:
        turn = Turn()
        assert await turn.take()
        times.append(trio.current_time())
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(attempt)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert times == pytest.approx([PATIENCE, 2 * PATIENCE, 3 * PATIENCE])


async def test_a_turn_that_has_passed_a_stuck_one_is_passed_on(autojump_clock: trio.testing.MockClock) -> None:
    for _ in range(MOST):
        await Turn().take()
    times: list[float] = []

    async def attempt() -> None:
        turn = Turn()
        await turn.take()
        times.append(trio.current_time())
        await trio.sleep(0.1)
        turn.close()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(attempt)
    assert times == pytest.approx([PATIENCE, PATIENCE + 0.1, PATIENCE + 0.2])


async def test_a_cancelled_wait_leaves_the_queue(autojump_clock: trio.testing.MockClock) -> None:
    held = [Turn() for _ in range(MOST)]
    for turn in held:
        await turn.take()
    cancelled, later = Turn(), Turn()
    with trio.move_on_after(0.1):
        await cancelled.take()
    cancelled.close()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(later.take)
        await trio.testing.wait_all_tasks_blocked()
        held[0].close()
    assert trio.current_time() == pytest.approx(0.1)


async def test_each_run_of_trio_has_turns_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    for _ in range(MOST):
        await Turn().take()
    turn = Turn()
    # A second run in a thread of its own: its turns are free.
    assert await trio.to_thread.run_sync(trio.run, turn.take) is False


# -- migrations --------------------------------------------------------------------------------------------------------


class Watch:
    """Counts the guests that are stopped."""

    def __init__(self) -> None:
        self.stopped = self.most = 0

    def listen(self, event: trimig.Event) -> None:
        if event.name != "PHASE":
            return
        if event.data["phase"] == "pause" and event.data["step"] == "begin":
            self.stopped += 1
            self.most = max(self.most, self.stopped)
        if event.data["phase"] == "commit" and event.data["step"] == "end":
            self.stopped -= 1


async def migrate_all(pairs: Sequence[Pair]) -> list[trimig.Summary]:
    found: list[trimig.Summary] = []

    async def one(pair: Pair) -> None:
        here, _ = await pair.both()
        found.append(here)

    async with trio.open_nursery() as nursery:
        for pair in pairs:
            nursery.start_soon(one, pair)
    return found


async def test_of_twenty_migrations_four_at_most_stop_their_guests(autojump_clock: trio.testing.MockClock) -> None:
    watch = Watch()
    pairs = [Pair() for _ in range(20)]
    for pair in pairs:
        pair.here.add_listener(watch.listen)
    summaries = await migrate_all(pairs)
    assert all(isinstance(summary, trimig.Summary) for summary in summaries)
    assert (watch.stopped, watch.most) == (0, MOST)
    for pair in pairs:
        assert pair.source.digest() == pair.target.digest()


async def test_what_a_guest_writes_while_it_waits_is_sent_before_it_stops(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """20 pages in the second of the wait: 80 ms of downtime on this link, if no other pass followed."""
    for _ in range(MOST):
        await Turn().take()
    link = VirtualLink(rate=1e6, window=8192)
    pair = Pair(running(pages=64, rate=20), link=link, config_here=config(downtime_limit=10))
    here, _ = await pair.both()
    assert here.total_time > PATIENCE
    assert here.downtime < 0.030
    assert pair.source.digest() == pair.target.digest()


async def test_a_waiting_attempt_is_cancelled_with_its_guest_running(autojump_clock: trio.testing.MockClock) -> None:
    for _ in range(MOST):
        await Turn().take()
    pair = Pair()

    async def user() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await trio.sleep(PATIENCE / 2)
        assert pair.source.run_state == "running"
        pair.here.cancel("test")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(user)
        here, _ = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    assert "pause" not in pair.source.events()


async def test_an_attempt_that_fails_gives_its_turn_back(autojump_clock: trio.testing.MockClock) -> None:
    async def refuse() -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("the journal is full")

    for _ in range(2 * MOST):
        here, _ = await Pair().both(commit=refuse)
        assert isinstance(here, trimig.MigrationError)
    assert [await Turn().take() for _ in range(MOST)] == [False] * MOST


async def test_a_held_migration_keeps_no_turn(autojump_clock: trio.testing.MockClock) -> None:
    capabilities = trimig.Capabilities(pause_before_switchover=True)
    pairs = [Pair(config_here=trimig.Config(capabilities=capabilities)) for _ in range(2 * MOST)]

    async def user() -> None:
        for pair in pairs:
            await pair.here.wait_status(Status.PRE_SWITCHOVER)
        assert trio.current_time() < PATIENCE
        assert [await Turn().take() for _ in range(MOST)] == [False] * MOST
        for pair in pairs:
            pair.here.resume()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(user)
        summaries = await migrate_all(pairs)
    assert all(isinstance(summary, trimig.Summary) for summary in summaries)
