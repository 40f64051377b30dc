"""trimig.config: the tables of config.md, and every way in and out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.config import (
    BUILT,
    CAPABILITY_NAMES,
    ENGINE_OPTIONS,
    LEGACY_2_2,
    LEGACY_2_3,
    PARAMETER_NAMES,
    PEERS,
    QEMU_7_2,
    RULES,
    BitmapAlias,
    Capabilities,
    Config,
    GiB,
    KiB,
    MiB,
    NodeAlias,
    Parameters,
    PeerProfile,
    Proposal,
    check_idle,
    check_proposal,
    parse_size,
)
from trimig.errors import ConfigError, MigrationError, StateError

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
]
EVERYTHING = frozenset(ALL_CAPABILITIES)

#: config.md part 2, the column of 7.2.
DEFAULTS_7_2 = {
    "compress-level": 1,
    "compress-threads": 8,
    "compress-wait-thread": True,
    "decompress-threads": 2,
    "throttle-trigger-threshold": 50,
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "cpu-throttle-tailslow": False,
    "max-cpu-throttle": 99,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "max-bandwidth": 134217728,
    "downtime-limit": 300,
    "x-checkpoint-delay": 20000,
    "block-incremental": False,
    "multifd-channels": 2,
    "multifd-compression": "none",
    "multifd-zlib-level": 1,
    "multifd-zstd-level": 1,
    "xbzrle-cache-size": 67108864,
    "max-postcopy-bandwidth": 0,
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
}

#: Legal extremes of each integer parameter; one further is illegal.
RANGES = {
    "compress-level": (0, 9),
    "compress-threads": (1, 255),
    "decompress-threads": (1, 255),
    "throttle-trigger-threshold": (1, 100),
    "cpu-throttle-initial": (1, 99),
    "cpu-throttle-increment": (1, 99),
    "max-cpu-throttle": (20, 99),
    "max-bandwidth": (0, 2**64 - 1),
    "downtime-limit": (0, 2_000_000),
    "x-checkpoint-delay": (0, 2**32 - 1),
    "multifd-channels": (1, 255),
    "multifd-zlib-level": (0, 9),
    "multifd-zstd-level": (0, 20),
    "xbzrle-cache-size": (4096, 2**63),
    "max-postcopy-bandwidth": (0, 2**64 - 1),
    "announce-initial": (0, 100_000),
    "announce-max": (0, 100_000),
    "announce-rounds": (0, 1000),
    "announce-step": (1, 10_000),
}


def refusal(call: Callable[[], object]) -> ConfigError:
    """The ConfigError that *call* raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


# Capabilities


def test_capabilities_are_listed_in_qemus_order_without_unbuilt_block() -> None:
    """C1: all capabilities in order; `block` omitted when not built."""
    listed = Capabilities().to_qmp()
    assert [item["capability"] for item in listed] == [name for name in ALL_CAPABILITIES if name != "block"]
    assert list(CAPABILITY_NAMES) == ALL_CAPABILITIES


def test_only_the_return_path_is_on_by_default() -> None:
    assert Capabilities().enabled == {"return-path"}
    assert [item["capability"] for item in Capabilities().to_qmp() if item["state"]] == ["return-path"]


NEEDS = {"zero-copy-send": frozenset({"multifd"}), "postcopy-preempt": frozenset({"postcopy-ram"})}


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
        ("postcopy-preempt postcopy-ram compress", {}, "postcopy-preempt", "not compatible with compress"),
        ("multifd compress", {}, "multifd", "not compatible with compress"),
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


@pytest.mark.parametrize(
    "status",
    [
        *("setup", "active", "pre-switchover", "device", "handover", "uncertain", "cancelling"),
        *("postcopy-active", "postcopy-paused", "postcopy-recover", "colo"),
    ],
)
def test_capabilities_cannot_change_while_a_migration_is_in_progress(status: str) -> None:
    """C2: refused while setup, active, ..., cancelling, paused, recover; and in colo (G20)."""
    with pytest.raises(StateError, match=status) as caught:
        check_idle(status)
    assert caught.value.status == status


def test_capabilities_may_change_in_every_idle_status() -> None:
    """C3: accepted in idle states."""
    for status in ("none", "completed", "failed", "cancelled"):
        check_idle(status)
    with pytest.raises(StateError):
        check_idle("active")


