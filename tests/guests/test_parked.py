"""Parked guests: loaded and saved, received and sent on, and nothing left behind where that fails."""

from __future__ import annotations

import errno
import functools
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.guests.saved import check, devices, stream
from trimig.channel.offload import limiter
from trimig.guest import OpaqueGuest
from trimig.guests.parked import writer as saving
from trimig.memory import MemfdBlock
from trimig.stream import inspect_stream
from trimig.testing import VirtualLink, virtual_link
from trimig.wire import RamFlag, RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire.devices import description, globalstate


def blocks_of(guest: trimig.ParkedGuest) -> list[MemfdBlock]:
    """Its RAM, as what it is."""
    blocks = [block for block in guest.ram if isinstance(block, MemfdBlock)]
    assert len(blocks) == len(guest.ram)
    return blocks


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def test_a_stream_is_loaded_and_saved_with_each_page_once(tmp_path: Path) -> None:
    """Q1, Q3: ids, names, subsections, description and the order of blocks survive; the second save is identical."""
    original = stream()
    with await trimig.ParkedGuest.load(write(tmp_path / "in", original)) as guest:
        assert isinstance(guest, OpaqueGuest)
        check(guest)
        await guest.save(tmp_path / "out")
    saved = (tmp_path / "out").read_bytes()
    tail = original[original.index(b"\x04\x00\x00\x00\x00\x05timer") :]
    assert saved.endswith(tail)
    assert saved.startswith(original[: original.index(b"\x08")])
    report = await inspect_stream(tmp_path / "out")
    assert [(b.name, b.pages, b.zero_pages) for b in report.blocks] == [("ram", 4, 1), ("rom", 1, 0)]
    assert report.commands == []
    with await trimig.ParkedGuest.load(tmp_path / "out") as again:
        check(again)
        await again.save(tmp_path / "twice")
    assert (tmp_path / "twice").read_bytes() == saved
    assert limiter().borrowed_tokens == 0


async def test_pages_before_a_repeated_start_are_kept(tmp_path: Path) -> None:
    with await trimig.ParkedGuest.load(write(tmp_path / "in", stream(restart=True))) as guest:
        check(guest)
    link = VirtualLink(seed=1)
    with trimig.ParkedGuest() as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(trimig.receive, received, link.b))
            await link.a.send_all(stream(restart=True))
        check(received)


async def test_a_stream_without_description_keeps_its_devices(tmp_path: Path) -> None:
    with await trimig.ParkedGuest.load(write(tmp_path / "in", stream(described=False))) as guest:
        check(guest)
        assert guest.description is None
        assert any("no description" in warning for warning in guest.warnings)
        await guest.save(tmp_path / "out")
    # With a description of none of them: a QEMU waits for one, also if the file is sent by another program.
    end = globalstate.section("paused").payload + b"\x7e\0\0\0\x29" + wire.end_of_stream()
    assert (tmp_path / "out").read_bytes().endswith(end + wire.description(description.build(4096, [])))
    with await trimig.ParkedGuest.load(tmp_path / "out") as again:
        check(again)


async def test_a_stream_of_an_old_machine_type_is_written_as_it_came(tmp_path: Path) -> None:
    """Without configuration section and footers; both are found out from the file."""
    close = wire.END_WORD
    data = (
        wire.file_header() + wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", 4096)]) + close
    )
    data += wire.section_continue(Section.PART, 2)
    data += RecordWriter().zero_records("ram", np.zeros(1, np.int64)) + close
    data += wire.section_continue(Section.END, 2) + close
    sections = devices()
    data += b"".join(wire.device_section(s, s.section_id or 0, footer=False) for s in sections) + wire.end_of_stream()
    data += wire.description(description.build(4096, [s.description or {} for s in sections]))
    with await trimig.ParkedGuest.load(write(tmp_path / "in", data)) as guest:
        assert (guest.peer.send_configuration, guest.peer.send_section_footer) == (False, False)
        await guest.save(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


async def test_a_throttle_means_nothing_to_a_parked_guest(tmp_path: Path) -> None:
    """S3: it does not run, so nothing is taken from it; it is sent on with auto-converge like any other."""
    with await trimig.ParkedGuest.load(write(tmp_path / "in", stream())) as guest:
        await guest.throttle(99)
        one, other = virtual_link()
        config = trimig.Config(capabilities=trimig.Capabilities(auto_converge=True))
        with trimig.ParkedGuest(tmp_path / "out") as again:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trimig.receive, again, other)
                summary = await trimig.migrate(guest, one, config)
            check(again)
        assert summary.warnings == ()


