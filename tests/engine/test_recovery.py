"""Recovery of a paused postcopy: what each side may say before RESUME is answered, and how long it is tried.

Nothing is completed out of `postcopy-recover`; what is illegal there pauses the migration again, and the next connection
goes through. What counts at the end is the guest's memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator

import numpy as np
import pytest
import trio

import trimig
from tests.engine.test_order import made
from tests.engine.test_postcopy_bad_input import (
    ALL,
    CLOSE,
    END,
    OPENING,
    PACKAGE,
    PAGES,
    START,
    Destination,
    Peer,
    able,
    destination,
    devices,
    discard,
    guest,
    part,
)
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.recovery import FIRST_DELAY, LONGEST_DELAY
from trimig.engine.source import migrate_stream
from trimig.errors import Ownership, PostcopyLost, RemoteProtocolError
from trimig.monitor.core import MonitorCore
from trimig.status import STREAM, TERMINAL, Item, Status, Stream
from trimig.testing import FakeDevice, ScriptedGuest, VirtualLink
from trimig.wire import Command, Section
from trimig.wire import encoder as wire
from trimig.wire import postcopy as pc
from trimig.wire.devices import globalstate
from trimig.wire.return_path import Pong, ReceivedPages, ResumeAck, Shut, encode

RESUME = wire.command(Command.POSTCOPY_RESUME)
ASK = wire.command(Command.RECV_BITMAP, b"\x03ram")


def told(monitor: MonitorCore) -> list[str]:
    """The statuses from here on."""
    statuses: list[str] = []
    monitor.add_listener(lambda event: statuses.append(event.data["status"]) if event.name == "MIGRATION" else None)
    return statuses


@contextlib.asynccontextmanager
async def paused(kind: str = "scripted", config: trimig.Config | None = None) -> AsyncIterator[Destination]:
    """A destination that has the pages 0 to 2, and has lost its source."""
    async with made(kind) as target, destination(target, config) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE)
        await peer.hear_that_it_lives()
        await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        await peer.stream.aclose()
        yield there


async def bring_the_rest(there: Destination) -> None:
    """Over the next connection."""
    again = await there.reconnect()
    again.decoder.expect_bitmap("ram")
    await again.say(ASK + RESUME)
    await again.hear_until(ResumeAck)
    (bitmap,) = [message.pages for message in again.heard if isinstance(message, ReceivedPages)]
    await again.say(part(*np.flatnonzero(~bitmap).tolist()) + END)
    await again.hear_until(Shut)
    assert Shut(status=0) in again.heard


# -- the destination: what a source may not say ------------------------------------------------------------------------

_ILLEGAL: dict[str, bytes] = {
    "pages": part(3, 4),
    "all pages, and the end": part(3, 4, 5, 6, 7) + END,
    "the end of the RAM": wire.section_continue(Section.END, 2) + CLOSE,
    "the end of the stream": wire.end_of_stream(),
    "a list of blocks": START,
    "a device": devices(),
    "a file header": wire.file_header(),
    "an unknown block": wire.command(Command.RECV_BITMAP, b"\x03rom"),
    "a bitmap without a name": wire.command(Command.RECV_BITMAP, b""),
    "a package": PACKAGE,
    "discards": discard(3),
    "garbage": b"\x7f",
    "nothing": b"",
    "half a command": ASK[:5],
    "an unknown command": wire.command(0x7FFF),
} | {
    number.name: wire.command(number, b"\0" * 4 if number == Command.PING else b"")
    for number in Command
    if Item[number.name] not in STREAM[Stream.RECOVERING]
    and number not in (Command.PACKAGED, Command.POSTCOPY_RAM_DISCARD, Command.POSTCOPY_ADVISE)
}


@pytest.mark.parametrize("kind", ["scripted", "lazy application", "parked"])
@pytest.mark.parametrize("what", _ILLEGAL)
async def test_what_a_source_may_not_say_before_resume(
    autojump_clock: trio.testing.MockClock, what: str, kind: str
) -> None:
    """Refused and paused again, with the guest as it was; the next connection brings the rest."""
    async with paused(kind) as there:
        await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        statuses = told(there.monitor)
        again = await there.reconnect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.hear)
            with contextlib.suppress(trio.BrokenResourceError):
                await again.say(_ILLEGAL[what])
                await again.stream.send_eof()
            while "postcopy-paused" not in statuses:
                await there.monitor.wait_changed()
        assert statuses == ["postcopy-recover", "postcopy-paused"]
        assert there.guest.run_state == ("inmigrate" if kind == "parked" else "running")
        assert there.monitor.owner is Ownership.DESTINATION
        assert not any(isinstance(message, Shut | ResumeAck) for message in again.heard)
        assert there.monitor.info()["error-desc"]
        await bring_the_rest(there)
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert all((block.pages == 5).all() for block in there.guest.ram)


@pytest.mark.parametrize("what", ["RESUME", "RECV_BITMAP", "a page that is here"])
async def test_what_a_source_may_not_say_behind_resume(autojump_clock: trio.testing.MockClock, what: str) -> None:
    """A second handshake on the same connection pauses it as well."""
    second = {"RESUME": RESUME, "RECV_BITMAP": ASK, "a page that is here": part(1)}[what]
    async with paused() as there:
        again = await there.reconnect()
        await again.say(RESUME)
        await again.hear_until(ResumeAck)
        await again.say(part(3) + second)
        await again.hear()
        await bring_the_rest(there)
    assert isinstance(there.outcome, trimig.Summary), there.outcome


async def test_given_up_behind_an_illegal_recovery_the_guest_stands_still(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The status, the error and the guest say the same."""
    async with paused() as there:
        again = await there.reconnect()
        await again.say(part(3, 4, 5, 6, 7) + END)
        await again.hear()
        await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        there.monitor.abandon("enough")
    assert isinstance(there.outcome, PostcopyLost)
    assert there.monitor.status is Status.POSTCOPY_LOST
    assert there.guest.run_state == "paused"
    assert dict(there.outcome.missing) == {"ram": [(3, PAGES)]}