def test_rejected_list_of_capabilities_changes_nothing() -> None:
    """C3: a rejected list changes nothing."""
    base = Capabilities(return_path=False)
    changes = [{"capability": "events", "state": True}, {"capability": "multifd", "state": True}]
    assert refusal(lambda: Capabilities.from_qmp(changes, base)).name == "multifd"
    assert base == Capabilities(return_path=False)
    assert Capabilities.from_qmp(changes[:1], base) == Capabilities(return_path=False, events=True)
    assert Capabilities.from_qmp([], base) == base


def test_a_list_is_judged_as_a_whole_not_step_by_step() -> None:
    changes = [{"capability": "xbzrle", "state": True}, {"capability": "xbzrle", "state": False}]
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
    assert refusal(lambda: Capabilities.from_qmp([{"capability": "x-multifd", "state": True}])).name == "multifd"
    assert Capabilities.from_qmp([{"capability": "x-multifd", "state": False}]) == Capabilities()


@given(st.sets(st.sampled_from(sorted(BUILT))))
def test_capabilities_survive_qmp(enabled: set[str]) -> None:
    capabilities = Capabilities(**{name.replace("-", "_"): name in enabled for name in BUILT})
    assert capabilities.enabled == enabled
    assert Capabilities.from_qmp(capabilities.to_qmp()) == capabilities


# Parameters


def test_defaults_are_those_of_7_2() -> None:
    """A7, D1: every parameter is there and equals the table of config.md part 2."""
    assert Parameters().to_qmp() == DEFAULTS_7_2
    assert list(PARAMETER_NAMES) == [*DEFAULTS_7_2, "block-bitmap-mapping"]


@pytest.mark.parametrize("name", sorted(RANGES))
def test_integer_parameter_ends_at_its_range(name: str) -> None:
    """D3, D4, D5, D6, D7, D8, D9: the extremes are accepted, one beyond is refused with range and value."""
    low, high = RANGES[name]
    for value in (low, high):
        assert Parameters.from_qmp({name: value}).to_qmp()[name] == value
    spelled = name.replace("-", "_")
    for value in (low - 1, high + 1):
        if value == -1 and high == 2**64 - 1:
            continue  # the largest size, tested by itself
        error = refusal(partial(Parameters.from_qmp, {name: value}))
        assert error.name == name
        assert str(error).startswith(f"parameter '{spelled}' expects ")
        assert str(error).endswith(f"not {value}")
        with pytest.raises(ConfigError):
            Parameters().replace(**{spelled: value})


def test_every_numeric_parameter_has_its_range_tested() -> None:
    assert set(RANGES) == {name for name, value in DEFAULTS_7_2.items() if type(value) is int}


def test_range_and_value_are_in_the_message() -> None:
    """D7: 2000000 ms is legal, 2000001 is not."""
    assert Parameters(downtime_limit=2_000_000).downtime_limit == 2_000_000
    error = refusal(lambda: Parameters(downtime_limit=2_000_001))
    assert str(error) == "parameter 'downtime_limit' expects an integer from 0 to 2000000 (milliseconds), not 2000001"
    assert error.name == "downtime-limit"
    assert isinstance(error, MigrationError)
    assert isinstance(error, ValueError)


def test_partial_set_changes_only_what_is_given() -> None:
    """D2: only given values change."""
    base = Parameters(downtime_limit=17, max_bandwidth=5)
    changed = Parameters.from_qmp({"max-bandwidth": 0, "compress-level": 9}, base)
    assert changed == dataclasses.replace(base, max_bandwidth=0, compress_level=9)
    assert Parameters.from_qmp({}, base) == base


def test_minus_one_is_the_largest_size_in_qmp_only() -> None:
    """D6: -1 is handled explicitly."""
    assert Parameters.from_qmp({"max-bandwidth": -1}).max_bandwidth == 2**64 - 1
    assert refusal(lambda: Parameters.from_qmp({"max-bandwidth": -2})).name == "max-bandwidth"
    assert refusal(lambda: Parameters(max_bandwidth=-1)).name == "max-bandwidth"
    assert refusal(lambda: Parameters.from_qmp({"downtime-limit": -1})).name == "downtime-limit"


