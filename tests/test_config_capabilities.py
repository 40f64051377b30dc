"""Capabilities of trimig.config: the list, the rules of config.md 1.1, QMP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.config import (
    BUILT,
    CAPABILITY_NAMES,
    RULES,
    Capabilities,
    Proposal,
    check_proposal,
)
from trimig.errors import ConfigError, StateError
from trimig.status import IDLE, Status, check_idle

#: config.md part 1, written out by hand.
ALL_CAPABILITIES = [
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "zero-blocks",
    "compress",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "block",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
]
EVERYTHING = frozenset(ALL_CAPABILITIES)


def refusal(call: Callable[[], object]) -> ConfigError:
    """The ConfigError that *call* raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


def test_capabilities_are_listed_in_qemus_order_without_unbuilt_block() -> None:
    """C1: all capabilities in order; `block` omitted when not built."""
    listed = Capabilities().to_qmp()
    assert [item["capability"] for item in listed] == [name for name in ALL_CAPABILITIES if name != "block"]
    assert list(CAPABILITY_NAMES) == ALL_CAPABILITIES


def test_only_the_return_path_is_on_by_default() -> None:
    assert Capabilities().enabled == {"return-path"}
    assert [item["capability"] for item in Capabilities().to_qmp() if item["state"]] == ["return-path"]


NEEDS = {
    "zero-copy-send": frozenset({"multifd"}),
    "postcopy-preempt": frozenset({"postcopy-ram"}),
    "switchover-ack": frozenset({"return-path"}),
    "x-colo": frozenset({"return-path"}),
}


@pytest.mark.parametrize("name", sorted(EVERYTHING - BUILT))
def test_unbuilt_capability_is_refused_by_name_and_may_be_turned_off(name: str) -> None:
    needed = NEEDS.get(name, frozenset())
    error = refusal(lambda: check_proposal(Proposal(enabled=needed | {name}), built=BUILT | needed))
    assert str(error).startswith(f"capability '{name}' is not built into trimig yet")
    assert error.name == name
    check_proposal(Proposal(enabled=needed | {name}), built=BUILT | needed | {name})
    with pytest.raises(ConfigError):
        Capabilities(return_path=False, **{name.replace("-", "_"): True})
    assert Capabilities.from_qmp([{"capability": name, "state": False}]) == Capabilities()


def test_unbuilt_block_points_to_nbd() -> None:
    """C6: block not compiled: refused with hint."""
    assert "NBD" in str(refusal(lambda: Capabilities(block=True)))


def test_built_capabilities_can_be_turned_on_and_off() -> None:
    assert Capabilities(events=True, return_path=False).enabled == {"events"}


def test_capability_state_must_be_a_bool() -> None:
    error = refusal(lambda: Capabilities(events=1))  # type: ignore[arg-type]  # the wrong type is the point
    assert str(error) == "capability 'events' expects true or false, not 1"
    assert error.name == "events"


SNAPSHOT_CONFLICTS = [
    "postcopy-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "release-ram",
    "rdma-pin-all",
    "compress",
    "xbzrle",
    "x-colo",
    "validate-uuid",
    "zero-copy-send",
]