# -- the destination: whole, and the source does not know ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scripted", "lazy application", "parked"])
@pytest.mark.parametrize(
    "rest", [b"", END[:3], END[:-1], b"\x7f", part(1)], ids=["cut", "in END", "no EOF", "bad", "twice"]
)
@pytest.mark.parametrize("retry", [False, True], ids=["no retry", "retry"])
async def test_whole_is_whole_however_the_connection_ends(
    autojump_clock: trio.testing.MockClock, kind: str, rest: bytes, *, retry: bool
) -> None:
    """Every page is here, and the last word does not come."""
    config = dataclasses.replace(able(), recovery_retry=retry)
    async with made(kind) as target:
        async with destination(target, config) as there:
            statuses = told(there.monitor)
            peer = await there.connect()
            await peer.say(OPENING + part(0, 1, 2) + PACKAGE + part(*ALL[3:]) + rest)
            await peer.hear_that_it_lives()
            with contextlib.suppress(trio.BrokenResourceError):
                await peer.stream.send_eof()
            await peer.hear()
        assert target.run_state == ("paused" if kind == "parked" else "running")
        assert all((block.pages == 5).all() for block in target.ram)
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert there.monitor.status is Status.COMPLETED
    assert not there.outcome.confirmed
    assert any("could not be told" in text for text in there.outcome.warnings)
    assert "postcopy-recover" not in statuses
    assert "error-desc" not in there.monitor.info()


