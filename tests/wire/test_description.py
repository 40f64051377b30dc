"""The JSON description: byte-exact both ways, hostile texts, and decoding payloads by it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.errors import RemoteProtocolError
from trimig.wire.devices.decoding import Node, count, decode_payload, measure_payload, uncertain_fields
from trimig.wire.devices.description import JsonObject, Limits, build, dump, parse, section_name
from trimig.wire.devices.vmstate import Field, Subsection, VMState

NONE = (
    b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, '
    b'"fields": [{"name": "cpu_ticks_offset", "type": "int64", "size": 8}, {"name": "unused", "type": '
    b'"unused_buffer", "size": 8}, {"name": "cpu_clock_offset", "type": "int64", "size": 8}]}, {"name": '
    b'"globalstate", "instance_id": 0, "vmsd_name": "globalstate", "version": 1, "fields": [{"name": "size", '
    b'"type": "uint32", "size": 4}, {"name": "runstate", "type": "buffer", "size": 100}]}]}'
)
# A list of two elements: their keys stand in one object, one behind the other.
LIST = (
    b'{"page_size": 4096, "devices": [{"name": "q", "instance_id": 1, "vmsd_name": "q", "version": 1, "fields": ['
    b'{"name": "reqs", "type": "qtailq", "vmsd_name": "req", "version": 1, "fields": [{"name": "tag", "type": '
    b'"uint8", "size": 1}], "vmsd_name": "req", "version": 1, "fields": [{"name": "tag", "type": "uint8", "size": 1}]'
    b', "size": 5}]}]}'
)


def device(*fields: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 1, "fields": list(fields), **more}


def field(name: str, kind: str, size: int, **more: Any) -> dict[str, Any]:
    return {"name": name, **more, "type": kind, "size": size}


def struct_of(name: str, size: int, *fields: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    inner = {"vmsd_name": "inner", "version": 1, "fields": list(fields)}
    return {"name": name, **more, "type": "struct", "struct": inner, "size": size}


@pytest.mark.parametrize("text", [NONE, LIST], ids=["machine none", "repeated keys"])
def test_text_is_built_again_to_equal_bytes(text: bytes) -> None:
    """Q1: key order and repeated keys survive."""
    parsed = parse(text)
    assert parsed.page_size == 4096
    assert build(parsed.page_size, parsed.devices) == text


def test_repeated_keys_are_kept_in_order_and_the_first_is_looked_up() -> None:
    value = JsonObject([("a", 1), ("b", 2), ("a", 3)])
    assert (value["a"], list(value), len(value)) == (1, ["a", "b"], 2)
    assert value.pairs == (("a", 1), ("b", 2), ("a", 3))
    assert value == {"a": 1, "b": 2}
    assert dump(value) == b'{"a": 1, "b": 2, "a": 3}'


def test_empty_containers_and_other_values_are_written_as_json() -> None:
    value = {"a": {}, "b": [], "c": 'x"\u00e9', "d": True, "e": None, "f": 1.5}
    assert dump(value) == json.dumps(value).encode()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not an object"),
        (b"{}", "page_size is None"),
        (b'{"page_size": true, "devices": []}', "page_size is True"),
        (b'{"page_size": -1, "devices": []}', "page_size is -1"),
        (b'{"page_size": 4096}', "no list of devices"),
        (b'{"page_size": 4096, "devices": {}}', "no list of devices"),
        (b'{"page_size": 4096, "devices": [1]}', "a device is 1"),
        (b'{"page_size": 4096, "devices": [{}]}', "'name' is None"),
        (b'{"page_size": 4096, "devices": [{"name": 1, "instance_id": 0}]}', "'name' is 1"),
        (b'{"page_size": 4096, "devices": [{"name": "a", "instance_id": "0"}]}', "'instance_id' is '0'"),
        (b'{"page_size": 4096, "devices": [{"name": "a", "instance_id": -1}]}', "'instance_id' is -1"),
        (b'{"page_size": 4096, "devices": [{"name": "a", "name": "b", "instance_id": 0}]}', "more than once"),
        (b'{"page_size": 4096, "devices": []} x', "not valid JSON"),
        (b'{"page_size": NaN, "devices": []}', "not valid JSON"),
        (b'{"page_size": \xff, "devices": []}', "not valid JSON"),
        (b'{"page_size": 4096, "devices": [{"name": "\\ud800", "instance_id": 0}]}', "not valid JSON"),
        (b'{"page_size": ' + b"9" * 5000 + b', "devices": []}', "not valid JSON"),
        (b"[" * 100_000, "levels deep"),
        (b'{"a":' * 100_000, "levels deep"),
        (b'{"page_size": 4096, "devices": [' + b"{}," * 600_000, "items"),
        (b'"' + b'\\"' * 500_000, "not valid JSON"),
        (b'"' * 500_001, "not valid JSON"),
        (b" " * (16 * 1024 * 1024 + 1), "bytes, more than"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[:30].decode(errors="replace"),
)
def test_hostile_text_is_refused_with_a_typed_error(text: bytes, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        parse(text)


def test_brackets_inside_strings_are_no_nesting() -> None:
    text = b'{"page_size": 1, "devices": [{"name": "' + b'[{\\"' * 100 + b'", "instance_id": 0}]}'
    assert parse(text).devices[0]["name"] == '[{"' * 100


def test_limits_are_the_callers() -> None:
    limits = Limits(max_bytes=len(NONE), max_items=NONE.count(b",") + 11, max_depth=5)
    assert len(parse(NONE, limits).devices) == 2
    for tighter in ({"max_bytes": len(NONE) - 1}, {"max_items": NONE.count(b",") + 10}, {"max_depth": 4}):
        with pytest.raises(RemoteProtocolError):
            parse(NONE, Limits(**tighter))


def test_payload_is_decoded_field_by_field() -> None:
    """Q2: values, offsets and sizes of every kind of field."""
    described = device(
        field("n", "int32", 4),
        field("flags", "bool", 1, array_len=2),
        field("kept", "timer", 8),
        struct_of("regs", 3, field("now", "uint8", 1, array_len=2), field("mode", "int8", 1), array_len=2),
        struct_of("chan", 1, field("x", "uint8 equal", 1), index=0),
        struct_of("chan", 1, field("x", "uint8 equal", 1), index=1),
        {
            "name": "kcs",
            "type": "vstruct",
            "vmsd_name": "kcs-v",
            "version": 2,
            "fields": [field("y", "int16", 2)],
            "size": 2,
        },
        {"name": "none", "type": "struct", "struct": {}, "size": 1},
        field("config", "pci config", 4),
        field("real", "CPU_Double_U", 8),
        subsections=[{"vmsd_name": "dev/more", "version": 3, "fields": [field("z", "uint64", 8)]}],
    )
    payload = bytes.fromhex(
        "ffffffff 0001 00000000000000ff 0102ff 0304fe 07 08 0102 30 80000001 3ff8000000000000"
        "05 08 6465762f6d6f7265 00000003 0000000000000009"
    )
    nodes = decode_payload(described, payload)
    assert measure_payload(described, payload + b"\x7e") == len(payload)
    assert [(n.name, n.index, n.type, n.offset, n.size, n.value) for n in nodes] == [
        ("n", None, "int32", 0, 4, -1),
        ("flags", None, "bool", 4, 2, (False, True)),
        ("kept", None, "timer", 6, 8, 255),
        ("regs", None, "struct", 14, 6, None),
        ("chan", 0, "struct", 20, 1, None),
        ("chan", 1, "struct", 21, 1, None),
        ("kcs", None, "vstruct", 22, 2, None),
        ("none", None, "struct", 24, 1, None),
        ("config", None, "pci config", 25, 4, None),
        ("real", None, "CPU_Double_U", 29, 8, 1.5),
        ("dev/more", None, "subsection", 37, 22, None),
    ]
    # 11, the registers' two elements with two fields each, and one field in each of chan, chan, kcs and the subsection.
    assert count(nodes) == 11 + 2 + 4 + 2 + 1 + 1
    regs = nodes[3]
    assert [(e.index, e.offset, [(f.name, f.offset, f.value) for f in e.children]) for e in regs.children] == [
        (0, 14, [("now", 14, (1, 2)), ("mode", 16, -1)]),
        (1, 17, [("now", 17, (3, 4)), ("mode", 19, -2)]),
    ]
    assert (nodes[7].raw, nodes[8].raw) == (b"0", bytes.fromhex("80000001"))
    assert (nodes[6].vmsd_name, nodes[6].version, nodes[10].version) == ("kcs-v", 2, 3)


def test_lists_are_taken_as_raw_bytes() -> None:
    described = parse(LIST).devices[0]
    (node,) = decode_payload(described, b"\x01\x07\x01\x08\x00")
    assert (node.type, node.raw, node.children) == ("qtailq", b"\x01\x07\x01\x08\x00", ())


@pytest.mark.parametrize(
    ("described", "payload", "complaint"),
    [
        (device(field("a", "uint32", 4)), bytes(3), r"'a' at byte 0.*4 bytes, and 3 are left"),
        (device(field("a", "uint32", 4)), bytes(5), r"'a' at byte 4.*goes on to byte 5"),
        (device(field("a", "uint32", 3)), bytes(3), "a uint32 has 4 bytes, not 3"),
        (device(struct_of("s", 3, field("a", "uint16", 2))), bytes(3), r"'s' .*has 2 bytes.*says 3"),
        (device(field("a", "buffer", 2**62, array_len=2**62)), bytes(3), "'a'"),
        (device(field("a", "buffer", 2**63)), bytes(3), "'size'"),
        (device(field("a", "buffer", -1)), bytes(3), "'size' is -1"),
        (device({"name": "a", "type": "uint8", "size": True}), bytes(3), "'size' is True"),
        (device({"name": "a", "type": "uint8"}), bytes(1), "'size' is None"),
        (device({"name": 5, "type": "uint8", "size": 1}), bytes(1), "'name' is 5"),
        (device(field("a", "uint8", 1, array_len="4")), bytes(4), "'array_len' is '4'"),
        (device(field("a", "struct", 1)), bytes(1), "struct without description"),
        (device(struct_of("s", 0, array_len=2**40)), b"", "too many"),
        (device(*[field("a", "buffer", 0)] * 2000), b"", "too many"),
        ({"name": "dev", "instance_id": 0}, b"", "'fields' is None"),
        ({"name": "dev", "instance_id": 0, "fields": [1]}, b"", "a field of the device is 1"),
        (device(subsections={}), b"", "'subsections'"),
        (device(subsections=[3]), b"", "a subsection of the device is 3"),
        (device(subsections=[{"vmsd_name": "dev/x", "version": 1, "fields": []}]), bytes(11), "the payload has not"),
        (device(subsections=[{"vmsd_name": "d" * 256, "version": 1, "fields": []}]), bytes(300), "subsection"),
        (
            JsonObject([("name", "dev"), ("fields", []), ("fields", [])]),
            b"",
            "'fields' occurs more than once",
        ),
    ],
)
def test_description_that_does_not_fit_is_refused_naming_device_and_field(
    described: Mapping[str, Any], payload: bytes, complaint: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint) as caught:
        decode_payload(described, payload)
    assert caught.value.section == "dev"


def test_array_with_unequal_elements_is_pointed_out() -> None:
    described = device(
        field("plain", "uint32", 4, array_len=3),
        struct_of("ptrs", 2, field("v", "uint16", 2), array_len=2),
        struct_of("outer", 2, struct_of("deep", 1, field("b", "uint8", 1), array_len=2)),
    )
    assert uncertain_fields(described) == ("ptrs", "outer.deep")
    with pytest.raises(RemoteProtocolError, match=r"elements of 'ptrs', 'outer.deep' may differ in size"):
        decode_payload(described, bytes(12 + 4 + 2 + 1))


def test_type_that_is_no_text_is_pointed_out_as_well() -> None:
    assert uncertain_fields(device({"name": "a", "array_len": 1, "type": {}})) == ("a",)


def test_instance_is_in_the_name_unless_it_is_the_first() -> None:
    assert [section_name({"name": "dma", "instance_id": k}) for k in (0, 1)] == ["dma", "dma (1)"]


INNER = VMState("s", fields=(Field("a", "uint16", count=2), Field("b", "bool")))
DECLARED = VMState(
    "dev",
    fields=(
        Field("n", "uint8"),
        Field("blob", "buffer", size="n"),
        Field("inner", INNER, count="n"),
        Field("d", "CPU_Double_U"),
        Field("odd", "uint8", when=lambda state, version: state["n"] % 2 == 1),
    ),
    subsections=(Subsection(VMState("dev/opt", fields=(Field("opt", "int64"),))),),
)


def leaves(nodes: tuple[Node, ...]) -> bytes:
    """The bytes of what has no children, with the heads of subsections left out."""
    return b"".join(leaves(node.children) if node.children else node.raw for node in nodes if node.type != "subsection")


@given(
    n=st.integers(0, 5),
    d=st.floats(allow_nan=False),
    opt=st.none() | st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_what_a_declaration_describes_is_decoded_by_its_description(
    n: int, d: float, opt: int | None, data: st.DataObject
) -> None:
    """Q2: two independent ways through the same bytes agree."""
    u16 = st.integers(0, 65535)
    inner = st.fixed_dictionaries({"a": st.lists(u16, min_size=2, max_size=2), "b": st.booleans()})
    state: dict[str, Any] = {
        "n": n,
        "blob": data.draw(st.binary(min_size=n, max_size=n)),
        "inner": data.draw(st.lists(inner, min_size=n, max_size=n)),
        "d": d,
        "odd": 5,
        "opt": opt,
    }
    payload = DECLARED.encode(state)
    described = {"name": "dev", "instance_id": 0, **DECLARED.describe(state)}
    text = build(4096, [described])
    (back,) = parse(text).devices
    nodes = decode_payload(back, payload)
    assert measure_payload(back, payload + b"\x7e\0\0\0\0") == len(payload)
    by_name = {node.name: node for node in nodes}
    assert by_name["d"].value == d
    assert math.copysign(1, d) == math.copysign(1, float(str(by_name["d"].value)))
    assert ("odd" in by_name) == (n % 2 == 1)
    assert payload.startswith(leaves(nodes))
    if opt is not None:
        assert by_name["dev/opt"].children[0].value == opt


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.sampled_from(["struct", "uint8", "vstruct", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "type", "size", "struct", "fields", "subsections", "array_len", "index", "version"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(fields=_json, subsections=_json, payload=st.binary(max_size=20))
def test_any_json_in_the_place_of_a_device_gives_nodes_or_one_typed_error(
    fields: Any, subsections: Any, payload: bytes
) -> None:
    text = dump({"page_size": 1, "devices": [device(subsections=subsections) | {"fields": fields}]})
    (described,) = parse(text).devices
    uncertain_fields(described)
    try:
        nodes = decode_payload(described, payload)
    except RemoteProtocolError:
        return
    assert sum(node.size for node in nodes) == len(payload)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_description_or_one_typed_error(text: bytes) -> None:
    try:
        parsed = parse(text)
    except RemoteProtocolError:
        return
    assert parse(build(parsed.page_size, parsed.devices)) == parsed


def test_reading_a_long_text_can_be_ended_between_its_objects() -> None:
    """What the caller's function raises comes through; it is called often enough."""
    text = dump({"page_size": 1, "devices": [device()] * 5000})
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        parse(text, between=between)
    assert calls == 10
    assert parse(text, between=lambda: None) == parse(text)
