"""The advice to turn an encoding on, with its effect, from given samples."""

from __future__ import annotations

import dataclasses

import pytest

from trimig.monitor.statistics import PageCost
from trimig.policy.convergence import Bounds, Progress, explain
from trimig.policy.encoding_advice import encoding_advice, predicted_downtime

MiB = 1 << 20
BYTE = PageCost(size=16, seconds=20e-6)
TEXT = PageCost(size=1024, seconds=30e-6)
XBZRLE = "send differences (capability xbzrle)"
MULTIFD = "compress pages (capability multifd with multifd-compression zstd, at both sides)"
COMPRESS = "compress pages (capability compress, at both sides)"


@pytest.mark.parametrize(
    ("cost", "bandwidth", "processors", "seconds"),
    [
        (BYTE, 16e6, 0, 1024 * 21e-6),  # one after the other
        (BYTE, 1e12, 0, 1024 * 20e-6),
        (TEXT, 1024e6, 2, 1024 * 15e-6),  # at the same time, by two processors
        (TEXT, 1024e6, 1, 1024 * 30e-6),
        (TEXT, 10.24e6, 2, 1024 * 100e-6),
    ],
)
def test_predicted_downtime(cost: PageCost, bandwidth: float, processors: int, seconds: float) -> None:
    """Of a rest of 1024 pages."""
    assert predicted_downtime(4 * MiB, bandwidth, cost, processors=processors) == pytest.approx(seconds, rel=1e-3)


def advice(samples: dict[str, PageCost], *capabilities: str, bandwidth: float = 10.24e6) -> tuple[str, ...]:
    """For a rest of 4 MiB."""
    downtime = 4 * MiB / bandwidth
    return encoding_advice(4 * MiB, bandwidth, downtime, capabilities=capabilities, samples=samples, processors=2)


def test_what_helps_most_comes_first() -> None:
    xbzrle = f"{XBZRLE}: a dirtied page takes 16 B then, and the rest 22 ms"
    multifd = f"{MULTIFD}: a dirtied page takes 1 KiB then, and the rest 102 ms"
    compress = f"{COMPRESS}: a dirtied page takes 1 KiB then, and the rest 102 ms"
    both = {"xbzrle": BYTE, "zlib": TEXT}
    assert advice(both, "xbzrle", "multifd") == (xbzrle, multifd)
    assert advice(both, "compress", "xbzrle") == (xbzrle, compress)
    assert advice({"xbzrle": TEXT, "zlib": BYTE}, "xbzrle", "multifd")[0].startswith(MULTIFD)
    assert advice(both, "xbzrle") == (xbzrle,)
    assert advice(both) == ()


def test_what_was_not_measured_is_said_to_be_so_and_stands_last() -> None:
    assert advice({}, "xbzrle", "multifd") == (
        f"{MULTIFD}: its effect was not measured",
        f"{XBZRLE}: its effect was not measured",
    )
    assert advice({"zlib": TEXT}, "xbzrle", "multifd")[1] == f"{XBZRLE}: its effect was not measured"


def test_what_does_not_help_is_not_named() -> None:
    """Random data; and an encoder that is slower than the connection."""
    assert advice({"xbzrle": PageCost(size=4104, seconds=40e-6)}, "xbzrle") == ()
    assert advice({"xbzrle": BYTE}, "xbzrle", bandwidth=1e9) == ()
    assert len(advice({"xbzrle": BYTE}, "xbzrle", bandwidth=100e6)) == 1


def test_explanation_names_the_encoding_and_the_throttle_with_their_effects() -> None:
    progress = Progress(
        remaining=4 * MiB, bandwidth=10 * MiB, iteration=3, elapsed=3.0, dirty_rate=20.0 * MiB, samples={"xbzrle": BYTE}
    )
    bounds = Bounds(downtime_limit=0.05, encodings=("xbzrle", "multifd"), processors=2)
    why = explain(progress, bounds)
    assert why.advice == (
        "raise downtime-limit to 441 ms",
        f"{XBZRLE}: a dirtied page takes 16 B then, and the rest 22 ms",
        f"{MULTIFD}: its effect was not measured",
        "throttle the guest by 55 % (capability auto-converge), which leaves 9 MiB/s dirtied",
    )
    assert explain(dataclasses.replace(progress, dirty_rate=5.0 * MiB, least=float(MiB)), bounds).advice[-1] == (
        "throttle the guest by 89 % (capability auto-converge), which leaves about 44 ms of downtime"
    )