async def test_a_source_that_comes_again_is_told_that_all_is_here(autojump_clock: trio.testing.MockClock) -> None:
    """For a moment the destination stays for it; a wrong connection meanwhile changes nothing."""
    target = guest()
    async with destination(target, dataclasses.replace(able(), recovery_retry=True)) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE + part(*ALL[3:]))
        await peer.hear_that_it_lives()
        await peer.stream.aclose()
        wrong = await there.connect()
        await wrong.say(END)
        await wrong.hear()
        again = await there.connect()
        again.decoder.expect_bitmap("ram")
        await again.say(ASK + RESUME)
        await again.hear_until(ResumeAck)
        await again.say(END)
        await again.hear_until(Shut)
        assert Shut(status=0) in again.heard
    assert isinstance(there.outcome, trimig.Summary)
    assert there.outcome.confirmed
    assert target.running
    assert not target.overwritten


async def test_an_end_that_comes_too_early_is_none(autojump_clock: trio.testing.MockClock) -> None:
    """END and the end of the stream do not make a guest whole."""
    async with paused() as there:
        await bring_the_rest(there)
    async with paused() as there:
        again = await there.reconnect()
        await again.say(RESUME)
        await again.hear_until(ResumeAck)
        await again.say(part(3) + END)
        await again.hear()
        await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        assert "4 pages are missing" in there.monitor.info()["error-desc"]
        await bring_the_rest(there)
    assert isinstance(there.outcome, trimig.Summary)


# -- a parked guest: what can be refused is refused before it is taken -------------------------------------------------


@pytest.mark.parametrize("state", [b"hibernated", b"", b"\xff\xfe"])
async def test_a_parked_guest_is_looked_at_before_it_is_taken(
    autojump_clock: trio.testing.MockClock, state: bytes
) -> None:
    """The source is refused while it still has its guest, and no PING is answered."""
    good = globalstate.section("running")
    bad = dataclasses.replace(good, payload=good.payload[:4] + state.ljust(len(good.payload) - 4, b"\0"))
    package = pc.packaged(
        wire.command(Command.POSTCOPY_LISTEN)
        + wire.device_section(bad, 5)
        + wire.ping(3)
        + wire.ping(0x42)
        + wire.command(Command.POSTCOPY_RUN)
    )
    async with made("parked") as target, destination(target) as there:
        peer = await there.connect()
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.say(OPENING + package + part(*ALL) + END)
        await peer.hear()
    assert isinstance(there.outcome, RemoteProtocolError), there.outcome
    assert there.outcome.section == "globalstate"
    assert there.monitor.owner is Ownership.SOURCE
    assert Shut(status=1) in peer.heard
    assert not {Pong(value=3), Pong(value=0x42)} & set(filter(lambda m: isinstance(m, Pong), peer.heard))


# -- the source: what a destination may not say ------------------------------------------------------------------------


