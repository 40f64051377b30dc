"""How many pages go together."""

from __future__ import annotations

import trio
import trio.testing

from trimig.channel.channels import Channels
from trimig.channel.limiter import Limiter
from trimig.channel.vectored import BATCH_PAGES
from trimig.monitor.statistics import Counters

MANY = 1 << 20


async def grants(limiter: Limiter, seconds: float, count: int) -> list[int]:
    """What is granted, where each batch takes *seconds* to send."""
    found = []
    for _ in range(count):
        found.append(await limiter.pages(MANY))
        await trio.sleep(seconds)
    return found


async def test_batches_grow_on_a_fast_connection_and_shrink_on_a_slow_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A change of the limit waits for the end of a batch, so one should not take much longer than a window."""
    limiter = Limiter(Channels(), 0, Counters())
    assert await grants(limiter, 0.01, 5) == [1024, 2048, 4096, BATCH_PAGES, BATCH_PAGES]
    assert await grants(limiter, 0.07, 3) == [BATCH_PAGES] * 3
    assert await grants(limiter, 0.3, 8) == [BATCH_PAGES, 4096, 2048, 1024, 512, 256, 256, 256]
    assert await grants(limiter, 0.01, 3) == [256, 512, 1024]


async def test_a_batch_that_the_limit_or_the_rest_made_small_says_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limiter = Limiter(Channels(), 10_000_000, Counters())
    assert await limiter.pages(MANY) == 1_000_000 // 4104  # one window of the limit
    limiter.lift()
    assert await limiter.pages(10) == 10
    assert await limiter.pages(MANY) == 1024
