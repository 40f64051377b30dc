"""The choice of the encoding from given measurements: by which a page is soonest gone."""

from __future__ import annotations

import math

import pytest

from trimig.policy.encoding import PLAIN, PLAIN_BYTES, Average, Encoding, EncodingChoice, Rates

MB = 1_000_000
XBZRLE = Encoding(name="xbzrle")
COMPRESS = Encoding(name="compress", threads=8, overlapped=True)
#: Bytes and seconds of processor time for one page: a difference of one byte, and text; and what neither can make shorter.
ONE_BYTE = {"xbzrle": (14, 20e-6), "compress": (4104, 60e-6)}
TEXT = {"xbzrle": (4104, 40e-6), "compress": (410, 30e-6)}
RANDOM = {"xbzrle": (4104, 40e-6), "compress": (4104, 90e-6)}


def chooser(
    costs: dict[str, tuple[int, float]] | None = None, *, share: float = 1.0, processors: int = 2
) -> EncodingChoice:
    """One that has measured *costs*, in threads that got *share* of a processor each."""
    choice = EncodingChoice((XBZRLE, COMPRESS), processors)
    for name, (size, seconds) in (costs or {}).items():
        choice.record(name, pages=64, size=64 * size, processor=64 * seconds, elapsed=64 * seconds / share)
    return choice


@pytest.mark.parametrize(
    ("costs", "limit", "link", "best"),
    [
        (ONE_BYTE, 30 * MB, 1000 * MB, "xbzrle"),
        (ONE_BYTE, 0, 100 * MB, "xbzrle"),
        (ONE_BYTE, 0, 3000 * MB, PLAIN),  # 20 microseconds for a page that is gone in 1.4
        (TEXT, 30 * MB, 1000 * MB, "compress"),
        (TEXT, 0, 100 * MB, "compress"),
        (TEXT, 0, 1000 * MB, PLAIN),
        (RANDOM, 1 * MB, 1000 * MB, PLAIN),
        (RANDOM, 0, 1 * MB, PLAIN),
        (ONE_BYTE, 0, 0, PLAIN),  # nothing was measured of the connection
    ],
)
def test_the_encoding_is_chosen_by_which_pages_are_soonest_gone(
    costs: dict[str, tuple[int, float]], limit: int, link: int, best: str
) -> None:
    assert chooser(costs).choose(Rates(link=link, limit=limit)) == best