class Told:
    """A destination that is played: it takes the guest on the first connection and closes it."""

    def __init__(self, **options: object) -> None:
        base = able()
        slow = trimig.Parameters(max_bandwidth=0, downtime_limit=1, max_postcopy_bandwidth=32 << 10)
        self.config = dataclasses.replace(base, parameters=slow, **options)  # type: ignore[arg-type]
        self.guest = ScriptedGuest(blocks={"ram": PAGES}, seed=3, devices=[FakeDevice("clock", size=8)])
        self.monitor = MonitorCore()
        self.statuses = told(self.monitor)
        self.outcome: trimig.Summary | trimig.TrimigError | None = None
        self.tries: list[float] = []
        self.links: list[VirtualLink] = []
        self._offers, self._taken = trio.open_memory_channel[AnyStream](math.inf)
        self.monitor.add_listener(lambda e: self.monitor.start_postcopy() if e.data.get("status") == "setup" else None)

    async def run(self) -> None:
        try:
            ways = Connections(first=self._next, again=lambda _: self._next())
            self.outcome = await migrate_stream(self.guest, ways, self.config, self.monitor)
        except trimig.TrimigError as error:
            self.outcome = error

    async def _next(self) -> AnyStream:
        await trio.lowlevel.checkpoint()
        link = VirtualLink(seed=0, window=65536)
        self.links.append(link)
        self.tries.append(trio.current_time())
        await self._offers.send(link.b)
        return link.a

    async def accept(self) -> Peer:
        stream = await self._taken.receive()
        assert isinstance(stream, trio.abc.HalfCloseableStream)
        return Peer(stream)

    async def take(self) -> None:
        """The first connection, up to the answer to the PING behind the devices; then it is lost."""
        peer = await self.accept()
        read = b""
        pings = 0
        while self.monitor.status is not Status.POSTCOPY_ACTIVE:
            read += await peer.stream.receive_some()
            head = wire.ping(0)[:5]
            found = [read[i + 5 : i + 9] for i in range(len(read)) if read.startswith(head, i) and len(read) >= i + 9]
            for value in found[pings:]:
                await peer.say(encode(Pong(value=int.from_bytes(value))))
            pings = len(found)
            if pings >= 5:  # of QEMU: two, of trimig: its mark and two
                await self.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        await peer.stream.aclose()

    async def bring_to_an_end(self, peer: Peer, *here: int) -> None:
        """A recovery as it should be; the pages *here* have come before."""
        have = np.zeros(PAGES, np.bool_)
        have[list(here)] = True
        read = b""
        while RESUME not in read:
            read += await peer.stream.receive_some()
            if ASK in read:
                await peer.say(encode(ReceivedPages(block="ram", pages=have)))
                read = read.replace(ASK, b"")
        await peer.say(encode(ResumeAck()))
        while not read.endswith(END[-6:]):
            read += await peer.stream.receive_some()
        await peer.say(encode(Shut(status=0)))
        await peer.hear_end()


BITMAP = encode(ReceivedPages(block="ram", pages=np.zeros(PAGES, np.bool_)))
_ILLEGAL_ANSWERS: dict[str, bytes] = {
    "RESUME_ACK at once": encode(ResumeAck()),
    "RESUME_ACK and an end": encode(ResumeAck()) + encode(Shut(status=0)),
    "an end": encode(Shut(status=0)),
    "an error": encode(Shut(status=1)),
    "the bitmap twice": BITMAP + BITMAP,
    "an unknown block": encode(ReceivedPages(block="rom", pages=np.zeros(PAGES, np.bool_))),
    "half a bitmap": BITMAP[:20],
    "the bitmap, and an end": BITMAP + encode(Shut(status=0)),
    "an unknown type": b"\x7f\0\0\0",
    "nothing": b"",
}


@pytest.mark.parametrize("what", _ILLEGAL_ANSWERS)
async def test_what_a_destination_may_not_say_before_it_resumes(
    autojump_clock: trio.testing.MockClock, what: str
) -> None:
    """A protocol error, paused again, and tried again; then it goes through."""
    told_by = Told(recovery_retry=True)
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told_by.run)
            await told_by.take()
            bad = await told_by.accept()
            with contextlib.suppress(trio.BrokenResourceError):
                await bad.stream.receive_some()
                await bad.say(_ILLEGAL_ANSWERS[what])
                await bad.stream.send_eof()
            good = await told_by.accept()
            await bad.stream.aclose()
            assert "completed" not in told_by.statuses
            assert told_by.monitor.owner is Ownership.DESTINATION
            await told_by.bring_to_an_end(good)
    assert isinstance(told_by.outcome, trimig.Summary), told_by.outcome
    assert told_by.statuses.count("postcopy-recover") == 2
    assert not told_by.guest.running


async def test_silence_behind_an_early_resume_ack_is_refused_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """The source does not wait for the rest of a handshake that is wrong already."""
    told_by = Told(recovery_retry=True)
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told_by.run)
            await told_by.take()
            bad = await told_by.accept()
            began = trio.current_time()
            await bad.say(encode(ResumeAck()))
            good = await told_by.accept()
            assert trio.current_time() - began < told_by.config.handover_timeout
            await told_by.bring_to_an_end(good)
            await bad.stream.aclose()
    assert isinstance(told_by.outcome, trimig.Summary), told_by.outcome


