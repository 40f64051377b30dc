"""The benchmarks' own arithmetic, and one tiny run of what needs neither QEMU nor the engine. No figure is judged."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from click.testing import CliRunner

from bench import parking, postcopy
from bench.__main__ import as_json, main
from bench.cancel import Point, cancel_table, summarise
from bench.errors import BenchError
from bench.figures import (
    GIB,
    MIB,
    PAIRS,
    Measurement,
    Row,
    Verdict,
    engines,
    format_table,
    make_rows,
    make_verdicts,
    rows_table,
    verdicts_table,
)
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
from bench.qemu import find_qemu, qemu_command

ISSUE_KEYS = {
    "pair",
    "memory",
    "pages",
    "bytes_per_s",
    "cpu_s_per_gib",
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
        ["cancel", "--points", "0"],
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


@pytest.mark.parametrize(
    ("pair", "memory", "qemu", "said"),
    [
        ("raw", "anon", None, ""),
        ("qemu-qemu", "anon", "/bin/qemu", ""),
        ("trimig-trimig", "memfd-cold", None, ""),
        ("trimig-qemu", "anon", "/bin/qemu", ""),
        ("trimig-qemu", "memfd-cold", None, "no QEMU"),
        ("qemu-trimig", "anon", "/bin/qemu", "memfd"),
    ],
)
def test_what_cannot_be_measured_has_a_reason(pair: str, memory: str, qemu: str | None, said: str) -> None:
    reason = reason_to_skip(pair, memory, qemu)
    assert said in reason
    assert bool(reason) is bool(said)


def test_the_engines_of_a_pair() -> None:
    assert engines("raw") == ("raw", "raw")
    assert engines("qemu-trimig") == ("qemu", "trimig")


def test_qemu_gets_the_memory_that_the_row_names() -> None:
    def memory(name: str) -> str:
        kind = MEMORY_KINDS[name]
        command = qemu_command("qemu", MIB, kind, incoming=True, prealloc=kind.populated)
        return command[command.index("-object") + 1]

    assert memory("memfd-cold").startswith("memory-backend-memfd,share=on,")
    assert memory("memfd-cold").endswith("prealloc=off")
    assert memory("memfd-populated").endswith("prealloc=on")
    assert memory("anon").startswith("memory-backend-ram,")


def test_a_qemu_that_is_not_there_is_not_found() -> None:
    assert find_qemu("/nowhere/qemu") is None


# --- contents


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


# --- readings


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
    assert row.cpu_s_per_gib == 6.0


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


def verdict_of(rows: list[Row], what: str, memory: str) -> Verdict:
    (verdict,) = [one for one in make_verdicts(rows) if one.what == what and one.memory == memory]
    return verdict


@pytest.mark.parametrize(
    ("memory", "seconds", "result"),
    [
        ("memfd-cold", 1 / 1.4, "below"),
        ("memfd-cold", 1 / 1.6, "floor"),
        ("memfd-cold", 1 / 2.0, "goal"),
        ("memfd-populated", 1 / 1.1, "below"),
        ("memfd-populated", 1 / 1.4, "floor"),
        ("memfd-populated", 1 / 1.6, "goal"),
    ],
)
def test_the_ratio_to_reach_depends_on_the_destinations_memory(memory: str, seconds: float, result: str) -> None:
    rows = make_rows([measurement("qemu-qemu", memory=memory), measurement(seconds=seconds, memory=memory)])
    verdict = verdict_of(rows, "trimig-trimig / qemu-qemu", memory)
    assert verdict.value == pytest.approx(1 / seconds)
    assert verdict.result == result


def test_a_ratio_is_only_taken_between_like_conditions() -> None:
    rows = make_rows([measurement("qemu-qemu", memory="memfd-cold"), measurement(memory="memfd-populated")])
    assert [verdict for verdict in make_verdicts(rows) if verdict.unit == "ratio"] == []


def test_memory_and_slices_are_judged_by_the_worst_row_and_less_is_better() -> None:
    good = measurement(slices=(Slices(steps=1, p99_ms=1.0, max_ms=1.0),))
    bad = measurement(
        "trimig-qemu",
        source=usage(extra=40 * MIB),
        slices=(Slices(steps=1, p99_ms=6.0, max_ms=9.0),),
    )
    memory, held = [verdict for verdict in make_verdicts(make_rows([good, bad])) if verdict.unit != "ratio"]
    assert (memory.value, memory.result) == (40.0, "floor")
    assert (held.value, held.result) == (6.0, "below")
    assert "trimig-qemu" in memory.what


def test_tables_have_a_line_for_each_row_and_name_the_memory() -> None:
    rows = make_rows([measurement(pair) for pair in PAIRS])
    lines = rows_table(rows).splitlines()
    assert len(lines) == 1 + len(PAIRS)
    assert all("memfd-cold" in line for line in lines[1:])
    assert "trimig-trimig / raw" in verdicts_table(make_verdicts(rows))


def test_columns_are_aligned() -> None:
    assert format_table([["a", "b"], ["long", "1"], ["x", "10"]], left=1) == "a      b\nlong   1\nx     10"


def test_the_json_has_the_agreed_keys_and_survives_a_round_trip() -> None:
    outcome = Outcome(measurements=[measurement(pair) for pair in PAIRS])
    document = json.loads(json.dumps(as_json(plan(pairs=PAIRS), outcome)))
    assert {row["pair"] for row in document["rows"]} == set(PAIRS)
    for row in document["rows"]:
        assert set(row) >= ISSUE_KEYS
    assert {ratio["result"] for ratio in document["ratios"]} <= {"goal", "floor", "below"}
    assert document["skipped"] == document["failed"] == []


# --- cancel


def test_cancel_figures_tell_points_while_paused_from_the_others() -> None:
    points = [Point(at_s=0.1, paused=False, returned_s=0.001 * n, running_s=0.0) for n in range(1, 100)]
    points.append(Point(at_s=0.2, paused=True, returned_s=0.5, running_s=0.4))
    lines = summarise(points)
    assert [line.what for line in lines] == ["guest runs again", "guest runs again, was paused", "call returned"]
    everything, paused, returned = lines
    assert (everything.count, everything.median_ms, everything.p99_ms, everything.max_ms) == (100, 0.0, 0.0, 400.0)
    assert (paused.count, paused.median_ms) == (1, 400.0)
    assert (returned.median_ms, returned.p99_ms, returned.max_ms) == pytest.approx((50.5, 99.0, 500.0))
    assert len(cancel_table(lines).splitlines()) == 4


# --- one real run


async def test_a_tiny_raw_copy_arrives_and_is_measured() -> None:
    outcome = await run_plan(plan(memories=["memfd-cold", "anon"]), progress=lambda line: None)
    assert outcome.failed == []
    rows = make_rows(outcome.measurements)
    assert [(row.pair, row.memory) for row in rows] == [("raw", "memfd-cold"), ("raw", "anon")]
    for row in rows:
        assert row.bytes_per_s > 0
        assert row.cpu_s_per_gib > 0
        assert row.extra_memory_bytes > 0
        assert row.resident_at_start_bytes < row.size_bytes


# -- postcopy ----------------------------------------------------------------------------------------------------------


def postcopy_result(pair: str, cap: int, median: float | None, total: float | None = None) -> Any:
    return postcopy.Result(
        pair=pair,
        cap=cap,
        faults=10,
        fault_median_ms=median,
        fault_p99_ms=None if median is None else 2 * median,
        downtime_ms=5.0,
        total_s=total,
        bytes_per_s=None if total is None else 1e9 / total,
    )


def test_medians_of_postcopy_are_for_each_pair_and_limit() -> None:
    found = postcopy.rows(
        [postcopy_result("trimig-trimig", 0, median) for median in (1.0, 9.0, 2.0)]
        + [postcopy_result("trimig-trimig", postcopy.CAP, 0.5), postcopy_result("trimig-trimig precopy", 0, None)]
    )
    assert [(row["pair"], row["cap"], row["runs"], row["fault_median_ms"]) for row in found] == [
        ("trimig-trimig", 0, 3, 2.0),
        ("trimig-trimig", postcopy.CAP, 1, 0.5),
        ("trimig-trimig precopy", 0, 1, None),
    ]


def test_figures_of_postcopy_are_compared_with_what_is_to_be_reached() -> None:
    results = [
        postcopy_result("trimig-trimig", 0, 2.0, 1.0),
        postcopy_result("qemu-qemu", 0, 1.0, 1.0),
        postcopy_result("trimig-trimig preempt", 0, 1.0, 2.0),
        postcopy_result("qemu-qemu preempt", 0, 1.0, 1.0),
        postcopy_result("trimig-trimig", postcopy.CAP, 1.0),
        postcopy_result("qemu-qemu", postcopy.CAP, 100.0),
        postcopy_result("trimig-trimig precopy", 0, None, 1.0),
    ]
    lines = postcopy.table(postcopy.rows(results)).splitlines()
    assert [line for line in lines if "reached" in line] == [
        "fault median, no limit, trimig / QEMU: 2, at most 1: not reached",
        "fault median, 1 MiB/s, trimig / QEMU: 0.01, at most 0.05: reached",
        "fault median preempt, no limit, trimig / QEMU: 1, at most 1: reached",
        "downtime, trimig / QEMU: 1, at most 1: reached",
        "time, postcopy / precopy: 1, at most 1.25: reached",
        "time, postcopy preempt / precopy: 2, at most 1.25: not reached",
    ]


async def test_a_demo_that_does_not_verify_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(command: list[str], **_: object) -> Any:
        await trio.lowlevel.checkpoint()
        assert "--postcopy-after" in command
        assert "postcopy-preempt=on" in command
        return types.SimpleNamespace(stdout=b'{"verified": false, "error": "page 7 is wrong"}', stderr=b"")

    monkeypatch.setattr(trio, "run_process", run)
    with pytest.raises(BenchError, match="page 7 is wrong"):
        await postcopy.trimig_run(1 << 20, 0, preempt=True)


# -- parking -----------------------------------------------------------------------------------------------------------


def parking_result(target: parking.Target, guest: str, pause: float, load: float = 1.0) -> parking.Result:
    return parking.Result(
        target=target, guest=guest, size=4 << 30, pause_ms=pause, total_s=2.0, cpu_s=1.0, file_bytes=1 << 20, load=load
    )


def test_pauses_of_parking_are_medians_with_the_worst_and_the_load_beside_them() -> None:
    save, qemu = parking.TARGETS
    found = parking.rows(
        [parking_result(save, "idle", pause, load) for pause, load in ((20.0, 3.0), (90.0, 1.0), (30.0, 2.0))]
        + [parking_result(qemu, "idle", 200.0), parking_result(save, "used", 400.0)]
    )
    assert [(row["guest"], row["target"], row["runs"], row["pause_ms"], row["worst_pause_ms"]) for row in found] == [
        ("idle", save, 3, 30.0, 90.0),
        ("idle", qemu, 1, 200.0, 200.0),
        ("used", save, 1, 400.0, 400.0),
    ]
    assert found[0]["load"] == 3.0
    lines = parking.table(found).splitlines()
    assert [line for line in lines if "at most" in line] == [
        "pause of an idle guest of 4096 MiB: 30 ms, at most 300 ms, goal 50 ms: goal reached"
    ]


@pytest.mark.qemu
async def test_a_qemu_is_parked_and_measured(tmp_path: Path) -> None:
    qemu = find_qemu(None)
    assert qemu is not None
    said: list[str] = []
    found = await parking.run([16 << 20], 1, qemu, tmp_path, 60, said.append)
    assert [(r.target, r.guest) for r in found] == [
        (target, guest) for guest in parking.GUESTS for target in parking.TARGETS
    ], said
    assert all(r.cpu_s and r.cpu_s > 0 for r in found if r.target == parking.TARGETS[0])
    # All pages of an idle guest are zero, 9 bytes each; a sixteenth of the other's is not.
    assert [r.file_bytes is not None and r.file_bytes < 1 << 17 for r in found] == [True, False, False, False]
    assert os.listdir(tmp_path) == []
