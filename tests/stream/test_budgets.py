"""What reading a file costs follows from its bytes, not from what it announces."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import trio

import trimig
from tests.stream.made import device, elements, joined, received
from tests.wire.test_tail import greedy, headed
from trimig.channel.offload import offload
from trimig.engine import device_tail
from trimig.guest import DeviceSection
from trimig.stream import export_raw, inspect_stream
from trimig.stream.pages import PageSet
from trimig.wire import RecordWriter, Section
from trimig.wire import encoder as wire

CLOSE = wire.END_WORD + wire.section_footer(2)
MIB = 1 << 20


def announcing(length: int, *pages: int) -> bytes:
    """A stream of one block of *length* bytes, of which only *pages* come."""
    data = wire.file_header() + wire.configuration("none") + wire.section_start(Section.START, 2, "ram", 0, 4)
    data += wire.ram_list([("m0", length)]) + CLOSE + wire.section_continue(Section.PART, 2)
    data += RecordWriter().zero_records("m0", np.array(pages, np.int64) * 4096, np.full(len(pages), 1, np.uint8))
    return data + CLOSE + wire.section_continue(Section.END, 2) + CLOSE + b"\0"


class Peak:
    """The most memory that was allocated in between, in bytes."""

    def __enter__(self) -> Self:
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


async def test_announced_and_absent_memory_is_a_hole(tmp_path: Path) -> None:
    """Eight TiB from 140 bytes: a sparse file and no map of what is not there."""
    length = 8 << 40
    path = tmp_path / "in"
    path.write_bytes(announcing(length, 0, 5, length // 4096 - 1))
    with Peak() as peak:
        done = await export_raw(path, "m0", tmp_path / "out", partial=True)
    assert peak.bytes < 16 * MIB
    assert done.length == length
    end = length // 4096
    assert [(at // 4096, size // 4096) for at, size in done.holes] == [(1, 4), (6, end - 7)]
    found = (tmp_path / "out").stat()
    assert found.st_size == length
    assert found.st_blocks * 512 < MIB
    with Peak() as peak:
        report = await inspect_stream(path)
    assert peak.bytes < 16 * MIB
    assert (report.sound, report.blocks[0].missing) == (True, end - 3)
    with pytest.raises(trimig.RemoteProtocolError, match="are not in the stream"):
        await export_raw(path, "m0", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_set_of_pages_is_as_an_array_would_be() -> None:
    rng = np.random.default_rng(5)
    for length in (1, 511, 512, 513, 5000):
        pages, plain = PageSet(length), np.zeros(length, np.bool_)
        assert list(pages.holes()) == [(0, length)]
        for _ in range(20):
            some = rng.integers(0, length, rng.integers(0, 40))
            assert pages.contains(some).tolist() == plain[some].tolist()
            pages.add(some)
            plain[some] = True
            assert (len(pages), pages.missing) == (int(plain.sum()), int((~plain).sum()))
            holes = np.ones(length, np.bool_)
            for first, end in pages.holes():
                assert first < end
                holes[first:end] = False
            assert holes.tolist() == plain.tolist()


def with_text(sections: list[DeviceSection], descriptions: list[dict[str, Any]]) -> bytes:
    text = json.dumps({"page_size": 4096, "devices": descriptions}).encode()
    return joined(elements(devices=sections, text=text))


async def test_inspect_keeps_no_copies_of_nested_bytes(tmp_path: Path) -> None:
    field: dict[str, Any] = {"name": "b", "type": "buffer", "size": MIB}
    for _ in range(18):
        field = {"name": "s", "type": "struct", "size": MIB, "struct": {"fields": [field]}}
    data = with_text([device("d", bytes(MIB), 5)], [{"name": "d", "instance_id": 0, "fields": [field]}])
    (tmp_path / "in").write_bytes(data)
    with Peak() as peak:
        report = await inspect_stream(tmp_path / "in")
    assert report.devices[0].fields is not None
    assert peak.bytes < 16 * MIB


async def test_inspect_does_not_list_more_fields_than_the_bytes_are_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimig.stream.inspect._FREE_FIELDS", 1000)
    sections = [device(f"d{k}", bytes(4000), 5 + k) for k in range(3)]
    data = with_text(sections, [greedy(s.idstr, 4000) | {"fields": most(4000)} for s in sections])
    (tmp_path / "in").write_bytes(data)
    with Peak() as peak:
        report = await inspect_stream(tmp_path / "in")
    assert report.error is None
    assert [d.fields is None for d in report.devices] == [True, True, True]
    assert all("fields that can be listed" in str(d.problem) for d in report.devices)
    assert peak.bytes < 16 * MIB


def most(pad: int) -> list[dict[str, Any]]:
    """As many elements without a byte as are believed."""
    empty = {"vmsd_name": "e", "version": 1, "fields": []}
    return [
        {"name": "b", "type": "buffer", "size": pad},
        {"name": "a", "type": "struct", "array_len": 15_000, "size": 0, "struct": empty},
    ]


async def test_other_tasks_get_their_turn_while_a_tail_is_taken_apart(autojump_clock: trio.testing.MockClock) -> None:
    """Live and from a file; a cancellation comes through between any two pieces."""
    fields = [{"name": f"f{k}", "type": "uint8", "size": 1} for k in range(50)]
    inner = {"vmsd_name": "e", "version": 1, "fields": fields}
    field = {"name": "a", "type": "struct", "array_len": 400, "size": 50, "struct": inner}
    data = with_text([device("big", bytes(20_000), 5)], [{"name": "big", "instance_id": 0, "fields": [field]}])
    splits = 0
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += inside

    inside = 0
    real = device_tail.split

    async def split(*args: Any, **options: Any) -> Any:
        nonlocal inside, splits
        inside, splits = 1, splits + 1
        try:
            return await real(*args, **options)
        finally:
            inside = 0

    device_tail.split = split
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            with trimig.ParkedGuest() as guest:
                await received(data, guest)
            nursery.cancel_scope.cancel()
    finally:
        device_tail.split = real
    assert splits == 1
    # A turn between two pieces; which of the tasks comes first in the first and the last is chance.
    assert turns >= 20_000 // 2000 - 2


async def test_a_large_text_is_parsed_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A text of more than a quarter of a MiB is one call, and goes to a thread."""
    calls = 0
    real = offload

    async def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return await real(*args)

    monkeypatch.setattr(device_tail, "offload", counting)
    parts = elements()
    text = parts["text"][5:]
    long = text[:-1] + b" " * 300_000 + b"}"
    with trimig.ParkedGuest() as guest:
        await received(joined({**parts, "text": headed(long)[1:]}), guest)
        assert guest.description == long
    assert calls == 1
    (tmp_path / "in").write_bytes(joined({**parts, "text": headed(text)[1:]}))
    (await trimig.ParkedGuest.load(tmp_path / "in")).close()
    assert calls == 1