async def test_a_file_cut_at_any_place_gives_a_typed_error_or_the_guest(tmp_path: Path) -> None:
    """T4: cut before the end-of-file byte it is refused, behind it only the description is missing."""
    data = stream()
    text = data.index(b'{"page_size"')
    eof = text - 6
    cuts = [*range(120), *range(120, len(data), 997), *range(eof - 150, text + 3)]
    for cut in cuts:
        path = write(tmp_path / "cut", data[:cut])
        if cut > eof:
            with await trimig.ParkedGuest.load(path) as guest:
                check(guest)
            continue
        with pytest.raises((trimig.TransportFailed, trimig.RemoteProtocolError)):
            await trimig.ParkedGuest.load(path)


async def transfer(source: Any, target: Any) -> tuple[trimig.Summary, trimig.Summary]:
    link = VirtualLink(seed=2)
    results: dict[str, trimig.Summary] = {}

    async def send() -> None:
        results["source"] = await trimig.migrate(source, link.a)

    async def receive() -> None:
        results["target"] = await trimig.receive(target, link.b)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
    return results["source"], results["target"]


async def test_sent_on_as_it_came_and_the_file_is_there_before_the_answer(tmp_path: Path) -> None:
    """The source has prepared: its PING at the end of unknown devices is answered when RAM is on the disk."""
    path = write(tmp_path / "in", stream())
    with await trimig.ParkedGuest.load(path) as source, trimig.ParkedGuest(tmp_path / "out") as target:
        sent, got = await transfer(source, target)
        assert (sent.confirmed, sent.prepared, got.confirmed) == (True, True, True)
        check(target)
        assert target.description == source.description
        assert (target.run_state, source.run_state) == ("paused", "paused")
    with await trimig.ParkedGuest.load(tmp_path / "out") as loaded:
        check(loaded)
    assert sorted(await trio.to_thread.run_sync(os.listdir, tmp_path)) == ["in", "out"]


async def test_an_application_is_parked_and_comes_back() -> None:
    class Counter(trimig.Device):
        vmstate = trimig.VMState("counter", fields=(trimig.Field("value", "uint32"),))
        value = 0

    def app(*, running: bool) -> tuple[trimig.AppGuest, Counter]:
        guest = trimig.AppGuest("app", running=running)
        guest.add_ram("table", 1 << 20)
        device = Counter()
        guest.add_device(device)
        return guest, device

    first, counter = app(running=True)
    second, other = app(running=False)
    with trimig.ParkedGuest() as parked:
        first.ram[0].pages[7] = 9
        counter.value = 77
        await transfer(first, parked)
        assert [s.idstr for s in parked.sections] == ["counter", "globalstate"]
        assert parked.guest_run_state == "running"
        await transfer(parked, second)
    assert other.value == 77
    assert (second.ram[0].pages == first.ram[0].pages).all()
    assert second.run_state == "running"
    for guest in (first, second):
        guest.close()


@pytest.mark.parametrize("cut", [40, 300, 9000, -700, -500])
async def test_a_stream_that_breaks_leaves_no_file(tmp_path: Path, cut: int) -> None:
    link = VirtualLink(seed=1)
    with trimig.ParkedGuest(tmp_path / "out") as guest:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trimig.TrimigError):
                    await trimig.receive(guest, link.b)

            nursery.start_soon(receive)
            await link.a.send_all(stream(described=False)[:cut])
            await link.a.aclose()
        with pytest.raises(trimig.StateError):
            await guest.save_devices()
    assert await trio.to_thread.run_sync(os.listdir, tmp_path) == []


@pytest.mark.parametrize("cut", [300, 9000, -100])
async def test_a_cancelled_arrival_leaves_no_file(tmp_path: Path, cut: int) -> None:
    link = VirtualLink(seed=1)
    with trimig.ParkedGuest(tmp_path / "out") as guest:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(trimig.receive, guest, link.b))
            await link.a.send_all(stream()[:cut])
            while not guest.ram:
                await trio.lowlevel.checkpoint()
            assert guest.ram
            nursery.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(os.listdir, tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "link", "write"])
