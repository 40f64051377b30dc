"""Each transport once on real sockets: a migration over it arrives, is cancelled at six points, and is cut.

The sweeps on a virtual clock go through every step; these tests prove that the streams of the real transports fulfil
the same contract. After every test tests/conftest.py checks that no descriptor, child or task is left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
import trimig.guests
from tests.conftest import children
from tests.qemu.relay import exec_relay
from tests.transport.pki import Pki
from trimig import MiB, Ownership, Status
from trimig.channel.limiter import Limiter
from trimig.guest import PAGE_SIZE

LIMIT = 20
SIZE = 4 * MiB
#: With this limit a pass takes a tenth of a second.
BANDWIDTH = 40 * MiB
TRANSPORTS = ("tcp", "unix", "exec", "fd", "ws", "wss", "tls over tcp", "tls over unix")


def source_of(seed: int) -> trimig.AppGuest:
    guest = trimig.AppGuest("every", running=True)
    guest.add_ram("ram", SIZE)
    guest.add_device(trimig.guests.TimerState())
    guest.ram[0].pages[:] = np.random.default_rng(seed).integers(0, 256, guest.ram[0].pages.shape, np.uint8)
    return guest


def empty() -> trimig.AppGuest:
    guest = trimig.AppGuest("every", running=False)
    guest.add_ram("ram", SIZE)
    guest.add_device(trimig.guests.TimerState())
    return guest


class Way:
    """One transport: the destination's address, the source's address, and the configuration of both.

    A new address for every attempt, because some can be used only once.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self._name = name
        self._directory = directory
        self._count = 0
        self._pair: tuple[int, int] | None = None
        # If the source is cancelled before it has connected, a relay sends nothing: the stall timeout finds that out.
        plain = trimig.Config(
            parameters=trimig.Parameters(max_bandwidth=BANDWIDTH), handover_timeout=10, stall_timeout=2
        )
        self.here = self.there = plain
        if name in ("wss", "tls over tcp", "tls over unix"):
            pki = Pki(directory)
            self.there = plain.with_options(tls=pki.make("server"))
            hostname = ("tls-hostname=localhost",) if name == "tls over unix" else ()
            self.here = plain.with_options((), hostname, tls=pki.make("client"))

    def listen(self) -> str:
        """The address for the destination."""
        self._count += 1
        path = self._directory / f"s{self._count}"
        match self._name:
            case "tcp" | "tls over tcp":
                return "tcp:localhost:0"
            case "ws" | "wss":
                return f"{self._name}://localhost:0/"
            case "unix" | "tls over unix":
                return f"unix:{path}"
            case "exec":
                return exec_relay("listen", path)
        ours, theirs = socket.socketpair()
        self._pair = ours.detach(), theirs.detach()
        return f"fd:{self._pair[1]}"

    def connect(self, listening: str) -> str:
        """The address for the source, made from the one that the destination reports."""
        match self._name:
            case "exec":
                return exec_relay("connect", self._directory / f"s{self._count}")
            case "fd":
                assert self._pair is not None
                return f"fd:{self._pair[0]}"
        return listening

    async def ready(self, monitor: trimig.Monitor) -> str:
        """Wait until the source can connect; the address."""
        if self._name == "exec":
            path = trio.Path(self._directory / f"s{self._count}")
            while not await path.exists():  # noqa: ASYNC110 - it is another process that makes it
                await trio.sleep(0.005)
            return self.connect("")
        if self._name == "fd":
            await trio.lowlevel.checkpoint()
            return self.connect("")
        while not monitor.addresses:
            assert monitor.status in (Status.NONE, Status.SETUP), monitor.info()
            await monitor.wait_changed()
        return self.connect(monitor.addresses[0])


End = trimig.Summary | trimig.TrimigError | None


