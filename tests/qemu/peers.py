"""Guests of trimig that a ``-M none`` QEMU accepts, and ways to run the engine against that QEMU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

import trimig
import trimig.guests
from tests.qemu import installed
from tests.qemu.harness import RAM_BLOCK, Qemu, random_ram
from tests.qemu.relay import Relay

#: Seconds for a whole test; it takes far less, and nothing is asserted about it.
LIMIT: Final = 60
_DEFAULT: Final = installed.default()
#: Of a test that uses the second connection for urgent pages.
NEEDS_PREEMPT: Final = pytest.mark.skipif(
    _DEFAULT is not None and _DEFAULT.numbers < (7, 1), reason="no QEMU before 7.1 has postcopy-preempt"
)
LISTEN: Final = "tcp:127.0.0.1:0"
#: The RAM of guests in tests in which its size does not matter.
SMALL: Final = 1 << 20
PAGE: Final = 4096


def machine(
    size: int = SMALL,
    *,
    running: bool,
    name: str = "none",
    block: str = RAM_BLOCK,
    timer: bool = True,
    on_pause: Callable[[], Awaitable[None]] | None = None,
    dirty_tracking: str = "auto",
) -> trimig.AppGuest:
    """A guest with the RAM and the one device of ``-M none``; the arguments change it."""
    guest = trimig.AppGuest(name, running=running, on_pause=on_pause, dirty_tracking=dirty_tracking)
    guest.add_ram(block, size)
    if timer:
        guest.add_device(trimig.guests.TimerState())
    return guest


def memory(guest: trimig.AppGuest) -> NDArray[np.uint8]:
    """All of the guest's RAM, flat and writable."""
    return guest.ram[0].pages.reshape(-1)


