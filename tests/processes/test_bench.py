"""The benchmarks' own arithmetic, and one tiny run of what needs neither QEMU nor the engine. No figure is judged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio
from click.testing import CliRunner

from bench import goals, image
from bench.__main__ import as_json, main
from bench.errors import BenchError
from bench.figures import GIB, MIB, PAIRS, RATIO_GOALS, Measurement, Row, engines, make_rows, make_verdicts, rows_table
from bench.goals import GOALS, judge, verdicts_table
from bench.load import LoadLog
from bench.measure import SliceInstrument, Slices, Usage, parse_smaps, parse_status, percentile
from bench.memory import (
    MEMORY_KINDS,
    PAGE_PATTERNS,
    PAGE_SIZE,
    allocate,
    expected,
    fill,
    fill_in_fork,
    mismatches,
    parse_size,
)
from bench.precopy import Outcome, Plan, reason_to_skip, round_order, run_plan
from bench.programs import QemuProgram, find_qemu
from bench.qemu import qemu_command
from bench.table import format_table
from bench.ways import ENCODINGS, WAYS, Way
from trimig.config.built import BUILT

ISSUE_KEYS = {
    "pair",
    "memory",
    "pages",
    "bytes_per_s",
    "cpu_s_per_gib",
    "cpu_source_s_per_gib",
    "cpu_destination_s_per_gib",
    "load",
    "extra_memory_bytes",
    "downtime_ms",
}


def usage(*, cpu: float = 0.0, extra: int = 0) -> Usage:
    return Usage(cpu_seconds=cpu, extra_memory=extra, extra_memory_growth=extra // 2, resident_at_start=0)


def measurement(
    pair: str = "trimig-trimig", *, seconds: float = 1.0, memory: str = "memfd-cold", **more: object
) -> Measurement:
    values: dict[str, object] = {
        "pages": "random",
        "size": GIB,
        "source": usage(cpu=0.5, extra=10 * MIB),
        "destination": usage(cpu=1.0, extra=20 * MIB),
        **more,
    }
    return Measurement(pair=pair, memory=memory, seconds=seconds, **values)  # type: ignore[arg-type]  # test shorthand


def plan(**more: object) -> Plan:
    values: dict[str, object] = {
        "size": 8 * MIB,
        "repeat": 1,
        "memories": ["memfd-cold"],
        "pages": ["random"],
        "pairs": ["raw"],
        "qemu": None,
        **more,
    }
    return Plan(**values)  # type: ignore[arg-type]  # test shorthand


# --- arguments


@pytest.mark.parametrize(
    ("text", "size"), [("256M", 256 << 20), ("1G", 1 << 30), ("1g", 1 << 30), ("8388608", 8 << 20)]
)
def test_sizes_with_and_without_a_suffix(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "0", "1.5G", "-1M", "4095", "1T", "٣M"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["precopy", "--size", "lots"],
        ["precopy", "--repeat", "0"],
        ["precopy", "--memory", "memfd-cold,ram"],
        ["precopy", "--pages", "ones"],
        ["precopy", "--pairs", "qemu-raw"],
        ["precopy", "--ways", "multifd-3"],
        ["cancel", "--points", "0"],
        ["cancel", "--modes", "colo"],
        ["encodings", "--engines", "xen"],
        ["scale", "--counts", "1,none"],
        ["scale", "--counts", "0"],
    ],
)
def test_bad_arguments_are_usage_errors(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Invalid value" in result.output


def test_the_command_runs_without_qemu_and_says_what_is_missing(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    arguments = ["precopy", "--size", "1M", "--pairs", "qemu-qemu", "--qemu", "/nowhere/qemu", "--json", str(target)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert "there is no QEMU on this machine" in result.output
    document = json.loads(target.read_text())
    assert document["rows"] == []
    assert {left["pair"] for left in document["skipped"]} == {"qemu-qemu"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    target = tmp_path / "no such folder" / "figures.json"
    arguments = ["precopy", "--size", "1M", "--pairs", "qemu-qemu", "--qemu", "/nowhere/qemu", "--json", str(target)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "cannot be written" in result.output


# --- the plan


def test_each_round_starts_with_another_pair() -> None:
    orders = [round_order(PAIRS, number) for number in range(len(PAIRS))]
    assert {order[0] for order in orders} == set(PAIRS)
    assert all(sorted(order) == sorted(PAIRS) for order in orders)


QEMU = QemuProgram(command=("/bin/qemu",))


@pytest.mark.parametrize(
    ("pair", "memory", "qemu", "said"),
    [
        ("raw", "anon", None, ""),
        ("qemu-qemu", "anon", QEMU, ""),
        ("trimig-trimig", "memfd-cold", None, ""),
        ("trimig-qemu", "anon", QEMU, ""),
        ("trimig-qemu", "memfd-cold", None, "no QEMU"),
        ("qemu-trimig", "anon", QEMU, "memfd"),
    ],
)
def test_what_cannot_be_measured_has_a_reason(pair: str, memory: str, qemu: QemuProgram | None, said: str) -> None:
    reason = reason_to_skip(pair, memory, qemu)
    assert said in reason
    assert bool(reason) is bool(said)


@pytest.mark.parametrize("way", [*WAYS.values(), *ENCODINGS.values()], ids=lambda way: way.name)
def test_a_way_is_refused_with_one_sentence_until_trimig_has_it(way: Way) -> None:
    refusal = way.refusal()
    if "multifd-compression" not in refusal:
        assert bool(refusal) is not BUILT.issuperset(way.capabilities)
    assert "\n" not in refusal
    assert reason_to_skip("trimig-trimig", "memfd-cold", None, way) == refusal


def test_a_refusal_names_the_capability_and_qemus_go_that_way_all_the_same() -> None:
    way = Way(name="colo", capabilities=("x-colo",))
    assert "x-colo" in reason_to_skip("qemu-trimig", "memfd-cold", QEMU, way)
    assert reason_to_skip("qemu-qemu", "memfd-cold", QEMU, way) == ""
    assert "one connection" in reason_to_skip("raw", "memfd-cold", None, way)


def test_the_address_of_a_way_is_a_port_or_a_socket_in_the_directory() -> None:
    assert WAYS["multifd-2"].address("/d") == "tcp:127.0.0.1:0"
    assert WAYS["unix-multifd-2"].address("/d") == "unix:/d/socket"
    assert "multifd-channels=2" in WAYS["multifd-2"].parameter_options()


def test_the_engines_of_a_pair() -> None:
    assert engines("raw") == ("raw", "raw")
    assert engines("qemu-trimig") == ("qemu", "trimig")


def test_qemu_gets_the_memory_that_the_row_names() -> None:
    def memory(name: str) -> str:
        kind = MEMORY_KINDS[name]
        command = qemu_command(["qemu"], MIB, kind, incoming=True, prealloc=kind.populated)
        return command[command.index("-object") + 1]

    assert memory("memfd-cold").startswith("memory-backend-memfd,share=on,")
    assert memory("memfd-cold").endswith("prealloc=off")
    assert memory("memfd-populated").endswith("prealloc=on")
    assert memory("anon").startswith("memory-backend-ram,")


def test_a_qemu_that_is_not_there_is_not_found() -> None:
    assert find_qemu("/nowhere/qemu") is None
    assert find_qemu("1.0") is None


# --- contents


@pytest.fixture(autouse=True)
def small_image(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A memory image of three pages, of this file and a binary."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "text").write_text("one line of text\n" * 300)
    (folder / "binary").write_bytes(bytes(range(256)) * 16)
    image.make(folder / "made", 1 << 20, [folder])
    monkeypatch.setenv(image.VARIABLE, str(folder / "made"))
    yield
    image.forget()


@pytest.mark.parametrize("pattern", PAGE_PATTERNS)
@pytest.mark.parametrize("kind", ["memfd-cold", "anon-populated"])
def test_filled_memory_verifies_and_a_changed_page_is_noticed(pattern: str, kind: str) -> None:
    pages = allocate(32 * PAGE_SIZE, MEMORY_KINDS[kind])
    fill(pages, pattern)
    assert mismatches(pages, pattern) == 0
    pages[7, 4095] ^= 1
    pages[8, 0] ^= 1
    assert mismatches(pages, pattern) == 2


def test_random_pages_are_all_different_and_zero_pages_are_fifteen_of_sixteen() -> None:
    count = 64
    assert len(np.unique(expected(0, count, count, "random"), axis=0)) == count
    assert int(expected(0, count, count, "zero").any(axis=1).sum()) == count // 16
    assert int(expected(0, count, count, "eighth").any(axis=1).sum()) == count // 8


def test_a_part_of_the_expected_contents_is_that_part_of_the_whole() -> None:
    whole = expected(0, 64, 64, "zero")
    assert np.array_equal(expected(16, 32, 64, "zero"), whole[16:48])


def test_contents_written_by_a_forked_child_are_seen_here() -> None:
    pages = allocate(32 * PAGE_SIZE, MEMORY_KINDS["memfd-cold"])
    fill_in_fork(pages, "random")
    assert mismatches(pages, "random") == 0


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(BenchError, match="ones"):
        expected(0, 16, 16, "ones")


def test_files_of_an_image_begin_at_pages_and_are_taken_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "b").write_bytes(b"b" * (PAGE_SIZE + 1))
    (files / "a").write_bytes(b"\0" * 7)
    (files / "link").symlink_to(files / "a")
    image.make(tmp_path / "image", 1 << 20, [files])
    assert (tmp_path / "image").read_bytes() == bytes(PAGE_SIZE) + (b"b" * (PAGE_SIZE + 1)).ljust(2 * PAGE_SIZE, b"\0")


def test_half_of_an_image_is_text(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "binary").write_bytes(b"\0b" * (8 * PAGE_SIZE))
    (files / "text").write_bytes(b"t" * (16 * PAGE_SIZE))
    image.make(tmp_path / "image", 4 * PAGE_SIZE, [files])
    assert (tmp_path / "image").read_bytes() == b"\0b" * PAGE_SIZE + b"t" * (2 * PAGE_SIZE)


def test_an_image_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no file can be read"):
        image.make(tmp_path / "image", 1 << 20, [tmp_path / "nothing"])


def test_a_prepared_image_is_found_and_then_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(image.VARIABLE)
    with image.prepared(16 * PAGE_SIZE) as digest:
        name = os.environ[image.VARIABLE]
        assert len(image.pages()) == 16
        assert len(digest) == 64
    assert not os.path.exists(name)
    with pytest.raises(BenchError, match="no memory image"):
        image.pages()


# --- readings


def test_a_run_is_quiet_if_no_reading_of_the_load_reaches_the_limit() -> None:
    quiet, busy = LoadLog([0.2, 1.4, 0.9]), LoadLog([0.2, 1.5])
    assert (quiet.quiet, busy.quiet, LoadLog().quiet) == (True, False, False)
    assert quiet.sentence() == "quiet run: load average 0.20 before it and 1.40 at most (quiet is below 1.5)"
    assert busy.sentence().startswith("NOT a quiet run")
    assert busy.as_json() == {"before": 0.2, "most": 1.5, "quiet": False}


def test_a_reading_of_the_load_is_kept() -> None:
    log = LoadLog()
    value = log.read()
    assert log.as_json()["most"] == value


def test_nearest_rank_percentiles() -> None:
    values = list(range(1, 101))
    assert percentile(values, 99) == 99
    assert percentile(values, 100) == 100
    assert percentile([3.0], 99) == 3.0
    assert percentile([2.0, 1.0], 50) == 1.0
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_memory_lines_of_a_status_file_in_bytes() -> None:
    status = parse_status("Name:\tx\nVmHWM:\t      12 kB\nRssAnon:\t       3 kB\nThreads:\t1\n")
    assert status == {"VmHWM": 12 * 1024, "RssAnon": 3 * 1024}


def test_only_readable_and_writable_mappings_of_a_smaps_file() -> None:
    text = (
        "7f0000000000-7f0000400000 rw-s 00000000 00:01 77 /memfd:bench (deleted)\n"
        "Size:               4096 kB\n"
        "Rss:                1000 kB\n"
        "7f0001000000-7f0002000000 rwxp 00000000 00:00 0 \n"
        "Rss:                  16 kB\n"
        "7f0003000000-7f0003001000 rw-p 00000000 00:00 0 \n"
        "Rss:                   4 kB\n"
        "VmFlags: rd wr\n"
    )
    first, second = parse_smaps(text)
    assert (first.start, first.length, first.resident) == (0x7F0000000000, 4 * MIB, 1000 * 1024)
    assert first.path == "/memfd:bench (deleted)"
    assert (second.length, second.resident, second.path) == (4096, 4096, "")


async def test_the_instrument_counts_task_steps() -> None:
    instrument = SliceInstrument()
    assert instrument.slices() is None
    trio.lowlevel.add_instrument(instrument)
    for _ in range(5):
        await trio.lowlevel.checkpoint()
    trio.lowlevel.remove_instrument(instrument)
    slices = instrument.slices()
    assert slices is not None
    assert slices.steps >= 4
    assert 0 < slices.p99_ms <= slices.max_ms


# --- medians and ratios


def test_a_row_has_the_medians_of_its_runs() -> None:
    runs = [
        measurement(seconds=seconds, downtime_ms=downtime, slices=(Slices(steps=9, p99_ms=p99, max_ms=9.0),))
        for seconds, downtime, p99 in [(1.0, 30.0, 1.0), (2.0, 10.0, 3.0), (4.0, 20.0, 2.0)]
    ]
    (row,) = make_rows(runs)
    assert row.runs == 3
    assert row.bytes_per_s == GIB / 2
    assert (row.bytes_per_s_min, row.bytes_per_s_max) == (GIB / 4, GIB)
    assert row.cpu_s_per_gib == 1.5
    assert row.downtime_ms == 20.0
    assert row.slice_p99_ms == 2.0
    assert row.extra_memory_bytes == row.extra_memory_trimig_bytes == 20 * MIB
    assert row.extra_memory_source_bytes == 10 * MIB


def test_cpu_time_is_per_gib_of_guest_ram_and_of_both_sides() -> None:
    (row,) = make_rows([measurement(size=GIB // 4)])
    assert (row.cpu_source_s_per_gib, row.cpu_destination_s_per_gib, row.cpu_s_per_gib) == (2.0, 4.0, 6.0)


def test_the_load_of_a_row_is_the_highest_of_its_runs() -> None:
    (row,) = make_rows([measurement(load=load) for load in (0.5, 2.5, 1.0)])
    assert row.load == 2.5
    assert " 2.5" in rows_table([row])


def test_ways_are_rows_of_their_own() -> None:
    rows = make_rows([measurement(way=way) for way in ("tcp", "unix", "tcp")])
    assert [(row.way, row.runs) for row in rows] == [("tcp", 2), ("unix", 1)]


def test_rows_are_grouped_by_conditions_and_ordered_like_the_pairs() -> None:
    runs = [
        measurement(pair, memory=memory) for memory in ("memfd-populated", "memfd-cold") for pair in reversed(PAIRS)
    ]
    rows = make_rows(runs)
    assert [row.pair for row in rows] == [*PAIRS, *PAIRS]
    assert [row.memory for row in rows] == ["memfd-populated"] * 5 + ["memfd-cold"] * 5


def test_only_the_trimig_side_counts_as_trimigs_memory() -> None:
    rows = {row.pair: row for row in make_rows([measurement(pair) for pair in PAIRS])}
    assert rows["trimig-qemu"].extra_memory_trimig_bytes == 10 * MIB
    assert rows["qemu-trimig"].extra_memory_trimig_bytes == 20 * MIB
    assert rows["qemu-qemu"].extra_memory_trimig_bytes is None
    assert rows["raw"].downtime_ms is None


def results(rows: list[Row]) -> dict[str, str]:
    return {verdict.goal.key: verdict.result for verdict in make_verdicts(rows)}


@pytest.mark.parametrize(
    ("memory", "key", "seconds", "result"),
    [
        ("memfd-cold", "cold", 1 / 1.6, "below"),
        ("memfd-cold", "cold", 1 / 1.8, "floor"),
        ("memfd-cold", "cold", 1 / 2.0, "goal"),
        ("memfd-populated", "populated", 1 / 1.1, "below"),
        ("memfd-populated", "populated", 1 / 1.2, "floor"),
        ("memfd-populated", "populated", 1 / 1.6, "goal"),
    ],
)
def test_the_ratio_to_reach_depends_on_the_destinations_memory(
    memory: str, key: str, seconds: float, result: str
) -> None:
    rows = make_rows([measurement("qemu-qemu", memory=memory), measurement(seconds=seconds, memory=memory)])
    assert results(rows)[key] == result
    assert {"cold", "populated"} - results(rows).keys() == {"cold", "populated"} - {key}


def test_processor_time_is_compared_the_other_way_round() -> None:
    ours = measurement(memory="memfd-populated", source=usage(cpu=0.4), destination=usage(cpu=0.6))
    (verdict,) = [
        one
        for one in make_verdicts(make_rows([measurement("qemu-qemu", memory="memfd-populated"), ours]))
        if one.goal.key == "populated-cpu"
    ]
    assert (verdict.value, verdict.result) == (1.5, "goal")


def test_ways_are_compared_with_their_own_baseline() -> None:
    runs = [
        measurement("qemu-qemu", way="multifd-2", memory="memfd-populated"),
        measurement(way="multifd-2", memory="memfd-populated", seconds=0.9),
        measurement(way="tcp", memory="memfd-populated", seconds=0.1),
        measurement(way="unix", memory="memfd-populated", source=usage(cpu=0.2), destination=usage(cpu=0.3)),
    ]
    assert results(make_rows(runs)) == {
        "multifd": "floor",
        "multifd-cpu": "below",
        "unix-cpu": "goal",
        "memory": "goal",
    }


def test_each_ratio_is_a_figure_to_reach_and_each_figure_is_named_once() -> None:
    keys = [goal.key for goal in GOALS]
    assert len(set(keys)) == len(keys)
    assert {ratio.key for ratio in RATIO_GOALS} <= set(keys)


def test_a_ratio_is_only_taken_between_like_conditions() -> None:
    rows = make_rows([measurement("qemu-qemu", memory="memfd-cold"), measurement(memory="memfd-populated")])
    assert results(rows).keys() == {"memory"}


def test_memory_and_slices_are_judged_by_the_worst_row_and_less_is_better() -> None:
    good = measurement(slices=(Slices(steps=1, p99_ms=1.0, max_ms=1.0),))
    bad = measurement(
        "trimig-qemu",
        source=usage(extra=40 * MIB),
        slices=(Slices(steps=1, p99_ms=1.5, max_ms=9.0),),
    )
    memory, p99, worst = make_verdicts(make_rows([good, bad]))
    assert (memory.value, memory.result) == (40.0, "floor")
    assert (p99.value, p99.result) == (1.5, "floor")
    assert (worst.value, worst.result) == (9.0, "below")
    assert "trimig-qemu" in memory.where


def test_a_table_of_all_figures_has_those_that_were_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    one = judge("scale", 45.0, "4 MiB each")
    file.write_text(json.dumps({"verdicts": [one.as_json()], "load": {"before": 0.1, "most": 1.2, "quiet": True}}))
    lines = goals.report([file]).splitlines()
    assert len(lines) == 1 + len(GOALS) + 2
    assert [line.split()[-1] for line in lines if line.startswith("200 migrations")] == ["floor"]
    assert sum(line.endswith("not measured") for line in lines) == len(GOALS) - 1
    assert lines[-1] == "figures.json: quiet, load 0.10 before it, 1.20 at most"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"verdicts": [{"key": "scale"}], "load": {}}'])
def test_a_file_that_no_benchmark_has_written_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "figures.json"
    file.write_text(text)
    result = CliRunner().invoke(main, ["goals", str(file)])
    assert result.exit_code == 1
    assert "is not a document" in result.output


def test_tables_have_a_line_for_each_row_and_name_the_memory() -> None:
    rows = make_rows([measurement(pair) for pair in PAIRS])
    lines = rows_table(rows).splitlines()
    assert len(lines) == 1 + len(PAIRS)
    assert all("memfd-cold" in line for line in lines[1:])
    assert "cold: trimig-trimig / QEMU-QEMU" in verdicts_table(make_verdicts(rows))
    assert verdicts_table([]) == ""


def test_columns_are_aligned() -> None:
    assert format_table([["a", "b"], ["long", "1"], ["x", "10"]], left=1) == "a      b\nlong   1\nx     10"


def test_the_json_has_the_agreed_keys_and_survives_a_round_trip() -> None:
    outcome = Outcome(measurements=[measurement(pair) for pair in PAIRS])
    document = json.loads(json.dumps(as_json(plan(pairs=PAIRS), outcome)))
    assert {row["pair"] for row in document["rows"]} == set(PAIRS)
    for row in document["rows"]:
        assert set(row) >= ISSUE_KEYS
    assert {verdict["result"] for verdict in document["verdicts"]} <= {"goal", "floor", "below"}
    assert document["load"] == {"quiet": False}
    assert document["skipped"] == document["failed"] == []


# --- one real run


async def test_a_tiny_raw_copy_arrives_and_is_measured() -> None:
    outcome = await run_plan(plan(memories=["memfd-cold", "anon"]), progress=lambda line: None)
    assert outcome.failed == []
    rows = make_rows(outcome.measurements)
    assert [(row.pair, row.memory) for row in rows] == [("raw", "memfd-cold"), ("raw", "anon")]
    for row in rows:
        assert row.bytes_per_s > 0
        assert row.cpu_s_per_gib > 0
        assert row.load > 0
        assert row.extra_memory_bytes > 0
        assert row.resident_at_start_bytes < row.size_bytes