class Attempt:
    """One migration of *source* into *target*, both sides in this process."""

    def __init__(self, way: Way, source: trimig.AppGuest, target: trimig.AppGuest) -> None:
        self._way = way
        self._guests = source, target
        self.monitors = trimig.Monitor(), trimig.Monitor()
        self.scopes = trio.CancelScope(), trio.CancelScope()
        self.ends: list[End] = [None, None]

    async def run(self) -> None:
        """Wait until both sides have ended; their results are in :attr:`ends`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._side, 1, functools.partial(self._receive, self._way.listen()))
            uri = await self._way.ready(self.monitors[1])
            await self._side(0, functools.partial(self._send, uri))
            if not self.monitors[0].statistics().total:
                self.scopes[1].cancel("no source has connected")

    async def _send(self, uri: str) -> trimig.Summary:
        return await trimig.migrate(self._guests[0], uri, self._way.here, monitor=self.monitors[0])

    async def _receive(self, uri: str) -> trimig.Summary:
        return await trimig.receive(self._guests[1], uri, self._way.there, monitor=self.monitors[1])

    async def _side(self, number: int, call: Callable[[], object]) -> None:
        with self.scopes[number]:
            try:
                self.ends[number] = await call()  # type: ignore[misc]  # a coroutine function, partially applied
            except trimig.TrimigError as error:
                self.ends[number] = error


@asynccontextmanager
async def two_guests() -> AsyncIterator[tuple[trimig.AppGuest, trimig.AppGuest]]:
    with trio.fail_after(LIMIT), source_of(3) as source, empty() as target:
        yield source, target


async def arrives(way: Way, source: trimig.AppGuest, target: trimig.AppGuest) -> None:
    attempt = Attempt(way, source, target)
    await attempt.run()
    assert isinstance(attempt.ends[0], trimig.Summary), attempt.ends
    assert isinstance(attempt.ends[1], trimig.Summary), attempt.ends
    assert attempt.ends[0].confirmed
    assert np.array_equal(source.ram[0].pages, target.ram[0].pages)
    assert (source.run_state, target.run_state) == ("paused", "running")


@pytest.mark.parametrize("name", TRANSPORTS)
async def test_migration_arrives(tmp_path: Path, name: str) -> None:
    """B1-B4, B7, B17, K5: memory, run state, and the confirmation."""
    async with two_guests() as (source, target):
        await arrives(Way(name, tmp_path), source, target)


#: The points of the cancels: a status of the source, or the share of the memory that has been sent.
POINTS: tuple[str | float, ...] = ("setup", "active", 0.2, 0.5, 0.9, "device")


def at(monitor: trimig.Monitor, point: str | float, act: Callable[[], object]) -> Callable[[trimig.Event], None]:
    """A listener that acts at the point."""

    def heard(event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == point:
            act()

    return heard


@contextlib.contextmanager
def when_sent(share: float, act: Callable[[], object]) -> Iterator[None]:
    """Call *act* when the source has sent exactly that share of its pages, none of which is zero."""
    pages = Limiter.pages
    last = int(share * SIZE) // PAGE_SIZE
    acted = False

    async def stopped(limiter: Limiter, wanted: int) -> int:
        nonlocal acted
        if acted:
            return await pages(limiter, wanted)
        if limiter._counters.normal == last:
            acted = True
            act()
            await trio.lowlevel.checkpoint()
            return await pages(limiter, wanted)
        return await pages(limiter, min(wanted, last - limiter._counters.normal))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Limiter, "pages", stopped)
        yield
    assert acted


async def disturbed(attempt: Attempt, point: str | float, act: Callable[[], object]) -> None:
    """Run *attempt*, with *act* called at the point."""
    if isinstance(point, str):
        attempt.monitors[0].add_listener(at(attempt.monitors[0], point, act))
        await attempt.run()
        return
    with when_sent(point, act):
        await attempt.run()


def is_the_sources(attempt: Attempt, source: trimig.AppGuest, target: trimig.AppGuest) -> None:
    assert not isinstance(attempt.ends[0], trimig.Summary), attempt.ends
    assert attempt.monitors[0].owner is Ownership.SOURCE
    assert attempt.monitors[1].owner is Ownership.SOURCE
    assert (source.run_state, target.run_state == "running") == ("running", False)


@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize("name", TRANSPORTS)
async def test_cancel_at_six_points(tmp_path: Path, name: str, victim: str) -> None:
    """T7, F10: by Monitor.cancel and by scope in turn; the guest is as before, and the next attempt completes."""
    number = 0 if victim == "source" else 1
    way = Way(name, tmp_path)
    async with two_guests() as (source, target):
        for index, point in enumerate(POINTS):
            attempt = Attempt(way, source, target)

            def cancel(attempt: Attempt = attempt, *, polite: bool = bool(index % 2)) -> None:
                if polite and attempt.monitors[number].status is not Status.NONE:
                    attempt.monitors[number].cancel("the test")
                else:
                    attempt.scopes[number].cancel("the test")

            await disturbed(attempt, point, cancel)
            is_the_sources(attempt, source, target)
        await arrives(way, source, target)


def sockets() -> dict[int, str]:
    """The open sockets of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found[int(name)] = target
    return found


