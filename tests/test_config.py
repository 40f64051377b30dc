"""trimig.config: peer profiles, sizes, engine options, TOML and the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.config import (
    ENGINE_OPTIONS,
    LEGACY_2_2,
    LEGACY_2_3,
    PEERS,
    QEMU_7_2,
    QEMU_10_0,
    Capabilities,
    Config,
    GiB,
    KiB,
    MiB,
    NodeAlias,
    Parameters,
    PeerProfile,
    parse_size,
    profile_for_machine,
)
from trimig.errors import ConfigError


def refusal(call: Callable[[], object]) -> ConfigError:
    """The ConfigError that *call* raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


# Peer profiles


#: newer.md part 1 and stream.md part 11: configuration, footers, run state, no description, early second connection,
#: SWITCHOVER_START, ACKs of a destination without devices that need them, multifd, compressed pages.
PROFILES = {
    "legacy-2.2": (False, False, False, True, True, False, 1, "7.2", "yes"),
    "legacy-2.3": (False, False, False, False, True, False, 1, "7.2", "yes"),
    "qemu-2.11": (True, True, True, False, True, False, 1, "2.11", "precopy"),
    "qemu-7.2": (True, True, True, False, True, False, 1, "7.2", "yes"),
    "qemu-8.0": (True, True, True, False, False, False, 1, "7.2", "yes"),
    "qemu-8.1": (True, True, True, False, False, False, 1, "8.1", "yes"),
    "qemu-9.0": (True, True, True, False, False, False, 1, "9.0", "yes"),
    "qemu-9.1": (True, True, True, False, False, False, 1, "9.0", "no"),
    "qemu-10.0": (True, True, True, False, False, True, 1, "9.0", "no"),
    "qemu-11.1": (True, True, True, False, False, True, 0, "9.0", "no"),
}


def test_peer_profiles_are_those_of_the_machine_types() -> None:
    assert set(PEERS) == {*PROFILES, "by-machine"}
    for name, row in PROFILES.items():
        p = PEERS[name]
        assert p.name == name
        assert row == (
            p.send_configuration, p.send_section_footer, p.store_global_state, p.suppress_vmdesc, p.preempt_pre_7_2,
            p.send_switchover_start, p.switchover_acks, p.multifd_scheme, p.compressed_pages,
        )  # fmt: skip
        assert p.for_machine("pc-q35-11.1") is p, "a profile that was named wins"
    assert Config().peer is PEERS["by-machine"]


@pytest.mark.parametrize(
    ("machine", "profile"),
    [
        ("pc-i440fx-2.2", "legacy-2.2"),
        ("pc-0.14", "legacy-2.2"),
        ("pc-q35-2.3", "legacy-2.3"),
        ("pc-i440fx-2.4", "qemu-7.2"),
        ("pc-i440fx-2.12", "qemu-7.2"),
        ("pseries-2.12-sxxm", "qemu-7.2"),
        ("pc-q35-7.2", "qemu-7.2"),
        ("pc-q35-8.0", "qemu-8.0"),
        ("virt-8.1", "qemu-8.1"),
        ("s390-ccw-virtio-8.2", "qemu-8.1"),
        ("pseries-9.0", "qemu-9.0"),
        ("pc-i440fx-9.1", "qemu-9.1"),
        ("pc-i440fx-9.2", "qemu-9.1"),
        ("pc-i440fx-10.0", "qemu-10.0"),
        ("pc-q35-10.2", "qemu-10.0"),
        ("virt-11.0", "qemu-10.0"),
        ("pc-q35-11.1", "qemu-11.1"),
        ("some-board-12.3", "qemu-11.1"),
    ],
)
def test_the_version_of_the_machine_type_decides(machine: str, profile: str) -> None:
    for arriving in (False, True):
        assert profile_for_machine(machine, arriving=arriving) is PEERS[profile]
    found = Config().peer.for_machine(machine)
    assert (found.send_configuration, found.send_section_footer, found.store_global_state) == (True, True, True)
    if not profile.startswith("legacy"):
        assert found is PEERS[profile]
    assert found.suppress_vmdesc is PEERS[profile].suppress_vmdesc


@pytest.mark.parametrize(
    "machine", ["", "none", "q35", "microvm", "pc-i440fx-jammy", "pc-q35-rhel9.4.0", "10.0", "pc-10", "a\n-10.0.1"]
)
def test_where_no_version_can_be_told_every_program_can_read_it(machine: str) -> None:
    """A source does what 7.2 does, which all take; a destination waits for no early second connection."""
    source, destination = profile_for_machine(machine), profile_for_machine(machine, arriving=True)
    same = {"name": source.name, "preempt_pre_7_2": True}
    assert dataclasses.replace(destination, **same) == source == dataclasses.replace(QEMU_7_2, name=source.name)  # type: ignore[arg-type]
    assert destination.preempt_pre_7_2 is False


def test_a_guest_of_ones_own_has_no_machine_type_whatever_its_name() -> None:
    found = Config().peer.for_machine(None)
    assert dataclasses.replace(found, name="qemu-7.2") == QEMU_7_2