async def test_a_disk_that_fails_leaves_the_guest_at_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = write(tmp_path / "in", stream())

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with await trimig.ParkedGuest.load(path) as source, trimig.ParkedGuest(tmp_path / "out") as target:
        monkeypatch.setattr(os, call, broken)
        if call == "link":  # then it is tried without links
            monkeypatch.setattr(os, "rename", broken)
        link = VirtualLink(seed=1)
        failures: list[trimig.TrimigError] = []

        async def fails(call: Any) -> None:
            with pytest.raises(trimig.TrimigError) as caught:
                await call()
            failures.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, functools.partial(trimig.migrate, source, link.a))
            nursery.start_soon(fails, functools.partial(trimig.receive, target, link.b))
        monkeypatch.undo()
        kinds = {type(failure) for failure in failures}
        assert kinds == {trimig.GuestFailed, trimig.PeerFailed}
        assert all("No space left" in str(f) for f in failures if isinstance(f, trimig.GuestFailed))
        assert next(f for f in failures if isinstance(f, trimig.PeerFailed)).owner is trimig.Ownership.SOURCE
    assert await trio.to_thread.run_sync(os.listdir, tmp_path) == ["in"]


async def test_an_existing_file_is_never_touched_without_replace(tmp_path: Path) -> None:
    path = write(tmp_path / "in", stream())
    old = write(tmp_path / "out", b"precious")
    with await trimig.ParkedGuest.load(path) as guest:
        with pytest.raises(trimig.GuestFailed, match="File exists"):
            await guest.save(old)
        assert old.read_bytes() == b"precious"
        await guest.save(old, replace=True)
    with await trimig.ParkedGuest.load(old) as loaded:
        check(loaded)
    assert sorted(await trio.to_thread.run_sync(os.listdir, tmp_path)) == ["in", "out"]


async def test_a_file_that_comes_up_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    guest = await trimig.ParkedGuest.load(write(tmp_path / "in", stream()))
    with guest:
        file = saving.SaveFile(tmp_path / "out", guest, blocks_of(guest), replace=False, peer=guest.peer)
        await file.write_ram()
        write(tmp_path / "out", b"precious")
        with pytest.raises(FileExistsError):
            await file.finish(guest.sections)
        file.discard()
    assert (tmp_path / "out").read_bytes() == b"precious"
    assert sorted(await trio.to_thread.run_sync(os.listdir, tmp_path)) == ["in", "out"]


async def test_more_ram_than_the_machine_has_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    data = wire.file_header() + wire.configuration("toy") + wire.section_start(Section.START, 2, "ram", 0, 4)
    data += struct.pack(">Q", (1 << 47) | RamFlag.MEM_SIZE) + b"\x03ram" + struct.pack(">Q", 1 << 47)
    with pytest.raises(trimig.GuestFailed, match="there is room for"):
        await trimig.ParkedGuest.load(write(tmp_path / "in", data))


async def test_an_empty_or_busy_guest_cannot_be_sent(tmp_path: Path) -> None:
    link = VirtualLink(seed=1)
    with trimig.ParkedGuest() as guest:
        with pytest.raises(trimig.StateError, match="nothing is parked"):
            await guest.save(tmp_path / "out")
        guest.claim("a test")
        with pytest.raises(trimig.StateError, match="busy: a test"):
            await trimig.migrate(guest, link.a)
        guest.release()
    with pytest.raises(FileNotFoundError):
        await trimig.ParkedGuest.load(tmp_path / "none")
    assert await trio.to_thread.run_sync(os.listdir, tmp_path) == []


async def test_ram_that_is_not_in_the_file_is_an_error_unless_allowed(tmp_path: Path) -> None:
    """Q9."""
    data = stream()
    at = data.index(b"\x03rom\xff")
    data = data[: at - 8] + data[at + 5 :]  # without the only record of that block
    path = write(tmp_path / "in", data)
    with pytest.raises(trimig.RemoteProtocolError, match="1 pages of RAM block 'rom' are not in the stream"):
        await trimig.ParkedGuest.load(path)
    with await trimig.ParkedGuest.load(path, partial=True) as guest:
        assert not guest.ram[1].pages.any()
        assert "1 pages of RAM block 'rom' are not in the stream" in guest.warnings
