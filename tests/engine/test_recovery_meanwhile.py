"""The moments of a recovery before RESUME: what the guest meets meanwhile, and how long a slow source is waited for."""

from __future__ import annotations

import dataclasses

import numpy as np
import trio

import trimig
from tests.engine.test_postcopy_bad_input import END, OPENING, PACKAGE, PAGES, able, destination, guest, part
from tests.engine.test_recovery import ASK, RESUME, Told, paused
from trimig.guest import PAGE_SIZE
from trimig.wire.return_path import PageRequest, ReceivedPages, ResumeAck, Shut, encode


async def test_a_page_may_be_asked_for_before_the_bitmap(autojump_clock: trio.testing.MockClock) -> None:
    """A QEMU does so, whose guest meets a page in the moment of the recovery: it is the first that comes."""
    told_by = Told(recovery_retry=True)
    page = encode(PageRequest(block="ram", start=5 * PAGE_SIZE, length=PAGE_SIZE))
    there = encode(PageRequest(block="ram", start=0, length=PAGE_SIZE))
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told_by.run)
            await told_by.take()
            again = await told_by.accept()
            have = np.zeros(PAGES, np.bool_)
            have[0] = True
            await again.say(page + there + page + encode(ReceivedPages(block="ram", pages=have)))
            read = b""
            while RESUME not in read:
                read += await again.stream.receive_some()
            await again.say(encode(ResumeAck()))
            while not read.endswith(END[-6:]):
                read += await again.stream.receive_some()
            await again.say(encode(Shut(status=0)))
            await again.hear_end()
    assert isinstance(told_by.outcome, trimig.Summary), told_by.outcome
    assert told_by.statuses.count("postcopy-recover") == 1
    content = [block.pages[5].tobytes() for block in told_by.guest.ram]
    pages = read.partition(RESUME)[2]
    assert 0 <= pages.find(content[0]) < PAGE_SIZE  # before every other page
    assert told_by.monitor.counters.page_requests == 1


async def test_what_a_guest_meets_in_a_recovery_is_asked_for_behind_resume(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Once, with the name of its block: the source of this connection has heard none yet."""
    target = guest()
    async with destination(target) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE)
        await peer.hear_that_it_lives()
        target.touches += [3]
        assert target.memory is not None
        target.memory.go_on()
        await peer.hear_until(PageRequest)
        await peer.say(part(3))
        await trio.sleep(1)
        await peer.stream.aclose()
        again = await there.reconnect()
        again.decoder.expect_bitmap("ram")
        await again.say(ASK)
        await again.hear_until(ReceivedPages)
        target.touches += [6]
        target.memory.go_on()
        await trio.sleep(1)
        await again.say(RESUME)
        await again.hear_until(PageRequest)
        said = [m for m in again.heard if not isinstance(m, ReceivedPages)]
        assert said == [ResumeAck(), PageRequest(block="ram", start=6 * PAGE_SIZE, length=PAGE_SIZE)]
        await again.say(part(4, 5, 6, 7) + END)
        await again.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary), there.outcome


async def test_a_source_that_is_slow_to_resume_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """Its machine is busy; nothing says that the time for the recovery is short."""
    async with paused(config=dataclasses.replace(able(), handover_timeout=30.0, stall_timeout=60.0)) as there:
        again = await there.reconnect()
        again.decoder.expect_bitmap("ram")
        await again.say(ASK)
        await again.hear_until(ReceivedPages)
        await trio.sleep(25)
        await again.say(RESUME + part(3, 4, 5, 6, 7) + END)
        await again.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary), there.outcome
