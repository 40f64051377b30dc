"""An application that awaits its pages: the destination of postcopy in this very process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest
import trio

import trimig
from trimig.errors import GuestFailed, StateError
from trimig.guests import LazyAppGuest
from trimig.status import Status

MiB = 1 << 20
SIZE = 4 * MiB
PAGE = 4096
LIMIT = 60


def able(*, recover: bool = True, background: int = MiB, **more: bool) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True, **more),
        parameters=trimig.Parameters(max_bandwidth=20 * MiB, downtime_limit=1, max_postcopy_bandwidth=background),
        recovery_retry=recover,
        recovery_timeout=20 if recover else 0.2,
    )


class Both:
    """A source that goes ahead of its memory, and its destination."""

    def __init__(self, source: trimig.AppGuest, target: LazyAppGuest, config: trimig.Config) -> None:
        self.source = source
        self.target = target
        self.config = config
        self.content = source.ram[0].pages.copy()
        self.sender, self.taker = trimig.Monitor(), trimig.Monitor()
        self.errors: list[trimig.TrimigError] = []

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take)
            while not self.taker.addresses:
                await self.taker.wait_changed()
            self.sender.add_listener(
                lambda event: self.sender.start_postcopy() if event.data.get("status") == "setup" else None
            )
            with self._noting():
                await trimig.migrate(self.source, self.taker.addresses[0], self.config, monitor=self.sender)

    async def _take(self) -> None:
        with self._noting():
            await trimig.receive(self.target, "tcp:127.0.0.1:0", self.config, monitor=self.taker)

    @contextlib.contextmanager
    def _noting(self):  # type: ignore[no-untyped-def]  # a generator of nothing
        try:
            yield
        except trimig.TrimigError as error:
            self.errors.append(error)

    async def read(self, page: int) -> bytes:
        """A page, as the application sees it when it asks before."""
        await self.target.ensure_present("ram", page * PAGE, PAGE)
        async with self.target.running():
            return bytes(self.target.ram[0].pages[page])

    def right(self, page: int) -> bytes:
        return bytes(self.content[page])


@contextlib.asynccontextmanager
async def both(config: trimig.Config) -> AsyncIterator[Both]:
    with (
        trio.fail_after(LIMIT),
        trimig.AppGuest("lazy") as source,
        LazyAppGuest("lazy", running=False) as target,
    ):
        for guest in (source, target):
            guest.add_ram("ram", SIZE)
        source.ram[0].pages[:] = np.random.default_rng(3).integers(0, 256, (SIZE // PAGE, PAGE), np.uint8)
        source.ram[0].pages[5] = 0
        yield Both(source, target, config)


@pytest.mark.parametrize("preempt", [False, True], ids=["one connection", "two"])
async def test_tasks_get_what_they_ask_for_while_the_rest_follows(*, preempt: bool) -> None:
    """At 1 MiB/s the memory takes four seconds; what is asked for is there at once, across the end of a page, too."""
    config = able(postcopy_preempt=preempt, postcopy_blocktime=True)
    async with both(config) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.run)
        await it.taker.wait_status(Status.POSTCOPY_ACTIVE)
        for page in (1000, 5, 700, 1000, 0):
            assert await it.read(page) == it.right(page)
        await it.target.ensure_present("ram", 800 * PAGE - 1, 2)
        assert np.array_equal(it.target.ram[0].pages[799:801], it.content[799:801])
        async with it.target.running():
            it.target.ram[0].pages[1000] = 1  # written here: it must not be overwritten
        assert it.taker.status is Status.POSTCOPY_ACTIVE
        it.sender.set_parameters(max_postcopy_bandwidth=0)
        await it.taker.wait_status(Status.COMPLETED)
        assert not it.errors
        assert (it.target.ram[0].pages[1000] == 1).all()
        it.content[1000] = 1
        assert np.array_equal(it.target.ram[0].pages, it.content)
        assert it.taker.info()["postcopy-blocktime"] >= 0
        assert it.sender.info()["ram"]["postcopy-requests"] >= 4
        await it.target.ensure_present("ram", 0, SIZE)


async def test_a_wait_goes_on_over_a_lost_connection() -> None:
    """O6: the page that a task waits for is asked for again."""
    async with both(able(background=64 << 10)) as it:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.run)
            await it.taker.wait_status(Status.POSTCOPY_ACTIVE)
            await it.sender.wait_status(Status.POSTCOPY_ACTIVE)
            it.taker.pause("the test cuts it")
            assert await it.read(900) == it.right(900)
            it.sender.set_parameters(max_postcopy_bandwidth=0)
        assert not it.errors
        assert np.array_equal(it.target.ram[0].pages, it.content)


async def test_when_the_rest_is_lost_the_waiting_are_told() -> None:
    """No task waits for ever, and no task reads zeros in place of a page that never came."""
    async with both(able(recover=False, background=64 << 10)) as it:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.run)
            await it.taker.wait_status(Status.POSTCOPY_ACTIVE)
            await it.sender.wait_status(Status.POSTCOPY_ACTIVE)
            it.taker.pause("the test cuts it")
            with pytest.raises(GuestFailed, match="will never come"):
                await it.target.ensure_present("ram", 0, SIZE)
        assert it.taker.status is Status.POSTCOPY_LOST
        assert it.target.run_state == "paused"
        assert all(isinstance(error, trimig.PostcopyLost) for error in it.errors)
        assert it.taker.counters.missing


async def test_inside_the_gate_no_task_waits_for_the_network() -> None:
    """A pause waits for the task inside."""
    async with both(able()) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.run)
        await it.taker.wait_status(Status.POSTCOPY_ACTIVE)
        async with it.target.running():
            with pytest.raises(StateError, match=r"before guest.running"):
                await it.target.ensure_present("ram", 0, SIZE)
        it.sender.set_parameters(max_postcopy_bandwidth=0)


async def test_outside_of_postcopy_it_is_there() -> None:
    with LazyAppGuest("lazy") as guest:
        guest.add_ram("ram", SIZE)
        await guest.ensure_present("ram", 0, SIZE)
        for block, start, length in (("rom", 0, 1), ("ram", SIZE, 1), ("ram", -1, 1), ("ram", 0, -1)):
            with pytest.raises(ValueError, match="are not in a RAM block"):
                await guest.ensure_present(block, start, length)


async def test_an_app_guest_that_does_not_ask_is_refused_with_the_way_out() -> None:
    """The GIL hazard."""
    with (
        trimig.AppGuest("app", running=False) as guest,
        pytest.raises(GuestFailed, match="LazyAppGuest, which awaits its pages"),
    ):
        await trimig.receive(guest, "tcp:127.0.0.1:0", able())