def mix(ram: NDArray[np.uint8], *, seed: int) -> None:
    """Random pages, pages of one repeated byte, zero pages, and pages that are zero except for their last byte."""
    ram[:] = random_ram(len(ram), seed=seed)
    pages = ram.reshape(-1, PAGE)
    pages[1::8] = 0
    pages[2::8] = 0x5A
    pages[3::8] = 0
    pages[3::8, -1] = 1
    pages[len(pages) // 2 :][: len(pages) // 4] = 0  # long runs too


def source(size: int = SMALL, *, seed: int = 1, **options: object) -> trimig.AppGuest:
    """A running guest with mixed memory; the options are those of :func:`machine`."""
    guest = machine(size, running=True, **options)  # type: ignore[arg-type]  # handed on as they are
    mix(memory(guest), seed=seed)
    return guest


def settings(
    *, return_path: bool = True, bandwidth: int = 0, downtime_limit: int = 300, **options: object
) -> trimig.Config:
    """A configuration; bytes per second, and milliseconds."""
    return trimig.Config(
        capabilities=trimig.Capabilities(return_path=return_path),
        parameters=trimig.Parameters(max_bandwidth=bandwidth, downtime_limit=downtime_limit),
        **options,  # type: ignore[arg-type]  # handed on as they are
    )


@asynccontextmanager
async def target(
    size: int = SMALL, *, uri: str = LISTEN, version: str | None = None
) -> AsyncIterator[tuple[Qemu, str]]:
    """A QEMU that waits for a migration, and its address."""
    with trio.fail_after(LIMIT):
        async with Qemu.start("none", f"{size >> 20}M", incoming="defer", version=version) as vm:
            yield vm, await vm.incoming(uri)


@asynccontextmanager
async def relayed(size: int = SMALL) -> AsyncIterator[tuple[Qemu, Relay]]:
    """A QEMU that waits for a migration behind a relay, and the relay."""
    async with target(size) as (vm, uri), Relay(uri) as relay:
        yield vm, relay


async def accepted(guest: trimig.AppGuest) -> None:
    """Another QEMU receives *guest* whole: earlier attempts have left nothing behind."""
    async with target(guest.ram[0].length) as (vm, uri):
        await trimig.migrate(guest, uri, settings())
        await vm.wait_status("running")
        assert np.array_equal(vm.ram, memory(guest))


@dataclasses.dataclass(slots=True)
class Arrival:
    """The background :func:`trimig.receive` of :func:`arriving`."""

    uri: str
    monitor: trimig.Monitor
    #: To cancel the receiver from outside.
    scope: trio.CancelScope
    outcome: trimig.Summary | trimig.TrimigError | None = None
    done: trio.Event = dataclasses.field(default_factory=trio.Event)
    #: Why connections were dropped that were not the source's.
    drops: list[str] = dataclasses.field(default_factory=list)
    dropping: trio.Event = dataclasses.field(default_factory=trio.Event)

    def heard(self, event: trimig.Event) -> None:
        """The listener of the monitor."""
        if event.name == "CONNECTION_DROPPED":
            self.drops.append(str(event.data["reason"]))
            self.dropping.set()
            self.dropping = trio.Event()

    async def dropped(self, count: int = 1) -> str:
        """Wait until that many connections have been dropped; the reason of the last drop."""
        while len(self.drops) < count:
            await self.dropping.wait()
        return self.drops[count - 1]

    async def wait_pages(self, count: int) -> None:
        """Wait until that many pages have arrived, without zero pages."""
        async for picture in self.monitor.watch(0.01):
            if picture.normal_pages >= count:
                break

    async def summary(self) -> trimig.Summary:
        """The summary of the receiver, which must succeed."""
        await self.done.wait()
        if isinstance(self.outcome, trimig.TrimigError):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    async def error(self) -> trimig.TrimigError:
        """The error of the receiver, which must fail."""
        await self.done.wait()
        assert isinstance(self.outcome, trimig.TrimigError), self.outcome
        return self.outcome


@asynccontextmanager
async def arriving(
    guest: trimig.Guest, config: trimig.Config | None = None, *, uri: str = LISTEN
) -> AsyncIterator[Arrival]:
    """Receive into *guest* while the block runs; the block ends when the receiver has ended."""
    monitor = trimig.Monitor()
    arrival = Arrival("", monitor, trio.CancelScope())
    monitor.add_listener(arrival.heard)

    async def receive() -> None:
        try:
            with arrival.scope:
                arrival.outcome = await trimig.receive(guest, uri, config or settings(), monitor=monitor)
        except trimig.TrimigError as error:
            arrival.outcome = error
            if not (arrival.uri or uri.startswith("fd:")):
                raise  # before it has listened
        arrival.done.set()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            # A descriptor has no address to report.
            while not (monitor.addresses or uri.startswith("fd:")):
                await monitor.wait_changed()
            arrival.uri = monitor.addresses[0] if monitor.addresses else uri
            try:
                yield arrival
            except Exception as error:
                if isinstance(arrival.outcome, trimig.TrimigError):
                    error.add_note(f"the receiver had ended with {arrival.outcome!r}")
                raise


async def while_migrating(
    guest: trimig.Guest,
    uri: str,
    config: trimig.Config,
    monitor: trimig.Monitor,
    beside: Callable[[], Awaitable[object]],
    **hooks: Callable[[], Awaitable[None]],
) -> trimig.Summary:
    """Migrate, with *beside* as a second task that ends by itself; an error of either is raised bare."""
    failure: trimig.TrimigError | None = None
    summary: trimig.Summary | None = None
    try:
        async with trio.open_nursery() as nursery:

            async def task() -> None:
                await beside()

            nursery.start_soon(task)
            try:
                summary = await trimig.migrate(guest, uri, config, monitor=monitor, **hooks)  # type: ignore[arg-type]  # commit
            except trimig.TrimigError as error:
                failure = error
    except BaseExceptionGroup as group:
        group.add_note(
            f"the migration is {monitor.status}; the last error of this side: {monitor.counters.error}; {failure!r}"
        )
        raise
    if failure is not None:
        raise failure
    assert summary is not None
    return summary


def statuses(monitor_events: list[trimig.Event]) -> list[str]:
    """The statuses in *monitor_events*, in order."""
    return [str(event.data["status"]) for event in monitor_events if event.name == "MIGRATION"]


async def wait_lost(monitor: trimig.Monitor) -> None:
    """Wait until a destination has noticed that its source is gone, in postcopy.

    A QEMU that asks for the proof that the guest runs takes it back if it is cut before it has read that. When it has read it
    we cannot tell: so the status here is ``postcopy-uncertain`` until it has come again, and of another QEMU ``postcopy-paused``.
    """
    await monitor.wait_status(trimig.Status.POSTCOPY_PAUSED, trimig.Status.POSTCOPY_UNCERTAIN)


def members(info: Mapping[str, object]) -> set[str]:
    """The names in a ``query-migrate``, those of ``ram`` as ``ram.total``; without the names that only trimig has."""
    names = set(info) - {"owner", "dirty-tracking", "convergence"}
    ram = info.get("ram")
    return names | ({f"ram.{name}" for name in ram} if isinstance(ram, Mapping) else set())


@asynccontextmanager
async def writing(guest: trimig.AppGuest, write: Callable[[], None], every: float) -> AsyncIterator[None]:
    """*write* is called in the guest every so many seconds, as long as it runs here."""

    async def program() -> None:
        with contextlib.suppress(trimig.NotOwner):  # after the handover
            while True:
                async with guest.running():
                    write()
                await trio.sleep(every)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(program)
        yield
        nursery.cancel_scope.cancel()


async def passed(monitor: trimig.Monitor, passes: int) -> None:
    """Wait until the source is in the pass of that number."""
    async for picture in monitor.watch(0.01):
        if picture.iteration >= passes:
            break
