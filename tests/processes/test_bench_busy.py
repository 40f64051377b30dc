"""The benchmarks with a busy guest, many guests, or a cancel: their parts, and one tiny run of each. No figure is judged."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from bench import cancel, encodings, image, scale
from bench.busy import FIRST, LAST, Workload
from bench.busy_boot import boot_sector
from bench.busy_worker import BusyWorker
from bench.child import start_python_child
from bench.errors import BenchError
from bench.load import LoadLog
from bench.memory import MEMORY_KINDS, PAGE_SIZE, allocate
from bench.programs import find_qemu
from bench.relay import Direction
from bench.shaped import Shape, open_link
from bench.trimig_side import add_machine
from bench.ways import ENCODINGS, Way
from trimig import Status
from trimig.guests.worker.messages import WorkerRequest

MIB = 1 << 20
WORKLOAD = Workload(size=40 * MIB, hot=128, rate=1000)


@pytest.fixture(autouse=True)
def small_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A memory image of 64 pages."""
    (tmp_path / "files").mkdir()
    content = np.random.default_rng(1).integers(0, 256, 64 * PAGE_SIZE, dtype=np.uint8).tobytes()
    (tmp_path / "files" / "binary").write_bytes(content)
    image.make(tmp_path / "image", 2 * len(content), [tmp_path / "files"])
    monkeypatch.setenv(image.VARIABLE, str(tmp_path / "image"))
    yield
    image.forget()


