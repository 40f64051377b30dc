"""The decision: prepare, the commit hook, the answer and its absence, the fence, and settling what is uncertain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import ACCEPTED, REFUSED, Destination, Pair, config, played, running, waiting
from trimig.engine.source.announce import PING_OPENED
from trimig.engine.source.switchover import PING_PREPARE
from trimig.status import Status
from trimig.testing import FakeDevice, Fault, VirtualLink
from trimig.wire import encoder as wire
from trimig.wire.return_path import Pong

SOURCE, DESTINATION, UNKNOWN = trimig.Ownership.SOURCE, trimig.Ownership.DESTINATION, trimig.Ownership.UNKNOWN


async def silent(there: Destination) -> None:
    """Prepares, takes the decision and says nothing."""
    await there.prepare()
    await there.until_closed()


async def doubtful(pair: Pair, **hooks: Callable[[], Awaitable[object]]) -> trimig.TrimigError:
    """The error of a source whose answer never comes."""
    async with played(pair, silent):
        with pytest.raises(trimig.TrimigError) as caught:
            await pair.migrate(**hooks)
    assert pair.link.a.closed
    return caught.value


# -- prepare -------------------------------------------------------------------------------------------------------


async def test_device_that_cannot_be_loaded_is_found_before_the_decision(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """P4, L12, gap G13: the source resumes, and not a byte of the decision was sent."""
    device = FakeDevice("clock", size=8, load_error=trimig.RemoteProtocolError("no such clock", section="clock"))
    pair = Pair(target=waiting(devices=[device]))
    here, there = await pair.both()
    assert isinstance(here, trimig.PeerFailed)
    assert here.code == 1
    assert here.owner is SOURCE
    assert isinstance(there, trimig.RemoteProtocolError)
    assert there.section == "clock"
    assert pair.source.running
    assert "resume" in pair.source.events()
    assert not pair.target.executed
    assert pair.link.recorded("a->b").endswith(wire.ping(PING_PREPARE))


async def test_destination_that_does_not_prove_that_it_is_prepared(autojump_clock: trio.testing.MockClock) -> None:
    """T3: taken back after handover_timeout."""
    pair = Pair(config_here=config(handover_timeout=7.0))

    async def script(there: Destination) -> None:
        await there.until(wire.ping(PING_OPENED))
        await there.say(Pong(value=PING_OPENED))
        await there.until(wire.ping(PING_PREPARE))
        await there.say(Pong(value=PING_PREPARE + 1))
        await there.until_closed()

    async with played(pair, script):
        with pytest.raises(trimig.TransportFailed, match="did not confirm within 7 s"):
            await pair.migrate()
    assert trio.current_time() == pytest.approx(7, abs=0.1)
    assert pair.source.running


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no"), trimig.StateError("not now")])
async def test_commit_hook_that_fails_takes_everything_back(
    autojump_clock: trio.testing.MockClock, error: Exception
) -> None:
    """The decision could not be recorded, so there is none."""
    pair = Pair()

    async def commit() -> None:
        raise error

    here, there = await pair.both(commit=commit)
    assert isinstance(here, trimig.GuestFailed)
    assert str(error) in str(here)
    assert here.owner is SOURCE
    assert isinstance(there, trimig.PeerFailed)
    assert str(error) in str(there)
    assert pair.source.running
    assert not pair.target.executed


async def test_commit_hook_comes_between_the_proof_and_the_decision(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair()
    seen: list[object] = []

    async def commit() -> None:
        seen.append((pair.here.status, pair.source.run_state, pair.target.events()[-1]))
        assert wire.ping(PING_PREPARE) in pair.link.recorded("a->b")
        assert pair.link.recorded("a->b").endswith(wire.ping(PING_PREPARE))

    here, _ = await pair.both(commit=commit)
    assert seen == [(Status.DEVICE, "paused", "load")]
    assert here.prepared


async def test_commit_hook_that_hangs_ends_with_the_time_limit(autojump_clock: trio.testing.MockClock) -> None:
    """T3: the guest stands still meanwhile."""
    pair = Pair(config_here=config(handover_timeout=3.0))
    here, _ = await pair.both(commit=trio.sleep_forever)
    assert isinstance(here, trimig.GuestFailed)
    assert "the commit hook took longer than 3 s" in str(here)
    assert pair.source.running


# -- the answer ----------------------------------------------------------------------------------------------------


async def test_refusal_after_the_decision_gives_the_guest_back(autojump_clock: trio.testing.MockClock) -> None:
    """K4, L12: SHUT 1 is the destination's word that it does not run the guest."""
    pair = Pair()

    async def script(there: Destination) -> None:
        await there.prepare()
        await there.until(b'"page_size"')
        assert pair.here.owner is UNKNOWN
        await there.say(REFUSED)
        await there.until_closed()

    async with played(pair, script):
        with pytest.raises(trimig.PeerFailed, match="SHUT 1") as caught:
            await pair.migrate()
    assert caught.value.owner is SOURCE
    assert pair.here.status is Status.FAILED
    assert pair.source.running