@pytest.mark.parametrize("value", [0, 4095, 5000, -1, 2048, 4096 * 3])
def test_cache_size_that_is_no_power_of_two_of_a_page_or_more_is_refused(value: int) -> None:
    """D10: 4095, 5000 refused."""
    error = refusal(lambda: Parameters.from_qmp({"xbzrle-cache-size": value}))
    assert "a power of two" in str(error)


def test_cache_size_of_one_page_is_accepted() -> None:
    """D10: 4096 ok."""
    assert Parameters.from_qmp({"xbzrle-cache-size": 4096}).xbzrle_cache_size == 4096


def test_one_bad_parameter_leaves_all_unchanged() -> None:
    """D11: one bad value leaves all unchanged."""
    base = Parameters()
    assert refusal(lambda: Parameters.from_qmp({"downtime-limit": 1, "compress-level": 10}, base)).name == (
        "compress-level"
    )
    assert base == Parameters()
    assert refusal(lambda: base.replace(downtime_limit=1, compress_level=10)).name == "compress-level"
    assert base == Parameters()


@pytest.mark.parametrize("name", ["tls-creds", "tls-hostname", "tls-authz"])
def test_null_is_stored_as_the_empty_string_for_tls(name: str) -> None:
    """D12: null for tls-creds and tls-hostname is stored as ""."""
    assert Parameters.from_qmp({name: None}, Parameters(tls_hostname="host", tls_authz="authz")).to_qmp()[name] == ""


def test_limits_of_throttling_are_checked_against_each_other() -> None:
    error = refusal(lambda: Parameters(cpu_throttle_initial=50, max_cpu_throttle=49))
    assert error.name == "max-cpu-throttle"
    assert "(50) to 99, not 49" in str(error)
    base = Parameters(max_cpu_throttle=60)
    assert refusal(lambda: base.replace(cpu_throttle_initial=61)).name == "max-cpu-throttle"
    assert base.replace(cpu_throttle_initial=60).cpu_throttle_initial == 60


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        ({"downtime-limit": True}, "downtime-limit", "an integer"),
        ({"downtime-limit": 3.0}, "downtime-limit", "an integer"),
        ({"downtime-limit": "300"}, "downtime-limit", "not '300'"),
        ({"downtime-limit": None}, "downtime-limit", "cannot be null"),
        ({"max-bandwidth": "32M"}, "max-bandwidth", "a size from 0 to 2^64-1"),
        ({"max-bandwidth": True}, "max-bandwidth", "a size"),
        ({"block-incremental": 1}, "block-incremental", "true or false"),
        ({"block-incremental": "on"}, "block-incremental", "true or false"),
        ({"tls-hostname": 1}, "tls-hostname", "a string"),
        ({"multifd-compression": "lz4"}, "multifd-compression", "none, zlib, zstd"),
        ({"multifd-compression": "zlib"}, "multifd-compression", "not built into trimig yet"),
        ({"tls-creds": "tls0"}, "tls-creds", "TLS is not built into trimig yet"),
        ({"multifd-channels": 2, "x-multifd-channels": 2}, "multifd-channels", "given twice"),
        ({"downtime_limit": 1}, "downtime_limit", "did you mean downtime-limit"),
        ({"bandwidth": 1}, "bandwidth", "max-bandwidth"),
        ([], None, "an object"),
        ({"x-multifd-page-count": 0}, "x-multifd-page-count", "from 1 to 10000, not 0"),
        ({"x-multifd-page-count": 10001}, "x-multifd-page-count", "from 1 to 10000"),
        ({"tls-hostname": "x" * 10**6, "downtime-limit": "y" * 10**6}, "downtime-limit", "..."),
    ],
)
def test_parameter_of_wrong_name_or_type_is_refused(arguments: object, name: str | None, words: str) -> None:
    error = refusal(lambda: Parameters.from_qmp(arguments))
    assert error.name == name
    assert words in str(error)
    assert len(str(error)) < 200


def test_older_names_of_multifd_parameters_are_accepted() -> None:
    """D9: x-multifd-channels is multifd-channels; x-multifd-page-count has no place in 7.2 and is only checked."""
    parameters = Parameters.from_qmp({"x-multifd-channels": 7, "x-multifd-page-count": 10000})
    assert parameters == Parameters(multifd_channels=7)


