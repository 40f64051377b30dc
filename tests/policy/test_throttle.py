"""Auto-converge: when the throttle begins, rises and stays, beside QEMU's own arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.policy.throttle import AutoConverge, Steps

STEPS: Final = Steps(threshold=50, initial=20, increment=10, tailslow=False, maximum=99)
MiB: Final = 1 << 20


class Played:
    """A guest that is synced again and again."""

    def __init__(self, steps: Steps = STEPS) -> None:
        self.steps = steps
        self.now, self.dirtied, self.sent, self.throttle = 5.0, 700 * MiB, 900 * MiB, 0
        self._policy = AutoConverge(self.now, dirtied=self.dirtied, sent=self.sent)

    def sync(self, seconds: float, dirtied: int, sent: int) -> int:
        """One sync *seconds* after the last; the throttle behind it."""
        self.now, self.dirtied, self.sent = self.now + seconds, self.dirtied + dirtied, self.sent + sent
        self.throttle = self._policy.synced(
            self.now, dirtied=self.dirtied, sent=self.sent, throttle=self.throttle, steps=self.steps
        )
        return self.throttle


def test_throttle_rises_at_each_second_period() -> None:
    """S3: 20, 30, 40, as QEMU's real sequence."""
    guest = Played()
    assert [guest.sync(1.1, 51 * MiB, 100 * MiB) for _ in range(7)] == [0, 20, 20, 30, 30, 40, 40]


def test_periods_need_not_follow_each_other() -> None:
    """QEMU does not forget a bad period when a good one comes."""
    guest = Played()
    assert [guest.sync(1.1, dirty, 100) for dirty in (51, 50, 50, 51, 10, 51, 51)] == [0, 0, 0, 20, 20, 20, 30]


def test_short_passes_are_one_period() -> None:
    """A sync that comes within a second ends no period, and its pages count in the period."""
    guest = Played()
    assert [guest.sync(0.25, 20, 30) for _ in range(4)] == [0] * 4
    assert guest.sync(0.01, 0, 0) == 0  # the first period
    assert [guest.sync(0.25, 20, 30) for _ in range(5)] == [0] * 4 + [20]


def test_throttle_stops_at_its_maximum() -> None:
    guest = Played(dataclasses.replace(STEPS, initial=15, increment=50, maximum=70))
    assert [guest.sync(2, 2, 1) for _ in range(8)] == [0, 15, 15, 65, 65, 70, 70, 70]


def test_lower_maximum_counts_at_the_next_sync() -> None:
    guest = Played(dataclasses.replace(STEPS, initial=80))
    assert [guest.sync(2, 2, 1) for _ in range(2)] == [0, 80]
    guest.steps = dataclasses.replace(STEPS, maximum=30)
    assert guest.sync(0.1, 0, 0) == 30


@pytest.mark.parametrize(
    ("throttle", "dirtied", "step"),
    [
        (20, 1000, 10),  # 40 of the 80 percent would be enough: more than one step
        (80, 1000, 10),
        (80, 501, 1),  # 19.96 of 20 percent would be enough: QEMU cuts that to 19
        (80, 555, 2),
        (98, 1000, 1),
    ],
)
def test_tailslow_takes_smaller_steps_at_the_end(throttle: int, dirtied: int, step: int) -> None:
    guest = Played(dataclasses.replace(STEPS, tailslow=True))
    guest.throttle = throttle
    guest.sync(2, dirtied, 1000)
    assert guest.sync(2, dirtied, 1000) == throttle + step


def as_qemu(throttle: int, dirtied: int, sent: int, steps: Steps) -> int:
    """``mig_throttle_guest_down`` and ``cpu_throttle_set`` of QEMU 7.2, for a second bad period."""
    threshold = sent * steps.threshold // 100
    if dirtied <= threshold:
        return throttle
    if throttle == 0:
        wanted = steps.initial
    elif not steps.tailslow:
        wanted = min(throttle + steps.increment, steps.maximum)
    else:
        cpu_now = 100 - throttle
        cpu_ideal = int(cpu_now * (threshold * 1.0 / dirtied))
        wanted = min(throttle + min(cpu_now - cpu_ideal, steps.increment), steps.maximum)
    return max(1, min(99, wanted))


@given(
    throttle=st.integers(0, 99),
    dirtied=st.integers(0, 1 << 40),
    sent=st.integers(0, 1 << 40),
    threshold=st.integers(1, 100),
    initial=st.integers(1, 50),
    increment=st.integers(1, 99),
    tailslow=st.booleans(),
    maximum=st.integers(50, 99),
)
def test_steps_are_those_of_qemu(
    throttle: int, dirtied: int, sent: int, threshold: int, initial: int, increment: int, tailslow: bool, maximum: int
) -> None:
    """S3, D5: for every legal set of parameters."""
    steps = Steps(threshold=threshold, initial=initial, increment=increment, tailslow=tailslow, maximum=maximum)
    guest = Played(steps)
    guest.throttle = throttle = min(throttle, maximum)
    assert guest.sync(2, dirtied, sent) == throttle
    assert guest.sync(2, dirtied, sent) == as_qemu(throttle, dirtied, sent, steps)
