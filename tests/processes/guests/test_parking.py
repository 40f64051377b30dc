"""A guest is written to its file while it runs at its source: what is in the file then, and what is left of it after a fault."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.guests.test_ramfile import read
from trimig.channel.offload import limiter
from trimig.channel.vectored import writev
from trimig.engine.destination import arriving
from trimig.engine.ram.marked import MarkedPages
from trimig.guests.parked import writer as saving
from trimig.guests.parked.newfile import NewFile
from trimig.guests.parked.ramfile import GROUP, RamWriter
from trimig.memory import MemfdBlock
from trimig.status import Status
from trimig.stream import inspect_stream
from trimig.testing import VirtualLink

LIMIT = 60
RAM, VGA = 2000, 600


class Clock(trimig.Device):
    vmstate = trimig.VMState("clock", fields=(trimig.Field("ticks", "uint64"),))
    ticks = 77


def application(*, random: np.random.Generator | None = None) -> trimig.AppGuest:
    """Two blocks and a device; half of the memory is zero."""
    guest = trimig.AppGuest("app")
    guest.add_ram("ram", RAM * 4096)
    guest.add_ram("vga", VGA * 4096)
    guest.add_device(Clock())
    for block in guest.ram:
        if random is not None:
            block.pages[::2] = random.integers(1, 256, (len(block.pages[::2]), 1), np.uint8)
    return guest


async def scribble(guest: trimig.AppGuest, random: np.random.Generator) -> None:
    """Write random pages, data over zeros and zeros over data, for as long as the guest runs."""
    with contextlib.suppress(trimig.NotOwner):  # it was handed over
        while True:
            async with guest.running():
                pages = guest.ram[int(random.integers(2))].pages
                first, count = int(random.integers(len(pages))), int(random.choice([1, 1, 2, 30]))
                pages[first : first + count] = int(random.integers(2) * random.integers(1, 256))
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def ends(kind: str) -> AsyncIterator[tuple[Any, Any, trimig.Monitor]]:
    """What the source and the destination are given, and the destination's monitor."""
    monitor = trimig.Monitor()
    if kind == "link":
        link = VirtualLink(seed=4)
        yield link.a, link.b, monitor
        return
    yield functools.partial(_address, monitor), "tcp:127.0.0.1:0", monitor


async def _address(monitor: trimig.Monitor) -> str:
    while not monitor.addresses:
        await monitor.wait_changed()
    return monitor.addresses[0]


class Parking:
    """One migration into a parked guest, and how each side ended."""

    def __init__(self, source: trimig.Guest, target: trimig.ParkedGuest, config: trimig.Config | None = None) -> None:
        self.source = source
        self.target = target
        self.config = config or trimig.Config(parameters=trimig.Parameters(max_bandwidth=0))
        self.here, self.there = trimig.Monitor(), trimig.Monitor()
        self.errors: dict[str, trimig.TrimigError] = {}

    async def run(self, kind: str = "link") -> None:
        with trio.fail_after(LIMIT):
            async with ends(kind) as (to, at, self.there), trio.open_nursery() as nursery:
                nursery.start_soon(self._one, "target", self._receive, at)
                await self._one("source", self._migrate, to)

    async def _migrate(self, to: Any) -> None:
        await trimig.migrate(self.source, await to() if callable(to) else to, self.config, monitor=self.here)

    async def _receive(self, at: Any) -> None:
        await trimig.receive(self.target, at, self.config, monitor=self.there)

    async def _one(self, name: str, call: Callable[[Any], Awaitable[None]], where: Any) -> None:
        try:
            await call(where)
        except trimig.TrimigError as error:
            self.errors[name] = error


async def each_page_once(file: Path, source: Any) -> None:
    """The file has each page once, and what is loaded from it is the memory of *source*."""
    report = await inspect_stream(file)
    assert report.error is None
    assert [(b.name, b.pages + b.zero_pages, b.missing) for b in report.blocks] == [
        (block.name, len(block.pages), 0) for block in source.ram
    ]
    with await trimig.ParkedGuest.load(file) as loaded:
        for one, other in zip(source.ram, loaded.ram, strict=True):
            assert np.array_equal(one.pages, other.pages)
        assert [s.idstr for s in loaded.sections] == ["clock", "globalstate"]