# -- the source: everything is sent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [False, True], ids=["", "release-ram"])
async def test_all_is_sent_and_the_answer_is_lost(autojump_clock: trio.testing.MockClock, *, release: bool) -> None:
    """Paused, and a recovery finds that everything is there, also where sent memory was given back."""
    told_by = Told(recovery_retry=True)
    capabilities = dataclasses.replace(told_by.config.capabilities, release_ram=release)
    told_by.config = dataclasses.replace(
        told_by.config, capabilities=capabilities, parameters=trimig.Parameters(max_bandwidth=0, downtime_limit=1)
    )
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told_by.run)
            first = await told_by.accept()
            await answer_until(first, END[-6:])
            await first.stream.aclose()
            good = await told_by.accept()
            assert told_by.monitor.owner is Ownership.DESTINATION
            await told_by.bring_to_an_end(good, *ALL)
    assert isinstance(told_by.outcome, trimig.Summary), told_by.outcome
    assert told_by.outcome.confirmed
    assert "postcopy-paused" in told_by.statuses


async def answer_until(peer: Peer, end: bytes, *, but: tuple[int, ...] = ()) -> None:
    """Answer each PING, but those of the values *but*, until the stream ends with *end*."""
    read, pings, head = b"", 0, wire.ping(0)[:5]
    while not read.endswith(end):
        read += await peer.stream.receive_some()
        found = [read[i + 5 : i + 9] for i in range(len(read)) if read.startswith(head, i) and len(read) >= i + 9]
        for value in found[pings:]:
            if int.from_bytes(value) not in but:
                await peer.say(encode(Pong(value=int.from_bytes(value))))
        pings = len(found)


async def test_all_is_sent_and_no_peer_is_found_again(autojump_clock: trio.testing.MockClock) -> None:
    """The error says that the destination may be complete."""
    told_by = Told(recovery_retry=True, recovery_timeout=3.0)
    told_by.config = dataclasses.replace(
        told_by.config, parameters=trimig.Parameters(max_bandwidth=0, downtime_limit=1)
    )
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told_by.run)
            first = await told_by.accept()
            await answer_until(first, END[-6:])
            await first.stream.aclose()
            while told_by.monitor.status not in TERMINAL:
                with trio.move_on_after(0.5):
                    await (await told_by.accept()).stream.aclose()
    assert isinstance(told_by.outcome, PostcopyLost)
    assert "the destination may be complete: look there" in str(told_by.outcome)
    assert len(told_by.links) > 2
    handed_over = sum(link.sent("a->b") for link in told_by.links)
    assert (
        handed_over - 16 < told_by.monitor.counters.transferred <= handed_over
    )  # the end may be of a write that failed


# -- how long it is tried ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"", encode(ResumeAck())], ids=["closes", "answers wrongly"])
async def test_a_peer_that_accepts_and_closes_is_tried_for_no_longer_than_the_bound(
    autojump_clock: trio.testing.MockClock, answer: bytes
) -> None:
    """The time counts from the pause, and the delays grow."""
    told_by = Told(recovery_retry=True, recovery_timeout=30.0)
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told_by.run)
            await told_by.take()
            began = trio.current_time()
            while told_by.monitor.status not in TERMINAL:
                with trio.move_on_after(1.0):
                    peer = await told_by.accept()
                    with contextlib.suppress(trio.BrokenResourceError):
                        await peer.say(answer)
                    await peer.stream.aclose()
    assert isinstance(told_by.outcome, PostcopyLost)
    assert "within 30 s" in str(told_by.outcome)
    tries = [at for at in told_by.tries if at >= began]
    assert tries[-1] - began <= 30.0
    # 0.1, 0.2, 0.4 … 5, 5, 5
    assert len(tries) <= math.log2(LONGEST_DELAY / FIRST_DELAY) + 30 / LONGEST_DELAY + 2
    delays = np.diff(tries)
    assert (delays[1:] >= delays[:-1] * 0.99).all()


