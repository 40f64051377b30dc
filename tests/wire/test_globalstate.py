"""The section that says in which run state the guest was (Q3, gap G21)."""

from __future__ import annotations

import pytest

from tests.wire.cases import EXAMPLE_A
from trimig.errors import LocalProtocolError, RemoteProtocolError
from trimig.wire.devices import globalstate

PRELAUNCH = EXAMPLE_A.data[0x92:0xFA]


def test_section_is_that_of_example_a() -> None:
    """Q3: stream.md part 12."""
    section = globalstate.section("prelaunch")
    assert (section.idstr, section.instance_id, section.version_id) == ("globalstate", 0, 1)
    assert section.payload == PRELAUNCH
    assert section.description is not None
    assert dict(section.description)["fields"] == [
        {"name": "size", "type": "uint32", "size": 4},
        {"name": "runstate", "type": "buffer", "size": 100},
    ]
    assert globalstate.decode(PRELAUNCH) == "prelaunch"


@pytest.mark.parametrize("state", sorted(globalstate.RUN_STATES))
def test_every_run_state_goes_there_and_back(state: str) -> None:
    """Q3."""
    payload = globalstate.section(state).payload
    assert len(payload) == 104
    assert int.from_bytes(payload[:4], "big") == len(state) + 1
    assert globalstate.decode(payload) == state


@pytest.mark.parametrize("state", ["debug", "save-vm", "restore-vm"])
def test_run_state_that_aborts_a_qemu_is_neither_sent_nor_taken(state: str) -> None:
    """Q3, gap G21: a QEMU destination that receives one of them ends with SIGABRT."""
    with pytest.raises(LocalProtocolError, match=f"cannot arrive in '{state}'"):
        globalstate.section(state)
    payload = (len(state) + 1).to_bytes(4, "big") + state.encode().ljust(100, b"\0")
    with pytest.raises(RemoteProtocolError, match=f"cannot arrive in '{state}'") as caught:
        globalstate.decode(payload)
    assert caught.value.section == "globalstate"


@pytest.mark.parametrize("name", [b"", b"Running", b"running ", b"x" * 99, b"run\xffning"])
def test_unknown_run_state_is_refused(name: bytes) -> None:
    """Q3: EINVAL in QEMU."""
    with pytest.raises(RemoteProtocolError, match="there is no run state"):
        globalstate.decode(bytes(4) + name.ljust(100, b"\0"))


def test_run_state_without_end_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="no end"):
        globalstate.decode(bytes(4) + b"x" * 100)


def test_rest_of_a_longer_name_and_the_size_do_not_count() -> None:
    """vmstate.md 4.2: the reader uses the text up to the first NUL and ignores the size."""
    assert globalstate.decode(b"\xff\xff\xff\xff" + b"paused\0lmigrate\0".ljust(100, b"\0")) == "paused"
    assert globalstate.run_state_of(b"running\0") == "running"


@pytest.mark.parametrize("length", [0, 1, 3, 4, 103])
def test_payload_that_is_not_all_there(length: int) -> None:
    assert globalstate.measure(memoryview(PRELAUNCH)[:length], 1) is None
    with pytest.raises(RemoteProtocolError):
        globalstate.decode(PRELAUNCH[:length])


def test_payload_has_one_length() -> None:
    assert globalstate.measure(memoryview(PRELAUNCH + b"\x7e\0\0"), 1) == 104
    with pytest.raises(RemoteProtocolError):
        globalstate.decode(PRELAUNCH + b"\0")


def test_newer_version_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="version"):
        globalstate.decode(PRELAUNCH, 2)


def test_refusal_names_the_reason() -> None:
    assert globalstate.refusal("running") is None
    assert globalstate.refusal("debug") == "a guest cannot arrive in 'debug'"
    assert globalstate.refusal("sleeping") == "there is no run state 'sleeping'"
    with pytest.raises(LocalProtocolError, match="there is no run state 'sleeping'"):
        globalstate.fields_of("sleeping")
