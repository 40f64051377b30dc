"""Streams as QEMUs of other versions and machine types write them, built element by element, and all ways to read one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trio

import trimig
from trimig.guest import DeviceSection
from trimig.stream import StreamReport, export_raw, inspect_stream
from trimig.testing import DribbleStream, VirtualLink
from trimig.wire import RecordWriter, Section
from trimig.wire import encoder as wire

PAGES = 4
SWITCHOVER_START = bytes.fromhex("08 000b 0000")


def described(section: DeviceSection) -> dict[str, Any]:
    """What a description says of a section whose payload is one buffer."""
    fields = [{"name": "data", "type": "buffer", "size": len(section.payload)}]
    return {
        "name": section.idstr,
        "instance_id": section.instance_id,
        "vmsd_name": section.idstr,
        "version": section.version_id,
        "fields": fields,
    }


def device(idstr: str, payload: bytes, number: int, *, instance: int = 0, version: int = 1) -> DeviceSection:
    """A device of an unknown machine."""
    return DeviceSection(idstr=idstr, instance_id=instance, version_id=version, payload=payload, section_id=number)


DEVICES = (device("timer", b"\x40" * 24, 0, version=2), device("i8259", b"\x41" * 7, 7, instance=1))


def content() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pages of the block ``ram``; the last one is zero."""
    pages = np.random.default_rng(1).integers(1, 256, (PAGES, 4096), np.uint8)
    pages[-1] = 0
    return pages


def text_of(devices: Sequence[DeviceSection], first: Mapping[str, Any] | None = None, **style: Any) -> bytes:
    """A description, with *first* in front of its other keys; *style* is that of ``json.dumps``."""
    whole = {**(first or {}), "page_size": 4096, "devices": [described(d) for d in devices]}
    return json.dumps(whole, **style).encode()


def elements(
    *,
    machine: str = "toy-1.0",
    configuration: bytes | None = None,
    footers: bool = True,
    devices: Sequence[DeviceSection] = DEVICES,
    early: Sequence[DeviceSection] = (),
    early_before: str = "start",
    text: bytes | None = None,
    answers: bool = False,
) -> dict[str, bytes]:
    """A whole stream, by its elements; *early* sections stand before the element of that name.

    Args:
        configuration: instead of that of *machine*; empty for a stream without one.
        text: of the description; empty for none.
        answers: with a return path.
    """
    close = wire.END_WORD + (wire.section_footer(2) if footers else b"")
    offsets = np.arange(PAGES, dtype=np.int64) * 4096
    records = RecordWriter()
    pages = content()
    parts: dict[str, bytes] = {"header": wire.file_header()}
    parts["configuration"] = wire.configuration(machine) if configuration is None else configuration
    if answers:
        parts["opened"] = wire.command(1) + wire.ping(1)
    parts["start"] = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", PAGES * 4096)]) + close
    first = records.page_records("ram", offsets[:2], pages[:2])
    parts["part"] = wire.section_continue(Section.PART, 2) + first + close
    last = records.page_records("ram", offsets[2:-1], pages[2:-1]) + records.zero_records("ram", offsets[-1:])
    parts["end"] = wire.section_continue(Section.END, 2) + last + close
    for i, section in enumerate(devices):
        parts[f"device {i}"] = wire.device_section(section, section.section_id or 0, footer=footers)
    parts["eof"] = wire.end_of_stream()
    if text is None:
        text = text_of([*early, *devices])
    if text:
        parts["text"] = b"\x06" + struct.pack(">I", len(text)) + text
    if early:
        made = b"".join(wire.device_section(s, s.section_id or 0, footer=footers) for s in early)
        parts = {k: (made + v if k == early_before else v) for k, v in parts.items()}
    return parts


def joined(parts: Mapping[str, bytes]) -> bytes:
    """The stream."""
    return b"".join(parts.values())


def with_before(parts: Mapping[str, bytes], name: str, what: bytes) -> bytes:
    """The stream, with *what* in front of the element *name*."""
    return b"".join((what if key == name else b"") + value for key, value in parts.items())


async def received(
    data: bytes, guest: trimig.Guest, config: trimig.Config | None = None, *, piece: int = 0, end: bool = True
) -> trimig.Summary:
    """Give *data* to a destination; the connection stays open behind it unless *end*."""
    link = VirtualLink(seed=1)
    near: Any = DribbleStream(link.a, send=piece, receive=piece) if piece else link.a
    summary: list[trimig.Summary] = []
    failure: list[trimig.MigrationError] = []

    async def receive() -> None:
        try:
            summary.append(await trimig.receive(guest, link.b, config))
        except trimig.MigrationError as error:
            failure.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        try:
            await near.send_all(data)
            if end:
                await near.send_eof()
            while await near.receive_some(4096):
                pass
        except trio.BrokenResourceError:
            pass
        await near.aclose()
    if failure:
        raise failure[0]
    return summary[0]


async def read_everywhere(data: bytes, folder: Path, *, config: trimig.Config | None = None) -> StreamReport:
    """Read a stream by everything that reads one; all must find the same guest. Returns what inspect says of it."""
    path = folder / "stream"
    path.write_bytes(data)
    report = await inspect_stream(path)
    assert report.error is None, report.error
    assert [(b.name, b.length, b.missing) for b in report.blocks] == [("ram", PAGES * 4096, 0)]
    out = folder / "ram"
    await export_raw(path, "ram", out, replace=True)
    assert out.read_bytes() == content().tobytes()
    found = [(d.idstr, d.instance_id, d.version_id, d.section_id, d.payload) for d in report.devices]
    with await trimig.ParkedGuest.load(path) as loaded, trimig.ParkedGuest() as live:
        await received(data, live, config)
        for guest in (loaded, live):
            assert np.array_equal(guest.ram[0].pages, content())
            sections = [(s.idstr, s.instance_id, s.version_id, s.section_id, s.payload) for s in guest.sections]
            assert sections == found
            assert guest.name == (report.machine or "")
    return report
