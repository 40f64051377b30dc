"""A QEMU's guest is parked in trimig and sent to another QEMU: byte for byte, and without a gap in its count."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
from tests.qemu.bootsector import assert_no_gap, boot_sector, parse_counts
from tests.qemu.harness import RAM_BLOCK, Qemu, random_ram
from trimig.stream import inspect_stream
from trimig.testing import VirtualLink

pytestmark = pytest.mark.qemu

LIMIT = 60
LISTEN = "tcp:127.0.0.1:0"


async def receive_from(vm: Qemu, guest: trimig.ParkedGuest, *, return_path: bool) -> trimig.Summary:
    """Let *vm* migrate into *guest*."""
    monitor = trimig.Monitor()
    results: list[trimig.Summary] = []

    async def receive() -> None:
        results.append(await trimig.receive(guest, LISTEN, monitor=monitor))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            while not monitor.addresses:
                await monitor.wait_changed()
            await vm.migrate(monitor.addresses[0], capabilities={"return-path": return_path})
    return results[0]


@pytest.mark.parametrize("return_path", [True, False])
async def test_ram_of_a_qemu_arrives_byte_for_byte(tmp_path: Path, *, return_path: bool) -> None:
    """B7: 64 MiB of random memory, received and on the disk before the source gets the answer."""
    file = tmp_path / "guest"
    with trimig.ParkedGuest(file) as guest:
        async with Qemu.start("none", "64M") as vm:
            vm.ram[:] = random_ram(64 << 20, seed=5)
            vm.ram[8 << 20 : 9 << 20] = 0
            summary = await receive_from(vm, guest, return_path=return_path)
            assert np.array_equal(guest.ram[0].pages.reshape(-1), vm.ram)
            assert summary.confirmed is return_path
        assert [s.idstr for s in guest.sections] == ["timer", "globalstate"]
        with await trimig.ParkedGuest.load(file) as loaded:
            assert np.array_equal(loaded.ram[0].pages, guest.ram[0].pages)
            assert loaded.sections == guest.sections
            assert loaded.description == guest.description
    assert await trio.to_thread.run_sync(os.listdir, tmp_path) == ["guest"]


async def count_on(vm: Qemu, lines: int) -> str:
    """Let the guest print *lines* more."""
    have = vm.serial_text().count("\n")
    return await vm.wait_serial(lambda text: text.count("\n") >= have + lines)


async def test_a_counting_guest_goes_on_behind_the_parking(tmp_path: Path) -> None:
    """A QEMU saves its guest in a file; trimig sends that to one QEMU, and another loads the file itself."""
    file = tmp_path / "guest"
    with trio.fail_after(LIMIT), trimig.ParkedGuest(file) as parked:
        async with Qemu.start("pc", "16M", boot=boot_sector()) as vm:
            await count_on(vm, 5)
            await receive_from(vm, parked, return_path=True)
            before = vm.serial_text()
        assert parked.guest_run_state == "running"

        async with Qemu.start("pc", "16M", boot=boot_sector(), incoming="defer") as vm:
            uri = await vm.incoming(LISTEN)
            with await trimig.ParkedGuest.load(file) as guest:
                summary = await trimig.migrate(guest, uri)
            assert (summary.confirmed, summary.prepared) == (True, True)
            await vm.wait_status("running")
            after = await count_on(vm, 5)
        assert_no_gap(parse_counts(before + after))

        async with Qemu.start("pc", "16M", boot=boot_sector(), incoming=f"exec:cat {file}") as vm:
            await vm.wait_status("running")
            after = await count_on(vm, 5)
        assert_no_gap(parse_counts(before + after))


@pytest.mark.parametrize("machine", ["none", "pc", "q35", "microvm"])
async def test_capture_is_saved_again_to_equal_bytes(captures: dict[str, Path], tmp_path: Path, machine: str) -> None:
    """The saved file loads and saves to the same bytes, and devices and description are those of the capture."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    with await trimig.ParkedGuest.load(captures[machine]) as guest:
        await guest.save(once)
        original = captures[machine].read_bytes()
        tail = original[original.index(b"\x04\x00\x00\x00\x00\x05timer") :]
        assert once.read_bytes().endswith(tail)
        with await trimig.ParkedGuest.load(once) as again:
            await again.save(twice)
            for one, other in zip(guest.ram, again.ram, strict=True):
                assert (one.name, one.length) == (other.name, other.length)
                assert np.array_equal(one.pages, other.pages)
    assert once.read_bytes() == twice.read_bytes()


@pytest.mark.parametrize("machine", ["none", "pc", "q35", "microvm"])
async def test_every_device_decodes_by_the_description(captures: dict[str, Path], machine: str) -> None:
    """Q2: no size mismatch in any device, nothing missing, and nothing behind the end."""
    report = await inspect_stream(captures[machine])
    assert report.error is None
    assert [(d.idstr, d.problem) for d in report.devices if d.problem is not None] == []
    assert len(report.devices) > (1 if machine == "none" else 10)
    assert all(d.fields for d in report.devices if d.size)
    assert report.problems == []
    assert report.trailing == 0
    assert {b.name: b.missing for b in report.blocks}[RAM_BLOCK] == 0


async def test_trimig_to_trimig_with_a_parked_guest(captures: dict[str, Path], tmp_path: Path) -> None:
    """The PING of the prepare step is recognised at the end of devices that trimig does not know."""
    file = tmp_path / "guest"
    link = VirtualLink(seed=1)
    sent: list[trimig.Summary] = []
    with await trimig.ParkedGuest.load(captures["pc"]) as source, trimig.ParkedGuest(file) as target:

        async def send() -> None:
            sent.append(await trimig.migrate(source, link.a))

        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(functools.partial(trimig.receive, target, link.b))
        assert (sent[0].confirmed, sent[0].prepared) == (True, True)
        assert target.sections == source.sections
        assert target.description == source.description
        with await trimig.ParkedGuest.load(file) as loaded:
            for one, other in zip(source.ram, loaded.ram, strict=True):
                assert (one.name, np.array_equal(one.pages, other.pages)) == (other.name, True)
            assert loaded.sections == source.sections
    report = await inspect_stream(file)
    assert [(b.name, b.pages + b.zero_pages) for b in report.blocks] == [
        (b.name, b.length // 4096) for b in report.blocks
    ]
