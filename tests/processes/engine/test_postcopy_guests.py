"""Postcopy of a guest in a process of its own, whole: what is given back, what is measured, and a busy neighbour."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import trio

import trimig
from trimig.channel import offload
from trimig.guests.workload.guest import MiB, WorkloadGuest
from trimig.status import Status

SIZE = 16 * MiB
LIMIT = 60


def able(*, background: int = 0, **more: bool) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True, **more),
        parameters=trimig.Parameters(max_bandwidth=40 * MiB, downtime_limit=1, max_postcopy_bandwidth=background),
        recovery_retry=True,
        recovery_timeout=20,
    )


class Pair:
    """A guest on its way by postcopy, both sides in this process."""

    def __init__(self, source: WorkloadGuest, target: WorkloadGuest, config: trimig.Config) -> None:
        self.source = source
        self.target = target
        self.config = config
        self.sender, self.taker = trimig.Monitor(), trimig.Monitor()
        self.errors: list[trimig.TrimigError] = []

    async def run(self) -> None:
        """Until both have ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take)
            while not self.taker.addresses:
                await self.taker.wait_changed()
            await self._send(self.taker.addresses[0])

    async def _take(self) -> None:
        try:
            await trimig.receive(self.target, "tcp:127.0.0.1:0", self.config, monitor=self.taker)
        except trimig.TrimigError as error:
            self.errors.append(error)

    async def _send(self, uri: str) -> None:
        self.sender.add_listener(self._soon)
        try:
            await trimig.migrate(self.source, uri, self.config, monitor=self.sender)
        except trimig.TrimigError as error:
            self.errors.append(error)

    def _soon(self, event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == "setup":
            self.sender.start_postcopy()


@contextlib.asynccontextmanager
async def pair(config: trimig.Config) -> AsyncIterator[Pair]:
    with trio.fail_after(LIMIT):
        async with (
            WorkloadGuest.open(size=SIZE, hot=4 * MiB, dirty_rate=40 * MiB, seed=2) as source,
            WorkloadGuest.open(size=SIZE, hot=4 * MiB, running=False) as target,
        ):
            yield Pair(source, target, config)


async def proved(guest: WorkloadGuest) -> None:
    await guest.pause()
    proof = await guest.verify()
    assert proof.ok, str(proof)


def memory_of(guest: WorkloadGuest) -> int:
    """Bytes that the host keeps for it."""
    return os.fstat(guest.block.fd).st_blocks * 512


async def test_blocktime_is_measured_where_it_is_asked_for() -> None:
    """G11, P13, S14: in ms, one for each processor, after completion, and only with the capability."""
    async with pair(able(postcopy_blocktime=True, background=8 * MiB)) as both:
        await both.run()
        assert not both.errors
        info = both.taker.info()
        assert info["postcopy-vcpu-blocktime"] == [info["postcopy-blocktime"]]
        assert both.target.touch_times is not None
        assert info["postcopy-blocktime"] == round(both.target.touch_times.blocked / 1e6)
        assert both.target.touch_times.waits > 0
        assert both.target.touch_times.blocked > 0  # its memory takes two seconds, and it does not
        await proved(both.target)


async def test_blocktime_is_not_shown_unasked() -> None:
    async with pair(able()) as both:
        await both.run()
        assert "postcopy-blocktime" not in both.taker.info()


async def test_release_ram_gives_the_memory_back() -> None:
    """O10, S9: the source's memory is gone when the destination has it; without the capability it stays."""
    for release in (False, True):
        async with pair(able(release_ram=release)) as both:
            before = memory_of(both.source)
            await both.run()
            assert not both.errors
            left = memory_of(both.source)
            if release:
                assert left < before // 8
            else:
                assert left == before
            await proved(both.target)


async def test_release_ram_and_a_lost_connection() -> None:
    """O10: recovery is refused with the reason, and no side waits for it."""
    async with pair(able(release_ram=True, background=2 * MiB)) as both:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.run)
            await both.sender.wait_status(Status.POSTCOPY_ACTIVE)
            await both.taker.wait_status(Status.POSTCOPY_ACTIVE)
            both.sender.pause("the test cuts it")
            await both.taker.wait_status(Status.POSTCOPY_PAUSED)
            await both.sender.wait_status(Status.POSTCOPY_LOST)
            both.taker.abandon("the source has given its memory back")
        here, there = both.errors
        assert "release-ram has given the sent memory back" in str(here)
        assert isinstance(there, trimig.PostcopyLost)
        assert there.missing
        assert both.target.run_state == "paused"
        assert both.sender.owner is both.taker.owner is trimig.Ownership.DESTINATION


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """A thread of Python that never waits."""
    stop = threading.Event()

    def spin() -> None:
        number = 0
        while not stop.is_set():
            number += 1

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def test_busy_python_thread_beside_the_server_of_faults() -> None:
    """The GIL hazard: it is slower, and ends."""
    async with pair(able()) as both:
        with busy_thread():
            await both.run()
        assert not both.errors
        await proved(both.target)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_guest_goes_on_over_a_connection_that_breaks_and_is_found_again(side: str) -> None:
    """O6: by itself, with recovery_retry; the downtime is that of the switch (G16)."""
    async with pair(able(background=8 * MiB)) as both:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.run)
            monitor = both.sender if side == "source" else both.taker
            await both.sender.wait_status(Status.POSTCOPY_ACTIVE)
            await monitor.wait_status(Status.POSTCOPY_ACTIVE)
            downtime = both.sender.counters.downtime
            monitor.pause("the test cuts it")
        assert not both.errors, both.errors
        assert both.sender.counters.downtime == downtime
        await proved(both.target)


