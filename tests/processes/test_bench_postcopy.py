"""The benchmarks of postcopy, of the transports and of parking: their arithmetic, and tiny runs. No figure is judged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import parking, postcopy, transports
from bench.figures import GIB
from bench.load import LoadLog
from bench.programs import find_qemu

# -- postcopy ----------------------------------------------------------------------------------------------------------


def postcopy_result(pair: str, cap: int, median: float | None, total: float | None = None, **more: Any) -> Any:
    return postcopy.Result(
        pair=pair,
        cap=cap,
        faults=10,
        fault_median_ms=median,
        fault_p99_ms=None if median is None else 2 * median,
        downtime_ms=5.0,
        total_s=total,
        bytes_per_s=None if total is None else 1e9 / total,
        **more,
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
    assert [(v.goal.key, v.value, v.result) for v in postcopy.verdicts(postcopy.rows(results))] == [
        ("fault", 2.0, "below"),
        ("fault-p99", 4.0, "below"),
        ("fault-preempt", 1.0, "floor"),
        ("fault-limited", 0.01, "goal"),
        ("postcopy-time", 1.0, "goal"),
        ("postcopy-time", 2.0, "below"),
    ]


def test_postcopy_has_processor_time_of_each_side_and_the_load() -> None:
    runs = [postcopy_result("trimig-trimig", 0, 1.0, 1.0, size=GIB // 2, cpu=(1.0, 2.0), load=load) for load in (1, 3)]
    (row,) = postcopy.rows(runs)
    assert (row["cpu_source_s_per_gib"], row["cpu_destination_s_per_gib"], row["load"]) == (2.0, 4.0, 3)
    head, line = postcopy.table([row]).splitlines()
    assert head.split()[-5:] == ["CPU", "src", "CPU", "dst", "load"]
    assert line.split()[-3:] == ["2.00", "4.00", "3.0"]


async def test_a_guest_in_postcopy_is_measured_by_its_own_waits() -> None:
    result = await postcopy.trimig_run(4 << 20, 0, preempt=True)
    assert result.pair == "trimig-trimig preempt"
    assert result.downtime_ms is not None
    assert all(seconds > 0 for seconds in result.cpu)


# -- transports --------------------------------------------------------------------------------------------------------


def test_transports_are_compared_with_their_baselines() -> None:
    found = transports.rows(
        [
            transports.Result(transport=name, size=GIB, seconds=seconds, cpu=(cpu, 2 * cpu), load=1.0)
            for name, seconds, cpu in (("tcp", 1.0, 0.2), ("unix", 0.9, 0.1), ("ws", 4.0, 1.0), ("tls", 2.0, 1.0))
        ]
    )
    assert [row.cpu_destination_s_per_gib / row.cpu_source_s_per_gib for row in found] == [2.0] * 4
    assert [(v.goal.key, v.value, v.result) for v in transports.verdicts(found)] == [
        ("ws", 0.25, "below"),
        ("unix-cpu", pytest.approx(2.0), "goal"),
    ]
    assert len(transports.table(found).splitlines()) == 5


# -- parking -----------------------------------------------------------------------------------------------------------


def parking_result(target: parking.Target, guest: str, pause: float, load: float = 1.0) -> parking.Result:
    return parking.Result(
        target=target,
        guest=guest,
        size=4 << 30,
        pause_ms=pause,
        total_s=2.0,
        cpu=(1.0, 2.0),
        file_bytes=1 << 20,
        load=load,
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
    assert (found[0]["cpu_source_s_per_gib"], found[0]["cpu_destination_s_per_gib"]) == (0.25, 0.5)
    assert len(parking.table(found).splitlines()) == 4
    (verdict,) = parking.verdicts(found)
    assert (verdict.value, verdict.where, verdict.result) == (30.0, "4096 MiB", "goal")


@pytest.mark.qemu
async def test_a_qemu_is_parked_and_measured(tmp_path: Path) -> None:
    qemu = find_qemu(None)
    assert qemu is not None
    said: list[str] = []
    loads = LoadLog()
    found = await parking.run([16 << 20], 1, qemu, tmp_path, 60, said.append, loads)
    assert [(r.target, r.guest) for r in found] == [
        (target, guest) for guest in parking.GUESTS for target in parking.TARGETS
    ], said
    assert all(seconds > 0 for r in found for seconds in r.cpu)
    assert loads.as_json()["most"] == max(r.load for r in found)
    # All pages of an idle guest are zero, 9 bytes each; a sixteenth of the other's is not.
    assert [r.file_bytes is not None and r.file_bytes < 1 << 17 for r in found] == [True, False, False, False]
    assert os.listdir(tmp_path) == []