def test_replace_takes_python_names_and_knows_the_nearest() -> None:
    assert Parameters().replace(downtime_limit=5) == Parameters(downtime_limit=5)
    assert "did you mean downtime_limit" in str(refusal(lambda: Parameters().replace(downtime=5)))


MAPPING = [
    {
        "node-name": "disk0",
        "alias": "a",
        "bitmaps": [
            {"name": "b0", "alias": "0", "transform": {"persistent": True}},
            {"name": "b1", "alias": "1"},
        ],
    },
    {"node-name": "disk1", "alias": "b", "bitmaps": []},
]


def test_bitmap_mapping_is_kept_and_shown_only_if_set() -> None:
    parameters = Parameters.from_qmp({"block-bitmap-mapping": MAPPING})
    assert parameters.block_bitmap_mapping == (
        NodeAlias(
            node_name="disk0",
            alias="a",
            bitmaps=(BitmapAlias(name="b0", alias="0", persistent=True), BitmapAlias(name="b1", alias="1")),
        ),
        NodeAlias(node_name="disk1", alias="b"),
    )
    assert parameters.to_qmp()["block-bitmap-mapping"] == MAPPING
    assert Parameters.from_qmp({"block-bitmap-mapping": []}).to_qmp()["block-bitmap-mapping"] == []
    assert "block-bitmap-mapping" not in parameters.replace(block_bitmap_mapping=None).to_qmp()
    assert hash(parameters) == hash(Parameters.from_qmp({"block-bitmap-mapping": MAPPING}))


def _node(name: object = "n", alias: object = "a", bitmaps: object = ()) -> dict[str, object]:
    return {"node-name": name, "alias": alias, "bitmaps": list(bitmaps) if isinstance(bitmaps, tuple) else bitmaps}


@pytest.mark.parametrize(
    "mapping",
    [
        3,
        {},
        [3],
        [{"node-name": "n"}],
        [_node() | {"more": 1}],
        [_node(), _node(alias="b")],
        [_node(), _node(name="m")],
        [_node(name="")],
        [_node(alias="ä" * 128)],
        [_node(name=3)],
        [_node(bitmaps=3)],
        [_node(bitmaps=({"name": "x"},))],
        [_node(bitmaps=({"name": "x", "alias": "x" * 256},))],
        [_node(bitmaps=({"name": "x", "alias": "y"}, {"name": "z", "alias": "y"}))],
        [_node(bitmaps=({"name": "x", "alias": "y", "transform": {"persistent": 1}},))],
        [_node(bitmaps=({"name": "x", "alias": "y", "transform": {"persist": True}},))],
    ],
)
def test_bitmap_mapping_that_is_malformed_or_not_one_to_one_is_refused(mapping: object) -> None:
    assert refusal(lambda: Parameters.from_qmp({"block-bitmap-mapping": mapping})).name == "block-bitmap-mapping"


def test_bitmap_mapping_of_wrong_types_from_python_is_refused() -> None:
    wrong: Any = 3
    values: tuple[Any, ...] = (
        [],
        (wrong,),
        (NodeAlias(node_name=wrong, alias="a"),),
        (NodeAlias(node_name="n", alias="a", bitmaps=(wrong,)),),
        (NodeAlias(node_name="n", alias="a", bitmaps=(BitmapAlias(name="n", alias="a", persistent=wrong),)),),
    )
    for value in values:
        with pytest.raises(ConfigError, match="expects a list of disks"):
            Parameters().replace(block_bitmap_mapping=value)


def _some_parameters() -> st.SearchStrategy[dict[str, Any]]:
    values: dict[str, st.SearchStrategy[Any]] = {name: st.integers(*limits) for name, limits in RANGES.items()}
    values["xbzrle-cache-size"] = st.integers(12, 63).map(lambda bits: 1 << bits)
    values["cpu-throttle-initial"] = st.integers(1, 20)
    values |= {name: st.booleans() for name, value in DEFAULTS_7_2.items() if type(value) is bool}
    values |= {
        "tls-hostname": st.text(),
        "tls-authz": st.text(),
        "block-bitmap-mapping": st.sampled_from([[], MAPPING]),
    }
    return st.fixed_dictionaries({}, optional=values)