@pytest.mark.parametrize(
    ("enabled", "situation", "name", "words"),
    [
        ("postcopy-ram", {"inmigrate": True, "postcopy_obstacle": "no userfaultfd"}, "postcopy-ram", "no userfaultfd"),
        ("postcopy-ram x-ignore-shared", {}, "postcopy-ram", "not compatible with x-ignore-shared"),
        ("background-snapshot", {"snapshot_obstacle": "no write protection"}, "background-snapshot", "no write prot"),
        ("zero-copy-send", {}, "zero-copy-send", "needs multifd"),
        ("zero-copy-send multifd compress", {}, "zero-copy-send", "not compatible with compress"),
        ("zero-copy-send multifd xbzrle", {}, "zero-copy-send", "not compatible with xbzrle"),
        ("zero-copy-send multifd", {"multifd_compression": "zstd"}, "zero-copy-send", "multifd-compression zstd"),
        ("zero-copy-send multifd", {"tls": True}, "zero-copy-send", "TLS"),
        ("multifd", {"inmigrate": True, "several_channels": False}, "multifd", "several channels"),
        ("postcopy-preempt", {}, "postcopy-preempt", "needs postcopy-ram"),
        ("postcopy-ram postcopy-preempt", {"listening": True}, "postcopy-preempt", "before the incoming migration"),
        ("multifd", {"listening": True}, "multifd", "before the incoming migration"),
        ("", {"listening": True, "before": frozenset({"postcopy-preempt"})}, "postcopy-preempt", "before the incoming"),
        ("postcopy-preempt postcopy-ram compress", {}, "postcopy-preempt", "not compatible with compress"),
        ("multifd compress", {}, "multifd", "not compatible with compress"),
        ("postcopy-ram compress", {"compressed_pages": "precopy"}, "postcopy-ram", "not compatible with compress"),
        ("compress", {"compressed_pages": "no"}, "compress", "was removed in QEMU 9.1"),
        ("multifd xbzrle", {}, "multifd", "not compatible with xbzrle"),
        ("switchover-ack", {}, "switchover-ack", "needs return-path"),
        ("x-colo", {}, "x-colo", "needs return-path"),
        ("dirty-limit auto-converge", {}, "dirty-limit", "not compatible with auto-converge"),
        ("mapped-ram xbzrle", {}, "mapped-ram", "not compatible with xbzrle"),
        ("mapped-ram postcopy-ram", {}, "mapped-ram", "not compatible with postcopy-ram"),
        *(
            (f"background-snapshot {other}", {}, "background-snapshot", f"not compatible with {other}")
            for other in SNAPSHOT_CONFLICTS
        ),
    ],
)
def test_contradiction_is_refused_as_such_built_or_not(
    enabled: str, situation: Mapping[str, Any], name: str, words: str
) -> None:
    proposal = Proposal(enabled=frozenset(enabled.split()), **situation)
    for built in (EVERYTHING, BUILT):
        error = refusal(partial(check_proposal, proposal, built=built))
        assert error.name == name
        assert words in str(error)
        assert "not built" not in str(error)
    assert sum(rule(proposal) is not None for rule in RULES) >= 1


@pytest.mark.parametrize(
    ("enabled", "situation"),
    [
        ("", {}),
        ("postcopy-ram compress", {}),  # C4: allowed since 7.2
        ("compress", {"compressed_pages": "precopy"}),
        ("postcopy-ram", {"inmigrate": False, "postcopy_obstacle": "no userfaultfd"}),
        ("postcopy-ram", {"inmigrate": True}),
        (
            "postcopy-ram",
            {"inmigrate": True, "postcopy_obstacle": "no userfaultfd", "before": frozenset({"postcopy-ram"})},
        ),
        ("background-snapshot events", {}),
        ("zero-copy-send multifd", {}),
        ("multifd", {"inmigrate": True, "several_channels": True}),
        ("multifd", {"inmigrate": False, "several_channels": False}),
        ("postcopy-ram postcopy-preempt", {}),
        ("multifd postcopy-ram", {}),
        ("switchover-ack return-path", {}),
        ("x-colo return-path", {}),
        ("dirty-limit", {}),
        ("postcopy-ram postcopy-preempt", {"listening": True, "before": frozenset({"postcopy-preempt"})}),
        ("mapped-ram return-path multifd", {}),  # as QEMU 10.0 and 11.1
        ("xbzrle auto-converge return-path events", {"tls": True, "multifd_compression": "zlib"}),
    ],
)
def test_sound_combination_is_allowed_once_everything_is_built(enabled: str, situation: Mapping[str, Any]) -> None:
    """C5: the host is asked about postcopy only when it is newly set while waiting for a migration."""
    proposal = Proposal(enabled=frozenset(enabled.split()), **situation)
    check_proposal(proposal, built=EVERYTHING)
    assert [rule(proposal) for rule in RULES] == [None] * len(RULES)


