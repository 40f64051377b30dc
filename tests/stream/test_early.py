"""Devices in front of the memory (newer.md part 2), and memory that virtio-mem has not plugged in."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from click.testing import CliRunner

import trimig
from tests.engine import test_destination as known
from tests.stream.made import (
    DEVICES,
    PAGES,
    SWITCHOVER_START,
    content,
    device,
    elements,
    joined,
    read_everywhere,
    received,
    text_of,
    with_before,
)
from trimig.cli import main
from trimig.guest import DeviceSection
from trimig.stream import export_raw, inspect_stream
from trimig.testing import VirtualLink
from trimig.wire import Decoder, RecordWriter, Section, events
from trimig.wire import encoder as wire
from trimig.wire.devices.virtio_mem import absent_by_rule, overlap

EARLY = device("0000:00:02.0/virtio-mem-device-early", bytes(range(52)), 38)
NASTY = device("0000:00:03.0/nasty-early", bytes.fromhex("7e00000027 04 7e00000027 00 7e00000027 0100"), 39)


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("before", ["start", "part"])
@pytest.mark.parametrize("early", [(EARLY,), (EARLY, NASTY)], ids=["one", "two"])
async def test_early_sections_are_read_and_written_in_their_place(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    early: tuple[DeviceSection, ...],
    before: str,
    answers: bool,
) -> None:
    """As 11.1 and as 10.0 send them: live, from a file, saved, and sent on."""
    parts = elements(early=early, early_before=before, answers=answers)
    data = joined(parts)
    report = await read_everywhere(data, tmp_path)
    assert [d.payload for d in report.devices] == [s.payload for s in (*early, *DEVICES)]
    assert [d.problem for d in report.devices] == [None] * len(report.devices)
    assert all(d.fields for d in report.devices)
    assert report.problems == []
    made = b"".join(wire.device_section(s, s.section_id or 0) for s in early)
    for piece in (0, 1):
        with trimig.ParkedGuest(tmp_path / "kept", replace=True) as guest:
            await received(data, guest, piece=piece)
            await check_kept((tmp_path / "kept").read_bytes(), made, before)
            await guest.save(tmp_path / "saved", replace=True)
            await check_kept((tmp_path / "saved").read_bytes(), made, before)
            with trimig.ParkedGuest() as third:
                await send_on(guest, third)
                assert [s.payload for s in third.sections] == [s.payload for s in (*early, *DEVICES)]
                assert [s.before for s in third.sections[: len(early)]] == [
                    "list" if before == "start" else "pages"
                ] * len(early)
                assert third.description == guest.description


async def check_kept(data: bytes, made: bytes, before: str) -> None:
    """The early sections stand once in *data*, in front of RAM's list or behind it."""
    assert data.count(made) == 1
    start = data.index(wire.section_start(Section.START, 2, "ram", 0, 4))
    if before == "start":
        assert data.index(made) + len(made) == start
    else:
        head = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", PAGES * 4096)])
        assert data.index(made) == start + len(head + wire.END_WORD + wire.section_footer(2))


async def send_on(source: trimig.ParkedGuest, target: trimig.ParkedGuest) -> None:
    link = VirtualLink(seed=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(trimig.receive, target, link.b))
        await trimig.migrate(source, link.a)


def test_any_cut_gives_the_same_sections() -> None:
    """The end is a guess by what follows, and so must not depend on how the bytes come."""
    data = joined(elements(early=(EARLY, NASTY)))
    stop = data.index(content()[0].tobytes()[:16])
    for cut in range(9, stop):
        decoder = Decoder(measure=None, footers=None)
        found: list[bytes] = []
        for piece in (data[:cut], data[cut:]):
            decoder.feed(piece)
            while (event := decoder.next_event()) is not None:
                if isinstance(event, events.DevicePayload):
                    found.append(event.payload)
        assert found == [EARLY.payload, NASTY.payload], cut


