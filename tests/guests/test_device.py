"""Devices declared by the caller, and the two that every machine has."""

from __future__ import annotations

import pytest

from trimig import guest as interfaces
from trimig.errors import LocalProtocolError, RemoteProtocolError
from trimig.guests.device import Device, device_section
from trimig.guests.standard import GlobalState, TimerState
from trimig.wire.devices.description import build
from trimig.wire.devices.globalstate import ILLEGAL_RUN_STATES, RUN_STATES
from trimig.wire.devices.globalstate import decode as decode_global_state
from trimig.wire.devices.globalstate import section as global_state_section
from trimig.wire.devices.vmstate import Field, VMState

# stream.md part 12: the whole description of a machine without devices.
NONE_DESCRIPTION = (
    b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, '
    b'"fields": [{"name": "cpu_ticks_offset", "type": "int64", "size": 8}, {"name": "unused", "type": '
    b'"unused_buffer", "size": 8}, {"name": "cpu_clock_offset", "type": "int64", "size": 8}]}, {"name": '
    b'"globalstate", "instance_id": 0, "vmsd_name": "globalstate", "version": 1, "fields": [{"name": "size", '
    b'"type": "uint32", "size": 4}, {"name": "runstate", "type": "buffer", "size": 100}]}]}'
)
# The section "timer" of a machine that counts instructions.
ICOUNT_TIMER = bytes.fromhex(
    "0000000000719364 0000000000000000 00000000002e6fe2"
    "05 0c 74696d65722f69636f756e74 00000001 0000000000000000 0000000000000000"
    "05 17 74696d65722f69636f756e742f776172705f74696d6572 00000001 000000000000db47 0000000005f6bc47"
    "05 13 74696d65722f69636f756e742f74696d657273 00000001 000000003b9aca00 0000000005f5e100"
    "05 12 74696d65722f69636f756e742f7368696674 00000002 0003 0000000000000000"
)


class Clock(Device):
    vmstate = VMState(
        "clock",
        version=2,
        minimum_version=1,
        fields=(Field("ticks", "uint32"), Field("limit", "uint32 equal"), Field("zone", "int8", since=2)),
    )

    def __init__(self, *, instance_id: int = 0) -> None:
        super().__init__(instance_id=instance_id)
        self.ticks = 1
        self.limit = 10
        self.zone = -1
        self.saves = 0
        self.loaded: list[int] = []

    def pre_save(self) -> None:
        self.saves += 1

    def post_load(self, version_id: int) -> None:
        if self.ticks > self.limit:
            raise ValueError(f"{self.ticks} ticks, and the limit is {self.limit}")
        self.loaded.append(version_id)


def test_device_saves_its_attributes_and_describes_them() -> None:
    clock = Clock(instance_id=3)
    section = device_section(clock, 7)
    assert section == interfaces.DeviceSection(
        idstr="clock",
        instance_id=3,
        version_id=2,
        payload=bytes.fromhex("00000001 0000000a ff"),
        section_id=7,
        description={
            "name": "clock",
            "instance_id": 3,
            "vmsd_name": "clock",
            "version": 2,
            "fields": [
                {"name": "ticks", "type": "uint32", "size": 4},
                {"name": "limit", "type": "uint32 equal", "size": 4},
                {"name": "zone", "type": "int8", "size": 1},
            ],
        },
    )
    assert clock.saves == 2  # once for the payload, once for the description


def test_device_loads_into_its_attributes() -> None:
    there, here = Clock(), Clock()
    there.ticks, there.zone = 9, 5
    payload = there.save()
    assert here.measure(memoryview(payload + b"\x7e"), 2) == len(payload)
    here.load(payload, 2)
    assert (here.ticks, here.zone, here.loaded) == (9, 5, [2])


def test_older_version_leaves_newer_fields_alone() -> None:
    clock = Clock()
    clock.load(bytes.fromhex("00000002 0000000a"), 1)
    assert (clock.ticks, clock.zone, clock.loaded) == (2, -1, [1])


@pytest.mark.parametrize(
    ("payload", "version", "complaint"),
    [
        ("00000002 0000000a 00", 3, "version 3"),
        ("00000002 0000000a", 2, "needs 1 bytes"),
        ("00000002 0000000a 00 00", 2, "left behind"),
        ("00000002 0000000b 00", 2, "must be 10"),
        ("0000000b 0000000a 00", 2, "the limit is 10"),
    ],
)
def test_refused_load_leaves_the_device_as_it_was(payload: str, version: int, complaint: str) -> None:
    clock = Clock()
    before = dict(vars(clock))
    with pytest.raises(RemoteProtocolError, match=complaint) as caught:
        clock.load(bytes.fromhex(payload), version)
    assert caught.value.section == "clock"
    assert vars(clock) == before