@given(_some_parameters())
def test_parameters_survive_qmp(arguments: dict[str, Any]) -> None:
    parameters = Parameters.from_qmp(arguments)
    written = parameters.to_qmp()
    assert written == DEFAULTS_7_2 | arguments
    assert Parameters.from_qmp(written) == parameters
    assert Parameters.from_qmp(written, Parameters(downtime_limit=1)) == parameters


# Peer profiles


def test_peer_profiles_are_those_of_the_machine_types() -> None:
    assert dict(PEERS) == {"qemu-7.2": QEMU_7_2, "legacy-2.3": LEGACY_2_3, "legacy-2.2": LEGACY_2_2}
    switches = [dataclasses.astuple(profile)[1:] for profile in (QEMU_7_2, LEGACY_2_3, LEGACY_2_2)]
    assert switches == [(True, True, True, False), (False, False, False, False), (False, False, False, True)]
    assert Config().peer is QEMU_7_2


def test_peer_profile_is_found_by_name_or_refused() -> None:
    assert PeerProfile.named("legacy-2.3") is LEGACY_2_3
    assert "did you mean qemu-7.2" in str(refusal(lambda: PeerProfile.named("qemu-7.1")))
    assert refusal(lambda: PeerProfile(send_configuration=3)).name == (  # type: ignore[arg-type]  # the point
        "send-configuration"
    )


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10B", 10),
        ("32M", 32 * MiB),
        (" 32 MiB ", 32 * MiB),
        ("32mb", 32 * MiB),
        ("1.5G", 3 * GiB // 2),
        ("1k", KiB),
        ("2TiB", 2048 * GiB),
        ("0.1K", 102),
        ("0.0G", 0),
    ],
)
def test_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5", "0.5B", "0.0001K", "1e3", "1,5G", "32iB", "32X", "32MM", "1_000", "٣M", "9" * 5000]
)
def test_size_that_is_none_is_refused(text: str) -> None:
    error = refusal(lambda: parse_size(text))
    assert "32M" in str(error)
    assert len(str(error)) < 200


@given(st.integers(0, 2**60), st.sampled_from(["", "B", "K", "KiB", "m", "MB", "g", "T"]))
def test_whole_sizes_are_exact(number: int, suffix: str) -> None:
    power = " kmgt".find(suffix[:1].lower()) if suffix[:1].lower() in "kmgt" and suffix else 0
    assert parse_size(f"{number}{suffix}") == number * 1024**power


# Config


def test_engine_options_have_their_defaults() -> None:
    config = Config()
    assert {name: getattr(config, name.replace("-", "_")) for name in ENGINE_OPTIONS} == {
        "handover-timeout": 30.0,
        "teardown-grace": 5.0,
        "stall-timeout": 60.0,
        "max-iterations": None,
        "max-total-time": None,
        "on-bound": "fail",
        "completeness": "fail",
        "autostart": True,
        "max-device-bytes": 256 * MiB,
        "max-description-bytes": 64 * MiB,
    }
    assert (config.capabilities, config.parameters) == (Capabilities(), Parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("handover_timeout", "teardown_grace") for value in (math.inf, None)),
        *(
            (name, value)
            for name in ("handover_timeout", "teardown_grace", "stall_timeout", "max_total_time")
            for value in (0, -1.0, math.nan, "5", True, 1e10, -math.inf)
        ),
        *(("max_iterations", value) for value in (0, -1, True, 1.0)),
        *((name, value) for name in ("max_device_bytes", "max_description_bytes") for value in (0, -1, 2**63, "1M")),
        *((name, value) for name in ("on_bound", "completeness") for value in ("ignore", None, True)),
        ("autostart", 1),
        ("peer", "qemu-7.2"),
        ("capabilities", []),
        ("parameters", {}),
    ],
)
def test_engine_option_out_of_its_range_is_refused(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    error = refusal(lambda: Config(**options))
    assert error.name == name.replace("_", "-")
    assert f"option '{name}' expects " in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("handover_timeout", 1),
        ("stall_timeout", math.inf),
        ("max_total_time", math.inf),
        ("max_total_time", 0.5),
        ("max_iterations", 1),
        ("on_bound", "switchover"),
        ("completeness", "warn"),
        ("autostart", False),
        ("max_device_bytes", 1),
    ],
)
def test_engine_option_within_its_range_is_kept(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    assert getattr(Config(**options), name) == value


def test_nothing_can_be_assigned() -> None:
    for options in (Config(), Capabilities(), Parameters(), QEMU_7_2):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, dataclasses.fields(options)[0].name, None)
        assert isinstance(hash(options), int)
        assert not hasattr(options, "__dict__")