def test_single_switches_stand_and_the_machine_type_decides_the_others() -> None:
    peer = Config.from_toml("[peer]\nsuppress-vmdesc = true\npreempt-pre-7-2 = true").peer
    found = peer.for_machine("pc-q35-10.0")
    assert (found.suppress_vmdesc, found.preempt_pre_7_2) == (True, True)
    assert (found.send_switchover_start, found.multifd_scheme) == (True, "9.0")
    assert found.name == "qemu-10.0 with suppress-vmdesc on, preempt-pre-7-2 on"
    # A switch that says what the machine type says anyway changes nothing.
    assert Config.from_toml("[peer]\nsend-switchover-start = true").peer.for_machine("pc-q35-10.0") is QEMU_10_0
    changed = dataclasses.replace(Config().peer, send_section_footer=False)
    assert changed.for_machine("virt-9.0").send_section_footer is False
    assert Config.from_toml('[peer]\nmultifd-scheme = "9.0"').peer.multifd_scheme == "9.0"
    assert "there is no peer switch 'explicit'" in str(refusal(lambda: Config.from_toml("[peer]\nexplicit = true")))


@pytest.mark.parametrize(
    ("capabilities", "profile", "words"),
    [
        ("compress", "qemu-9.1", "capability 'compress' was removed in QEMU 9.1"),
        ("compress", "qemu-10.0", "capability 'compress' was removed in QEMU 9.1"),
        ("compress postcopy-ram", "qemu-11.1", "capability 'compress' was removed in QEMU 9.1"),
        ("compress postcopy-ram", "qemu-2.11", "'postcopy-ram' is not compatible with compress for the peer profile"),
        ("compress postcopy-ram", "qemu-7.2", None),
        ("compress", "qemu-2.11", None),
        ("compress", "qemu-9.0", None),
        ("compress xbzrle", "qemu-8.1", None),
    ],
)
def test_peer_decides_what_goes_together_with_compress(capabilities: str, profile: str, words: str | None) -> None:
    """A3, C4: the rules of 2.11, of 5.2 to 9.0, and of 9.1 and later, which have no such capability."""
    table = "\n".join(f"{name} = true" for name in capabilities.split())
    text = f"[capabilities]\n{table}\n[peer]\nprofile = '{profile}'"
    if words is None:
        assert Config.from_toml(text).capabilities.compress
    else:
        assert words in str(refusal(lambda: Config.from_toml(text)))


def test_machine_type_decides_that_too_for_a_source_only() -> None:
    settings = Config(capabilities=Capabilities(compress=True))
    for machine in ("pc-q35-9.0", "none"):
        dataclasses.replace(settings, peer=settings.peer.for_machine(machine))
    newer = settings.peer.for_machine("pc-q35-9.1")
    assert "was removed in QEMU 9.1" in str(refusal(lambda: dataclasses.replace(settings, peer=newer)))
    arriving = settings.peer.for_machine("pc-q35-9.1", arriving=True)
    assert dataclasses.replace(settings, peer=arriving).peer.name == "qemu-9.1"


def test_peer_profile_is_found_by_name_or_refused() -> None:
    assert PeerProfile.named("legacy-2.3") is LEGACY_2_3
    assert "did you mean qemu-" in str(refusal(lambda: PeerProfile.named("qemu-7.1")))
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
        "recovery-retry": False,
        "recovery-timeout": math.inf,
        "max-iterations": None,
        "max-total-time": None,
        "on-bound": "fail",
        "encoding": "off",
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
        *((name, value) for name in ("on_bound", "completeness", "encoding") for value in ("ignore", None, True)),
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
        ("encoding", "auto"),
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
encoding = "auto"
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
        encoding="auto",
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
        ("[capabilities]\nx-colo = true", "x-colo", "capabilities.x-colo: capability 'x-colo' is not built"),
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
        (["events=yes"], [], "capability 'events' expects on or off, not 'yes'"),
        (["postcopy_ram=maybe"], [], "capability 'postcopy_ram' expects on or off, not 'maybe'"),
        ([], ["max-bandwidth=1X"], "parameter 'max-bandwidth' expects a size"),
        (["events="], [], "expects on or off"),
        (["x-colo"], [], "capability 'x-colo' is not built into trimig yet"),
        ([""], [], "no capability ''"),
        ([], ["downtime-limit"], "NAME=VALUE, not 'downtime-limit'"),
        ([], ["downtime-limit="], "expects an integer"),
        ([], ["downtime-limit=1.5"], "expects an integer"),
        ([], ["downtime-limit=2000001"], "from 0 to 2000000 (milliseconds), not 2000001"),
        ([], ["downtime=1"], "downtime-limit"),
        ([], ["max-bandwidth=fast"], "a size from 0 to 2^64-1"),
        ([], ["block-incremental=maybe"], "'block-incremental' expects on or off"),
        ([], ["block-bitmap-mapping=["], "a list of disks"),
        ([], ["mode=cpr-reboot"], "not built into trimig yet"),
        # The value is shown as it is, also where it is the name in another spelling.
        (["return_path=return-path"], [], "capability 'return_path' expects on or off, not 'return-path'"),
        ([], ["max_bandwidth=max-bandwidth"], "not 'max-bandwidth'"),
        ([], ["x_multifd_channels=0"], "parameter 'x_multifd_channels' expects an integer from 1 to 255, not 0"),
    ],
)
def test_bad_command_line_option_is_refused(capabilities: list[str], parameters: list[str], words: str) -> None:
    assert words in str(refusal(lambda: Config().with_options(capabilities, parameters)))


def test_units_are_powers_of_1024() -> None:
    assert (KiB, MiB, GiB) == (1024, 1024**2, 1024**3)
