"""Parameters of trimig.config: the table of config.md part 2, QMP."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trimig
from trimig.config import (
    PARAMETER_NAMES,
    BitmapAlias,
    NodeAlias,
    Parameters,
)
from trimig.config.built import BUILT, BUILT_VALUES, UNREAD
from trimig.errors import ConfigError, TrimigError

#: config.md part 2, the column of 7.2; and newer.md part 7.
DEFAULTS = {
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
    "avail-switchover-bandwidth": 0,
    "zero-page-detection": "multifd",
    "mode": "normal",
    "direct-io": False,
    "multifd-qatzip-level": 1,
    "x-vcpu-dirty-limit-period": 1000,
    "vcpu-dirty-limit": 1,
    "cpr-exec-command": [],
    "x-rdma-chunk-size": 1048576,
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
    "avail-switchover-bandwidth": (0, 2**64 - 1),
    "multifd-qatzip-level": (1, 9),
    "x-vcpu-dirty-limit-period": (1, 1000),
    "vcpu-dirty-limit": (1, 2**64 - 1),
    "x-rdma-chunk-size": (2**20, 2**30),
}


def refusal(call: Callable[[], object]) -> ConfigError:
    """The ConfigError that *call* raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


def test_defaults_are_qemus() -> None:
    """A7, D1: every parameter is there and equals the table of config.md part 2."""
    assert Parameters().to_qmp() == DEFAULTS
    assert set(PARAMETER_NAMES) == {*DEFAULTS, "block-bitmap-mapping"}


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
    assert set(RANGES) == {name for name, value in DEFAULTS.items() if type(value) is int}


def test_range_and_value_are_in_the_message() -> None:
    """D7: 2000000 ms is legal, 2000001 is not."""
    assert Parameters(downtime_limit=2_000_000).downtime_limit == 2_000_000
    error = refusal(lambda: Parameters(downtime_limit=2_000_001))
    assert str(error) == "parameter 'downtime_limit' expects an integer from 0 to 2000000 (milliseconds), not 2000001"
    assert error.name == "downtime-limit"
    assert isinstance(error, TrimigError)
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
        ({"mode": "cpr-exec"}, "mode", "not built into trimig yet"),
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
    values["x-rdma-chunk-size"] = st.integers(20, 30).map(lambda bits: 1 << bits)
    values["cpu-throttle-initial"] = st.integers(1, 20)
    values |= {name: st.booleans() for name, value in DEFAULTS.items() if type(value) is bool}
    values |= {
        "tls-hostname": st.text(),
        "tls-authz": st.text(),
        "block-bitmap-mapping": st.sampled_from([[], MAPPING]),
        "cpr-exec-command": st.lists(st.text()),
        "zero-page-detection": st.sampled_from(["none", "legacy", "multifd"]),
    }
    return st.fixed_dictionaries({}, optional=values)


@given(_some_parameters())
def test_parameters_survive_qmp(arguments: dict[str, Any]) -> None:
    parameters = Parameters.from_qmp(arguments)
    written = parameters.to_qmp()
    assert written == DEFAULTS | arguments
    assert Parameters.from_qmp(written) == parameters
    assert Parameters.from_qmp(written, Parameters(downtime_limit=1)) == parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "cpr-reboot"),
        ("mode", "cpr-transfer"),
        ("mode", "cpr-exec"),
    ],
)
def test_a_value_that_turns_an_unbuilt_feature_on_is_refused_by_name(name: str, value: str) -> None:
    error = refusal(lambda: Parameters.from_qmp({name: value}))
    assert error.name == name
    assert f"'{name.replace('-', '_')}' cannot be {value}: that is not built into trimig yet" in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cpr-exec-command", "ls"),
        ("cpr-exec-command", ["ls", 1]),
        ("mode", "cpr"),
        ("zero-page-detection", True),
        ("direct-io", 1),
        ("x-rdma-chunk-size", 3 * 2**20),
    ],
)
def test_a_newer_parameter_of_the_wrong_kind_is_refused(name: str, value: object) -> None:
    assert refusal(lambda: Parameters.from_qmp({name: value})).name == name


#: Another legal value for each parameter that nothing reads.
CHANGED: dict[str, object] = {
    **{name: low if DEFAULTS[name] != low else high for name, (low, high) in RANGES.items()},
    "compress-wait-thread": False,
    "cpu-throttle-tailslow": True,
    "block-incremental": True,
    "direct-io": True,
    "cpr-exec-command": ["ls", "-l"],
    "block-bitmap-mapping": [{"node-name": "disk", "alias": "d", "bitmaps": []}],
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_parameter_that_nothing_reads_may_be_set_and_is_told(name: str) -> None:
    changed = Parameters.from_qmp({name: CHANGED[name]})
    assert changed.to_qmp()[name] == CHANGED[name]
    (text,) = changed.warnings()
    assert f"the parameter {name} has no effect yet" in text
    assert UNREAD[name] in text
    assert UNREAD[name].removeprefix("the capability ") not in BUILT, "the feature is built"


def test_defaults_give_no_warning() -> None:
    assert Parameters().warnings() == []
    assert Parameters(max_bandwidth=1, downtime_limit=1).warnings() == []


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_each_parameter_is_read_or_told_or_has_one_value(name: str) -> None:
    """The package is searched: what reads a parameter writes ``parameters.NAME`` or names it in a table of strings."""
    field = name.replace("-", "_")
    found = re.compile(rf"parameters\.{field}\b")
    package = Path(trimig.__file__).parent
    texts = [path.read_text() for path in package.rglob("*.py") if "config" not in path.relative_to(package).parts]
    count = sum(len(found.findall(text)) for text in texts)
    # The old command that shows the cache's size has no effect on a migration.
    read = count > (name == "xbzrle-cache-size")
    assert read != (name in UNREAD or name in BUILT_VALUES), name