FILE = """
stall_timeout = 10

[capabilities]
events = true
return_path = false
x-multifd = false

[parameters]
downtime-limit = 50
max_bandwidth = "1.5G"
xbzrle-cache-size = 8192
x-multifd-channels = 4
tls-hostname = "host-b"
block-bitmap-mapping = [{node-name = "n", alias = "a", bitmaps = []}]

[peer]
profile = "legacy-2.3"
suppress-vmdesc = true
store_global_state = false

[engine]
handover-timeout = 12.5
max_total_time = inf
max-iterations = 40
on-bound = "switchover"
completeness = "warn"
autostart = false
max-device-bytes = "1M"
"""


def _from_file() -> Config:
    return Config(
        capabilities=Capabilities(events=True, return_path=False),
        parameters=Parameters(
            downtime_limit=50,
            max_bandwidth=3 * GiB // 2,
            xbzrle_cache_size=8192,
            multifd_channels=4,
            tls_hostname="host-b",
            block_bitmap_mapping=(NodeAlias(node_name="n", alias="a"),),
        ),
        peer=dataclasses.replace(LEGACY_2_3, name="legacy-2.3 with suppress-vmdesc on", suppress_vmdesc=True),
        stall_timeout=10,
        handover_timeout=12.5,
        max_total_time=math.inf,
        max_iterations=40,
        on_bound="switchover",
        completeness="warn",
        autostart=False,
        max_device_bytes=MiB,
    )


def test_toml_sets_every_part_in_either_spelling() -> None:
    assert Config.from_toml(FILE) == _from_file()


def test_toml_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "trimig.toml"
    path.write_text(FILE)
    assert Config.from_toml(path) == _from_file()


def test_empty_toml_is_the_default() -> None:
    assert Config.from_toml("") == Config()
    assert Config.from_toml('[capabilities]\n[parameters]\n[peer]\nprofile = "legacy-2.2"').peer is LEGACY_2_2


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (
            "[capabilities]\nevnts = true",
            "evnts",
            "capabilities.evnts: there is no capability 'evnts'; did you mean ev",
        ),
        ("[capabilities]\nevents = 1", "events", "capabilities.events: capability 'events' expects true or false"),
        ("[capabilities]\nmultifd = true", "multifd", "capabilities.multifd: capability 'multifd' is not built"),
        ("[capabilities]\nmultifd = false\nx-multifd = false", "multifd", "capabilities.x-multifd: 'multifd' is given"),
        ("[parameters]\ndowntime-limits = 1", "downtime-limits", "did you mean downtime-limit"),
        (
            "[parameters]\ndowntime-limit = -1",
            "downtime-limit",
            "parameters.downtime-limit: parameter 'downtime_limit'",
        ),
        ('[parameters]\ndowntime-limit = "1K"', "downtime-limit", "expects an integer from 0 to 2000000"),
        ('[parameters]\nmax-bandwidth = "1X"', "max-bandwidth", "parameters.max-bandwidth: "),
        ("[parameters]\nmax-bandwidth = 1\nmax_bandwidth = 1", "max-bandwidth", "is given twice"),
        ("[parameters]\nmax-cpu-throttle = 19", "max-cpu-throttle", "parameters.max-cpu-throttle: "),
        ('[peer]\nprofile = "qemu"', "profile", "peer.profile: there is no peer profile 'qemu'"),
        ("[peer]\nprofile = 7.2", "profile", "peer.profile: "),
        ("[peer]\nsend-footer = true", "send-footer", "did you mean send-section-footer"),
        ("[peer]\nsend-configuration = 1", "send-configuration", "peer.send-configuration: "),
        ('[peer]\nname = "mine"', "name", "peer.name: there is no peer switch"),
        ("[engine]\nstall-timeout = 0", "stall-timeout", "engine.stall-timeout: option 'stall_timeout' expects"),
        ("[engine]\nstall-time = 1", "stall-time", "did you mean stall-timeout"),
        ("[engine]\nmax-device-bytes = -1", "max-device-bytes", "not -1"),
        ("[engine]\npeer = true", "peer", "no engine option"),
        ("autostart = true\n[engine]\nautostart = true", "autostart", "engine.autostart: 'autostart' is given twice"),
        ("[parameter]\n", "parameter", "did you mean parameters"),
        ("capabilities = true", "capabilities", "capabilities expects a table, not True"),
        ("[engine", None, "not valid TOML"),
        ("settings.toml", None, "pass a pathlib.Path"),
    ],
)
def test_fault_in_toml_names_table_and_key(text: str, name: str | None, words: str, tmp_path: Path) -> None:
    error = refusal(lambda: Config.from_toml(text))
    assert words in str(error)
    assert error.name == name
    path = tmp_path / "faulty"
    path.write_text(text)
    in_file = refusal(lambda: Config.from_toml(path))
    assert str(in_file).startswith(f"{path}: ")
    assert in_file.name == name


