"""The owner of a guest: what it refuses, and how it is settled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

import trimig
from trimig.errors import GuestFailed, NotOwner, Owner, StateError
from trimig.owner import OwnerState, check_here


def state(owner: Owner, *, runs: bool = False) -> OwnerState:
    return OwnerState(owner, runs=lambda: runs)


@pytest.mark.parametrize(
    ("owner", "text"),
    [(Owner.ELSEWHERE, "was handed over, or has not arrived here"), (Owner.UNKNOWN, r"guest\.settle\(\)")],
)
def test_side_that_is_not_the_owner_is_refused_with_the_reason(owner: Owner, text: str) -> None:
    with pytest.raises(NotOwner, match=f"cannot be resumed: .*{text}") as caught:
        state(owner).check("be resumed")
    assert caught.value.guest_owner is owner
    with pytest.raises(NotOwner):
        state(owner).starting().__enter__()
    with pytest.raises(NotOwner, match="cannot be migrated"):
        check_here(state(owner))


def test_a_guest_that_executes_is_not_handed_over() -> None:
    running = state(Owner.HERE, runs=True)
    with pytest.raises(GuestFailed, match="started in the moment"):
        running.set(Owner.UNKNOWN)
    running.check("be served")


def test_nor_one_that_is_being_started() -> None:
    it = state(Owner.HERE)
    with it.starting(), pytest.raises(GuestFailed, match="started in the moment"):
        it.set(Owner.UNKNOWN)
    it.set(Owner.UNKNOWN)
    assert it.owner is Owner.UNKNOWN


@pytest.mark.parametrize(
    ("steps", "handed_over"),
    [
        ([], False),
        ([(Owner.HERE, False), (Owner.ELSEWHERE, False)], False),  # it is given to receive()
        ([(Owner.HERE, False), (Owner.ELSEWHERE, True)], True),
        ([(Owner.HERE, False), (Owner.ELSEWHERE, True), (Owner.HERE, False)], False),  # it has come back
    ],
)
def test_gone_is_not_the_same_as_not_arrived(steps: list[tuple[Owner, bool]], handed_over: bool) -> None:
    it = state(Owner.ELSEWHERE)
    for owner, away in steps:
        it.set(owner, handed_over=away)
    assert it.handed_over is handed_over


# -- settle ------------------------------------------------------------------------------------------------------------


async def test_settle_is_refused_where_there_is_nothing_to_settle() -> None:
    for owner in (Owner.HERE, Owner.ELSEWHERE):
        with pytest.raises(StateError, match="already settled"):
            await state(owner).settle(Owner.HERE)
    with pytest.raises(StateError, match="may still come"):
        await state(Owner.UNKNOWN).settle(Owner.HERE)
    with pytest.raises(ValueError, match="definite owner"):
        await state(Owner.UNKNOWN).settle(Owner.UNKNOWN)


async def test_two_cannot_settle_differently_at_once() -> None:
    """Else the guest would be resumed here and given up to the destination."""
    resuming, go_on = trio.Event(), trio.Event()
    it = state(Owner.UNKNOWN)

    async def settle(owner: Owner) -> None:
        resuming.set()
        await go_on.wait()
        it.set(owner)

    it.set(Owner.UNKNOWN, settle=settle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.settle, Owner.HERE)
        await resuming.wait()
        with pytest.raises(StateError, match="another task is settling it"):
            await it.settle(Owner.ELSEWHERE)
        go_on.set()
    assert it.owner is Owner.HERE
    with pytest.raises(StateError, match="already settled"):
        await it.settle(Owner.ELSEWHERE)


# -- the guests that come with trimig ------------------------------------------------------------------------------------

MADE: dict[str, Callable[[bool], trimig.Guest]] = {
    "AppGuest": lambda running: trimig.AppGuest(running=running),
    "LazyAppGuest": lambda running: trimig.LazyAppGuest(running=running),
}


@pytest.mark.parametrize("kind", MADE)
async def test_a_guest_that_waits_to_be_received_is_not_run(kind: str) -> None:
    assert MADE[kind](True).owner is Owner.HERE
    guest = MADE[kind](False)
    assert guest.owner is Owner.ELSEWHERE
    with pytest.raises(NotOwner):
        await guest.resume()
    assert guest.run_state == "inmigrate"


async def test_a_parked_guest_is_not_owned_here_until_it_is_filled() -> None:
    with trimig.ParkedGuest() as guest:
        assert guest.owner is Owner.ELSEWHERE
        with pytest.raises(NotOwner):
            await trimig.migrate(guest, "tcp:127.0.0.1:1")


async def test_tasks_that_wait_are_told_when_the_guest_has_gone() -> None:
    """And go on waiting while its owner is not known; new ones are refused in both cases."""
    outcomes: list[str] = []

    async def serve(guest: trimig.AppGuest, started: trio.Event) -> None:
        started.set()
        try:
            async with guest.running():
                outcomes.append("served")
        except NotOwner:
            outcomes.append("told")

    with trimig.AppGuest() as guest:
        for then, outcome in ((Owner.ELSEWHERE, "told"), (Owner.HERE, "served")):
            await guest.resume()
            await guest.pause()
            outcomes.clear()
            async with trio.open_nursery() as nursery:
                started = trio.Event()
                nursery.start_soon(serve, guest, started)
                await started.wait()
                await trio.testing.wait_all_tasks_blocked()
                guest.set_owner(Owner.UNKNOWN)
                await trio.testing.wait_all_tasks_blocked()
                assert outcomes == []
                with pytest.raises(NotOwner):
                    async with guest.running():
                        raise AssertionError("it was let in")
                guest.set_owner(then, handed_over=then is Owner.ELSEWHERE)
                if then is Owner.HERE:
                    await guest.resume()
            assert outcomes == [outcome]
            guest.set_owner(Owner.HERE)


async def test_waiting_for_an_arrival_is_no_error() -> None:
    with trimig.AppGuest(running=False) as guest:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.wait_running)
            await trio.testing.wait_all_tasks_blocked()
            guest.set_owner(Owner.ELSEWHERE)  # receive() begins
            await trio.testing.wait_all_tasks_blocked()
            guest.set_owner(Owner.HERE)
            await guest.resume()