async def test_guest_that_cannot_be_brought_to_life_is_given_back(autojump_clock: trio.testing.MockClock) -> None:
    """P4: both sides agree, over the wire."""
    pair = Pair(target=waiting(delays={"activate": 1000}), config_here=config(handover_timeout=5.0))
    pair.config_there = config(handover_timeout=3.0)
    here, there = await pair.both()
    assert isinstance(here, trimig.PeerFailed)
    assert isinstance(there, trimig.GuestFailed)
    assert there.owner is SOURCE
    assert pair.referee.running() == ("source",)


async def test_missing_answer_leaves_the_guest_paused_and_says_what_to_do(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """T1, K10, gap G1: never a guess."""
    pair = Pair(config_here=config(handover_timeout=4.0))
    error = await doubtful(pair)
    assert isinstance(error, trimig.HandoverUncertain)
    assert error.owner is pair.here.owner is UNKNOWN
    assert "nothing came for 4 s" in str(error)
    assert "settle" in str(error)
    assert pair.here.info() == {
        "status": "failed", "owner": "unknown", "error-desc": str(error), "dirty-tracking": "marks",
    }  # fmt: skip
    assert pair.source.run_state == "paused"
    assert not pair.source.claimed
    assert trio.current_time() == pytest.approx(4, abs=0.1)


async def test_connection_that_closes_instead_of_an_answer_is_uncertain_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """K10, gap G1."""
    pair = Pair()

    async def script(there: Destination) -> None:
        await there.prepare()
        await there.until(b'"page_size"')

    async with played(pair, script):
        with pytest.raises(trimig.HandoverUncertain, match="closed the connection"):
            await pair.migrate()
    assert trio.current_time() < 1


@pytest.mark.parametrize("nonsense", [b"\0\x63\0\0", b"\0\1\0\5\0\0\0\0\0", b"\0\1\0\4\0"])
async def test_nonsense_instead_of_an_answer_is_uncertain(
    autojump_clock: trio.testing.MockClock, nonsense: bytes
) -> None:
    """K3: an invalid message is no refusal."""
    pair = Pair()

    async def script(there: Destination) -> None:
        await there.prepare()
        await there.until(b'"page_size"')
        await there.say(nonsense)

    async with played(pair, script):
        with pytest.raises(trimig.HandoverUncertain):
            await pair.migrate()
    assert pair.source.run_state == "paused"


async def test_cancel_while_the_answer_is_due_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    """Gap G2: it has happened, and so the cancel comes too late."""
    pair = Pair()
    scope = trio.CancelScope()

    async def script(there: Destination) -> None:
        await there.prepare()
        await there.until(b'"page_size"')
        scope.cancel()
        await trio.sleep(3)
        await there.say(ACCEPTED)
        await there.until_closed()

    async with played(pair, script):
        with scope:
            summary = await pair.migrate()
    assert summary.confirmed
    assert not scope.cancelled_caught
    assert pair.here.status is Status.COMPLETED


async def test_decision_of_which_nothing_can_leave_is_no_decision_on_a_socket(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A kernel socket says how much it took; here a commit hook fills it and the peer does not read."""
    near, far = trio.socket.socketpair()
    pair = Pair(config_here=config(handover_timeout=2.0))

    async def fill() -> None:
        with trio.move_on_after(1):
            while True:
                await near.send(bytes(1 << 16))

    async with trio.open_nursery() as nursery:

        async def play() -> None:
            there = Destination(trio.SocketStream(far))
            await there.prepare()

        nursery.start_soon(play)
        with pytest.raises(trimig.TransportFailed, match="took nothing of the decision within 2 s"):
            await trimig.migrate(pair.source, trio.SocketStream(near), pair.config_here, monitor=pair.here, commit=fill)
        far.close()
    assert pair.here.status is Status.FAILED
    assert pair.source.running


# -- the fence -----------------------------------------------------------------------------------------------------


async def test_fence_that_finds_the_guest_at_the_destination(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair()

    async def fence() -> trimig.Ownership:
        assert pair.here.status is Status.UNCERTAIN
        return DESTINATION

    async with played(pair, silent):
        summary = await pair.migrate(fence=fence)
    assert pair.here.status is Status.COMPLETED
    assert pair.here.owner is DESTINATION
    assert "the fence found the guest at the destination" in summary.warnings[-1]
    assert summary.downtime == pytest.approx(summary.downtime_parts.total)
    assert pair.source.run_state == "paused"


async def test_fence_that_gives_the_guest_back(autojump_clock: trio.testing.MockClock) -> None:
    """T5: it runs here again, and the failure has its reason."""
    pair = Pair()

    async def fence() -> trimig.Ownership:
        return SOURCE

    error = await doubtful(pair, fence=fence)
    assert isinstance(error, trimig.TransportFailed)
    assert error.owner is SOURCE
    assert "the fence gave the guest back" in str(error)
    assert pair.here.info()["error-desc"] == str(error)
    assert pair.source.running


async def test_fence_gives_back_a_guest_that_cannot_be_resumed(autojump_clock: trio.testing.MockClock) -> None:
    """The owner is certain all the same."""
    pair = Pair(running(delays={"resume": 1000}))

    async def fence() -> trimig.Ownership:
        return SOURCE

    error = await doubtful(pair, fence=fence)
    assert isinstance(error, trimig.GuestNotResumed)
    assert error.owner is pair.here.owner is SOURCE
    assert pair.here.status is Status.FAILED


async def unknown() -> trimig.Ownership:
    """Cannot tell."""
    await trio.lowlevel.checkpoint()
    return UNKNOWN


async def broken() -> trimig.Ownership:
    """The way to the destination is broken too."""
    raise OSError("no route to host")


@pytest.mark.parametrize("answer", [trimig.Owner.HERE, trimig.Owner.ELSEWHERE, "source", None, True], ids=str)
async def test_a_fence_that_answers_something_else(autojump_clock: trio.testing.MockClock, answer: Any) -> None:
    """T3: it is not taken for an answer, and the error says what it was."""
    pair = Pair()

    async def fence() -> Any:
        return answer

    error = await doubtful(pair, fence=fence)
    assert isinstance(error, trimig.HandoverUncertain)
    assert f"the fence hook must return a trimig.Ownership, not {answer!r}" in str(error)
    assert pair.source.owner is trimig.Owner.UNKNOWN


@pytest.mark.parametrize("fence", [unknown, broken, trio.sleep_forever])
async def test_fence_that_finds_nothing_out(
    autojump_clock: trio.testing.MockClock, fence: Callable[[], Awaitable[trimig.Ownership]]
) -> None:
    """T3: whether it says so, fails or hangs, the question stays open, and can be settled."""
    pair = Pair(config_here=config(handover_timeout=3.0))
    error = await doubtful(pair, fence=fence)
    assert isinstance(error, trimig.HandoverUncertain)
    assert ("no route to host" in str(error)) == (fence is broken)
    assert pair.here.status is Status.UNCERTAIN
    assert trio.current_time() < 7
    await error.settle(SOURCE)
    assert pair.source.running


async def test_fence_is_not_asked_where_the_owner_is_certain(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair(target=waiting(pages=5))

    async def fence() -> trimig.Ownership:
        raise AssertionError("asked")

    here, _ = await pair.both(fence=fence)
    assert isinstance(here, trimig.PeerFailed)


# -- settling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
async def test_an_old_error_settles_no_later_attempt(autojump_clock: trio.testing.MockClock, *, shared: bool) -> None:
    """The first was settled by the guest, and it went to another host: what is known of the first says nothing of the second."""
    pair = Pair()
    first = await doubtful(pair)
    assert isinstance(first, trimig.HandoverUncertain)
    await pair.source.settle(trimig.Owner.HERE)
    again = Pair(pair.source)
    if shared:
        again.here = pair.here
    second = await doubtful(again)
    assert isinstance(second, trimig.HandoverUncertain)
    for owner in (SOURCE, DESTINATION):
        with pytest.raises(trimig.StateError, match=r"already settled; .* a later attempt"):
            await first.settle(owner)
    assert (pair.source.owner, pair.source.running, first.settled) == (trimig.Owner.UNKNOWN, False, None)
    await second.settle(SOURCE)
    assert pair.source.running
    with pytest.raises(trimig.StateError, match="already settled: it is certain that the guest is here"):
        await first.settle(DESTINATION)


async def test_settled_as_source_it_runs_here_again(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair()
    error = await doubtful(pair)
    assert isinstance(error, trimig.HandoverUncertain)
    await error.settle(SOURCE)
    assert pair.source.running
    assert pair.here.status is Status.FAILED
    assert pair.here.owner is SOURCE
    with pytest.raises(trimig.StateError, match="already settled"):
        await error.settle(DESTINATION)


async def test_settled_as_destination_it_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """The monitor is free for another attempt."""
    pair = Pair()
    error = await doubtful(pair)
    assert isinstance(error, trimig.HandoverUncertain)
    with pytest.raises(trimig.StateError, match="uncertain"):
        await trimig.migrate(running(), VirtualLink().a, monitor=pair.here)
    await error.settle(DESTINATION)
    assert pair.source.run_state == "paused"
    assert pair.here.status is Status.COMPLETED
    assert pair.here.owner is DESTINATION


async def test_settled_guest_that_stood_still_is_not_started(autojump_clock: trio.testing.MockClock) -> None:
    """L12, gap G19."""
    pair = Pair(running(run_state="paused"))
    error = await doubtful(pair)
    assert isinstance(error, trimig.HandoverUncertain)
    await error.settle(SOURCE)
    assert pair.source.run_state == "paused"
    assert pair.here.status is Status.FAILED


async def test_settling_may_be_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    """A guest that could not be resumed is this side's all the same, and can be resumed later."""
    guest = running(delays={"resume": 1000})
    pair = Pair(guest)
    error = await doubtful(pair)
    assert isinstance(error, trimig.HandoverUncertain)
    with pytest.raises(trimig.GuestNotResumed, match="could not be resumed"):
        await error.settle(SOURCE)
    assert (pair.here.status, guest.owner, error.settled) == (Status.FAILED, trimig.Owner.HERE, SOURCE)
    guest._delays.clear()
    await guest.resume()
    assert guest.running


# -- without an answer by design -------------------------------------------------------------------------------------


async def test_cut_inside_the_decision_without_a_return_path_is_uncertain(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Gap G3."""
    plain = Pair(config_here=config(return_path=False))
    await plain.both()
    cut = Fault(direction="a->b", after=plain.link.sent("a->b") - 5, kind="reset")
    pair = Pair(config_here=config(return_path=False), link=VirtualLink(faults=[cut]))
    here, there = await pair.both()
    assert isinstance(here, trimig.HandoverUncertain)
    assert isinstance(there, trimig.Summary)
    assert pair.source.run_state == "paused"
