"""PING 0x42: a source from QEMU 11.1 on takes its guest back unless it has read that the guest runs at the destination.

As the destination of such a source: the answer is sent when the guest lives, and until something shows that it was read, a
lost connection stops the guest. As a source: one of the two answers says that the guest is there.
"""

from __future__ import annotations

import pytest
import trio

import trimig
from tests.engine.test_order import made
from tests.engine.test_postcopy_bad_input import (
    ALL,
    CLOSE,
    END,
    OPENING,
    PAGES,
    destination,
    devices,
    part,
)
from tests.engine.test_recovery import ASK, RESUME, Told, answer_until, told
from trimig.engine.source.switchover import PING_QUEUED
from trimig.errors import HandoverUncertain, Ownership
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.wire import Command, Section
from trimig.wire import encoder as wire
from trimig.wire import postcopy as pc
from trimig.wire.return_path import Pong, ReceivedPages, ResumeAck, Shut, encode

#: As a source from 11.1 on sends it.
PACKAGE = pc.packaged(
    wire.command(Command.POSTCOPY_LISTEN)
    + devices()
    + wire.ping(3)
    + wire.ping(0x42)
    + wire.command(Command.POSTCOPY_RUN)
)


def owner_of(monitor: MonitorCore) -> Ownership:
    return monitor.owner


KINDS = ["scripted", "lazy application", "parked"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_break_before_anything_shows_that_the_answer_was_read(
    autojump_clock: trio.testing.MockClock, kind: str
) -> None:
    """Gap G24: the guest stands still, and its owner is unknown; a recovery is the proof, and it runs on."""
    runs = "inmigrate" if kind == "parked" else "running"
    async with made(kind) as target, destination(target) as there:
        statuses = told(there.monitor)
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE + part(3))
        await peer.hear_that_it_lives()
        await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        assert target.run_state == runs
        await peer.stream.aclose()
        await there.monitor.wait_status(Status.POSTCOPY_UNCERTAIN)
        assert owner_of(there.monitor) is Ownership.UNKNOWN
        assert target.run_state == ("inmigrate" if kind == "parked" else "paused")
        # A stranger proves nothing.
        there.monitor.recover("again")
        stranger = await there.connect()
        await stranger.say(END)
        await stranger.hear()
        assert owner_of(there.monitor) is Ownership.UNKNOWN
        there.monitor.recover("again")
        again = await there.connect()
        again.decoder.expect_bitmap("ram")
        await again.say(ASK)
        await again.hear_until(ReceivedPages)
        assert target.run_state == runs
        assert owner_of(there.monitor) is Ownership.DESTINATION
        await again.say(RESUME)
        await again.hear_until(ResumeAck)
        await again.say(part(*ALL[4:]) + END)
        await again.hear_until(Shut)
        assert all((block.pages == 5).all() for block in target.ram)
    assert isinstance(there.outcome, trimig.Summary)
    assert statuses == [
        "setup", "active", "handover", "postcopy-active", "postcopy-uncertain", "postcopy-recover", "postcopy-active",
        "completed",
    ][-len(statuses) :]  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("truth", [Ownership.SOURCE, Ownership.DESTINATION])
async def test_given_up_in_doubt(autojump_clock: trio.testing.MockClock, truth: Ownership, *, whole: bool) -> None:
    """Gap G24: also with all of its memory; then the caller settles the owner."""
    async with made("scripted") as target, destination(target) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE + part(*ALL[3 : PAGES if whole else 5]))
        await peer.hear_that_it_lives()
        await peer.stream.aclose()
        await there.monitor.wait_status(Status.POSTCOPY_UNCERTAIN)
        there.monitor.abandon("enough")
    error = there.outcome
    assert isinstance(error, HandoverUncertain)
    assert there.monitor.status is Status.UNCERTAIN
    assert owner_of(there.monitor) is error.owner is Ownership.UNKNOWN
    assert target.run_state == "paused"
    await error.settle(truth)
    assert owner_of(there.monitor) is truth
    # With all of its memory here it runs on.
    assert target.run_state == ("running" if whole and truth is Ownership.DESTINATION else "paused")
    assert target.owner is (trimig.Owner.HERE if truth is Ownership.DESTINATION else trimig.Owner.ELSEWHERE)
    if truth is Ownership.SOURCE:
        assert there.monitor.status.value == "failed"
    else:
        assert there.monitor.status.value == ("completed" if whole else "postcopy-lost")


