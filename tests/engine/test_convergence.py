"""When a source stops iterating, how fast it sends, and what can be changed meanwhile."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running
from trimig.status import Status
from trimig.testing import ScriptedGuest, VirtualLink

#: Bytes per second of the link where it matters: 250 pages or so.
RATE = 1_000_000


def eager() -> ScriptedGuest:
    """Writes all of its 64 pages again and again."""
    return running(pages=64, rate=100_000)


def slow_link(rate: float = RATE) -> VirtualLink:
    """A link that takes no more than its rate."""
    return VirtualLink(rate=rate, window=8192)


async def test_guest_that_writes_less_than_fits_converges(autojump_clock: trio.testing.MockClock) -> None:
    """L6: 20 pages a second need 80 kB/s of the megabyte per second."""
    pair = Pair(running(pages=64, rate=20), link=slow_link(), config_here=config(downtime_limit=10))
    here, _ = await pair.both()
    assert 1 < here.iterations <= 4
    assert here.downtime < 0.030
    assert pair.source.digest() == pair.target.digest()


async def test_eager_guest_makes_the_migration_fail_at_its_bound(autojump_clock: trio.testing.MockClock) -> None:
    """L6, L12: the sentence has the figures, and the guest was never stopped."""
    pair = Pair(eager(), link=slow_link(), config_here=config(downtime_limit=50, max_iterations=3))
    here, there = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert here.owner is trimig.Ownership.SOURCE
    text = str(here)
    assert "no convergence within 3 iterations" in text
    assert "MiB/s are dirtied" in text
    assert "against a limit of 50 ms" in text
    assert "pause" not in pair.source.events()
    assert isinstance(there, trimig.PeerFailed)
    assert str(there) == f"the source ended the migration: {text}"
    assert pair.here.info()["error-desc"] == text


async def test_eager_guest_is_switched_over_if_told_so(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair(
        eager(), link=slow_link(), config_here=config(downtime_limit=50, max_iterations=3, on_bound="switchover")
    )
    here, _ = await pair.both()
    assert here.iterations == 3
    assert here.downtime > 0.2
    assert pair.source.digest() == pair.target.digest()


async def test_bound_on_time(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair(eager(), link=slow_link(), config_here=config(downtime_limit=50, max_total_time=2.0))
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert "(the limit is 2 s)" in str(here)
    assert 2.0 <= trio.current_time() < 2.5


async def test_downtime_limit_raised_while_it_runs(autojump_clock: trio.testing.MockClock) -> None:
    """D16: the next decision uses it."""
    pair = Pair(eager(), link=slow_link(), config_here=config(downtime_limit=10))

    async def user() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await trio.sleep(3)
        assert pair.here.status is Status.ACTIVE
        pair.here.set_parameters(downtime_limit=2000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(user)
        here, _ = await pair.both()
    assert 3 < here.total_time < 4.5


async def test_pages_of_zeros_count_with_the_bytes_that_they_take(autojump_clock: trio.testing.MockClock) -> None:
    """Pages whose zeros are found by a look take nine bytes each, and the limit counts nine bytes for each."""
    pair = Pair(
        running(pages=2048, content="zero"), link=VirtualLink(rate=100e6), config_here=config(max_bandwidth=200_000)
    )
    here, _ = await pair.both()
    assert here.zero_pages >= 2048
    assert here.total_time < 2, "as pages of data they would take 42 s"


@pytest.mark.parametrize("limit", [200_000, 1_000_000])
async def test_rate_limit_holds_over_two_seconds(autojump_clock: trio.testing.MockClock, limit: int) -> None:
    """L7: within 5 % on a link that is much faster."""
    pair = Pair(
        running(pages=limit * 4 // 4096, content="random"),
        link=VirtualLink(rate=100e6),
        config_here=config(max_bandwidth=limit),
    )
    marks: list[int] = []

    async def watch() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await trio.sleep(0.5)
        marks.append(pair.link.sent("a->b"))
        await trio.sleep(2)
        marks.append(pair.link.sent("a->b"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await pair.both()
    assert (marks[1] - marks[0]) / 2 == pytest.approx(limit, rel=0.05)


async def test_no_limit(autojump_clock: trio.testing.MockClock) -> None:
    """L7: 0 is as fast as the link."""
    pair = Pair(running(pages=256, content="random"), link=VirtualLink(rate=10e6), config_here=config(max_bandwidth=0))
    here, _ = await pair.both()
    assert here.total_time == pytest.approx(256 * 4104 / 10e6, rel=0.05)


async def test_rate_limit_changed_while_it_runs(autojump_clock: trio.testing.MockClock) -> None:
    """D13: the rate follows within 200 ms, up and down."""
    pair = Pair(
        running(pages=1024, content="random"), link=VirtualLink(rate=100e6), config_here=config(max_bandwidth=100_000)
    )
    rates: list[float] = []

    async def user() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        for limit in (100_000, 1_000_000, 50_000):
            pair.here.set_parameters(max_bandwidth=limit)
            await trio.sleep(0.2)
            before = pair.link.sent("a->b")
            await trio.sleep(1)
            rates.append((pair.link.sent("a->b") - before) / limit)
        pair.here.set_parameters(max_bandwidth=0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(user)
        await pair.both()
    assert rates == pytest.approx([1, 1, 1], rel=0.1)


async def test_transport_without_a_byte_count_is_measured_over_whole_writes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """L8: a megabyte in a slow write that ends in one window was not sent in that window."""
    pair = Pair(running(pages=512, content="random"), link=slow_link(), config_here=config(downtime_limit=50))
    seen: list[float] = []

    async def watch() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        while pair.here.status is Status.ACTIVE:
            await trio.sleep(0.05)
            seen.append(pair.here.statistics().bandwidth)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await pair.both()
    assert max(seen) < 1.4 * RATE
    assert sum(seen) / len(seen) == pytest.approx(RATE, rel=0.2)


async def test_slow_write_that_advances_is_no_stall(autojump_clock: trio.testing.MockClock) -> None:
    """T3: half a megabyte at 30 kB/s takes longer than the stall timeout, and is sent."""
    pair = Pair(running(pages=128, content="random"), link=slow_link(30_000), config_here=config(stall_timeout=5.0))
    here, _ = await pair.both()
    assert here.total_time > 15


async def test_limit_does_not_hold_while_the_guest_stands_still(autojump_clock: trio.testing.MockClock) -> None:
    """M5: what is left is sent as fast as the transport takes it."""
    pair = Pair(
        running(pages=64, rate=100_000),
        link=VirtualLink(rate=100e6),
        config_here=config(max_bandwidth=100_000, max_iterations=1, on_bound="switchover"),
    )
    here, _ = await pair.both()
    assert here.total_time > 2
    assert here.downtime < 0.1


async def test_expected_downtime_starts_at_the_limit(autojump_clock: trio.testing.MockClock) -> None:
    """G14, G15, L8: then it is what is left over what the link takes."""
    pair = Pair(eager(), link=slow_link(), config_here=config(downtime_limit=77, max_iterations=4))
    seen: list[int] = []

    async def watch() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        seen.append(pair.here.info()["expected-downtime"])
        await trio.sleep(0.7)
        seen.append(pair.here.info()["expected-downtime"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await pair.both()
    assert seen[0] == 77
    assert seen[1] == pytest.approx(64 * 4096 / RATE * 1000, rel=0.2)
