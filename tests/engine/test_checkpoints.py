"""Where the engine gives other tasks a turn, and where it must not (rules C2 and C11); no long slices."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running, waiting
from trimig.channel import closing
from trimig.channel.channel import Channel
from trimig.channel.channels import Channels
from trimig.channel.limiter import Limiter
from trimig.channel.return_path import ReturnPathReader
from trimig.engine import guest_calls
from trimig.monitor.core import MonitorCore
from trimig.monitor.monitor import Counters
from trimig.status import ReturnPath, Role, Status
from trimig.testing import VirtualLink
from trimig.wire.return_path import Pong, Shut, encode


async def test_the_two_calls_are_checkpoints_with_the_least_to_do(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair(running(pages=1, run_state="paused"), waiting(pages=1), link=VirtualLink())

    async def receive() -> None:
        with trio.testing.assert_checkpoints():
            await pair.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        with trio.testing.assert_checkpoints():
            await pair.migrate()


async def test_a_refusal_is_a_checkpoint_too(autojump_clock: trio.testing.MockClock) -> None:
    guest = running()
    guest.claim("a test")
    link = VirtualLink()
    for call in (trimig.migrate(guest, link.a), trimig.receive(guest, link.b)):
        with trio.testing.assert_checkpoints(), pytest.raises(trimig.StateError):
            await call


async def test_channel(autojump_clock: trio.testing.MockClock) -> None:
    link = VirtualLink()
    channel = Channel(link.a)
    with trio.testing.assert_checkpoints():
        await channel.send(b"x")
    await link.b.send_all(b"y")
    with trio.testing.assert_checkpoints():
        await channel.receive_into(memoryview(bytearray(10)))
    with trio.testing.assert_no_checkpoints():
        channel.backlog()
    with trio.testing.assert_checkpoints():
        await closing.close(link.a)


async def test_limiter_within_its_budget_needs_no_turn(autojump_clock: trio.testing.MockClock) -> None:
    limiter = Limiter(Channels(), 0, Counters())
    with trio.testing.assert_no_checkpoints():
        assert await limiter.pages(3) == 3
        await limiter.bytes(100)
        limiter.set_rate(5)
        limiter.lift()


async def test_answers_that_are_there_need_no_turn(autojump_clock: trio.testing.MockClock) -> None:
    link = VirtualLink()
    reader = ReturnPathReader(Channel(link.a), {})
    reader.state = ReturnPath.COMMITTED
    await link.b.send_all(encode(Pong(value=1)) + encode(Shut(status=0)))
    with trio.testing.assert_checkpoints():
        await reader.run()
    with trio.testing.assert_no_checkpoints():
        await reader.wait_pong(1)
        await reader.wait_answer()
    assert reader.shut == 0


async def test_guest_calls(autojump_clock: trio.testing.MockClock) -> None:
    guest = running(run_state="paused")
    with trio.testing.assert_checkpoints():
        await guest_calls.call("resuming", guest.resume, 1)
    with trio.testing.assert_checkpoints():
        assert await guest_calls.bring_back("resumed", trio.lowlevel.checkpoint, 1) is None
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await guest_calls.bring_back("resumed", trio.lowlevel.checkpoint, 1) is None, "the shield does not hold"
    assert not scope.cancelled_caught


async def test_monitor_changes_and_looks_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """State changes are synchronous: no other task runs between the test and the change."""
    monitor = MonitorCore()
    with trio.testing.assert_no_checkpoints():
        monitor.begin(Role.SOURCE, config())
        monitor.advance(Status.ACTIVE)
        monitor.statistics()
        monitor.info()
        monitor.set_parameters(max_bandwidth=1)
        monitor.cancel("now")
    with trio.testing.assert_checkpoints():
        await monitor.wait_status(Status.CANCELLING)
    events = monitor.events()
    monitor.advance(Status.CANCELLED)
    with trio.testing.assert_checkpoints():
        await events.__anext__()
    with trio.testing.assert_checkpoints(), pytest.raises(StopAsyncIteration):
        await events.__anext__()


async def test_settling_is_a_checkpoint_where_it_has_something_to_do(autojump_clock: trio.testing.MockClock) -> None:
    guest = running(run_state="paused")

    async def settle(owner: trimig.Owner) -> None:
        guest.set_owner(owner)
        await guest.resume()

    guest.set_owner(trimig.Owner.UNKNOWN, settle=settle)
    error = trimig.HandoverUncertain("who knows", settle=guest.settle)
    with trio.testing.assert_checkpoints():
        await error.settle(trimig.Ownership.SOURCE)
    assert guest.running


async def test_other_tasks_get_turns_while_pages_move() -> None:
    """rule C11: a pass over memory does not hold the run loop; here 16 MiB.

    On the real clock: a virtual one stands still while a task is busy, and the receiver pauses now and then.
    """
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    pair = Pair(running(pages=4096), waiting(pages=4096), link=VirtualLink(window=1 << 30))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await pair.both()
        nursery.cancel_scope.cancel()
    assert turns > 2 * 16