async def test_progress_begins_the_time_anew(autojump_clock: trio.testing.MockClock) -> None:
    """A connection that has brought the migration forward is one; a handshake that has found the same is none."""
    told_by = Told(recovery_retry=True, recovery_timeout=30.0)
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told_by.run)
            await told_by.take()
            began = trio.current_time()
            have = np.zeros(PAGES, np.bool_)
            while told_by.monitor.status not in TERMINAL:
                with trio.move_on_after(60.0):
                    peer = await told_by.accept()
                    have[: len(told_by.tries) // 2] = True  # one page more at every second connection, then no more
                    have[4:] = False
                    with contextlib.suppress(trio.BrokenResourceError, AssertionError):
                        await peer.stream.receive_some()
                        await peer.say(encode(ReceivedPages(block="ram", pages=have)))
                        read = b""
                        while RESUME not in read:
                            read += await peer.stream.receive_some() or RESUME
                        await peer.say(encode(ResumeAck()))
                        await trio.sleep(4.0)
                    await peer.stream.aclose()
    assert isinstance(told_by.outcome, PostcopyLost)
    assert "after the last was lost (" in str(told_by.outcome)
    assert trio.current_time() - began > 30.0
    assert trio.current_time() - began < 120.0


async def test_a_destination_waits_no_longer_than_the_bound(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that connects and says nothing, or closes, does not prolong it."""
    config = dataclasses.replace(able(), recovery_retry=True, recovery_timeout=20.0, stall_timeout=15.0)
    async with paused(config=config) as there:
        began = trio.current_time()
        while there.monitor.status not in TERMINAL:
            with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(7.0):
                peer = await there.connect()
                await peer.hear()
    assert isinstance(there.outcome, PostcopyLost)
    assert trio.current_time() - began < 20.0 + 7.0 + 1.0
    assert "after the last was lost (the stream ends at byte " in str(there.outcome)
    assert there.guest.run_state == "paused"


# -- the caller's cancellation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scripted", "parked"])
@pytest.mark.parametrize("connection", [1, 2])
async def test_a_cancellation_waits_while_there_is_a_connection(
    autojump_clock: trio.testing.MockClock, connection: int, kind: str
) -> None:
    """The guest lives here, so its memory comes first, for longer than any time limit of the engine."""
    outside = trio.CancelScope()
    async with made(kind) as target:
        there = Destination(target, dataclasses.replace(able(), stall_timeout=3600.0))

        async def receive() -> None:
            with outside:
                await there.run()

        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                peer = await there.connect()
                await peer.say(OPENING + part(0, 1, 2) + PACKAGE)
                await peer.hear_that_it_lives()
                await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
                if connection == 2:
                    await peer.stream.aclose()
                    peer = await there.reconnect()
                    peer.decoder.expect_bitmap("ram")
                    await peer.say(ASK + RESUME)
                    await peer.hear_until(ResumeAck)
                outside.cancel()
                await trio.sleep(100 * there.config.handover_timeout)
                await peer.say(part(*ALL[3:]) + END)
                await peer.hear_until(Shut)
        assert isinstance(there.outcome, trimig.Summary), there.outcome
        assert there.monitor.status is Status.COMPLETED
        assert all((block.pages == 5).all() for block in target.ram)


async def test_peer_that_asks_and_is_silent_then_does_not_use_up_the_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A stranger who knows the name of a block; the source comes behind it, and is heard."""
    config = dataclasses.replace(able(), recovery_retry=True, recovery_timeout=30.0)
    async with paused(config=config) as there:
        began = trio.current_time()
        stranger = await there.connect()
        await stranger.say(ASK)
        stranger.decoder.expect_bitmap("ram")
        await stranger.hear_until(ReceivedPages)
        await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        assert trio.current_time() - began < config.recovery_timeout / 2
        await bring_the_rest(there)
    assert there.monitor.status is Status.COMPLETED