@pytest.mark.parametrize("kind", ["link", "tcp"])
@pytest.mark.parametrize("seed", range(4))
async def test_a_busy_guest(tmp_path: Path, kind: str, seed: int) -> None:
    """Many passes: what was written is written again, and the file has the memory of the moment in which it stopped."""
    random = np.random.default_rng(seed)
    config = trimig.Config(
        parameters=trimig.Parameters(max_bandwidth=60 << 20, downtime_limit=0), max_iterations=7, on_bound="switchover"
    )
    source = application(random=random)
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target, config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scribble, source, random)
            await parking.run(kind)
            nursery.cancel_scope.cancel()
        assert parking.errors == {}
        await each_page_once(tmp_path / "out", source)
        assert os.listdir(tmp_path) == ["out"]
    source.close()
    assert limiter().borrowed_tokens == 0


class Written:
    """Counts the pages that reach the file, and those of them that were not brought to the disk since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages = 0
        self.unsynced = 0
        real, real_sync = RamWriter.write, NewFile.sync

        def write(ram: RamWriter, number: int, indices: Any) -> int:
            done = real(ram, number, indices)
            self.pages += len(indices)
            self.unsynced += len(indices)
            return done

        def sync(file: NewFile) -> None:
            real_sync(file)
            self.unsynced = 0

        monkeypatch.setattr(RamWriter, "write", write)
        monkeypatch.setattr(NewFile, "sync", sync)


async def test_all_but_the_last_pages_are_written_before_the_guest_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is held behind its first pass, until all of it is on the disk; then a few pages change."""
    written = Written(monkeypatch)
    parameters = trimig.Parameters(max_bandwidth=0)
    config = trimig.Config(parameters=parameters, capabilities=trimig.Capabilities(pause_before_switchover=True))
    source = application(random=np.random.default_rng(1))
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target, config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parking.run)
            await parking.here.wait_status(Status.PRE_SWITCHOVER)
            with trio.fail_after(LIMIT):
                while written.pages < RAM + VGA or written.unsynced:  # noqa: ASYNC110 - it happens in a thread
                    await trio.sleep(0.01)
            before = written.pages
            source.ram[0].pages[5:8] = 123  # its owner may do so, as it has not been sent yet for the last time
            parking.here.resume()
        assert parking.errors == {}
        assert written.pages - before <= 3
        await each_page_once(tmp_path / "out", target)
    source.close()


async def test_an_idle_guest_takes_no_memory(tmp_path: Path) -> None:
    """What was never touched at the source is not touched here; its records are short."""
    source = application()
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target)
        await parking.run("tcp")
        assert parking.errors == {}
        for block in target.ram:
            assert isinstance(block, MemfdBlock)
            assert block.absent().all()
        assert (tmp_path / "out").stat().st_size < (RAM + VGA) * 9 + 2000
        await each_page_once(tmp_path / "out", source)
    source.close()


@pytest.mark.parametrize("kind", ["link", "tcp"])
async def test_a_page_is_marked_when_its_content_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The writer may read it at once. Each page of this guest comes once, so it is marked with its last content."""
    seen: dict[tuple[str, int], bytes] = {}
    target = trimig.ParkedGuest(tmp_path / "out")

    def look(name: str, indices: Any) -> None:
        pages = next(block for block in target.ram if block.name == name).pages
        for index in indices:
            seen.setdefault((name, int(index)), pages[int(index)].tobytes())

    real_mark, real_each = MarkedPages.mark, MarkedPages.mark_each

    def mark(marks: MarkedPages, name: str, first: int, count: int) -> None:
        look(name, range(first, first + count))
        real_mark(marks, name, first, count)

    def mark_each(marks: MarkedPages, name: str, indices: Any) -> None:
        look(name, indices)
        real_each(marks, name, indices)

    monkeypatch.setattr(MarkedPages, "mark", mark)
    monkeypatch.setattr(MarkedPages, "mark_each", mark_each)
    source = application(random=np.random.default_rng(1))
    with target:
        parking = Parking(source, target)
        await parking.run(kind)
        assert parking.errors == {}
        assert len(seen) == RAM + VGA
        for block in source.ram:
            assert all(seen[block.name, index] == page.tobytes() for index, page in enumerate(block.pages))
    source.close()


async def test_a_page_that_changes_while_it_is_written_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it is new when the thread reads it, so the file has a torn page for a moment."""
    random = np.random.default_rng(5)
    with trimig.ParkedGuest() as guest:
        guest.adopt("toy", (), [("ram", 64 * 4096)])
        (block,) = guest.ram
        assert isinstance(block, MemfdBlock)
        block.pages[:] = 1
        marks = MarkedPages({"ram": block.length})
        torn: list[int] = []

        def tear(fd: int, vector: Any) -> int | None:
            """What the engine does in the run loop, at the worst moment."""
            page = int(random.integers(64))
            if len(torn) < 40:
                torn.append(page)
                block.pages[page, :2048] = len(torn) + 1
            done = writev(fd, vector)
            block.pages[page, 2048:] = block.pages[page, 0]
            trio.from_thread.run_sync(marks.mark, "ram", page, 1)
            return done

        monkeypatch.setattr("trimig.guests.parked.ramfile.writev", tear)
        file = saving.SaveFile(tmp_path / "out", guest, [block], replace=False, peer=guest.peer)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(file.write_arriving, marks)
                marks.mark("ram", 0, 64)
                while len(torn) < 40:
                    marks.mark("ram", 0, 64)
                    await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
            monkeypatch.undo()
            await file.write_ram(marks)
            await file.finish([])
        assert marks.count == 0
        assert (block.pages == block.pages[:, :1]).all()
        memory, times = read(tmp_path / "out", ended=True)["ram"]
        assert (times == 1).all()
        assert np.array_equal(memory, block.pages)
        assert len(set(torn)) > 10