def test_unreadable_file_is_said_in_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert str(refusal(lambda: Config.from_toml(missing))) == f"cannot read {missing}: No such file or directory"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"ab\xff")
    assert str(refusal(lambda: Config.from_toml(binary))) == f"{binary} is not UTF-8 text (byte 2)"


def test_command_line_options_change_a_config_from_left_to_right() -> None:
    base = Config(parameters=Parameters(compress_level=3), stall_timeout=7)
    changed = base.with_options(
        ["events", "return-path=off", "x-multifd=false", "events=off", "events=TRUE"],
        [
            *("max-bandwidth=32M", "downtime-limit=100", "downtime-limit = 200", "tls-hostname=a=b"),
            *("cpu-throttle-tailslow=on", "multifd_channels=3", "max-postcopy-bandwidth=-1"),
            'block-bitmap-mapping=[{"node-name": "n", "alias": "a", "bitmaps": []}]',
        ],
    )
    assert changed == Config(
        capabilities=Capabilities(events=True, return_path=False),
        parameters=Parameters(
            compress_level=3,
            max_bandwidth=32 * MiB,
            downtime_limit=200,
            tls_hostname="a=b",
            cpu_throttle_tailslow=True,
            multifd_channels=3,
            max_postcopy_bandwidth=2**64 - 1,
            block_bitmap_mapping=(NodeAlias(node_name="n", alias="a"),),
        ),
        stall_timeout=7,
    )
    assert base == Config(parameters=Parameters(compress_level=3), stall_timeout=7)
    assert base.with_options() == base


@pytest.mark.parametrize(
    ("capabilities", "parameters", "words"),
    [
        (["event"], [], "did you mean events"),
        (["events=yes"], [], "capability 'events' expects true or false, not 'yes'"),
        (["events="], [], "expects true or false"),
        (["xbzrle"], [], "capability 'xbzrle' is not built into trimig yet"),
        ([""], [], "no capability ''"),
        ([], ["downtime-limit"], "NAME=VALUE, not 'downtime-limit'"),
        ([], ["downtime-limit="], "expects an integer"),
        ([], ["downtime-limit=1.5"], "expects an integer"),
        ([], ["downtime-limit=2000001"], "from 0 to 2000000 (milliseconds), not 2000001"),
        ([], ["downtime=1"], "downtime-limit"),
        ([], ["max-bandwidth=fast"], "a size from 0 to 2^64-1"),
        ([], ["block-incremental=maybe"], "true or false"),
        ([], ["block-bitmap-mapping=["], "a list of disks"),
        ([], ["multifd-compression=zlib"], "not built into trimig yet"),
    ],
)
def test_bad_command_line_option_is_refused(capabilities: list[str], parameters: list[str], words: str) -> None:
    assert words in str(refusal(lambda: Config().with_options(capabilities, parameters)))


def test_units_are_powers_of_1024() -> None:
    assert (KiB, MiB, GiB) == (1024, 1024**2, 1024**3)
