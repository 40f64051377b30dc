"""The matrix: each version of QEMU, its machine types, both directions and through trimig, in each mode of migration.

The README's test command runs some cells, chosen so that each value meets each other one; ``pytest -m full`` runs all
of them. Each test checks every byte of RAM, or that a guest that counts goes on counting without a gap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import trio
from _pytest.mark import ParameterSet

import trimig
from tests.conftest import missing_qemu
from tests.qemu import cells, hops, installed, peers
from tests.qemu.bootsector import assert_no_gap, boot_sector, parse_counts
from tests.qemu.cells import Cell
from tests.qemu.harness import Qemu
from tests.qemu.hops import Hop
from tests.qemu.pairs import by_pairs, pairs_of
from tests.transport.pki import Pki

SIZE = "16M"
#: A postcopy to be cut must not be over too soon, nor take too long: a guest that counts has few non-zero pages.
TRICKLE = {"none": 4 << 20, "counts": 512 << 10}
#: Seconds for one whole test. A test takes a few; a busy machine may take many times that.
LIMIT = 100


# -- which cells -------------------------------------------------------------------------------------------------------


def test_chosen_cells_have_every_possible_pair_of_values() -> None:
    versions = ["7.2", "10.0", "11.1"]
    possible = [dataclasses.astuple(cell) for cell in cells.every(versions) if cells.impossible(cell) is None]
    chosen = [dataclasses.astuple(cell) for cell in cells.chosen(versions)]
    wanted = set().union(*(pairs_of(combination) for combination in possible))
    assert wanted == set().union(*(pairs_of(combination) for combination in chosen))
    assert len(chosen) < len(possible) / 4
    # A missing cell has a reason.
    absent = set().union(*(pairs_of(dataclasses.astuple(cell)) for cell in cells.every(versions))) - wanted
    assert absent == {(0, 3, "7.2", "channels"), (0, 3, "7.2", "ack"), (2, 3, "to", "snapshot")}


def test_pairs_of_small_parameters_are_found() -> None:
    combinations = list(itertools.product("ab", "12", "xy"))
    chosen = by_pairs(combinations)
    assert len(chosen) == 4
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, combinations))
    assert by_pairs([]) == []
    assert by_pairs(reversed(combinations)) == by_pairs(reversed(combinations))


# -- the QEMUs of a cell -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@functools.cache
def machine_types(version: str) -> dict[str, str]:
    """The machine types of a version; an alias leads to its full name."""

    async def ask() -> dict[str, str]:
        async with Qemu.start("none", "1M", version=version) as vm:
            found = await vm.qmp.execute("query-machines")
        return {name: row["name"] for row in found for name in (row["name"], row.get("alias", row["name"]))}

    return trio.run(ask)


def full_name(cell: Cell) -> str:
    """The machine type in the form of all versions; skips if this version does not have it any more."""
    names = machine_types(cell.version)
    if cell.machine not in names:
        pytest.skip(f"QEMU {cell.version} has no machine type {cell.machine}")
    return names[cell.machine]


def next_version(version: str, machine: str) -> str:
    """The version to which a guest goes on: the next newer one with its machine type, or the oldest one with it."""
    there = list(installed.installed())
    at = there.index(version) + 1
    return next(name for name in (*there[at:], *there[:at]) if machine in machine_types(name))


@contextlib.asynccontextmanager
async def running(cell: Cell, machine: str, hop: Hop) -> AsyncIterator[Qemu]:
    """A QEMU with a running guest: it counts, or has memory of all kinds."""
    counts = machine != "none"
    async with Qemu.start(
        machine,
        SIZE,
        version=cell.version,
        boot=boot_sector() if counts else None,
        extra=hop.arguments("client"),
    ) as vm:
        if counts:
            await vm.wait_serial(lambda text: text.count("\n") >= 3)
        else:
            peers.mix(vm.ram, seed=21)
        yield vm


@contextlib.asynccontextmanager
async def waiting(version: str, machine: str, hop: Hop) -> AsyncIterator[Qemu]:
    """Another such QEMU that waits for a guest."""
    boot = boot_sector() if machine != "none" else None
    arguments = hop.arguments("server")
    async with Qemu.start(machine, SIZE, version=version, incoming="defer", boot=boot, extra=arguments) as vm:
        yield vm


async def goes_on(vm: Qemu, before: str) -> None:
    """The guest counts on from the point at which it was stopped."""
    text = await vm.wait_serial(lambda text: text.count("\n") >= 5)
    assert_no_gap(parse_counts(before + text))


async def goes_on_from_a_snapshot(vm: Qemu, last: int) -> None:
    """The guest counts on without a gap, from a moment that was not later than *last*."""
    text = await vm.wait_serial(lambda text: text.count("\n") >= 5)
    counts = parse_counts(text.partition("\n")[2])  # the first line may have begun before the snapshot
    assert counts == list(range(counts[0], counts[0] + len(counts)))
    assert 3 < counts[0] <= last + 2


def same_memory(guest: trimig.ParkedGuest, vm: Qemu) -> None:
    """Every byte of the main memory equals QEMU's."""
    (block,) = [block for block in guest.ram if block.name == "m0"]
    wrong = np.flatnonzero(np.asarray(block.pages).reshape(-1) != vm.ram)
    assert wrong.size == 0, (
        f"{wrong.size} bytes differ, at {', '.join(f'{address:#x}' for address in wrong[:20].tolist())}"
    )


