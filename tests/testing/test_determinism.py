"""The scheduler seed does what the sweeps presume; an upgrade of trio that changes it breaks here first."""

from __future__ import annotations

import pytest
import trio

from trimig.testing import deterministic_schedule


async def interleaving() -> str:
    trace = []

    async def step(name: str) -> None:
        for _ in range(20):
            trace.append(name)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for name in "abcde":
            nursery.start_soon(step, name)
    return "".join(trace)


def traced(seed: int) -> str:
    with deterministic_schedule(seed):
        return trio.run(interleaving)


def test_equal_seeds_give_equal_traces() -> None:
    assert len({traced(seed=5) for _ in range(5)}) == 1


def test_different_seeds_give_different_traces() -> None:
    assert len({traced(seed) for seed in range(6)}) == 6


def test_the_state_of_the_scheduler_is_given_back_after_an_error() -> None:
    run = vars(trio._core._run)
    before = run["_ALLOW_DETERMINISTIC_SCHEDULING"], run["_r"].getstate()
    with pytest.raises(ZeroDivisionError), deterministic_schedule(3):
        run["_r"].seed(1 // 0)
    assert (run["_ALLOW_DETERMINISTIC_SCHEDULING"], run["_r"].getstate()) == before


def test_a_trio_without_the_seed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING")
    with pytest.raises(RuntimeError, match="no scheduler seed"), deterministic_schedule(3):
        pass
