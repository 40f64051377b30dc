"""The machine type of a parked guest decides how its stream is written, and what its destination expects."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running
from tests.guests.saved import stream
from trimig.config import PEERS, QEMU_7_2, QEMU_10_0
from trimig.testing import FakeDevice, LazyScriptedGuest, VirtualLink
from trimig.wire import Command, Section
from trimig.wire import encoder as wire

WORD = wire.command(Command.SWITCHOVER_START)


async def sent_by(path: Path, settings: trimig.Config) -> bytes:
    """What a source writes that gives the guest in *path* to another."""
    link = VirtualLink(record=True)
    with await trimig.ParkedGuest.load(path) as source, trimig.ParkedGuest() as target:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimig.receive, target, link.b, config())
            await trimig.migrate(source, link.a, settings)
    return link.recorded("a->b")


@pytest.mark.parametrize(
    ("machine", "known"),
    [("pc-i440fx-7.2", False), ("pc-q35-9.2", False), ("none", False), ("pc-i440fx-10.0", True), ("virt-11.1", True)],
)
async def test_the_switchover_is_announced_by_machine_types_that_know_it(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, machine: str, *, known: bool
) -> None:
    """Directly before the END section, once; a profile that is named wins over the machine type."""
    path = tmp_path / "in"
    before = len("toy-1.0").to_bytes(4) + b"toy-1.0"
    assert before in stream()
    path.write_bytes(stream().replace(before, len(machine).to_bytes(4) + machine.encode()))
    end = wire.section_continue(Section.END, 2)
    by_machine = await sent_by(path, config())
    assert by_machine.count(WORD) == known
    assert (WORD + end in by_machine) is known
    assert WORD + end in await sent_by(path, dataclasses.replace(config(), peer=QEMU_10_0))
    assert WORD not in await sent_by(path, dataclasses.replace(config(), peer=QEMU_7_2))


async def test_a_guest_of_ones_own_is_as_it_was_whatever_its_name(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair(running(name="pc-q35-11.1"), running(name="pc-q35-11.1", run_state="inmigrate"))
    await pair.both()
    assert WORD not in pair.link.recorded("a->b")


@pytest.mark.parametrize("profile", [name for name in PEERS if name.startswith("qemu-")])
async def test_both_sides_understand_each_profile(autojump_clock: trio.testing.MockClock, profile: str) -> None:
    settings = dataclasses.replace(config(), peer=PEERS[profile])
    pair = Pair(config_here=settings)
    await pair.both()
    assert pair.here.status is trimig.Status.COMPLETED
    assert (WORD in pair.link.recorded("a->b")) is PEERS[profile].send_switchover_start


@pytest.mark.parametrize("profile", ["qemu-7.2", "qemu-9.0", "qemu-10.0", "qemu-11.1"])
async def test_in_postcopy_it_is_announced_before_the_discards(
    autojump_clock: trio.testing.MockClock, profile: str
) -> None:
    """Once, with the guest stopped, directly before the first discard."""
    settings = trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True),
        parameters=trimig.Parameters(max_bandwidth=0, downtime_limit=1),
        peer=PEERS[profile],
    )
    link = VirtualLink(record=True, latency=0.001, rate=1e6)
    source = running(pages=64, dirty_per_sync=50, working_set=60)
    target = LazyScriptedGuest(
        blocks={"ram": 64}, content="zero", run_state="inmigrate", devices=[FakeDevice("clock", size=8)]
    )
    monitor = trimig.Monitor()

    def listener(event: trimig.Event) -> None:
        if event.name == "PASS":
            monitor.start_postcopy()

    monitor.add_listener(listener)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trimig.receive, target, link.b, settings)
        await trimig.migrate(source, link.a, settings, monitor=monitor)
    sent = link.recorded("a->b")
    discard = wire.command(Command.POSTCOPY_RAM_DISCARD)[:3]
    announced = PEERS[profile].send_switchover_start
    assert discard in sent
    assert (WORD + discard in sent) is announced
    assert sent.count(WORD) == announced
