"""The workload's arithmetic: what every page must hold, and that a lost or replayed write shows."""

from __future__ import annotations

import dataclasses
import os
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimig.errors import RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.guests.worker.messages import WorkerRequest
from trimig.guests.workload import state as workload
from trimig.guests.workload import worker
from trimig.guests.workload.state import (
    WORDS_PER_PAGE,
    Journal,
    Words,
    WorkloadState,
    fill,
    initialise,
    last_writes,
    pages_of_writes,
    verify,
    verify_slice,
    write,
)
from trimig.guests.workload.worker import Pacer

SMALL = WorkloadState(seed=7, ram_pages=300, hot_pages=40, dirty_rate=1 << 20)


def fresh(state: WorkloadState) -> Words:
    words = np.zeros((state.ram_pages, WORDS_PER_PAGE), dtype=np.uint64)
    initialise(state, words)
    return words


@given(
    seed=st.integers(0, 2**64 - 1),
    hot=st.integers(0, 200),
    cold=st.integers(1, 200),
    writes=st.integers(0, 700),
)
@settings(deadline=None)
def test_the_closed_form_agrees_with_playing_the_writes_one_by_one(seed: int, hot: int, cold: int, writes: int) -> None:
    writes = writes if hot else 0
    state = WorkloadState(seed=seed, ram_pages=hot + cold, hot_pages=hot, dirty_rate=0, writes=writes)
    played = np.zeros(hot, dtype=np.int64)
    if hot:
        for number, page in enumerate(pages_of_writes(state, 1, writes).tolist(), 1):
            played[page] = number
    assert (last_writes(state, 0, hot) == played).all()
    assert (last_writes(state, hot, cold) <= 0).all()


@pytest.mark.parametrize("hot", [1, 2, 3, 4, 64, 8191, 8192])
def test_every_hot_page_is_hit_once_in_a_round(hot: int) -> None:
    state = WorkloadState(seed=99, ram_pages=8192, hot_pages=hot, dirty_rate=0)
    assert sorted(pages_of_writes(state, 12345, hot).tolist()) == list(range(hot))


def test_the_closed_form_holds_after_very_many_writes_to_very_many_pages() -> None:
    state = WorkloadState(seed=3, ram_pages=2**31 - 1, hot_pages=2**31 - 1, dirty_rate=0, writes=2**62 - 1)
    pages = pages_of_writes(state, state.writes - 9, 10)
    for number, page in zip(range(state.writes - 9, state.writes + 1), pages.tolist(), strict=True):
        assert last_writes(state, page, 1).tolist() == [number]


def test_a_quarter_of_the_cold_pages_is_zero_and_is_not_touched() -> None:
    state = WorkloadState(seed=1, ram_pages=64 + 1024, hot_pages=64, dirty_rate=0)
    words = fresh(state)
    zero = (words == 0).all(axis=1)
    assert zero.sum() == 256
    assert not zero[:64].any()
    assert (zero == (last_writes(state, 0, state.ram_pages) == -1)).all()


def test_memory_agrees_with_its_journal_after_any_number_of_writes() -> None:
    state, words = SMALL, fresh(SMALL)
    for count in (0, 1, 5, 39, 40, 200, 3):
        state = write(state, words, count)
        assert verify(state, words).ok
    assert state.writes == 0 + 1 + 5 + 39 + 40 + 40 + 3  # at most one round at a time
    assert str(verify(state, words)) == "all 300 pages are as 128 writes left them"


def test_other_seeds_give_other_memory() -> None:
    assert (fresh(SMALL)[:40] != fresh(dataclasses.replace(SMALL, seed=8))[:40]).all(axis=1).all()


def test_a_single_wrong_bit_anywhere_is_found() -> None:
    state, words = SMALL, fresh(SMALL)
    state = write(state, words, 17)
    for page, word in ((0, 0), (39, 511), (40, 3), (299, 511), (127, 7), (128, 0), (40 + 64 * 3, 1)):
        words[page, word] ^= np.uint64(1 << 63)
        result = verify(state, words)
        assert (result.ok, result.wrong_page, result.wrong_word) == (False, page, word)
        assert result.expected is not None
        assert result.found == result.expected ^ (1 << 63)
        assert result.found_write is None
        assert f"page {page}, word {word}" in str(result)
        words[page, word] ^= np.uint64(1 << 63)
    assert verify(state, words).ok


def test_a_lost_write_shows_as_the_one_before_and_a_replayed_one_as_the_next() -> None:
    state, words = SMALL, fresh(SMALL)
    for _ in range(3):
        state = write(state, words, 40)
    lost, before = state, words.copy()
    state = write(state, words, 1)
    page = int(pages_of_writes(state, 121, 1)[0])
    result = verify(state, before)  # write 121 did not arrive
    assert (result.ok, result.wrong_page, result.found_write) == (False, page, 81)
    result = verify(lost, words)  # write 121 was made here, and its number forgotten
    assert (result.ok, result.wrong_page, result.found_write) == (False, page, 121)
    assert "as write 121 left it" in str(result)


def test_a_write_too_early_to_a_page_that_was_never_hit_is_named() -> None:
    words = fresh(SMALL)
    page = int(pages_of_writes(SMALL, 1, 1)[0])
    write(SMALL, words, 1)
    result = verify(SMALL, words)
    assert (result.wrong_page, result.found_write) == (page, 1)