# -- the busy guest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hot": 100}, "power of two"),
        ({"hot": 64}, "power of two"),
        ({"hot": 2048}, "do not fit: at most 7 MiB"),
        ({"rate": 99}, "writes a second"),
        ({"rate": 12801}, "writes a second"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        dataclasses.replace(WORKLOAD, **changes)


def test_each_hot_page_has_its_turn() -> None:
    turn = WORKLOAD.indices(5, WORKLOAD.hot)
    assert sorted(turn) == list(range(FIRST, FIRST + WORKLOAD.hot))
    assert WORKLOAD.indices(5 + WORKLOAD.hot, WORKLOAD.hot).tolist() == turn.tolist()


@pytest.mark.parametrize("writes", [0, 1, 127, 128, 129, 300])
def test_the_memory_tells_the_number_of_writes(writes: int) -> None:
    pages = allocate(WORKLOAD.size, MEMORY_KINDS["memfd-cold"])
    WORKLOAD.fill(pages)
    assert not pages[:FIRST].any()
    assert not pages[len(pages) - LAST :].any()
    for number in range(writes):
        pages.view(np.uint32)[WORKLOAD.indices(number, 1), 0] += 1
    assert WORKLOAD.count(pages) == writes


@pytest.mark.parametrize(
    ("page", "byte", "said"),
    [
        (FIRST, 0, "a write was lost"),
        (FIRST + 1, 77, "are not what the guest had"),
        (FIRST + 400, 0, "not what the guest"),
    ],
)
def test_a_lost_write_and_a_changed_page_are_noticed(page: int, byte: int, said: str) -> None:
    pages = allocate(WORKLOAD.size, MEMORY_KINDS["memfd-cold"])
    WORKLOAD.fill(pages)
    pages.view(np.uint32)[WORKLOAD.indices(0, 100), 0] += 1
    pages[page, byte] ^= 0x40
    with pytest.raises(BenchError, match=said):
        WORKLOAD.count(pages)


def test_the_worker_writes_while_it_runs_and_saves_its_count() -> None:
    worker = BusyWorker()
    fd = os.memfd_create("bench")
    os.ftruncate(fd, WORKLOAD.size)
    view = allocate(WORKLOAD.size, MEMORY_KINDS["memfd-cold"])
    settings = b'{"made": 0, "size": %d, "hot": %d, "rate": %d}' % (WORKLOAD.size, WORKLOAD.hot, WORKLOAD.rate)

    def ask(verb: str, *words: str, body: bytes = b"") -> bytes:
        reply, _ = worker.handle(WorkerRequest(1, verb, words, body))
        assert reply.refused is None
        return reply.body

    ask("ram", str(os.dup(fd)), str(WORKLOAD.size))
    ask("create", body=settings)
    worker.tick()
    assert worker.rest() is None
    ask("resume")
    worker.tick()
    ask("pause")
    worker.tick()
    view.data.cast("B")[:] = os.pread(fd, WORKLOAD.size, 0)
    os.close(fd)
    assert WORKLOAD.count(view) == WORKLOAD.per_tick
    assert b'"made": 10,' in ask("save")
    assert worker.handle(WorkerRequest(1, "missing", ("0",), b""))[0].refused is not None


def test_the_boot_sector_is_one_sector_with_the_numbers_of_the_workload() -> None:
    sector = boot_sector(WORKLOAD)
    assert len(sector) == 512
    assert sector[-2:] == b"\x55\xaa"
    for value in (FIRST * PAGE_SIZE, WORKLOAD.per_tick, WORKLOAD.stride * PAGE_SIZE, WORKLOAD.hot * PAGE_SIZE):
        assert value.to_bytes(4, "little") in sector


# -- the network -------------------------------------------------------------------------------------------------------


def test_bytes_of_a_direction_come_at_its_rate_and_after_its_delay() -> None:
    direction = Direction(1000.0, 0.5)
    assert direction.due(100, 10.0) == pytest.approx(10.6)
    assert direction.due(100, 10.0) == pytest.approx(10.7)
    assert direction.due(100, 20.0) == pytest.approx(20.6)
    assert direction.wait(20.0) == pytest.approx(0.05)
    assert direction.wait(20.1) == 0.0


async def test_a_relay_carries_both_directions_and_counts_one() -> None:
    async with open_link(Shape(bits_per_s=10**9, delay_ms=1), relay=True) as link, trio.open_nursery() as nursery:
        assert "a relay" in link.how

        async def echo(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(bytes(data))

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        uri = await link.address_for_source(f"tcp:127.0.0.1:{listener.socket.getsockname()[1]}")
        _, host, port = uri.split(":")
        data = b""
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"x" * 100_000)
            while len(data) < 100_000:
                data += bytes(await stream.receive_some())
            await stream.send_eof()
            assert await stream.receive_some() == b""
        assert data == b"x" * 100_000
        assert await link.sent() == 100_000
        nursery.cancel_scope.cancel()


async def test_without_namespaces_there_is_a_relay_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ip").write_text("#!/bin/sh\necho mount --make-shared: not permitted >&2\nexit 1\n")
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    async with open_link(Shape(bits_per_s=10**9)) as link:
        assert link.how.startswith("a relay over loopback, 1000 Mbit/s, because `ip netns add trimig-bench-")
        assert "not permitted" in link.how
        assert list(link.source) == list(link.destination) == []


async def test_namespaces_are_removed_at_the_end(tmp_path: Path) -> None:
    async with open_link(Shape(bits_per_s=10**9)) as link:
        if "a relay" in link.how:
            pytest.skip(link.how)
        names = [word for word in (*link.source, *link.destination) if word.startswith("trimig-bench-")]
        assert len(names) == 2
        assert set(names) <= set(os.listdir("/run/netns"))
        before = await link.sent()
        program = "import socket; s = socket.create_connection(('10.203.77.2', 9), 0.2)"
        await trio.run_process([*link.source, sys.executable, "-c", program], check=False, capture_stderr=True)
        assert await link.sent() > before
    assert not set(names) & set(os.listdir("/run/netns"))


# -- encodings ---------------------------------------------------------------------------------------------------------

CONDITIONS = encodings.Conditions(workload=WORKLOAD, downtime_limit=300, limit=20.0)


def result(encoding: str, engine: str, *, downtime: float | None = 10.0, sent: int = 100) -> encodings.Result:
    return encodings.Result(
        encoding=encoding,
        engine=engine,
        size=1 << 29,
        converged=downtime is not None,
        total_s=2.0,
        downtime_ms=downtime,
        passes=3,
        sent_bytes=sent,
        cpu=(1.0, 2.0),
        load=1.0,
    )


def test_bytes_and_downtime_are_judged_where_both_have_converged() -> None:
    found = encodings.rows(
        [
            result("plain", "trimig", downtime=None),
            result("xbzrle", "trimig", downtime=12.0, sent=90),
            result("xbzrle", "qemu 7.2"),
            result("multifd-zstd", "trimig"),
            result("multifd-zstd", "qemu 11.1", downtime=None),
        ]
    )
    assert [(v.goal.key, v.value, v.result) for v in encodings.verdicts(found)] == [
        ("xbzrle-bytes", 0.9, "goal"),
        ("xbzrle-downtime", 1.2, "below"),
    ]
    left = [encodings.Left(encoding="compress", engine="trimig", reason="not built")]
    lines = encodings.table(found, left).splitlines()
    assert len(lines) == 1 + len(found) + 1
    assert " no " in lines[1]
    assert lines[-1] == "compress, trimig: not built"


async def test_the_busy_guest_goes_from_trimig_to_trimig() -> None:
    async with open_link(Shape(bits_per_s=10**9), relay=True) as link:
        found = await encodings.trimig_run(encodings.way_of("plain", CONDITIONS), CONDITIONS, link)
    assert found.converged
    assert found.sent_bytes > 0
    assert all(seconds > 0 for seconds in found.cpu)


async def test_what_does_not_converge_ends_at_the_limit() -> None:
    busier = dataclasses.replace(WORKLOAD, rate=12800)
    conditions = encodings.Conditions(workload=busier, downtime_limit=0, limit=1.5)
    async with open_link(Shape(bits_per_s=10**8), relay=True) as link:
        found = await encodings.trimig_run(encodings.way_of("plain", conditions), conditions, link)
    assert not found.converged
    assert found.downtime_ms is None


async def test_what_cannot_be_run_is_listed() -> None:
    said: list[str] = []
    way = Way(name="colo", capabilities=("x-colo",), qemu="1.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODINGS, "colo", way)
        async with open_link(Shape(bits_per_s=10**9), relay=True) as link:
            results, left = await encodings.run(
                ["colo"], encodings.ENGINES, CONDITIONS, link, 1, said.append, LoadLog()
            )
    assert results == []
    assert [one.engine for one in left] == ["trimig", "qemu"]
    assert said == [f"colo, trimig: {way.refusal()}", "colo, qemu: there is no QEMU 1.0 here"]


@pytest.mark.qemu
async def test_the_busy_guest_goes_from_qemu_to_qemu() -> None:
    qemu = find_qemu(None)
    assert qemu is not None
    way = encodings.way_of("xbzrle", CONDITIONS)
    async with open_link(Shape(bits_per_s=10**9), relay=True) as link:
        found = await encodings.qemu_run(way, CONDITIONS, link, qemu)
    assert found.converged
    assert found.sent_bytes > 0


# -- many at once ------------------------------------------------------------------------------------------------------


async def test_three_migrations_at_once_are_measured() -> None:
    found = await scale.one(3, MIB)
    assert len(found.downtimes_ms) == 3
    assert set(found.parts_ms) >= {"pause", "ram", "devices", "prepare", "commit"}
    assert found.slice_max_ms >= found.slice_p99_ms > 0


def scaled(count: int, downtimes: list[float], **more: Any) -> scale.Result:
    values: dict[str, Any] = {
        "size": MIB,
        "seconds": 1.0,
        "cpu_s": 1.0,
        "parts_ms": {"ram": 1.0, "held": 0.0},
        "slice_p99_ms": 1.0,
        "slice_max_ms": 2.0,
        **more,
    }
    return scale.Result(count=count, downtimes_ms=downtimes, **values)


def test_downtimes_are_those_of_all_migrations_of_all_runs() -> None:
    found = scale.rows([scaled(200, [10.0, 20.0]), scaled(200, [50.0, 90.0], slice_max_ms=7.0), scaled(1, [3.0])])
    assert [(row["count"], row["runs"], row["downtime_median_ms"]) for row in found] == [(200, 2, 35.0), (1, 1, 3.0)]
    assert (found[0]["downtime_p99_ms"], found[0]["slice_max_ms"]) == (90.0, 7.0)
    assert [(v.value, v.result) for v in scale.verdicts(found)] == [(35.0, "floor")]
    assert len(scale.table(found).splitlines()) == 3


@pytest.mark.parametrize(
    ("report", "said"),
    [({"wrong": 2}, "2 pages"), ({"wrong": 0, "downtimes_ms": [1.0]}, "1 of 3 migrations have completed")],
)
def test_a_run_that_is_not_whole_is_no_figure(report: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        scale.result_of(3, MIB, report)


# -- cancel ------------------------------------------------------------------------------------------------------------


def test_cancel_figures_are_for_each_mode_and_status() -> None:
    undisturbed = cancel.Undisturbed(total_s=1.0, lasted={}, cpu=(0.5, 1.0))

    def point(status: Status, running: float | None, returned: float) -> cancel.Point:
        return cancel.Point(mode="m", status=status, at_s=0.1, running_s=running, returned_s=returned)

    points = [point(Status.ACTIVE, 0.0, 0.001 * n) for n in range(1, 101)]
    points += [point(Status.DEVICE, 0.02, 0.03), point(Status.POSTCOPY_PAUSED, None, 0.5)]
    one = cancel.Cancelled(mode="m", size=1 << 30, points=points, undisturbed=undisturbed, too_late=0, load=2.0)
    active, device, paused = lines = cancel.summarise([one])
    assert (active.status, active.count, active.running_max_ms) == ("active", 100, 0.0)
    assert (active.returned_median_ms, active.returned_p99_ms) == pytest.approx((50.5, 99.0))
    assert (device.running_p99_ms, paused.running_p99_ms) == (20.0, None)
    assert (device.cpu_source_s_per_gib, device.cpu_destination_s_per_gib, device.load) == (0.5, 1.0, 2.0)
    assert len(cancel.cancel_table(lines).splitlines()) == 4
    (verdict,) = cancel.verdicts(lines)
    assert (verdict.value, verdict.where, verdict.result) == (20.0, "m device", "below")
    assert cancel.verdicts([paused]) == []


@pytest.mark.parametrize("mode", ["plain", "held", "postcopy"])
async def test_migrations_are_cancelled_in_the_statuses_of_a_mode(mode: str) -> None:
    said: list[str] = []
    guest = cancel.WatchedGuest("none")
    add_machine(guest, 2 * MIB).fill(7)
    (found,) = await cancel.run(guest, 2 * MIB, [mode], 1, 1, said.append, LoadLog())
    guest.close()
    assert guest.run_state == "running"
    assert {point.status for point in found.points} >= {cancel.MODES[mode].statuses[-1]}, said
    for point in found.points:
        assert point.returned_s > 0
        assert (point.running_s is None) is (mode == "postcopy")


async def test_a_mode_that_trimig_does_not_have_is_said() -> None:
    mode = cancel.Mode(name="colo", way=dataclasses.replace(cancel.MODES["plain"].way, capabilities=("x-colo",)))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cancel.MODES, "colo", mode)
        assert await cancel.run(cancel.WatchedGuest("none"), MIB, ["colo"], 1, 1, said.append, LoadLog()) == []
    assert said[0].startswith("colo: not built in trimig")


def test_a_guest_is_taken_back_after_it_was_handed_over() -> None:
    async def main() -> None:
        guest = cancel.WatchedGuest("none")
        await guest.pause()
        guest.set_owner(trimig.Owner.ELSEWHERE, handed_over=True)
        await guest.take_back()
        assert guest.run_state == "running"
        assert guest.resumed_at is None

    trio.run(main)


async def test_a_child_that_fails_is_an_error_with_its_sentence() -> None:
    async with trio.open_nursery() as nursery:
        child = await start_python_child(nursery, "three migrations", "bench.scale_side", ["1", "4095"])
        with pytest.raises(BenchError, match="three migrations"):
            await child.answer("report")
        nursery.cancel_scope.cancel()