class Disk:
    """Fails at one call of those that touch the file, or only counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> None:
        self.calls = 0
        self._fails_at = fails_at
        for name in ("write", "fsync", "fdatasync", "link"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))
        monkeypatch.setattr("trimig.guests.parked.ramfile.writev", self._wrapped(writev))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self._fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **named)

        return call


async def test_a_disk_that_fails_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest stays at its source, both sides are told, and there is no file."""
    source = application(random=np.random.default_rng(1))
    source.ram[0].pages[GROUP:] = 0
    point = 0
    while True:
        with trimig.ParkedGuest(tmp_path / "out") as target, monkeypatch.context() as patch:
            disk = Disk(patch, fails_at=point)
            parking = Parking(source, target)
            await parking.run("tcp")
            if disk.calls <= point:
                break
            assert isinstance(parking.errors["target"], trimig.GuestFailed)
            assert "No space left" in str(parking.errors["target"])
            assert isinstance(parking.errors["source"], trimig.PeerFailed), parking.errors["source"]
            assert source.run_state == "running"
            assert parking.here.owner is parking.there.owner is trimig.Ownership.SOURCE
        assert os.listdir(tmp_path) == []
        assert limiter().borrowed_tokens == 0
        point += 1
    assert point > 8
    assert parking.errors == {}
    await each_page_once(tmp_path / "out", source)
    source.close()


async def test_a_full_disk_is_told_while_the_guest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This guest would never stop: it writes faster than it may be sent."""
    random = np.random.default_rng(2)
    source = application(random=random)
    stopped: list[str] = []
    config = trimig.Config(parameters=trimig.Parameters(max_bandwidth=4 << 20, downtime_limit=0))
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target, config)
        parking.here.add_listener(lambda event: stopped.append(event.name))
        Disk(monkeypatch, fails_at=3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scribble, source, random)
            await parking.run("tcp")
            nursery.cancel_scope.cancel()
        assert isinstance(parking.errors["source"], trimig.PeerFailed)
        assert "STOP" not in stopped
        assert source.run_state == "running"
    assert os.listdir(tmp_path) == []
    source.close()


@pytest.mark.parametrize("kind", ["link", "tcp"])
async def test_cancelled_at_any_step(tmp_path: Path, kind: str) -> None:
    """No file, no thread; or the whole file, if the guest had changed hands."""
    source = application(random=np.random.default_rng(1))
    whole = 0
    steps = 0
    while not whole:
        with trimig.ParkedGuest(tmp_path / "out") as target:
            parking = Parking(source, target)
            async with trio.open_nursery() as nursery:

                async def cancel(after: int, scope: trio.CancelScope) -> None:
                    for _ in range(after):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cancel, steps, nursery.cancel_scope)
                await parking.run(kind)
                nursery.cancel_scope.cancel()
            assert limiter().borrowed_tokens == 0
            if parking.there.status is Status.COMPLETED:
                whole += 1
                await each_page_once(tmp_path / "out", source)
                assert os.listdir(tmp_path) == ["out"]
            else:
                assert os.listdir(tmp_path) == []
        steps = steps * 5 // 4 + 1
    assert steps > 20
    source.close()


async def test_a_slow_disk_slows_the_source_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come and is not written stays below a bound, so the guest is not stopped before the disk has caught up."""
    monkeypatch.setattr(arriving, "MOST_MARKED", 64)
    held, most = threading.Event(), [0]
    real_mark = MarkedPages.mark

    def mark(marks: MarkedPages, *where: Any) -> None:
        real_mark(marks, *where)
        most[0] = max(most[0], marks.count)

    def slow(fd: int, vector: Any) -> int | None:
        held.wait(LIMIT)
        return writev(fd, vector)

    monkeypatch.setattr(MarkedPages, "mark", mark)
    monkeypatch.setattr("trimig.guests.parked.ramfile.writev", slow)
    source = application(random=np.random.default_rng(1))
    for block in source.ram:
        block.pages[:, 0] = 1
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(parking.run)
                with trio.fail_after(LIMIT):
                    while most[0] <= 64:  # noqa: ASYNC110 - as above
                        await trio.sleep(0.01)
                    await trio.sleep(0.5)  # enough for all 2600 pages on most machines
                assert source.run_state == "running"
                held.set()
        finally:
            held.set()
        assert parking.errors == {}
        assert most[0] < 64 + 512  # and what one read may bring
        await each_page_once(tmp_path / "out", source)
    source.close()