@pytest.mark.parametrize("what", ["END", "another trimig", "an older source"])
async def test_where_there_is_no_doubt_it_runs_on(autojump_clock: trio.testing.MockClock, what: str) -> None:
    """Gap G24: END comes only from a source that has read the answer; a trimig never takes its guest back for want of it."""
    end = wire.section_continue(Section.END, 2) + CLOSE
    package = PACKAGE
    opening = OPENING
    if what == "another trimig":
        opening, end = OPENING + wire.ping(PING_QUEUED), b""
    elif what == "an older source":
        package, end = PACKAGE.replace(wire.ping(0x42), b""), b""
        package = pc.packaged(package[9:])
    async with made("scripted") as target, destination(target) as there:
        peer = await there.connect()
        await peer.say(opening + part(0, 1, 2) + package + part(*ALL[3:6]) + end)
        await peer.hear_that_it_lives()
        await peer.stream.send_eof()
        await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        assert target.run_state == "running"
        assert owner_of(there.monitor) is Ownership.DESTINATION
        there.monitor.abandon("enough")
    assert isinstance(there.outcome, trimig.PostcopyLost)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_answer_comes_when_the_guest_lives(autojump_clock: trio.testing.MockClock, kind: str) -> None:
    """Not before its devices are loaded and it runs; neither of the two."""
    at: list[tuple[str, str]] = []
    async with made(kind) as target, destination(target) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE)
        while Pong(value=0x42) not in peer.heard:
            peer.heard += peer.decoder.feed(await peer.stream.receive_some())
            at.append((target.run_state, there.monitor.status.value))
        assert at[-1][0] == ("inmigrate" if kind == "parked" else "running")
        assert peer.heard.index(Pong(value=3)) < peer.heard.index(Pong(value=0x42))
        await peer.say(part(*ALL[3:]) + END)
        await peer.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary)


@pytest.mark.parametrize("value", [3, 0x42])
async def test_either_answer_says_that_the_destination_has_it(
    autojump_clock: trio.testing.MockClock, value: int
) -> None:
    """As a source: PONG 3 or PONG 0x42."""
    source = Told(recovery_retry=True)
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.run)
            peer = await source.accept()
            await answer_until(peer, wire.ping(4), but=(3, 0x42))
            assert source.monitor.status is Status.HANDOVER
            await peer.say(encode(Pong(value=value)))
            await source.monitor.wait_status(Status.POSTCOPY_ACTIVE)
            await peer.stream.aclose()
            await source.bring_to_an_end(await source.accept())
    assert isinstance(source.outcome, trimig.Summary)


async def test_the_end_of_the_memory_is_the_proof(autojump_clock: trio.testing.MockClock) -> None:
    """Only a source that has read the answer sends it: a break behind it pauses, and the guest runs on."""
    async with made("scripted") as target, destination(target) as there:
        statuses = told(there.monitor)
        peer = await there.connect()
        await peer.say(
            OPENING + part(0, 1, 2) + PACKAGE + part(*ALL[3:5]) + wire.section_continue(Section.END, 2) + CLOSE
        )
        await peer.hear_that_it_lives()
        await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        await peer.stream.aclose()
        again = await there.reconnect()
        assert target.run_state == "running"
        assert owner_of(there.monitor) is Ownership.DESTINATION
        again.decoder.expect_bitmap("ram")
        await again.say(ASK + RESUME)
        await again.hear_until(ResumeAck)
        await again.say(part(*ALL[5:]) + END)
        await again.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary)
    assert "postcopy-uncertain" not in statuses


async def test_a_resume_alone_is_the_proof(autojump_clock: trio.testing.MockClock) -> None:
    """A source that asks for no bitmap has not taken its guest back either."""
    async with made("scripted") as target, destination(target) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE + part(3))
        await peer.hear_that_it_lives()
        await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        await peer.stream.aclose()
        await there.monitor.wait_status(Status.POSTCOPY_UNCERTAIN)
        there.monitor.recover("again")
        again = await there.connect()
        await again.say(RESUME)
        await again.hear_until(ResumeAck)
        assert target.run_state == "running"
        assert owner_of(there.monitor) is Ownership.DESTINATION
        await again.say(part(*ALL[4:]) + END)
        await again.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary)