def test_times_of_a_page() -> None:
    """Differences are made in turns with the sending, compressed pages while others are sent, and a limit holds for both."""
    choice = chooser(ONE_BYTE | {"compress": TEXT["compress"]})
    assert choice.page_seconds(PLAIN, Rates(link=100 * MB, limit=0)) == PLAIN_BYTES / (100 * MB)
    assert choice.page_seconds(PLAIN, Rates(link=100 * MB, limit=10 * MB)) == PLAIN_BYTES / (10 * MB)
    assert choice.page_seconds("xbzrle", Rates(link=1 * MB, limit=0)) == pytest.approx(20e-6 + 14e-6)
    assert choice.page_seconds("xbzrle", Rates(link=100 * MB, limit=MB // 10)) == pytest.approx(140e-6)
    assert choice.page_seconds("compress", Rates(link=100 * MB, limit=0)) == pytest.approx(15e-6)  # two processors
    assert choice.page_seconds("compress", Rates(link=10 * MB, limit=0)) == pytest.approx(41e-6)
    assert choice.page_seconds("compress", Rates(link=10 * MB, limit=1 * MB)) == pytest.approx(410e-6)


@pytest.mark.parametrize(
    ("share", "processors", "seconds"),
    [(1, 1, 30e-6), (1, 2, 15e-6), (1, 16, 30e-6 / 8), (1 / 8, 2, 30e-6), (0.05, 2, 75e-6)],
)
def test_free_processors_are_those_that_the_threads_get(share: float, processors: int, seconds: float) -> None:
    choice = chooser(TEXT, share=share, processors=processors)
    assert choice.page_seconds("compress", Rates(link=1000 * MB, limit=0)) == pytest.approx(seconds)


def test_a_busy_machine_sends_plain_pages() -> None:
    rates = Rates(link=150 * MB, limit=0)
    assert chooser(ONE_BYTE).choose(rates) == "xbzrle"
    assert chooser(ONE_BYTE, share=0.5).choose(rates) == PLAIN


def test_what_was_not_measured_is_not_chosen() -> None:
    choice, rates = chooser(), Rates(link=1 * MB, limit=0)
    assert choice.choose(rates) == PLAIN
    assert math.isinf(choice.page_seconds("xbzrle", rates))
    choice.record("xbzrle", pages=31, size=31, processor=0.0, elapsed=0.0)
    assert not choice.is_known("xbzrle")
    assert choice.choose(rates) == PLAIN
    choice.record("xbzrle", pages=1, size=1, processor=0.0, elapsed=0.0)
    assert choice.is_known("xbzrle")
    assert choice.choose(rates) == "xbzrle"


def test_a_small_gain_is_no_reason_to_change() -> None:
    rates = Rates(link=10 * MB, limit=0)
    assert chooser({"compress": (3700, 1e-6)}).choose(rates) == PLAIN
    choice = chooser({"compress": (3400, 1e-6)})
    assert choice.choose(rates) == "compress"
    choice.record("compress", pages=10_000, size=10_000 * 3700, processor=0.01, elapsed=0.01)
    assert choice.choose(rates) == "compress"  # as long as there is a gain
    choice.record("compress", pages=10_000, size=10_000 * 4000, processor=0.01, elapsed=0.01)
    assert choice.choose(rates) == PLAIN


def test_of_two_that_are_as_fast_the_one_is_taken_that_needs_less_of_a_processor() -> None:
    costs = {"xbzrle": (1000, 20e-6), "compress": (950, 100e-6)}
    assert chooser(costs).choose(Rates(link=1000 * MB, limit=1 * MB)) == "xbzrle"


def test_a_change_of_the_guest_is_followed() -> None:
    """Old measurements count less and less: after 256 pages half."""
    choice, rates = chooser(ONE_BYTE), Rates(link=1000 * MB, limit=30 * MB)
    assert choice.choose(rates) == "xbzrle"
    needed = 0
    while choice.choose(rates) == "xbzrle" and needed < 4096:
        choice.record("xbzrle", pages=64, size=64 * PLAIN_BYTES, processor=64 * 40e-6, elapsed=64 * 40e-6)
        needed += 64
    assert choice.present == PLAIN
    assert 256 <= needed <= 2048
    mean = Average(half_life=100)
    mean.add(0.0, 10)
    mean.add(1.0, 100)
    assert mean.value == pytest.approx(0.5)


def test_without_leaves_one_out() -> None:
    choice, rates = chooser({"xbzrle": (14, 1e-6), "compress": (400, 1e-6)}), Rates(link=10 * MB, limit=0)
    assert choice.choose(rates, without="xbzrle") == "compress"
    assert choice.choose(rates) == "xbzrle"


@pytest.mark.parametrize("costs", [ONE_BYTE, TEXT, RANDOM, {"xbzrle": (4104, 5e-3), "compress": (20000, 1.0)}])
@pytest.mark.parametrize("rates", [Rates(link=3000 * MB, limit=0), Rates(link=1 * MB, limit=0), Rates(link=0, limit=0)])
def test_what_was_not_chosen_is_tried_for_a_bounded_part_of_the_time(
    costs: dict[str, tuple[int, float]], rates: Rates
) -> None:
    choice = chooser(costs)
    best = choice.page_seconds(choice.choose(rates), rates)
    for name in ("xbzrle", "compress"):
        every = choice.one_in(name, rates)
        assert every.bit_count() == 1
        assert 16 <= every <= 4096
        if every < 4096:  # the most, from which on it is not tried less often
            assert choice.page_seconds(name, rates) / every <= best / 16


def test_a_limit_below_the_rate_of_the_connection_is_the_bottleneck() -> None:
    assert Rates(link=10, limit=9).bound
    assert not Rates(link=10, limit=11).bound
    assert not Rates(link=10, limit=0).bound
    assert not Rates(link=0, limit=9).bound