def test_capabilities_can_be_judged_again_in_a_situation() -> None:
    capabilities = Capabilities()
    capabilities.check(inmigrate=True, several_channels=False, postcopy_obstacle="none of it is asked")
    capabilities.check(before=Capabilities(events=True), built=EVERYTHING)
    error = refusal(lambda: capabilities.check(built=frozenset()))
    assert error.name == "return-path"


@pytest.mark.parametrize("status", Status)
def test_capabilities_may_change_in_idle_statuses_and_in_no_other(status: Status) -> None:
    """C2, C3: refused while setup, active, ..., cancelling, paused, recover; the one table of idle statuses decides."""
    if status in IDLE:
        check_idle(status)
    else:
        with pytest.raises(StateError, match=status.value) as caught:
            check_idle(status)
        assert caught.value.status == status.value


def test_the_lists_of_libvirt_are_accepted_while_everything_unbuilt_is_off() -> None:
    """Every name of 7.2, 10.0 and 11.1 is known; off is accepted whether it is built or not."""
    off = [{"capability": name, "state": False} for name in ALL_CAPABILITIES]
    assert Capabilities.from_qmp(off).enabled == frozenset()


def test_rejected_list_of_capabilities_changes_nothing() -> None:
    """C3: a rejected list changes nothing."""
    base = Capabilities(return_path=False)
    changes = [{"capability": "events", "state": True}, {"capability": "x-colo", "state": True}]
    assert refusal(lambda: Capabilities.from_qmp(changes, base)).name == "x-colo"
    assert base == Capabilities(return_path=False)
    assert Capabilities.from_qmp(changes[:1], base) == Capabilities(return_path=False, events=True)
    assert Capabilities.from_qmp([], base) == base


def test_a_list_is_judged_as_a_whole_not_step_by_step() -> None:
    changes = [{"capability": "x-colo", "state": True}, {"capability": "x-colo", "state": False}]
    assert Capabilities.from_qmp(changes) == Capabilities()


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        ({"events": True}, "a list"),
        ("events", "a list"),
        (None, "a list"),
        (["events"], "objects of 'capability' and 'state'"),
        ([{"capability": "events"}], "objects of"),
        ([{"capability": "events", "state": True, "more": 1}], "objects of"),
        ([{"capability": "events", "state": 1}], "true or false"),
        ([{"capability": "events", "state": "on"}], "true or false"),
        ([{"capability": ["events"], "state": True}], "no capability"),
        ([{"capability": "event", "state": True}], "did you mean events"),
        ([{"capability": "return_path", "state": True}], "did you mean return-path"),
        ([{"capability": "?", "state": True}], "known are xbzrle, "),
    ],
)
def test_malformed_list_of_capabilities_is_refused(capabilities: object, words: str) -> None:
    assert words in str(refusal(lambda: Capabilities.from_qmp(capabilities)))


def test_the_older_name_of_multifd_means_multifd() -> None:
    assert Capabilities.from_qmp([{"capability": "x-multifd", "state": True}]) == Capabilities(multifd=True)
    assert Capabilities.from_qmp([{"capability": "x-multifd", "state": False}]) == Capabilities()


@given(st.sets(st.sampled_from(sorted(BUILT))))
def test_capabilities_survive_qmp(enabled: set[str]) -> None:
    if "postcopy-preempt" in enabled:
        enabled.add("postcopy-ram")  # or it is refused
    if "switchover-ack" in enabled:
        enabled.add("return-path")
    if "multifd" in enabled:
        enabled -= {"xbzrle", "compress"}
    if "postcopy-preempt" in enabled:
        enabled.discard("compress")
    capabilities = Capabilities(**{name.replace("-", "_"): name in enabled for name in BUILT})
    assert capabilities.enabled == enabled
    assert Capabilities.from_qmp(capabilities.to_qmp()) == capabilities
