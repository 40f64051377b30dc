"""The tree of errors against the truth: what strikes where, what is raised, and whose the guest is then.

Every fault strikes in every status of each side, in precopy, in precopy that is held, and in postcopy. After it, class of
the error, ``error.owner``, ``monitor.owner``, ``guest.owner`` and the run state must say the same, on both sides.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from trimig import Owner, Ownership, Status
from trimig.testing import FakeDevice, LazyScriptedGuest, OwnerReferee, ScriptedGuest, VirtualLink

#: What a side of a migration can end by; a caller's own Cancelled beside them.
LEAVES = {
    trimig.TransportFailed, trimig.RemoteProtocolError, trimig.LocalProtocolError, trimig.PeerFailed, trimig.GuestFailed,
    trimig.NotConverging, trimig.MigrationCancelled, trimig.GuestNotResumed, trimig.HandoverUncertain, trimig.PostcopyLost,
}  # fmt: skip

MODES = ("precopy", "held", "postcopy")
STATUSES = ("setup", "active", "pre-switchover", "device", "handover", "postcopy-active", "completed")


class FaultyMixin:
    """The next call fails, or hangs for ever, once :attr:`fault` says so."""

    fault: str = ""

    async def _enter(self, call: str) -> None:
        await super()._enter(call)  # type: ignore[misc]
        if self.fault == "hangs":
            await trio.sleep_forever()
        if self.fault == "fails":
            self.fault = ""
            raise OSError(f"{call} failed")


class Faulty(FaultyMixin, ScriptedGuest):
    """A source's guest."""


class FaultyLazy(FaultyMixin, LazyScriptedGuest):
    """A destination's guest."""


class Garbling(trio.abc.HalfCloseableStream):
    """Sends nonsense instead of what it is given, once :attr:`on`."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self.on = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(b"\x99" * len(data) if self.on else data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


@dataclasses.dataclass
class Side:
    """One end of a run."""

    guest: Any
    monitor: trimig.Monitor
    stream: Garbling
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)
    #: A summary, an error, or None for a call that was cancelled.
    end: trimig.Summary | trimig.TrimigError | None = None

    async def run(self, call: Callable[..., Awaitable[trimig.Summary]], config: trimig.Config) -> None:
        with self.scope:
            try:
                self.end = await call(self.guest, self.stream, config, monitor=self.monitor)
            except trimig.TrimigError as error:
                self.end = error


class Struck:
    """A migration that a fault strikes when *side* has come to *status*."""

    def __init__(self, mode: str, number: int, status: str, fault: str, *, run_state: str = "running") -> None:
        self.run_state = run_state
        self.happened = False
        self._status, self._fault, self._mode = status, fault, mode
        source = Faulty(blocks={"ram": 12}, content="mixed", devices=[FakeDevice("clock", size=8)], run_state=run_state)
        target = FaultyLazy(
            blocks={"ram": 12}, content="random", seed=9, run_state="inmigrate", devices=[FakeDevice("clock", size=8)]
        )
        self.link = VirtualLink(latency=0.001, rate=1e5, window=4096)
        self.referee = OwnerReferee(source=source, destination=target)
        self.sides = (
            Side(source, trimig.Monitor(), Garbling(self.link.a)), Side(target, trimig.Monitor(), Garbling(self.link.b)),
        )  # fmt: skip
        self.here, self.there = self.sides
        self.struck, self.other = self.sides[number], self.sides[1 - number]
        self.config = trimig.Config(
            capabilities=trimig.Capabilities(postcopy_ram=mode == "postcopy", pause_before_switchover=mode == "held"),
            parameters=trimig.Parameters(max_bandwidth=0, downtime_limit=1 if mode == "postcopy" else 300),
            handover_timeout=2.0, stall_timeout=4.0, teardown_grace=1.0, recovery_timeout=1.0,
        )  # fmt: skip

    async def run(self) -> None:
        """Both sides, to the end."""
        self.struck.monitor.add_listener(self._strike)
        self.here.monitor.add_listener(self._go_on)
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.there.run, trimig.receive, self.config)
                await self.here.run(trimig.migrate, self.config)
                await self._keep_alive()
        self.referee.check()

    async def _keep_alive(self) -> None:
        """What the kernel does for a socket whose other host is gone: a side may wait long for one that is held."""
        if self._fault == "blackhole":
            await trio.sleep(60)
            self.link.inject("reset")
            self.link.inject("reset", "b->a")

    def _go_on(self, event: trimig.Event) -> None:
        if event.name != "MIGRATION":
            return
        if event.data["status"] == "setup" and self._mode == "postcopy":
            self.here.monitor.start_postcopy()
        if event.data["status"] == "pre-switchover" and self._status != "pre-switchover":
            self.here.monitor.resume()
        elif event.data["status"] == "pre-switchover":
            trio.lowlevel.spawn_system_task(self._resume)

    async def _resume(self) -> None:
        await trio.sleep(0.5)
        if self.here.monitor.status is Status.PRE_SWITCHOVER:
            self.here.monitor.resume()

    def _strike(self, event: trimig.Event) -> None:
        if event.name != "MIGRATION" or event.data["status"] != self._status or self.happened:
            return
        self.happened = True
        match self._fault:
            case "reset" | "eof" | "blackhole":
                self.link.inject(self._fault)
                self.link.inject(self._fault, "b->a")
            case "nonsense":
                self.other.stream.on = True
            case "asked to cancel":
                try:
                    self.struck.monitor.cancel("the test")
                except trimig.StateError:
                    self.happened = False  # it is too late for that, and it is said
            case "cancelled":
                self.struck.scope.cancel("the test")
            case "fails" | "hangs" as fault:
                self.struck.guest.fault = fault
            case "hangs and cancelled":
                self.struck.guest.fault = "hangs"
                self.struck.scope.cancel("the test")


def source_agrees(side: Side, run_state: str) -> None:
    """What a caller of migrate() concludes from the end is true."""
    guest, owner = side.guest, side.monitor.owner
    match side.end:
        case trimig.Summary():
            assert (guest.owner, owner, guest.running) == (Owner.ELSEWHERE, Ownership.DESTINATION, False)
        case trimig.MigrationError() as error:
            assert (guest.owner, owner, error.owner) == (Owner.HERE, Ownership.SOURCE, Ownership.SOURCE)
            assert guest.run_state == run_state
        case trimig.GuestNotResumed() as error:
            assert (guest.owner, owner, error.owner) == (Owner.HERE, Ownership.SOURCE, Ownership.SOURCE)
            assert not guest.running
        case trimig.HandoverUncertain() as error:
            assert (guest.owner, owner, error.owner) == (Owner.UNKNOWN, Ownership.UNKNOWN, Ownership.UNKNOWN)
            assert not guest.running
        case trimig.PostcopyLost() as error:
            assert (guest.owner, owner, error.owner) == (Owner.ELSEWHERE, Ownership.DESTINATION, Ownership.DESTINATION)
            assert not guest.running
        case None:
            assert (guest.owner, owner, guest.run_state) == (Owner.HERE, Ownership.SOURCE, run_state)
        case error:
            raise AssertionError(f"{error!r} is no end of a migration")


def destination_agrees(side: Side, run_state: str) -> None:
    """The same of receive()."""
    guest, owner = side.guest, side.monitor.owner
    match side.end:
        case trimig.Summary():
            assert (guest.owner, owner, guest.run_state) == (Owner.HERE, Ownership.DESTINATION, run_state)
        case trimig.MigrationError() as error:
            assert (guest.owner, owner, error.owner) == (Owner.ELSEWHERE, Ownership.SOURCE, Ownership.SOURCE)
            assert not guest.running
        case trimig.PostcopyLost() as error:
            assert (owner, error.owner) == (Ownership.DESTINATION, Ownership.DESTINATION)
            assert not guest.running
        case None:
            assert (guest.owner, owner, guest.executed) == (Owner.ELSEWHERE, Ownership.SOURCE, False)
        case error:
            raise AssertionError(f"{error!r} is no end of an arrival")


async def refused_where_it_is_not_here(side: Side) -> None:
    """A guest that is not this side's can neither be resumed nor sent."""
    if side.guest.owner is Owner.HERE:
        return
    with pytest.raises(trimig.NotOwner):
        await side.guest.resume()
    near, far = VirtualLink().a, VirtualLink().b
    with pytest.raises(trimig.NotOwner):
        await trimig.migrate(side.guest, near)
    await far.aclose()
    assert not side.guest.running


