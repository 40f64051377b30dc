"""One list of states and bytes, taken from the protocol document or from captures, used in both directions."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.errors import LocalProtocolError, RemoteProtocolError
from trimig.wire.devices.vmstate import Field, Subsection, VMState

PCI_BUS = VMState("PCIBUS", fields=(Field("nirq", "int32 equal"), Field("irq_count", "int32", count="nirq")))
FW_CFG = VMState(
    "fw_cfg",
    version=2,
    fields=(Field("cur_entry", "uint16"), Field("cur_offset", "uint32")),
    subsections=(
        Subsection(VMState("fw_cfg/dma", version=0, fields=(Field("dma_addr", "uint64"),))),
        Subsection(VMState("fw_cfg/acpi_mr", fields=tuple(Field(f"{n}_mr_size", "uint64") for n in ("a", "b", "c")))),
    ),
)
CPU_COMMON = VMState("cpu_common", fields=(Field("halted", "uint32"), Field("interrupt_request", "uint32")))
TIMED = VMState(
    "timed",
    version=2,
    minimum_version=1,
    fields=(
        Field("ticks", "int64"),
        Field("unused", "unused_buffer", size=8),
        Field("clock", "int64", since=2),
    ),
)
INNER = VMState(
    "inner",
    version=3,
    fields=(Field("x", "uint8"),),
    subsections=(Subsection(VMState("inner/more", fields=(Field("y", "uint8"),))),),
)
OUTER = VMState(
    "outer",
    fields=(Field("before", "bool"), Field("parts", INNER, count=2), Field("after", "uint16")),
    subsections=(Subsection(VMState("outer/last", fields=(Field("z", "int8"),))),),
)
ODD = VMState(
    "odd",
    fields=(
        Field("armed", "timer"),
        Field("idle", "timer"),
        Field("real", "CPU_Double_U"),
        Field("bits", "bitmap", size=65),
        Field("nbytes", "uint8"),
        Field("data", "buffer", size="nbytes"),
        Field("small", "int32 le"),
        Field("pairs", "int16", count=2),
        Field("nothing", "uint32", count=0),
    ),
)
VARIANTS = VMState(
    "variants",
    fields=(
        Field("wide", "bool"),
        Field("value", "uint16", when=lambda state, version: not state["wide"]),
        Field("value", "uint32", when=lambda state, version: bool(state["wide"])),
    ),
)

CASES: list[tuple[str, VMState, dict[str, Any], str]] = [
    ("pci bus", PCI_BUS, {"nirq": 4, "irq_count": [0, 0, 0, 0]}, "00000004" + 4 * "00000000"),
    ("fw_cfg without subsections", FW_CFG, {"cur_entry": 0, "cur_offset": 0}, "0000 00000000"),
    (
        "fw_cfg with both, one of version 0",
        FW_CFG,
        {"cur_entry": 0, "cur_offset": 0, "dma_addr": 0, "a_mr_size": 0x20000, "b_mr_size": 0x1000, "c_mr_size": 0x14},
        (
            "0000 00000000"
            "05 0a 66775f6366672f646d61 00000000 0000000000000000"
            "05 0e 66775f6366672f616370695f6d72 00000001 0000000000020000 0000000000001000 0000000000000014"
        ),
    ),
    ("cpu_common", CPU_COMMON, {"halted": 0, "interrupt_request": 16}, "00000000 00000010"),
    ("timer", TIMED, {"ticks": -2, "clock": 0x0102}, "fffffffffffffffe 0000000000000000 0000000000000102"),
    (
        "nested structures, one with a subsection of its own",
        OUTER,
        {"before": True, "parts": [{"x": 1}, {"x": 5, "y": 5}], "after": 0x0501, "z": -1},
        "01 01 05 05 0a 696e6e65722f6d6f7265 00000001 05 0501 05 0a 6f757465722f6c617374 00000001 ff",
    ),
    (
        "the other types",
        ODD,
        {
            "armed": 7,
            "idle": None,
            "real": -1.5,
            "bits": 1 << 64 | 1 << 63 | 2,
            "nbytes": 3,
            "data": b"\x7e\x05\x00",
            "small": 9,
            "pairs": [-1, 2],
            "nothing": [],
        },
        (
            "0000000000000007 ffffffffffffffff bff8000000000000 8000000000000002 0000000000000001"
            "03 7e0500 00000009 ffff 0002"
        ),
    ),
    ("the first variant of a field", VARIANTS, {"wide": False, "value": 1}, "00 0001"),
    ("the second variant of a field", VARIANTS, {"wide": True, "value": 1}, "01 00000001"),
]
all_cases = pytest.mark.parametrize(("vmstate", "state", "hexa"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


@all_cases
def test_state_encodes_to_the_documented_bytes(vmstate: VMState, state: dict[str, Any], hexa: str) -> None:
    assert vmstate.encode(state) == bytes.fromhex(hexa)


@all_cases
def test_documented_bytes_decode_to_the_state(vmstate: VMState, state: dict[str, Any], hexa: str) -> None:
    assert vmstate.decode(bytes.fromhex(hexa)) == state


@all_cases
def test_measure_needs_more_at_every_split_and_ignores_what_follows(
    vmstate: VMState, state: dict[str, Any], hexa: str
) -> None:
    whole = bytes.fromhex(hexa)
    for cut in range(len(whole)):
        # Where subsections are possible, the fields alone are a payload too, but only the next byte tells.
        assert vmstate.measure(whole[:cut]) is None
    assert vmstate.measure(whole + bytes.fromhex("7e00000005")) == len(whole)


def attempt(vmstate: VMState, data: bytes) -> tuple[RemoteProtocolError | None, dict[str, Any]]:
    try:
        return None, vmstate.decode(data, section="here")
    except RemoteProtocolError as error:
        return error, {}


@all_cases
def test_cut_payload_is_refused_with_the_name_of_the_section(
    vmstate: VMState, state: dict[str, Any], hexa: str
) -> None:
    whole = bytes.fromhex(hexa)
    for cut in range(len(whole)):
        refusal, decoded = attempt(vmstate, whole[:cut])
        if refusal is None:  # only subsections were cut off
            assert vmstate.encode(decoded) == whole[:cut]
        else:
            assert refusal.section == "here"


@all_cases
def test_objects_are_encoded_like_mappings(vmstate: VMState, state: dict[str, Any], hexa: str) -> None:
    thing = dataclasses.make_dataclass("Thing", list(state))(**state)
    assert vmstate.encode(thing) == bytes.fromhex(hexa)
    assert vmstate.describe(thing) == vmstate.describe(state)


def total_size(described: dict[str, Any]) -> int:
    fields = sum(field["size"] * field.get("array_len", 1) for field in described["fields"])
    heads = [(2 + len(s["vmsd_name"]) + 4, s) for s in described.get("subsections", ())]
    return int(fields + sum(head + total_size(s) for head, s in heads))


@all_cases
def test_sizes_in_the_description_add_up_to_the_payload(vmstate: VMState, state: dict[str, Any], hexa: str) -> None:
    assert total_size(vmstate.describe(state)) == len(bytes.fromhex(hexa))


def test_array_of_plain_structures_is_described_by_its_first_element() -> None:
    regs = VMState("dma_regs", fields=(Field("now", "int32", count=2), Field("mode", "uint8")))
    dma = VMState(
        "dma", fields=(Field("command", "uint8"), Field("regs", regs, count=4), Field("one", "uint8", count=1))
    )
    state = {"command": 0, "regs": [{"now": [1, 2], "mode": 3}] * 4, "one": [1]}
    described = dma.describe(state)
    assert described == {
        "vmsd_name": "dma",
        "version": 1,
        "fields": [
            {"name": "command", "type": "uint8", "size": 1},
            {
                "name": "regs",
                "array_len": 4,
                "type": "struct",
                "struct": {
                    "vmsd_name": "dma_regs",
                    "version": 1,
                    "fields": [
                        {"name": "now", "array_len": 2, "type": "int32", "size": 4},
                        {"name": "mode", "type": "uint8", "size": 1},
                    ],
                },
                "size": 9,
            },
            {"name": "one", "type": "uint8", "size": 1},
        ],
    }
    assert list(described["fields"][1]) == ["name", "array_len", "type", "struct", "size"]


def test_array_of_structures_with_subsections_is_described_one_by_one() -> None:
    described = OUTER.describe(CASES[5][2])
    parts = [field for field in described["fields"] if field["name"] == "parts"]
    assert [(part["index"], part["size"], "subsections" in part["struct"]) for part in parts] == [
        (0, 1, False),
        (1, 18, True),
    ]
    assert list(parts[0]) == ["name", "index", "type", "struct", "size"]


def test_repeated_name_gets_its_number_and_empty_arrays_are_not_described() -> None:
    assert [field["name"] for field in VARIANTS.describe({"wide": True, "value": 1})["fields"]] == ["wide", "value[1]"]
    assert "nothing" not in [field["name"] for field in ODD.describe(CASES[6][2])["fields"]]


def test_older_version_lacks_what_came_later() -> None:
    old = bytes.fromhex("0000000000000001 ffffffffffffffff")
    assert TIMED.decode(old, 1) == {"ticks": 1}
    assert TIMED.measure(old, 1) == 16
    assert TIMED.measure(old, 2) is None


@pytest.mark.parametrize("version", [0, 3, 2**32 - 1])
def test_unreadable_version_is_refused(version: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"version {version} of 'timed'"):
        TIMED.decode(bytes(24), version)
    with pytest.raises(RemoteProtocolError):
        TIMED.measure(b"", version)


def test_any_byte_but_zero_is_true() -> None:
    flag = VMState("flag", fields=(Field("set", "bool"),))
    assert [flag.decode(bytes([b]))["set"] for b in (0, 1, 2, 255)] == [False, True, True, True]


def test_equal_field_must_have_the_local_value() -> None:
    sent = bytes.fromhex("00000002 00000001 00000002")
    assert PCI_BUS.decode(sent, local={"nirq": 2})["irq_count"] == [1, 2]
    with pytest.raises(RemoteProtocolError, match=r"'nirq'.*has 2, here it must be 4"):
        PCI_BUS.decode(sent, local={"nirq": 4})
    nested = VMState("machine", fields=(Field("bus", PCI_BUS, count=1),))
    with pytest.raises(RemoteProtocolError, match=r"bus\[0\]\.nirq"):
        nested.decode(sent, local={"bus": [{"nirq": 4}]})


def test_int32_le_is_at_most_the_local_value() -> None:
    used = VMState("used", fields=(Field("n", "int32 le"),))
    assert used.decode(struct.pack(">i", 4), local={"n": 4}) == {"n": 4}
    for bad in (5, -1):
        with pytest.raises(RemoteProtocolError, match="'n'"):
            used.decode(struct.pack(">i", bad), local={"n": 4})
    with pytest.raises(RemoteProtocolError, match="negative"):
        used.decode(struct.pack(">i", -1))


def test_condition_sees_local_values_of_fields_that_are_not_sent() -> None:
    vmstate = VMState("local", fields=(Field("extra", "uint8", when=lambda state, version: state["has_extra"]),))
    assert vmstate.decode(b"\x07", local={"has_extra": True}) == {"extra": 7}
    assert vmstate.decode(b"", local={"has_extra": False}) == {}
    with pytest.raises(RemoteProtocolError, match="has_extra"):
        vmstate.decode(b"")


@pytest.mark.parametrize("count", [-1, 5, 2**31 - 1])
def test_hostile_length_is_refused_before_anything_is_allocated(count: int) -> None:
    vmstate = VMState("v", fields=(Field("n", "int32"), Field("data", "buffer", size="n", maximum=4)))
    head = struct.pack(">i", count)
    with pytest.raises(RemoteProtocolError, match=r"'data'.*'n'"):
        vmstate.measure(head)
    array = VMState("a", fields=(Field("n", "int32"), Field("items", INNER, count="n", maximum=4)))
    with pytest.raises(RemoteProtocolError, match=r"'items'.*'n'"):
        array.decode(head)


def test_subsections_come_in_any_order_and_the_last_of_several_wins() -> None:
    def more(name: str, version: int, rest: str) -> bytes:
        return bytes([5, len(name)]) + name.encode() + struct.pack(">I", version) + bytes.fromhex(rest)

    data = bytes(6) + more("fw_cfg/acpi_mr", 1, "00" * 24) + more("fw_cfg/dma", 0, "00" * 8)
    data += more("fw_cfg/dma", 0, "00" * 7 + "09")
    assert FW_CFG.decode(data)["dma_addr"] == 9
    with pytest.raises(RemoteProtocolError, match=r"'fw_cfg/x'.*no such subsection"):
        FW_CFG.decode(bytes(6) + more("fw_cfg/x", 1, ""))
    with pytest.raises(RemoteProtocolError, match="version 2 cannot be read"):
        FW_CFG.decode(bytes(6) + more("fw_cfg/acpi_mr", 2, "00" * 24))


def test_length_is_known_from_the_first_byte_that_cannot_be_a_subsection() -> None:
    """The sender may wait for an answer behind the footer, so the decision must not need more than that."""
    vmstate = VMState("v", fields=(Field("part", INNER), Field("next", "uint16")))
    assert vmstate.measure(bytes.fromhex("01 05ff 7e")) == 3


def test_subsection_of_another_structure_ends_this_one() -> None:
    other = bytes(6) + b"\x05\x05other\x00\x00\x00\x01"
    assert FW_CFG.measure(other) == 6
    assert FW_CFG.measure(bytes(6) + b"\x05\x02ab") == 6
    with pytest.raises(RemoteProtocolError, match="11 bytes are left"):
        FW_CFG.decode(other)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"cur_entry": 0}, "'cur_offset': it is missing in the state of the device"),
        ({"cur_entry": 65536, "cur_offset": 0}, "'cur_entry': 65536 is no uint16"),
        ({"cur_entry": -1, "cur_offset": 0}, "'cur_entry': -1"),
        ({"cur_entry": "0", "cur_offset": 0}, "'cur_entry': '0'"),
        ({"cur_entry": None, "cur_offset": 0}, "'cur_entry': None"),
    ],
)
def test_state_that_does_not_fit_is_not_sent(state: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LocalProtocolError, match=complaint):
        FW_CFG.encode(state)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Field("f", "buffer", size=2), b"abc"),
        (Field("f", "buffer", size=2), "ab"),
        (Field("f", "bool"), 2),
        (Field("f", "bitmap", size=64), 1 << 64),
        (Field("f", "bitmap", size=64), -1),
        (Field("f", "uint8", count=2), [1]),
        (Field("f", "uint8", count=2), 1),
        (Field("f", "uint8", count="n"), [1]),
        (Field("f", "timer"), -1),
        (Field("f", "CPU_Double_U"), "x"),
    ],
)
def test_value_of_the_wrong_kind_is_named(field: Field, value: object) -> None:
    with pytest.raises(LocalProtocolError, match="'f'"):
        VMState("v", fields=(field,)).encode({"f": value})


def test_declarations_that_cannot_work_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown type 'uint24'; there are bool, int8, .*, buffer, unused_buffer, or a VMState"
    ):
        Field("f", "uint24")
    with pytest.raises(ValueError, match="buffer needs size=BYTES"):
        Field("f", "buffer")
    with pytest.raises(ValueError, match="bitmap needs size=BITS"):
        Field("f", "bitmap")
    with pytest.raises(ValueError, match="only buffers, bitmaps have size"):
        Field("f", "uint8", size=1)
    with pytest.raises(ValueError, match="negative"):
        Field("f", "uint8", count=-1)
    with pytest.raises(ValueError, match="must be called 'dev/…'"):
        VMState("dev", fields=(), subsections=(Subsection(VMState("other", fields=())),))


def test_signalling_nan_keeps_its_bits() -> None:
    vmstate = VMState("fpu", fields=(Field("d", "CPU_Double_U"),))
    bits = bytes.fromhex("7ff0000000000001")
    assert vmstate.encode(vmstate.decode(bits)) == bits


MIXED = VMState(
    "mixed",
    fields=(
        Field("i8", "int8"),
        Field("u16", "uint16"),
        Field("i64", "int64 equal"),
        Field("n", "uint8"),
        Field("blob", "buffer", size="n"),
        Field("when", "timer", count=3),
        Field("map", "bitmap", size=130),
        Field("inner", INNER, count="n"),
        Field("tail", OUTER),
    ),
    subsections=(Subsection(VMState("mixed/opt", fields=(Field("opt", "timer"), Field("flag", "bool")))),),
)
_u8 = st.integers(0, 255)
_inner = st.fixed_dictionaries({"x": _u8}, optional={"y": _u8})


@st.composite
def mixed_states(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(0, 4))
    state: dict[str, Any] = {
        "i8": draw(st.integers(-128, 127)),
        "u16": draw(st.integers(0, 65535)),
        "i64": draw(st.integers(0, 2**64 - 1)),
        "n": n,
        "blob": draw(st.binary(min_size=n, max_size=n)),
        "when": draw(st.lists(st.none() | st.integers(0, 2**64 - 2), min_size=3, max_size=3)),
        "map": draw(st.integers(0, 2**130 - 1)),
        "inner": draw(st.lists(_inner, min_size=n, max_size=n)),
        "tail": draw(
            st.fixed_dictionaries(
                {
                    "before": st.booleans(),
                    "parts": st.lists(_inner, min_size=2, max_size=2),
                    "after": st.integers(0, 65535),
                },
                optional={"z": st.integers(-128, 127)},
            )
        ),
    }
    if draw(st.booleans()):
        state |= {"opt": draw(st.none() | st.integers(0, 9)), "flag": draw(st.booleans())}
    return state


@given(mixed_states())
def test_any_state_survives_the_round_trip(state: dict[str, Any]) -> None:
    data = MIXED.encode(state)
    assert MIXED.decode(data) == state
    assert MIXED.measure(data + b"\x7e\0\0\0\0") == len(data)
    assert total_size(MIXED.describe(state)) == len(data)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_state_or_one_typed_error(data: bytes) -> None:
    refusal, state = attempt(MIXED, data)
    if refusal is None:
        assert MIXED.decode(MIXED.encode(state)) == state
    else:
        assert refusal.section == "here"


def test_fields_of_a_nested_structure_may_be_a_list() -> None:
    inner = VMState("inner", fields=[Field("x", "uint8"), Field("y", "uint16")])
    outer = VMState("outer", fields=[Field("pair", inner), Field("pairs", inner, count=2)], subsections=[])
    state = {"pair": {"x": 1, "y": 2}, "pairs": [{"x": 3, "y": 4}, {"x": 5, "y": 6}]}
    data = outer.encode(state)
    assert data == bytes.fromhex("01 0002 03 0004 05 0006")
    assert outer.decode(data) == state