def cut(before: dict[int, str], children_before: set[int]) -> None:
    """Break every connection, and kill every child, that has been made since."""
    for pid in children() - children_before:
        os.killpg(pid, signal.SIGKILL)  # each command leads a process group of its own
    for fd, target in sockets().items():
        if before.get(fd) != target:
            with socket.socket(fileno=os.dup(fd)) as sock, contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("name", TRANSPORTS)
async def test_cut_in_the_middle(tmp_path: Path, name: str) -> None:
    """T3, K10, L9: both sides get one typed error, the guest runs at the source, and the next attempt arrives."""
    way = Way(name, tmp_path)
    async with two_guests() as (source, target):
        before, family = sockets(), children()
        for share in (0.05, 0.6):
            attempt = Attempt(way, source, target)
            await disturbed(attempt, share, functools.partial(cut, before, family))
            is_the_sources(attempt, source, target)
            for end in attempt.ends:
                assert isinstance(end, trimig.TransportFailed | trimig.PeerFailed), attempt.ends
                assert end.owner is Ownership.SOURCE
        await arrives(way, source, target)


async def test_file_holds_the_whole_of_it_or_nothing_counts(tmp_path: Path) -> None:
    """B3, gap G3: one direction only. After a cancel at each point the source has the guest; a whole stream can be
    loaded."""
    async with two_guests() as (source, target):
        config = trimig.Config(parameters=trimig.Parameters(max_bandwidth=BANDWIDTH))
        for index, point in enumerate(POINTS):
            monitor = trimig.Monitor()
            uri = f"file:{tmp_path}/{index}"
            with trio.CancelScope() as scope:
                act = functools.partial(scope.cancel, "the test")
                if isinstance(point, str):
                    monitor.add_listener(at(monitor, point, act))
                with when_sent(point, act) if isinstance(point, float) else contextlib.nullcontext():
                    await trimig.migrate(source, uri, config, monitor=monitor)
            assert scope.cancelled_caught
            assert (monitor.owner, source.run_state) == (Ownership.SOURCE, "running")
        uri = f"file:{tmp_path}/whole"
        summary = await trimig.migrate(source, uri, config)
        assert not summary.confirmed
        await trimig.receive(target, uri, config)
        assert np.array_equal(source.ram[0].pages, target.ram[0].pages)


@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize("name", TRANSPORTS)
async def test_yanked_in_the_middle(tmp_path: Path, name: str, victim: str) -> None:
    """As a cut: both sides fail, the source owns the guest, the next attempt completes. Refused without a socket."""
    number = 0 if victim == "source" else 1
    way = Way(name, tmp_path)
    async with two_guests() as (source, target):
        attempt = Attempt(way, source, target)
        refusals: list[str] = []

        def yank() -> None:
            try:
                attempt.monitors[number].yank()
            except trimig.StateError as error:
                refusals.append(str(error))

        await disturbed(attempt, 0.5, yank)
        if name == "exec":
            assert refusals == ["this kind of connection cannot be broken from here"]
            assert isinstance(attempt.ends[0], trimig.Summary), attempt.ends
            return
        assert not refusals
        is_the_sources(attempt, source, target)
        assert isinstance(attempt.ends[0], trimig.TransportFailed), attempt.ends
        attempt.monitors[number].yank()  # without a connection this has no effect
        await arrives(way, source, target)
