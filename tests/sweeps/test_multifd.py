"""U3, gap G14: a destination with three data channels, disturbed at every point of each connection."""

from __future__ import annotations

import pytest

from tests.sweeps.multifd import said, scenario
from tests.sweeps.sampled import NearChanges, sweep
from trimig.testing import CancelSweep, FaultSweep, TimeLeap

pytestmark = pytest.mark.timeout(600)
DONE = ("returned", "returned")
#: Another third of the points for each of the three seeds: so each point runs once.
THIRDS = 3


def faults(*, under: int) -> NearChanges:
    """At every byte of one connection, except far inside a page."""
    return NearChanges(sweep=FaultSweep(), sent=said(under=under))


@pytest.mark.parametrize(
    "under",
    [
        pytest.param(0, id="main"),
        pytest.param(1, id="channel 0", marks=pytest.mark.full),
        pytest.param(2, id="channel 1"),
        pytest.param(3, id="channel 2", marks=pytest.mark.full),
    ],
)
def test_each_connection_is_cut_at_every_byte(under: int) -> None:
    """It ends with an error, or everything has come: the attempt neither hangs nor completes without a page."""
    outcomes = sweep(scenario(under=under), faults(under=under), every=THIRDS, size=6).outcomes.keys()
    ends = {DONE, ("returned", "TransportFailed")}
    # A main connection that ends before it is known as one is dropped, and another one may come.
    assert outcomes == (ends | {("returned", "MigrationCancelled")} if under == 0 else ends)


@pytest.mark.parametrize("compression", [pytest.param("zlib", marks=pytest.mark.full), "zstd"])
def test_a_compressed_channel_is_cut_at_every_byte(compression: str) -> None:
    sent = said(under=2, compression=compression, new=False)
    cuts = NearChanges(sweep=FaultSweep(directions=("a->b",)), sent=sent)
    outcomes = sweep(scenario(under=2, compression=compression, new=False), cuts, every=THIRDS, size=6).outcomes
    assert outcomes.keys() == {DONE, ("returned", "TransportFailed")}


@pytest.mark.parametrize("new", [False, True], ids=["7.2", "9.0"])
def test_cancel_at_every_edge(*, new: bool) -> None:
    outcomes = sweep(scenario(under=0, new=new), CancelSweep(victims=("destination",)), size=8).outcomes.keys()
    assert {DONE, ("returned", "cancelled")} <= outcomes


def test_time_leaps_at_every_edge() -> None:
    """All deadlines expire at once."""
    outcomes = sweep(scenario(under=0), TimeLeap(), size=6).outcomes.keys()
    assert DONE in outcomes
    assert outcomes <= {DONE, ("returned", "TransportFailed"), ("returned", "GuestFailed")}