async def test_a_guess_that_the_description_does_not_confirm_is_refused(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Device state that holds its own footer with something legal behind it."""
    trap = b"abc" + wire.section_footer(38) + wire.device_section(device("trap", b"", 38), 38)
    tricky = device("0000:00:02.0/tricky", trap, 38)
    data = joined(elements(early=(tricky,)))
    (tmp_path / "in").write_bytes(data)
    words = "the description gives it"
    with pytest.raises(trimig.RemoteProtocolError, match=words):
        await trimig.ParkedGuest.load(tmp_path / "in")
    with trimig.ParkedGuest() as guest, pytest.raises(trimig.RemoteProtocolError, match=words):
        await received(data, guest)
    assert words in str((await inspect_stream(tmp_path / "in")).error)


async def test_early_sections_of_a_known_guest_are_measured(autojump_clock: trio.testing.MockClock) -> None:
    parts = known.parts()
    for before in ("list", "end"):
        moved = with_before({k: v for k, v in parts.items() if k != "device"}, before, parts["device"])
        fed = await known.Fed().feed(moved)
        assert isinstance(fed.result, trimig.Summary), fed.result
        assert fed.guest.running


# -- virtio-mem --------------------------------------------------------------------------------------------------------

BLOCK = 1 << 16
COUNT = 70
VM0 = "0000:00:02.0/vm0"


def plugged(bits: list[int], count: int = COUNT, *, full: bool = False, block: int = BLOCK) -> bytes:
    """What the device says: in a section of its own, or (*full*) as the middle of a larger one."""
    words = [0] * -(-count // 64)
    for bit in bits:
        words[bit // 64] |= 1 << bit % 64
    size = len(bits) * block
    figures = struct.pack(">QQQI", block << 4, count * block, block, 0)
    middle = struct.pack(">QQQ", count * block, size, size) if full else struct.pack(">Q", size)
    core = figures + middle + struct.pack(f">{len(words)}Q", *words)
    return b"\x11" * 333 + core + b"\x22" * 77 if full else core


def unplugged_stream(payload: bytes, pages: Mapping[int, int], *, early: bool, name: str = VM0) -> bytes:
    """A guest with a virtio-mem device of which only *pages* (and what they are filled with) come."""
    kind = "virtio-mem-device-early" if early else "virtio-mem"
    section = device(f"0000:00:02.0/{kind}", payload, 38)
    parts = elements(
        early=(section,) if early else (),
        devices=DEVICES if early else (*DEVICES, section),
    )
    close = wire.END_WORD + wire.section_footer(2)
    listed = [("ram", PAGES * 4096), (name, COUNT * BLOCK)]
    start = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list(listed) + close
    made = wire.device_section(section, 38) if early else b""
    parts["start"] = made + start
    offsets = np.array(sorted(pages), np.int64) * 4096
    fills = np.array([pages[k] for k in sorted(pages)], np.uint8)
    records = RecordWriter().zero_records(name, offsets, fills)
    parts["part"] = wire.section_continue(Section.PART, 2) + records + close + parts["part"]
    return joined(parts)


PER = BLOCK // 4096
SOME = [1, 2, 65]
WHOLE = {page: 7 for bit in SOME for page in range(bit * PER, (bit + 1) * PER)}


@pytest.mark.parametrize("name", [VM0, "vm0"])
@pytest.mark.parametrize("early", [False, True])
async def test_unplugged_memory_is_absent_by_rule(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, early: bool, name: str
) -> None:
    data = unplugged_stream(plugged(SOME, full=not early), WHOLE, early=early, name=name)
    path = tmp_path / "in"
    path.write_bytes(data)
    with await trimig.ParkedGuest.load(path) as loaded, trimig.ParkedGuest(tmp_path / "kept") as live:
        await received(data, live)
        assert loaded.warnings == ()
        assert loaded.holes == {}
        for guest in (loaded, live):
            pages = guest.ram[1].pages
            assert [bool((pages[k] == 7).all()) for k in range(len(pages))] == [k in WHOLE for k in range(len(pages))]
    (await trimig.ParkedGuest.load(tmp_path / "kept")).close()
    report = await inspect_stream(path)
    assert report.sound
    assert report.problems == []
    assert (report.blocks[1].missing, report.blocks[1].unplugged) == (0, (COUNT - len(SOME)) * PER)
    done = await export_raw(path, name, tmp_path / "out")
    assert done.length == COUNT * BLOCK


@pytest.mark.parametrize("early", [False, True])
async def test_any_other_absent_page_is_missing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, early: bool
) -> None:
    some = {page: fill for page, fill in WHOLE.items() if page != 2 * PER + 3}
    data = unplugged_stream(plugged(SOME, full=not early), some, early=early)
    path = tmp_path / "in"
    path.write_bytes(data)
    with pytest.raises(trimig.RemoteProtocolError, match=r"^1 pages of RAM block .* are not in the stream"):
        await trimig.ParkedGuest.load(path)
    with trimig.ParkedGuest() as guest, pytest.raises(trimig.RemoteProtocolError, match=r"^1 pages of RAM block"):
        await received(data, guest)
    assert (await inspect_stream(path)).blocks[1].missing == 1
    with pytest.raises(trimig.RemoteProtocolError, match="1 pages of RAM block"):
        await export_raw(path, VM0, tmp_path / "out")
    with trimig.ParkedGuest() as guest:
        summary = await received(data, guest, trimig.Config(completeness="warn"))
        assert any("1 pages of RAM block" in warning for warning in summary.warnings)


def test_send_has_the_option_that_receive_has(tmp_path: Path) -> None:
    """A guest with holes is not sent, unless it is said that it may be; then the next obstacle is the connection."""
    path = tmp_path / "in"
    path.write_bytes(unplugged_stream(plugged(SOME), {}, early=True))
    command = ["send", str(path), f"unix:{tmp_path / 'absent'}"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "are not in the stream" in refused.stderr
    assert 'completeness = "warn"' in refused.stderr
    (tmp_path / "c.toml").write_text('completeness = "warn"\n')
    accepted = CliRunner().invoke(main, [*command, "--config", str(tmp_path / "c.toml")])
    assert accepted.exit_code == 1
    assert "are not in the stream" in accepted.stderr
    assert "absent" in accepted.stderr


def test_only_figures_that_fit_each_other_are_believed() -> None:
    blocks = {VM0: COUNT * BLOCK, "ram": 1 << 20}
    good = plugged(SOME)

    def found(payload: bytes, idstr: str = "0000:00:02.0/virtio-mem") -> list[str]:
        section = DeviceSection(idstr=idstr, version_id=1, payload=payload)
        return list(absent_by_rule(blocks, [section]))

    assert found(good) == [VM0]
    assert found(good, "0000:00:02.0/virtio-net") == []
    assert found(good, "0000:00:09.0/virtio-mem") == [VM0]  # a backend with a name of its own: by its size
    for at in (8, 16, 28, 36):  # region, size of a block, plugged size, bits
        bad = bytearray(good)
        bad[at + 6] ^= 1
        assert found(bytes(bad)) == [], at
    assert found(good[:-1]) == []
    assert found(plugged(list(range(COUNT)))) == []  # all of it is plugged in: nothing may be absent


def test_runs_that_overlap() -> None:
    assert overlap([(0, 4), (6, 9)], [(1, 2), (3, 7), (8, 20)]) == 1 + 1 + 1 + 1
    assert overlap([], [(0, 1)]) == 0


async def test_a_huge_block_that_is_not_plugged_in_costs_nothing(tmp_path: Path) -> None:
    """Eight TiB in one block of the device: no map of its pages is made."""
    section = device("0000:00:02.0/virtio-mem-device-early", plugged([], 1, block=8 << 40), 38)
    parts = elements(early=(section,), devices=())
    close = wire.END_WORD + wire.section_footer(2)
    parts["start"] = wire.device_section(section, 38) + wire.section_start(Section.START, 2, "ram", 0, 4)
    parts["start"] += wire.ram_list([(VM0, 8 << 40)]) + close
    parts["part"], parts["end"] = b"", wire.section_continue(Section.END, 2) + close
    parts["eof"] = SWITCHOVER_START + parts["eof"]
    parts = {k: (wire.device_section(DEVICES[0], 0) + v if k == "eof" else v) for k, v in parts.items()}
    parts["text"] = b"\x06" + struct.pack(">I", len(text := text_of([section, DEVICES[0]]))) + text
    (tmp_path / "in").write_bytes(joined(parts))
    report = await inspect_stream(tmp_path / "in")
    assert report.sound
    assert (report.blocks[0].missing, report.blocks[0].unplugged) == (0, (8 << 40) // 4096)
