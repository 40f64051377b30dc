"""Reasons against a migration: who may add them, and what they refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running
from trimig.monitor.blockers import Blockable, Blockers
from trimig.status import Status
from trimig.testing import FakeDevice, VirtualLink


class Passthrough(trimig.Device):
    """A device of the host's, which cannot come along."""

    vmstate = trimig.VMState("vfio", fields=(trimig.Field("x", "uint8"),))
    unmigratable = "it is a device of the host"

    def __init__(self) -> None:
        super().__init__()
        self.x = 0


@contextlib.contextmanager
def app(*, running: bool = True) -> Iterator[trimig.AppGuest]:
    """A small guest."""
    with trimig.AppGuest("app", running=running) as guest:
        guest.add_ram("ram", 16384)
        yield guest


async def refused(guest: trimig.Guest) -> str:
    """What :func:`trimig.migrate` says; nothing may have been touched but the stream, which is closed."""
    link, monitor = VirtualLink(), trimig.Monitor()
    with pytest.raises(trimig.StateError) as caught:
        await trimig.migrate(guest, link.a, config(), monitor=monitor)
    assert monitor.status is Status.NONE
    assert link.sent("a->b") == 0
    assert link.a.closed
    return str(caught.value)


async def test_blocked_guest_is_refused_until_the_blocker_is_deleted(autojump_clock: trio.testing.MockClock) -> None:
    """I1, I4, F3: and then it goes."""
    with app() as guest, app(running=False) as target:
        assert isinstance(guest, Blockable)
        blocker = guest.blockers.add("a disk is being copied")
        assert await refused(guest) == "the migration is blocked: a disk is being copied"
        assert guest.run_state == "running"
        blocker.delete()
        blocker.delete()
        link = VirtualLink()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimig.receive, target, link.b, config())
            await trimig.migrate(guest, link.a, config())
        assert target.run_state == "running"


async def test_most_recent_reason_is_told_and_all_are_listed() -> None:
    """I6, G2: blocked-reasons stands in every status, also before the first migration."""
    with app() as guest:
        monitor = trimig.Monitor()
        monitor.guest = guest
        assert monitor.info() == {}
        first, second = guest.blockers.add("first"), guest.blockers.add("second")
        assert "second" in await refused(guest)
        assert guest.blockers.reasons == ("second", "first")
        assert monitor.info() == {"blocked-reasons": ["second", "first"]}
        second.delete()
        assert "first" in await refused(guest)
        first.delete()
        assert monitor.info() == {}


async def test_none_can_be_added_during_a_migration(autojump_clock: trio.testing.MockClock) -> None:
    """I2: busy, with the reason that would have been; deleting is always allowed."""
    guest = running(pages=64)
    blockers = Blockers(busy=lambda: guest.claimed)
    early = blockers.add("early")
    pair = Pair(guest, link=VirtualLink(rate=100_000, window=8192))
    seen: list[str] = []

    async def meddle() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        with pytest.raises(trimig.StateError) as caught:
            blockers.add("too late")
        seen.append(str(caught.value))
        early.delete()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(meddle)
        await pair.both()
    assert seen == ["no migration blocker can be added now (in progress: an outgoing migration), for: too late"]
    assert blockers.reasons == ()
    assert blockers.add("now again").reason == "now again"


async def test_none_can_be_added_with_only_migratable() -> None:
    """I3: refused by the configuration, not by the moment; unmigratable devices as well."""
    with app() as guest:
        guest.blockers.refuse_all()
        with pytest.raises(trimig.ConfigError, match=r"only-migratable.*for: passthrough") as caught:
            guest.blockers.add("passthrough")
        assert caught.value.name == "only-migratable"
        with pytest.raises(trimig.ConfigError, match="'vfio' cannot be migrated"):
            guest.add_device(Passthrough())
        assert guest.blockers.reasons == ()


async def test_unmigratable_device_is_named() -> None:
    """I5: both ways; the reason stands among the blocked-reasons, behind those that the caller gave."""
    with app() as guest:
        guest.add_device(Passthrough())
        text = "device 'vfio' cannot be migrated: it is a device of the host"
        guest.blockers.add("another")
        assert await refused(guest) == text
        monitor = trimig.Monitor()
        monitor.guest = guest
        assert monitor.info() == {"blocked-reasons": ["another", text]}
    with app(running=False) as target:
        target.add_device(Passthrough())
        link, monitor = VirtualLink(), trimig.Monitor()
        with pytest.raises(trimig.StateError, match="'vfio' cannot be migrated"):
            await trimig.receive(target, link.b, config(), monitor=monitor)
        assert monitor.status is Status.NONE
        assert link.b.closed


async def test_blocker_does_not_refuse_what_comes(autojump_clock: trio.testing.MockClock) -> None:
    """QEMU's incoming side looks at devices only."""
    with app() as guest, app(running=False) as target:
        target.blockers.add("must stay, once it is here")
        link = VirtualLink()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimig.receive, target, link.b, config())
            await trimig.migrate(guest, link.a, config())
        assert "must stay" in await refused(target)


async def test_guest_of_any_class_may_have_such_a_device() -> None:
    """I5: the engine asks every guest."""
    device = FakeDevice("odd")
    device.unmigratable = "it is odd"  # type: ignore[attr-defined]  # any attribute of that name will do
    assert await refused(running(devices=[device])) == "device 'odd' cannot be migrated: it is odd"
