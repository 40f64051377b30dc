"""A guest whose memory never came, and one whose owner is not known: neither is sent on nor filled by accident."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import running, waiting
from trimig import Owner, Status
from trimig.testing import virtual_link


async def moved(source: Any, target: Any) -> None:
    one, other = virtual_link()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trimig.receive, target, other)
        await trimig.migrate(source, one)


@pytest.fixture
def lost() -> trimig.LazyAppGuest:
    """The destination's guest of a postcopy that was given up."""
    guest = trimig.LazyAppGuest("lost", running=False)
    guest.add_ram("ram", 64 * 4096)
    return guest


async def lose(target: trimig.LazyAppGuest) -> None:
    source = trimig.AppGuest("lost")
    source.add_ram("ram", 64 * 4096).pages[:] = 7
    config = trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True),
        parameters=trimig.Parameters(max_bandwidth=4096, max_postcopy_bandwidth=4096),
    )
    here, there = trimig.Monitor(), trimig.Monitor()

    def steer(event: trimig.Event) -> None:
        if event.data.get("status") == "setup":
            here.start_postcopy()
        if event.data.get("status") == "postcopy-active":
            here.pause()

    here.add_listener(steer)
    one, other = virtual_link()

    async def give_up(monitor: trimig.Monitor) -> None:
        assert await monitor.wait_status(Status.POSTCOPY_PAUSED) is Status.POSTCOPY_PAUSED
        monitor.abandon("the test")

    async def send() -> None:
        with pytest.raises(trimig.PostcopyLost):
            await trimig.migrate(source, one, config, monitor=here)

    async with trio.open_nursery() as nursery:
        for monitor in (here, there):
            nursery.start_soon(give_up, monitor)
        nursery.start_soon(send)
        with pytest.raises(trimig.PostcopyLost) as caught:
            await trimig.receive(target, other, config, monitor=there)
    assert caught.value.missing
    source.close()


async def test_a_guest_without_all_of_its_memory_is_not_sent_on(
    autojump_clock: trio.testing.MockClock, lost: trimig.LazyAppGuest
) -> None:
    """Its missing pages read as zero: the destination would take them for its memory."""
    await lose(lost)
    assert (lost.owner, lost.run_state) == (Owner.HERE, "paused")
    for _ in range(2):
        one, _ = virtual_link()
        monitor = trimig.Monitor()
        with pytest.raises(
            trimig.StateError, match=r"^the migration is blocked: \d+ pages of the guest's memory never came"
        ):
            await trimig.migrate(lost, one, monitor=monitor)
        assert monitor.status is Status.NONE
    lost.blockers.refuse_all()  # what the engine knows is no blocker that could be refused
    with pytest.raises(trimig.StateError, match="never came"):
        lost.blockers.check()
    lost.close()


async def test_the_next_guest_is_whole(autojump_clock: trio.testing.MockClock, lost: trimig.LazyAppGuest) -> None:
    await lose(lost)
    source = trimig.AppGuest("lost")
    source.add_ram("ram", 64 * 4096).pages[:] = 9
    await moved(source, lost)
    assert lost.blockers.reasons == ()
    third = trimig.AppGuest("lost", running=False)
    third.add_ram("ram", 64 * 4096)
    await moved(lost, third)
    assert (third.ram[0].pages == 9).all()
    for guest in (source, lost, third):
        guest.close()


async def test_a_guest_whose_owner_is_not_known_is_not_filled() -> None:
    """It may be this side's alone: settled, and then filled if it is not."""
    guest = running()
    await guest.pause()
    asked: list[Owner] = []

    async def settle(owner: Owner) -> None:
        asked.append(owner)

    guest.set_owner(Owner.UNKNOWN, settle=settle)
    before = guest.ram[0].pages.copy()
    one, other = virtual_link()
    with pytest.raises(trimig.NotOwner, match=r"cannot be filled with another one: .*guest\.settle") as caught:
        await trimig.receive(guest, other)
    assert caught.value.guest_owner is guest.owner is Owner.UNKNOWN
    with contextlib.suppress(trio.BrokenResourceError):
        assert await one.receive_some() == b""  # its stream is closed all the same
    assert (guest.ram[0].pages == before).all()
    await guest.settle(Owner.ELSEWHERE)
    assert asked == [Owner.ELSEWHERE]


@pytest.mark.parametrize("call", [trimig.migrate, trimig.receive])
async def test_a_stream_is_closed_also_where_another_argument_is_wrong(call: Any) -> None:
    guest = running() if call is trimig.migrate else waiting()
    one, other = virtual_link()
    with pytest.raises(TypeError, match=r"^config must be"):
        await call(guest, one, {})
    with contextlib.suppress(trio.BrokenResourceError):
        assert await other.receive_some() == b""
    with pytest.raises(trio.ClosedResourceError):
        await one.send_all(b"x")