async def stranger(uri: str, hears: list[bytes]) -> None:
    """Connect in silence, and stay until the other side closes the connection; or find that nothing listens any more."""
    host, _, port = uri.removeprefix("tcp:").rpartition(":")
    try:
        stream = await trio.open_tcp_stream(host, int(port))
    except OSError:
        return
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await stream.receive_some():
                hears.append(data)


@pytest.mark.parametrize("preempt", [False, True], ids=["one connection", "two"])
async def test_no_peer_is_let_in_while_a_connection_is_alive(*, preempt: bool) -> None:
    """A stranger while the connections are alive hears nothing, and is out when all of them are there; the guest arrives.

    All are there: with one, when its first page that is not zero has come; with two, when the second was chosen.
    """
    hears: list[bytes] = []
    async with pair(able(background=8 * MiB, postcopy_preempt=preempt)) as both:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.run)
            while not both.taker.addresses:
                await both.taker.wait_changed()
            address = both.taker.addresses[0]
            for status in (Status.ACTIVE, Status.POSTCOPY_ACTIVE):
                await both.taker.wait_status(status)
                await both.sender.wait_status(status)
                nursery.start_soon(stranger, address, hears)
                with pytest.raises(trimig.StateError):
                    both.taker.recover("tcp:127.0.0.1:0")
            if not preempt:
                async for picture in both.taker.watch(0.01):
                    if picture.normal_pages:
                        break
                host, _, port = address.removeprefix("tcp:").rpartition(":")
                with pytest.raises(OSError, match=r"refused|all attempts to connect"):
                    await trio.open_tcp_stream(host, int(port))
        assert not both.errors, both.errors
        assert not hears
        await proved(both.target)


@pytest.mark.parametrize("preempt", [False, True], ids=["one", "preempt"])
async def test_a_thread_on_each_side_serves_the_guest_and_none_is_left(*, preempt: bool) -> None:
    """Also after a lost connection; behind the recovery both work again."""
    async with pair(able(postcopy_preempt=preempt, background=8 * MiB)) as both:
        opened = descriptors()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.run)
            await both_threads(both)
            both.sender.pause("the test cuts it")
            await both.taker.wait_status(Status.POSTCOPY_PAUSED)
            assert offload.pumps().borrowed_tokens == 0
            await both_threads(both)
        assert not both.errors
        assert offload.pumps().borrowed_tokens == 0
        left = descriptors()
        assert left <= opened, left - opened
        await proved(both.target)


def descriptors() -> collections.Counter[str]:
    """What kinds are open, and how often: sockets, eventfds and others."""
    found: collections.Counter[str] = collections.Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the directory
            found[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
    return found


async def both_threads(both: Pair) -> None:
    """Wait until a thread works on each side, as nothing but the end or a loss of the connection ends it for long."""
    await both.sender.wait_status(Status.POSTCOPY_ACTIVE)
    await both.taker.wait_status(Status.POSTCOPY_ACTIVE)
    while offload.pumps().borrowed_tokens < 2:
        assert both.taker.status is Status.POSTCOPY_ACTIVE
        await trio.sleep(0.001)