def test_class_without_declaration_or_with_an_impossible_name_is_refused() -> None:
    with pytest.raises(TypeError, match="vmstate"):
        type("Nameless", (Device,), {})
    with pytest.raises(TypeError, match="255"):
        type("Endless", (Device,), {"vmstate": Clock.vmstate, "idstr": "x" * 256})


def test_idstr_is_the_name_of_the_declaration_unless_given() -> None:
    class OnBus(Clock):
        idstr = "0000:00:02.0/clock"

    class Same(OnBus):
        pass

    assert [kind().idstr for kind in (Clock, OnBus, Same)] == ["clock", "0000:00:02.0/clock", "0000:00:02.0/clock"]


def test_standard_devices_fit_the_interface() -> None:
    devices: list[interfaces.DeviceProtocol] = [TimerState(), GlobalState()]
    assert [(d.idstr, d.instance_id, d.version_id) for d in devices] == [("timer", 0, 2), ("globalstate", 0, 1)]


def test_standard_devices_describe_themselves_as_the_document_says() -> None:
    """Q2: the JSON of a machine without devices, byte for byte."""
    assert build(4096, [TimerState().describe(), GlobalState().describe()]) == NONE_DESCRIPTION


def test_timer_is_24_bytes() -> None:
    timer = TimerState(cpu_ticks_offset=-1, cpu_clock_offset=2)
    assert timer.save() == bytes.fromhex("ffffffffffffffff 0000000000000000 0000000000000002")
    other = TimerState()
    other.load(timer.save(), 2)
    assert (other.cpu_ticks_offset, other.cpu_clock_offset) == (-1, 2)


def test_timer_with_instruction_counting_is_kept_and_given_back() -> None:
    timer = TimerState()
    timer.load(ICOUNT_TIMER, 2)
    assert timer.save() == ICOUNT_TIMER
    names = [s["vmsd_name"] for s in timer.describe()["subsections"][0]["subsections"]]
    assert names == ["timer/icount/warp_timer", "timer/icount/timers", "timer/icount/shift"]
    timer.load(bytes(24), 2)
    assert timer.save() == bytes(24)


def test_refused_timer_keeps_what_it_had() -> None:
    timer = TimerState()
    timer.load(ICOUNT_TIMER, 2)
    with pytest.raises(RemoteProtocolError):
        timer.load(ICOUNT_TIMER[:-1], 2)
    assert timer.save() == ICOUNT_TIMER


@pytest.mark.parametrize("name", sorted(RUN_STATES))
def test_run_state_goes_both_ways(name: str) -> None:
    """Q3: every run state a guest can arrive in."""
    payload = len(name + "0").to_bytes(4, "big") + name.encode().ljust(100, b"\0")
    assert global_state_section(name).payload == payload
    assert decode_global_state(payload) == name


def test_rest_of_a_longer_name_and_the_size_are_ignored() -> None:
    """Q3: the text counts up to its first NUL."""
    payload = (77).to_bytes(4, "big") + b"paused\0nch\0".ljust(100, b"\0")
    assert decode_global_state(payload) == "paused"


@pytest.mark.parametrize("name", [*sorted(ILLEGAL_RUN_STATES), "nonsense", "", "Running"])
def test_run_state_no_guest_can_arrive_in_is_refused_both_ways(name: str) -> None:
    """Q3, gap G21: QEMU aborts on three of these."""
    payload = bytes(4) + name.encode().ljust(100, b"\0")
    with pytest.raises(RemoteProtocolError, match=repr(name)):
        decode_global_state(payload)
    with pytest.raises(LocalProtocolError, match=repr(name)):
        global_state_section(name)


@pytest.mark.parametrize("text", [b"r" * 100, b"\xff\x00".ljust(100, b"\0")])
def test_run_state_that_is_no_text_is_refused(text: bytes) -> None:
    state = GlobalState("paused")
    with pytest.raises(RemoteProtocolError, match="run state"):
        state.load(bytes(4) + text, 1)
    assert state.run_state == "paused"