def test_slices_agree_with_the_whole() -> None:
    state, words = SMALL, fresh(SMALL)
    state = write(state, words, 30)
    words[200, 5] += np.uint64(1)
    verdicts = [verify_slice(state, words, first, 50).ok for first in range(0, 300, 50)]
    assert verdicts == [True, True, True, True, False, True]


def test_memory_of_another_size_cannot_be_verified() -> None:
    with pytest.raises(ValueError, match="300"):
        verify(SMALL, fresh(SMALL)[:299])


def test_half_of_the_pages_compresses() -> None:
    out = np.empty((64, WORDS_PER_PAGE), dtype=np.uint64)
    fill(SMALL, np.arange(64), np.full(64, 5), out)
    short = [len(zlib.compress(page.tobytes(), 1)) < PAGE_SIZE / 4 for page in out]
    assert short == [bool(page // 16 % 2) for page in range(64)]
    assert len({page.tobytes() for page in out}) == 64


def test_content_of_the_other_pages_does_not_compress() -> None:
    out = np.empty((16, WORDS_PER_PAGE), dtype=np.uint64)
    fill(SMALL, np.arange(16), np.zeros(16, dtype=np.int64), out)
    assert len(zlib.compress(out.tobytes())) > 0.99 * out.nbytes


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"ram_pages": 0},
        {"hot_pages": 301},
        {"hot_pages": -1},
        {"hot_pages": 0},
        {"dirty_rate": -1},
        {"dirty_rate": 2**48},
        {"writes": -1},
        {"writes": 2**62},
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        dataclasses.replace(SMALL, **change)


def test_the_journal_carries_the_state() -> None:
    source = Journal(dataclasses.replace(SMALL, writes=2**40))
    target = Journal(WorkloadState(seed=0, ram_pages=300, hot_pages=1, dirty_rate=0))
    payload = source.save()
    assert target.measure(memoryview(payload), 1) == len(payload)
    assert target.measure(memoryview(payload)[:-1], 1) is None
    target.load(payload, 1)
    assert target.state == source.state
    described = source.describe()
    assert sum(field["size"] for field in described["fields"]) == len(payload)
    assert (described["name"], described["instance_id"]) == ("trimig-workload", 0)


@pytest.mark.parametrize(("field", "value"), [("ram_pages", 301), ("hot_pages", 400), ("writes", 2**63)])
def test_a_journal_that_does_not_fit_leaves_the_device_unchanged(field: str, value: int) -> None:
    values = {**dataclasses.asdict(SMALL), field: value}
    target = Journal(SMALL)
    with pytest.raises(RemoteProtocolError):
        target.load(workload.Journal.vmstate.encode(values), 1)
    assert target.state == SMALL


def test_the_pacer_makes_what_is_due_and_forgets_old_arrears() -> None:
    pacer = Pacer()
    pacer.restart(100.0, 4096 * 1000)
    assert pacer.due(100.0) == 0
    assert pacer.due(100.0105) == 10
    pacer.made(10)
    assert pacer.due(100.0105) == 0
    assert pacer.due(101.0) == 51  # not the 990 of the stall
    pacer.made(51)
    assert pacer.due(101.0) == 0
    assert pacer.due(101.0025) == 2
    pacer.restart(102.0, 0)
    assert pacer.due(110.0) == 0


@pytest.mark.parametrize("throttle", [0, 20, 75, 99])
def test_throttled_worker_writes_its_share_of_the_rate(throttle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3: the worker's own program, with a clock that the test moves; its writes in ten seconds are counted."""
    now = 100.0
    monkeypatch.setattr("trimig.guests.workload.worker.time.monotonic", lambda: now)
    main = worker.WorkerMain()
    fd = os.memfd_create("test")
    os.ftruncate(fd, SMALL.ram_pages * PAGE_SIZE)
    main.ram(fd, SMALL.ram_pages * PAGE_SIZE)
    main.create(SMALL)
    main.resume()
    main.handle(WorkerRequest(1, "throttle", (str(throttle),)))
    for _ in range(10_000):
        now += 0.001
        main.tick()
    assert main.stats()["throttle"] == throttle
    full = 10 * SMALL.dirty_rate // PAGE_SIZE
    assert main.stats()["writes"] == pytest.approx(full * (100 - throttle) / 100, abs=2)
    main.handle(WorkerRequest(2, "throttle", ("0",)))
    before = main.stats()["writes"]
    for _ in range(1000):
        now += 0.001
        main.tick()
    assert main.stats()["writes"] - before == pytest.approx(full / 10, abs=2)


@pytest.mark.parametrize("write_size", [8, 64, 4088])
def test_small_writes_change_the_begin_of_a_page(write_size: int) -> None:
    """The rest stays as it was at first, and every word can still be verified."""
    state = dataclasses.replace(SMALL, write_size=write_size)
    words = fresh(state)
    before = words.copy()
    state = write(state, words, 25)
    changed = words != before
    written = write_size // 8
    assert changed.any(axis=1).sum() == 25
    assert changed[changed.any(axis=1), :written].all()
    assert not changed[:, written:].any()
    assert verify(state, words).ok
    words[3, 500] ^= np.uint64(1)
    assert (verify(state, words).wrong_page, verify(state, words).wrong_word) == (3, 500)
    assert WorkloadState.unpack(state.pack()) == state


@pytest.mark.parametrize("write_size", [0, 4, 12, 4104])
def test_writes_of_other_sizes_are_refused(write_size: int) -> None:
    with pytest.raises(ValueError, match=f"a write of {write_size} bytes"):
        dataclasses.replace(SMALL, write_size=write_size)
