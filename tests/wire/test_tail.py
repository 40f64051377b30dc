"""The description at the end of a tail is found by its structure alone, and at a cost that follows from the bytes."""

from __future__ import annotations

import json
import lzma
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.wire.test_devices import NASTY, described, section, tail_of
from trimig.errors import RemoteProtocolError
from trimig.wire.devices import decoding, tail
from trimig.wire.devices.decoding import decode_payload
from trimig.wire.devices.description import Limits, parse
from trimig.wire.devices.sections import TailSplitter, Undelimited, join_sections, split_tail
from trimig.wire.devices.tail import TailBuffer

DATA = Path(__file__).parent.parent / "data"
SECTIONS = NASTY[:3]
DEVICES = [s.description for s in SECTIONS]
MACHINE = {"vmsd_name": "configuration", "version": 1, "fields": [{"name": "len", "type": "uint32", "size": 4}]}


def headed(text: bytes) -> bytes:
    return b"\0\x06" + struct.pack(">I", len(text)) + text


def old_spelling(value: Any) -> str:
    """As QEMUs before 5.2 wrote it: blanks behind each bracket and before each colon."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f'"{k}": {old_spelling(v)}' for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[ " + ", ".join(map(old_spelling, value)) + " ]"
    return json.dumps(value)


PLAIN = {"page_size": 4096, "devices": DEVICES}
TEXTS: dict[str, str] = {
    "page_size first": json.dumps(PLAIN),
    "configuration first": json.dumps({"configuration": MACHINE, **PLAIN}),
    "devices first": json.dumps({"devices": DEVICES, "page_size": 4096}),
    "a key of the future first": json.dumps({"version": {"major": 12}, **PLAIN}),
    "blanks between all tokens": old_spelling(PLAIN),
    "blanks before the colons": json.dumps(PLAIN, separators=(" , ", " : ")),
    "no blanks": json.dumps({"configuration": MACHINE, **PLAIN}, separators=(",", ":")),
    "on many lines": json.dumps(PLAIN, indent=2),
    "tabs and line ends around": "\r\n\t " + json.dumps(PLAIN, indent="\t") + "\r\n",
    "a name with quotes and brackets": json.dumps({"note": '{"page_size" \\" ]}', **PLAIN}),
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_every_spelling_is_found_at_every_split(name: str) -> None:
    """Any first key, any white space; complete with the last byte and not before, wherever the bytes are cut."""
    text = TEXTS[name].encode()
    data = join_sections(SECTIONS) + headed(text)
    for cut in range(1, len(data) + 1):
        buffer = TailBuffer()
        buffer.feed(data[:cut])
        assert buffer.complete is (cut == len(data)), cut
        buffer.feed(data[cut:])
        assert buffer.complete, cut
    buffer = TailBuffer()
    for byte in data:
        buffer.feed(bytes([byte]))
    assert (buffer.text, buffer.excess) == (text, 0)
    split = split_tail(data)
    assert list(split.sections) == SECTIONS
    assert (split.problems, split.description_text) == ((), text)


@pytest.mark.parametrize("file", ["qemu-10.0-pc-i440fx-7.2.tail.xz"])
def test_a_real_machine_of_a_newer_qemu(file: str) -> None:
    """Every device is found by its description; none by a guess."""
    data = lzma.decompress((DATA / file).read_bytes())
    for step in (997, len(data)):
        buffer = TailBuffer()
        for at in range(0, len(data), step):
            assert not buffer.complete
            buffer.feed(data[at : at + step])
        assert buffer.complete
    split = split_tail(data)
    assert (len(split.sections), split.problems) == (30, ())
    for found in split.sections:
        assert found.description is not None
        assert decode_payload(found.description, found.payload)


FAKES: dict[str, bytes] = {
    "headers in a row": headed(b"{")[:6] * 3000,
    "headers with a brace": (b"\0\x06\0\x10\0\0{") * 3000,
    "headers and blanks": (b"\0\x06\0\x10\0\0" + b" " * 40) * 400,
    "texts that are no JSON": headed(b'{"page_size": 1, "devices": [}' + b" " * 50) * 300,
    "texts that are JSON and no description": headed(b'{"page_size": 1}') * 900,
    "texts of another kind": headed(b'["page_size"]') * 900,
    "a long text, cut by a header each time": (b"\0\x06\0\x0f\xff\xff{" + b'"a": 1, ' * 100) * 20,
    "length 0": (b"\0\x06\0\0\0\0") * 900,
}


@pytest.mark.parametrize("step", [1, 61, 1 << 20])
@pytest.mark.parametrize("name", list(FAKES))
def test_false_descriptions_in_device_state_cost_no_more_than_their_bytes(
    monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    """No byte is parsed twice, and what looks like a header is left behind as soon as that can be known."""
    parsed = 0

    def counting(text: bytes, limits: Limits | None = None) -> Any:
        nonlocal parsed
        parsed += len(text)
        return parse(text, limits)

    monkeypatch.setattr(tail, "parse", counting)
    data = tail_of([section("fake", FAKES[name], 1), *NASTY])
    buffer = TailBuffer()
    for at in range(0, len(data), step):
        buffer.feed(data[at : at + step])
    assert buffer.complete
    assert parsed <= len(data)
    assert bytes(buffer.finish()) == data
    assert len(split_tail(data).sections) == 1 + len(NASTY)


def test_a_text_that_is_too_large_for_one_piece_is_left_to_the_caller() -> None:
    data = tail_of(NASTY)
    buffer = TailBuffer(inline_bytes=100)
    buffer.feed(data + b"behind")
    assert not buffer.complete
    text = buffer.undecided
    assert text is not None
    buffer.judge(parse(text))
    assert (buffer.complete, buffer.undecided, buffer.excess) == (True, None, 6)
    refused = TailBuffer(inline_bytes=10)
    refused.feed(join_sections(NASTY) + headed(b'{"page_size": 4096}') + headed(text))
    assert refused.undecided == b'{"page_size": 4096}'
    refused.judge(RemoteProtocolError("no devices"))
    assert refused.undecided == text
    refused.judge(parse(text))
    assert refused.complete


# -- budgets -----------------------------------------------------------------------------------------------------------

EMPTY = {"vmsd_name": "e", "version": 1, "fields": []}


def greedy(name: str, pad: int) -> dict[str, Any]:
    """A description of *pad* bytes and as many elements without any as one likes."""
    return {
        **described(name, 0),
        "fields": [
            {"name": "b", "type": "buffer", "size": pad},
            {"name": "a", "type": "struct", "array_len": 2_000_000, "size": 0, "struct": EMPTY},
        ],
    }


def greedy_tail(count: int, pad: int) -> bytes:
    """Many sections without a byte, each described as above, over the bytes of one that follows them all."""
    made = [section(f"d{k}", b"", 100 + k) for k in range(count)]
    last = section("last", bytes(pad + 10), 9)
    texts = [*(greedy(s.idstr, pad) for s in made), last.description]
    return join_sections([*made, last]) + headed(json.dumps({"page_size": 4096, "devices": texts}).encode())


@pytest.mark.parametrize("count", [10, 300])
def test_work_follows_from_the_bytes_and_is_done_in_pieces(count: int) -> None:
    """What a description claims of one section does not come again for the next."""
    pad = 20_000
    data = greedy_tail(count, pad)
    buffer = TailBuffer()
    buffer.feed(data)
    splitter = TailSplitter(buffer)
    spent = 0
    while not splitter.step():
        now = splitter.steps
        spent, piece = now, now - spent
        assert piece <= 2000
    assert len(splitter.result().sections) == count + 1
    assert splitter.steps <= 4 * len(data) + (1 << 16) + count


def test_a_walk_of_many_fields_is_done_in_pieces() -> None:
    fields = [{"name": f"f{k}", "type": "uint8", "size": 1} for k in range(50)]
    inner = {"vmsd_name": "e", "version": 1, "fields": fields}
    field = {"name": "a", "type": "struct", "array_len": 1000, "size": 50, "struct": inner}
    device = {**described("big", 0), "fields": [field]}
    data = join_sections([section("big", bytes(50_000), 1)])
    buffer = TailBuffer()
    buffer.feed(data + headed(json.dumps({"page_size": 4096, "devices": [device]}).encode()))
    splitter = TailSplitter(buffer)
    pieces = 1
    while not splitter.step():
        pieces += 1
    assert [len(s.payload) for s in splitter.result().sections] == [50_000]
    assert pieces >= 51_000 // 2000


def test_a_search_among_false_footers_is_done_in_pieces() -> None:
    body = bytes.fromhex("7e00000001 05") * 20_000
    buffer = TailBuffer()
    buffer.feed(join_sections([section("odd", body, 1, claims=1)]) + b"\0")
    splitter = TailSplitter(buffer)
    pieces = 1
    while not splitter.step():
        pieces += 1
    assert len(splitter.result().sections) == 1
    assert pieces >= 20_000 // 1024


ONE_BYTE: dict[str, Any] = {"vmsd_name": "e", "version": 1, "fields": [{"name": "b", "type": "uint8", "size": 1}]}


def named(name: str) -> dict[str, Any]:
    return {"vmsd_name": "e", "version": 1, "fields": [{"name": name, "type": "uint8", "size": 1}]}


def long_name(make: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return make("n" * 500_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda name: {"name": name, "type": "struct", "array_len": 2000, "size": 1, "struct": ONE_BYTE},
        lambda name: {"name": "a", "type": "struct", "array_len": 2000, "size": 1, "struct": named(name)},
    ],
    ids=["of the array", "of the field"],
)
def test_long_names_are_not_copied_for_each_element(make: Callable[[str], dict[str, Any]]) -> None:
    """A name of half a megabyte and two thousand elements: a copy for each would be a gigabyte."""
    walk = decoding.measuring({**described("d", 0), "fields": [long_name(make)]}, bytes(2000), decoding.Allowance())
    assert decoding.whole(walk) == 2000
    with pytest.raises(RemoteProtocolError) as caught:
        decoding.measure_payload({**described("d", 0), "fields": [long_name(make)]}, bytes(1999))
    assert len(caught.value.reason) < 1000


def test_nested_structures_share_the_bytes_of_the_payload() -> None:
    """Each of 18 structures around a payload once kept a copy of it."""
    field: dict[str, Any] = {"name": "b", "type": "buffer", "size": 1000}
    for _ in range(18):
        field = {"name": "s", "type": "struct", "size": 1000, "struct": {"fields": [field]}}
    payload = bytes(range(250)) * 4
    (node,) = decode_payload({**described("d", 0), "fields": [field]}, payload)
    depth = 0
    while node.children:
        assert node.payload.obj is payload
        (node,) = node.children
        depth += 1
    assert (depth, node.raw, node.value) == (18, payload, None)


def test_the_number_of_listed_fields_is_bounded() -> None:
    with pytest.raises(RemoteProtocolError, match="more than the 100 fields"):
        decode_payload(greedy("d", 3000), bytes(3000), max_nodes=100)


def test_a_package_has_no_description_whatever_is_in_it() -> None:
    """Device state inside a package may look like one: it is not believed there."""
    fake = section("fake", headed(json.dumps(PLAIN).encode()), 1)
    data = join_sections([fake, NASTY[0]])
    buffer = TailBuffer(described=False)
    buffer.feed(data + b"\0")
    assert (buffer.complete, buffer.location) == (False, None)
    splitter = TailSplitter(buffer)
    while not splitter.step():
        pass
    assert [s.payload for s in splitter.result().sections] == [fake.payload, NASTY[0].payload]


def test_a_text_at_the_end_that_cannot_be_used_is_told() -> None:
    data = join_sections([NASTY[0]]) + headed(b'{"page_size": 42}')
    split = split_tail(data)
    assert "it has no list of devices" in split.problems[0]
    with pytest.raises(Undelimited):
        split_tail(data + b"junk behind")
