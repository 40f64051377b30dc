"""A small saved stream as a QEMU could have written it, and what is in it."""

from __future__ import annotations

from typing import Any

import numpy as np

import trimig
from trimig.guest import ConfigSubsection, DeviceSection
from trimig.wire import RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire.devices import description, globalstate

PAGES = 5


UUID = ConfigSubsection(name="configuration/uuid", version=1, payload=bytes(range(16)))


def devices() -> list[DeviceSection]:
    """Two devices and the run state, with numbers as a QEMU gives them."""
    made = []
    for number, (name, instance, size) in enumerate([("timer", 0, 24), ("i8259", 1, 7)]):
        fields = [{"name": "data", "type": "buffer", "size": size}]
        made.append(
            DeviceSection(
                idstr=name,
                instance_id=instance,
                version_id=2,
                payload=bytes([0x40 + number]) * size,
                section_id=7 * number,
                description={"name": name, "instance_id": instance, "version": 2, "fields": fields},
            )
        )
    state = globalstate.section("paused")
    return [
        *made,
        DeviceSection(
            idstr=state.idstr,
            version_id=1,
            payload=state.payload,
            section_id=41,
            description=dict(state.description or {}),
        ),
    ]


def content() -> np.ndarray[Any, np.dtype[np.uint8]]:
    pages = np.random.default_rng(1).integers(1, 256, (PAGES, 4096), np.uint8)
    pages[3] = 0
    return pages


def stream(*, restart: bool = False, described: bool = True) -> bytes:
    """A small precopy stream as a QEMU could send it: commands, a page sent twice, two blocks."""
    records = RecordWriter()
    pages = content()
    close = wire.END_WORD + wire.section_footer(2)
    start = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", PAGES * 4096), ("rom", 4096)])
    offsets = np.arange(PAGES, dtype=np.int64) * 4096
    out = wire.file_header() + wire.configuration("toy-1.0", [UUID])
    out += wire.command(1) + wire.ping(1) + start + close
    out += wire.section_continue(Section.PART, 2)
    out += records.page_records("ram", offsets[:1], pages[1:2])
    out += records.page_records("ram", offsets[:3], pages[:3])
    out += close
    if restart:
        out += start + close
        records.forget()
    out += wire.section_continue(Section.END, 2)
    out += records.zero_records("ram", offsets[3:4])
    out += records.page_records("ram", offsets[4:], pages[4:])
    out += records.zero_records("rom", offsets[:1], np.array([0xFF], np.uint8))
    out += close
    sections = devices()
    out += b"".join(wire.device_section(s, s.section_id or 0) for s in sections) + wire.end_of_stream()
    return out + (
        wire.description(description.build(4096, [s.description or {} for s in sections])) if described else b""
    )


def check(guest: trimig.ParkedGuest) -> None:
    """It is the guest of :func:`stream`."""
    assert guest.name == "toy-1.0"
    assert list(guest.subsections) == [UUID]
    assert [(b.name, b.length) for b in guest.ram] == [("ram", PAGES * 4096), ("rom", 4096)]
    assert np.array_equal(guest.ram[0].pages, content())
    assert (guest.ram[1].pages == 0xFF).all()
    assert [(s.idstr, s.instance_id, s.version_id, s.section_id, s.payload) for s in guest.sections] == [
        (s.idstr, s.instance_id, s.version_id, s.section_id, s.payload) for s in devices()
    ]
    assert guest.guest_run_state == "paused"