FAULTS = (
    "reset", "eof", "blackhole", "nonsense", "asked to cancel", "cancelled", "fails", "hangs", "hangs and cancelled",
)  # fmt: skip


@pytest.mark.parametrize("run_state", ["running", "paused"])
@pytest.mark.parametrize("mode", MODES)
def test_errors_say_who_has_the_guest(mode: str, run_state: str) -> None:
    """T1, T5: every fault in every status of both sides."""
    happened: dict[tuple[int, str], int] = {}
    raised: set[type] = set()

    async def one(number: int, status: str, fault: str) -> None:
        run = Struck(mode, number, status, fault, run_state=run_state)
        await run.run()
        happened[number, status] = happened.get((number, status), 0) + run.happened
        raised.update(type(side.end) for side in run.sides)
        source_agrees(run.here, run_state)
        destination_agrees(run.there, run_state)
        for side in run.sides:
            side.guest.fault = ""
            await refused_where_it_is_not_here(side)
        assert not (run.here.guest.owner is run.there.guest.owner is Owner.HERE)

    for number, status, fault in itertools.product((0, 1), STATUSES, FAULTS):
        try:
            trio.run(one, number, status, fault, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseException as error:
            error.add_note(f"{mode}, {run_state}: {fault} when the {('source', 'destination')[number]} is {status}")
            raise
    expected = {"setup", "active", "device", "handover", "completed"}
    expected |= {"pre-switchover"} if mode == "held" else {"postcopy-active"} if mode == "postcopy" else set()
    assert {status for (number, status), count in happened.items() if count and number == 0} == expected
    assert {status for (number, status), count in happened.items() if count and number == 1} == expected - {
        "device",
        "pre-switchover",
    }
    assert raised >= {trimig.Summary, trimig.TransportFailed, trimig.RemoteProtocolError, trimig.GuestFailed}
    assert all(issubclass(kind, tuple(LEAVES)) for kind in raised - {trimig.Summary, type(None)}), raised
    assert trimig.HandoverUncertain in raised
    if mode == "postcopy":
        assert trimig.PostcopyLost in raised