# -- postcopy ----------------------------------------------------------------------------------------------------------


def by_postcopy() -> trimig.Config:
    parameters = trimig.Parameters(max_bandwidth=8 << 20, max_postcopy_bandwidth=0)
    return trimig.Config(capabilities=trimig.Capabilities(postcopy_ram=True), parameters=parameters)


def go_ahead(parking: Parking) -> None:
    """The source switches to postcopy in its first pass."""

    def soon(event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == "active":
            parking.here.start_postcopy()

    parking.here.add_listener(soon)


@pytest.mark.parametrize("seed", range(3))
async def test_pages_that_come_behind_the_switch(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    source = application(random=random)
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target, by_postcopy())
        go_ahead(parking)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scribble, source, random)
            await parking.run("tcp")
            nursery.cancel_scope.cancel()
        assert parking.errors == {}
        await each_page_once(tmp_path / "out", source)
        assert os.listdir(tmp_path) == ["out"]
    source.close()


async def test_the_switch_is_refused_where_the_disk_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it the guest could not be kept and not be given back, so its room is set aside before."""
    asked: list[int] = []

    def full(_: NewFile, start: int, length: int) -> None:
        asked.append(start + length)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(NewFile, "reserve", full)
    random = np.random.default_rng(1)
    source = application(random=random)
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target, by_postcopy())
        go_ahead(parking)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scribble, source, random)
            await parking.run("tcp")
            nursery.cancel_scope.cancel()
        assert isinstance(parking.errors["target"], trimig.GuestFailed)
        assert "No space left" in str(parking.errors["target"])
        assert isinstance(parking.errors["source"], trimig.PeerFailed)
        assert parking.here.owner is parking.there.owner is trimig.Ownership.SOURCE
        assert source.run_state == "running"
        assert len(asked) == 1
        assert asked[0] > (RAM + VGA) * 4096 // 4
    assert os.listdir(tmp_path) == []
    source.close()


async def test_a_disk_that_fails_behind_the_switch_costs_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source cannot take the guest back, so all of its memory is taken before the failure counts."""
    source = application(random=np.random.default_rng(1))
    with trimig.ParkedGuest(tmp_path / "out") as target:
        parking = Parking(source, target, by_postcopy())
        go_ahead(parking)

        def broken(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def watch(event: trimig.Event) -> None:
            if event.name == "MIGRATION" and event.data["status"] == "postcopy-active":
                monkeypatch.setattr(os, "write", broken)
                monkeypatch.setattr("trimig.guests.parked.ramfile.writev", broken)

        original = parking._receive

        async def receive(at: Any) -> None:
            parking.there.add_listener(watch)
            try:
                await original(at)
            except trimig.TrimigError:
                await parking.here.wait_status(Status.POSTCOPY_PAUSED)
                parking.here.abandon("the destination has failed")
                raise

        monkeypatch.setattr(parking, "_receive", receive)
        await parking.run("tcp")
        monkeypatch.undo()
        assert "No space left" in str(parking.errors["target"])
        assert parking.there.owner is trimig.Ownership.DESTINATION
        for one, other in zip(source.ram, target.ram, strict=True):
            assert np.array_equal(one.pages, other.pages)
    assert os.listdir(tmp_path) == []
    source.close()
