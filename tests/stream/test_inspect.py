"""What is told of a stream, sound or damaged at any byte; exporting RAM; the record of the owner."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
from tests.engine.test_postcopy_bad_input import END, PACKAGE, discard, part
from tests.engine.test_postcopy_bad_input import OPENING as OPENING_OF_POSTCOPY
from tests.guests.saved import PAGES, content, devices, stream
from trimig.errors import Ownership
from trimig.stream import (
    Exported,
    OwnerRecord,
    export_raw,
    inspect_stream,
    locked,
    read_record,
    record_decision,
    record_path,
    write_record,
)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def test_report_names_everything_in_a_stream(tmp_path: Path) -> None:
    data = stream()
    report = await inspect_stream(write(tmp_path / "in", data))
    assert report.error is None
    assert (report.size, report.good, report.trailing) == (len(data), len(data), 0)
    assert (report.machine, report.version, report.run_state) == ("toy-1.0", 3, "paused")
    assert [s.name for s in report.subsections] == ["configuration/uuid"]
    assert [(c.name, c.payload) for c in report.commands] == [("OPEN_RETURN_PATH", b""), ("PING", b"\0\0\0\x01")]
    # One page was sent twice.
    assert [(b.name, b.pages, b.zero_pages, b.missing) for b in report.blocks] == [("ram", 5, 1, 0), ("rom", 0, 1, 0)]
    assert [(s.kind, s.idstr) for s in report.sections] == [
        ("start", "ram"), ("part", "ram"), ("end", "ram"), ("full", "timer"), ("full", "i8259"), ("full", "globalstate")
    ]  # fmt: skip
    for section in report.sections:
        assert section.size is not None
        assert data[section.offset] in (1, 2, 3, 4)
        assert data[section.offset + section.size - 5] == 0x7E
    assert [(d.idstr, d.payload, d.problem) for d in report.devices] == [(d.idstr, d.payload, None) for d in devices()]
    text = json.loads(json.dumps(report.record()))
    assert text["devices"][2]["fields"][0] == {"name": "size", "type": "uint32", "offset": 0, "size": 4, "value": 7}


async def test_a_stream_that_is_cut_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    """T4: at every kind of place an error with the offset, and never less than what came before."""
    data = stream()
    whole = await inspect_stream(write(tmp_path / "in", data))
    assert whole.eof_offset is not None
    known = 0
    cuts = {*range(0, 130, 3), *range(130, len(data), 701), *range(whole.eof_offset - 220, len(data), 7)}
    for cut in sorted(cuts):
        report = await inspect_stream(write(tmp_path / "cut", data[:cut]))
        # Behind the end-of-file byte the guest is complete; a stream without description is a sound one.
        assert (report.error is None) is (cut == whole.eof_offset + 1), cut
        assert report.size == cut
        assert report.good <= cut
        found = len(report.sections) + len(report.commands)
        assert found >= known, cut
        known = found
    assert known == len(whole.sections) + len(whole.commands)


async def test_damage_of_one_device_does_not_hide_the_others(tmp_path: Path) -> None:
    """Q2: a size mismatch is told of that device."""
    data = stream()
    at = data.index(b'{"page_size"')
    text = data[at:].replace(b'"size": 24', b'"size": 23')
    report = await inspect_stream(write(tmp_path / "in", data[:at] + text))
    assert report.error is None
    first, *others = report.devices
    assert first.problem is not None
    assert "goes on to byte 24" in first.problem
    assert [device.problem for device in others] == [None, None]


async def test_something_else_is_no_stream(tmp_path: Path) -> None:
    report = await inspect_stream(write(tmp_path / "in", b"\x7fELF" + bytes(100)))
    assert isinstance(report.error, trimig.RemoteProtocolError)
    assert report.error.offset == 0
    report = await inspect_stream(write(tmp_path / "empty", b""))
    assert "the file is empty" in str(report.error)
    assert not report.damaged


async def test_a_pipe_is_read_as_a_file_is(tmp_path: Path) -> None:
    data = stream()
    reader, writer = os.pipe()
    with os.fdopen(reader), trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def feed() -> None:
                async with trio.lowlevel.FdStream(writer) as pipe:
                    for start in range(0, len(data), 999):
                        await pipe.send_all(data[start : start + 999])

            nursery.start_soon(feed)
            report = await inspect_stream(f"/proc/self/fd/{reader}")
    assert report.error is None
    assert report.blocks == (await inspect_stream(write(tmp_path / "in", data))).blocks


async def test_exported_ram_is_byte_for_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "in", stream())
    assert await export_raw(path, "ram", tmp_path / "out") == Exported(length=PAGES * 4096, holes=[])
    assert (tmp_path / "out").read_bytes() == content().tobytes()
    with pytest.raises(FileExistsError):
        await export_raw(path, "rom", tmp_path / "out")
    await export_raw(path, "rom", tmp_path / "out", replace=True)
    assert np.frombuffer((tmp_path / "out").read_bytes(), np.uint8).tolist() == [0xFF] * 4096


@pytest.mark.parametrize("cut", [0, 20, 300, 9000])
async def test_a_failed_export_leaves_no_file(tmp_path: Path, cut: int) -> None:
    with pytest.raises(trimig.MigrationError):
        await export_raw(write(tmp_path / "in", stream()[:cut]), "ram", tmp_path / "out")
    with pytest.raises(trimig.ConfigError, match="it has 'ram', 'rom'"):
        await export_raw(write(tmp_path / "in", stream()), "disk", tmp_path / "out")
    assert await trio.to_thread.run_sync(os.listdir, tmp_path) == ["in"]


async def test_the_record_of_the_owner_goes_through_its_states(tmp_path: Path) -> None:
    file = write(tmp_path / "guest", b"")
    assert read_record(file) is None
    await record_decision(file, "tcp:there:1")
    record = read_record(file)
    assert record is not None
    assert (record.owner, record.destination) == (Ownership.UNKNOWN, "tcp:there:1")
    write_record(file, OwnerRecord.now(Ownership.DESTINATION, "tcp:there:1"))
    assert json.loads(record_path(file).read_text())["owner"] == "destination"
    write_record(file, None)
    write_record(file, None)
    assert read_record(file) is None
    record_path(file).write_text("{")
    with pytest.raises(trimig.StateError, match="damaged") as caught:
        read_record(file)
    assert caught.value.owner is Ownership.UNKNOWN


def test_a_file_is_sent_by_one_process_at_a_time(tmp_path: Path) -> None:
    file = write(tmp_path / "guest", b"")
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(file))
        with pytest.raises(trimig.StateError, match="by another trimig"):
            stack.enter_context(locked(file))
    with locked(file):
        pass


async def test_package_of_postcopy_is_shown_with_what_is_in_it(tmp_path: Path) -> None:
    """O3, O4: LISTEN first, RUN last, the devices between them, each where it stands in the stream."""
    data = OPENING_OF_POSTCOPY + part(0, 1, 2) + discard(1) + PACKAGE + part(1, 3, 4, 5, 6, 7) + END
    report = await inspect_stream(write(tmp_path / "in", data))
    assert report.error is None
    names = [command.name for command in report.commands]
    assert names[-4:] == ["PACKAGED", "POSTCOPY_LISTEN", "PING", "POSTCOPY_RUN"]
    assert [device.idstr for device in report.devices] == ["clock", "globalstate"]
    for device in report.devices:
        assert data[device.offset :].startswith(b"\x04")
    damaged = data.replace(PACKAGE[-5:], b"\x08\x00\x05\x00\x09")
    assert damaged != data
    report = await inspect_stream(write(tmp_path / "in", damaged))
    assert any("cannot be taken apart" in problem for problem in report.problems)