# -- the matrix --------------------------------------------------------------------------------------------------------


def _parameters() -> list[ParameterSet]:
    versions = installed.versions()
    chosen = cells.chosen(versions)
    found = []
    for cell in cells.every(versions):
        if cells.impossible(cell) is None:
            marks = () if cell in chosen else (pytest.mark.full,)
            found.append(pytest.param(cell, id=str(cell), marks=marks))
    return found


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Cell:
    """The cell of this test, recorded for the table."""
    found: Cell = request.param
    request.node.user_properties.append(("cell", dataclasses.astuple(found)))
    missing_qemu(installed.installed().get(found.version), os.environ, found.version)
    return found


@pytest.fixture
def machine(cell: Cell) -> str:
    """The full name of its machine type."""
    return full_name(cell)


@pytest.fixture
def target(cell: Cell, machine: str) -> str:
    """The version to which the guest goes on."""
    return next_version(cell.version, machine) if cell.direction == "through" else cell.version


@pytest.mark.qemu
@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("cell", _parameters(), indirect=True)
async def test_guest_arrives_whole(cell: Cell, machine: str, target: str, pki: Pki, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        if cell.direction == "to" and machine == "none":
            await _application_to_qemu(cell, pki, tmp_path)
        elif cell.direction == "to":
            await _capture_to_qemu(cell, machine, pki, tmp_path)
        else:
            await _out_of_qemu(cell, machine, target, pki, tmp_path)


async def _application_to_qemu(cell: Cell, pki: Pki, tmp_path: Path) -> None:
    """A guest of trimig, which runs, in a form that the QEMU accepts."""
    with Hop(cell.mode, tmp_path, pki, TRICKLE["none"]) as hop, peers.source(16 << 20) as guest:
        guest.uuid = hops.UUID if cell.mode == "uuid" else None
        async with waiting(cell.version, "none", hop) as vm:
            await hops.send(
                hop, guest, vm, functools.partial(waiting, cell.version, "none", Hop("precopy", tmp_path, pki))
            )
            assert np.array_equal(vm.ram, peers.memory(guest))
        assert guest.run_state == "paused"


async def _capture_to_qemu(cell: Cell, machine: str, pki: Pki, tmp_path: Path) -> None:
    """A file that a QEMU has written is sent to another QEMU."""
    file = tmp_path / "capture"
    start = Hop("uuid" if cell.mode == "uuid" else "precopy", tmp_path, pki)
    async with running(cell, machine, start) as vm:
        await vm.migrate(
            f"exec:cat > {file}.part && mv {file}.part {file}",
            capabilities={"validate-uuid": cell.mode == "uuid"},
            parameters={"max-bandwidth": 0},
        )
        while True:
            if await trio.Path(file).exists():
                break
            await trio.sleep(0.01)
        before = vm.serial_text()
    with await trimig.ParkedGuest.load(file) as guest:
        await _on_to_qemu(cell.version, machine, Hop(cell.mode, tmp_path, pki), guest, before)


async def _on_to_qemu(version: str, machine: str, hop: Hop, guest: trimig.ParkedGuest, before: str) -> None:
    """A parked guest that counts is sent to a QEMU, and counts on."""
    with hop:
        spare = functools.partial(waiting, version, machine, Hop("precopy", hop.directory, hop.pki))
        async with waiting(version, machine, hop) as vm:
            await hops.send(hop, guest, vm, spare)
            await goes_on(vm, before)


async def _out_of_qemu(cell: Cell, machine: str, target: str, pki: Pki, tmp_path: Path) -> None:
    """A QEMU's guest is parked; in the direction ``through`` it goes on to a QEMU of the version *target*."""
    file = tmp_path / "guest"
    trickle = TRICKLE["none" if machine == "none" else "counts"]
    with Hop(cell.mode, tmp_path, pki, trickle) as hop:
        async with running(cell, machine, hop) as vm:
            guest = await hops.receive(hop, vm, functools.partial(trimig.ParkedGuest, file))
            before = vm.serial_text() if machine != "none" else ""
            if cell.mode != "snapshot":
                await vm.wait_status("postmigrate")
            if cell.mode != "snapshot" or machine == "none":
                same_memory(guest, vm)
            memory = vm.ram.copy()
            guest.close()
    with await trimig.ParkedGuest.load(file) as guest:
        if cell.direction == "from":
            assert guest.name == machine
            return
        (tmp_path / "on").mkdir()
        numbers = tuple(int(part) for part in target.split("."))
        mode = cell.mode
        if cell.mode == "snapshot" or numbers < cells.SINCE.get(cell.mode, (0,)):
            mode = "precopy"
        with Hop(mode, tmp_path / "on", pki, trickle) as hop:
            spare = functools.partial(waiting, target, machine, Hop("precopy", hop.directory, pki))
            async with waiting(target, machine, hop) as vm:
                await hops.send(hop, guest, vm, spare)
                if machine == "none":
                    assert np.array_equal(vm.ram, memory)
                elif cell.mode == "snapshot":
                    await goes_on_from_a_snapshot(vm, parse_counts(before)[-1])
                else:
                    await goes_on(vm, before)
