"""``encoding = "auto"`` over a real socket: each kind of guest gets its encoding, and arrives byte for byte."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import trio

import trimig
from trimig.guest import PAGE_SIZE

PAGES = 1024
#: Pages that are written again and again.
HOT = 512
#: Pages of one write.
STEP = 64
LIMIT = 4_000_000


@pytest.mark.parametrize("kind", ["xbzrle", "plain", "compress"])
async def test_each_kind_of_guest_gets_its_encoding(kind: str) -> None:
    """S3: one byte of a page, random pages, and text, over a limited link. The first pass is left out: all of it is new."""
    config = trimig.Config(
        capabilities=trimig.Capabilities(xbzrle=True, compress=True),
        parameters=trimig.Parameters(max_bandwidth=LIMIT, downtime_limit=1),
        encoding="auto",
        max_iterations=5,
        on_bound="switchover",
    )
    rng = np.random.default_rng(5)
    here, there = trimig.Monitor(), trimig.Monitor()
    passed: list[dict[str, int]] = []
    with trimig.AppGuest("kinds") as source, trimig.AppGuest("kinds", running=False) as target:
        memory = np.frombuffer(source.add_ram("ram", PAGES * PAGE_SIZE).view, np.uint8).reshape(PAGES, PAGE_SIZE)
        arrived = np.frombuffer(target.add_ram("ram", PAGES * PAGE_SIZE).view, np.uint8).reshape(PAGES, PAGE_SIZE)
        memory[:] = rng.integers(0, 256, memory.shape, np.uint8)

        def write(count: int) -> None:
            """To the next few of the hot pages."""
            some = slice(count * STEP % HOT, count * STEP % HOT + STEP)
            if kind == "xbzrle":
                memory[some, count % PAGE_SIZE] += 1
            elif kind == "plain":
                memory[some] = rng.integers(0, 256, (STEP, PAGE_SIZE), np.uint8)
            else:
                memory[some] = np.resize(rng.integers(97, 123, 60, np.uint8), PAGE_SIZE)

        def heard(event: trimig.Event) -> None:
            if event.name == "PASS":
                passed.append({use.name: use.pages for use in here.statistics().encodings})

        async def work() -> None:
            """Each hot page is written several times in a pass, so that it is never found dirty with the content that was sent."""
            count = 0
            while source.run_state == "running":
                write(count)
                count += 1
                await trio.sleep(0.001)

        here.add_listener(heard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(functools.partial(trimig.receive, target, "tcp:127.0.0.1:0", config, monitor=there))
            while not there.addresses:
                await there.wait_changed()
            summary = await trimig.migrate(source, there.addresses[0], config, monitor=here)
        assert (arrived == memory).all()
    assert len(passed) == 5
    later = {name: count - passed[0][name] for name, count in passed[-1].items()}
    assert sum(later.values()) >= 3 * HOT
    assert later[kind] > 0.75 * sum(later.values())
    saved = sum(use.saved_bytes for use in summary.encodings)
    if kind == "plain":
        assert abs(saved) < 0.1 * HOT * PAGE_SIZE
    else:
        assert saved > 2 * HOT * PAGE_SIZE
