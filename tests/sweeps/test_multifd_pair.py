"""T1, T3, T5, T7 with multifd on both sides: a main connection and three data channels, disturbed one by one at any point."""

from __future__ import annotations

import pytest

from tests.sweeps.multifd_pair import scenario
from tests.sweeps.sampled import sweep
from trimig.testing import CancelSweep, FaultSweep, TimeLeap

pytestmark = pytest.mark.timeout(600)

#: Points that are drawn beside the outermost ones, which are many: there are two tasks for each channel on each side.
DRAWN = 5


def full(*values: object) -> object:
    """A case that runs with ``-m full`` only."""
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("victims", "profile"),
    [
        (("source",), "qemu-7.2"),
        full(("source",), "qemu-11.1"),
        full(("destination",), "qemu-7.2"),
        full(("destination",), "qemu-11.1"),
    ],
)
def test_cancel_at_every_edge(victims: tuple[str, ...], profile: str) -> None:
    """F10, L12: a cancelled migration leaves nothing behind on any connection; after the commit it has happened."""
    report = sweep(scenario(profile=profile), CancelSweep(victims=victims), size=DRAWN)
    assert ("returned", "returned", "destination") in report.outcomes
    assert any("cancelled" in str(outcome) for outcome in report.outcomes)


@pytest.mark.parametrize(
    ("disturbed", "profile"),
    [
        (0, "qemu-7.2"),
        (1, "qemu-11.1"),
        *(full(n, profile) for profile in ("qemu-7.2", "qemu-11.1") for n in range(4) if n or profile == "qemu-11.1"),
    ],
)
def test_each_connection_breaks_at_every_byte(disturbed: int, profile: str) -> None:
    """T1, L9: the guest is on one side, whichever connection breaks and where."""
    faults = FaultSweep(kinds=("eof", "reset", "blackhole"))
    report = sweep(scenario(profile=profile, disturbed=disturbed), faults, every=97, size=DRAWN)
    assert ("TransportFailed", "TransportFailed", "source") in report.outcomes


def test_compressed_channels_break() -> None:
    """T1: the same with a stream of zlib for each channel."""
    faults = FaultSweep(kinds=("eof",))
    sweep(scenario(profile="qemu-11.1", compression="zlib", disturbed=2), faults, every=97, size=DRAWN)


@pytest.mark.full
def test_time_leaps_at_every_edge() -> None:
    """T3: all timers expire at once."""
    sweep(scenario(), TimeLeap())
