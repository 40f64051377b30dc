"""Streams of one direction, and streams behind which perhaps no peer answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import ACCEPTED, REFUSED, Pair, config, running, waiting
from trimig.engine.source.precopy import SILENCE_SECONDS
from trimig.engine.source.switchover import PING_PREPARE
from trimig.status import Status
from trimig.testing import VirtualLink
from trimig.wire import encoder as wire
from trimig.wire.return_path import Pong, encode


class OnlySends(trio.abc.SendStream):
    """One direction of a stream; says how its delivery goes, if it is told to."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.closed = ""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Pass it on."""
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Pass it on."""
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Notes whether it was closed in order."""
        self.closed = self.closed or "by force"
        await self.stream.aclose()
        self.closed = "in order"


class OnlyReceives(trio.abc.ReceiveStream):
    """The other one."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self.stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Pass it on."""
        return await self.stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Pass it on."""
        await self.stream.aclose()


class Delivers(OnlySends):
    """Can say whether everything has arrived where it was to go."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, seconds: float, error: Exception | None = None) -> None:
        super().__init__(stream)
        self.seconds = seconds
        self.error = error

    async def delivered(self) -> None:
        """After some time."""
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error


class PerhapsSilent(Delivers, trio.abc.HalfCloseableStream):
    """A command that may or may not pass the stream on; *hear* is what is read from it."""

    perhaps_silent = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Pass it on."""
        return await self.stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        """Pass it on."""
        await self.stream.send_eof()


async def sent_through(
    pair: Pair, stream: trio.abc.SendStream, there: Callable[[], Any] | None = None
) -> trimig.Summary:
    """The source sends through *stream*; *there* is what the other end does, reading by default."""

    async def read() -> None:
        while await pair.link.b.receive_some():
            pass

    error: trimig.TrimigError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(there or read)
        try:
            summary = await trimig.migrate(pair.source, stream, pair.config_here, monitor=pair.here)
        except trimig.TrimigError as failure:
            error = failure
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    return summary


async def test_guest_arrives_over_one_direction(autojump_clock: trio.testing.MockClock) -> None:
    """K1, gap G3: no return path is asked for, nothing is proved, and both sides say so."""
    pair = Pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trimig.receive, pair.target, OnlyReceives(pair.link.b), config())
        summary = await trimig.migrate(pair.source, OnlySends(pair.link.a), config())
    assert (summary.confirmed, summary.prepared) == (False, False)
    assert any("one direction" in text for text in summary.warnings)
    assert wire.command(1) not in pair.link.recorded("a->b")
    assert pair.target.running
    pair.referee.check()


async def test_destination_without_a_way_back_takes_a_stream_that_asks_for_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """K1: OPEN_RETURN_PATH and PING are accepted and not answered; a recorded stream is full of them."""
    pair = Pair()
    pair.config_here = config()
    await pair.both()
    recorded = pair.link.recorded("a->b")
    assert wire.ping(PING_PREPARE) in recorded
    link, target = VirtualLink(window=1 << 20), waiting()
    async with trio.open_nursery() as nursery:

        async def play() -> None:
            await link.a.send_all(recorded)
            link.a.close()

        nursery.start_soon(play)
        summary = await trimig.receive(target, OnlyReceives(link.b), config())
    assert (summary.confirmed, summary.prepared) == (False, False)
    assert [text for text in summary.warnings if "no way back" in text] == list(summary.warnings)
    assert target.running
    assert target.digest() == pair.source.digest()
    assert link.sent("b->a") == 0


async def test_source_is_not_done_before_everything_is_delivered(autojump_clock: trio.testing.MockClock) -> None:
    """Gap G3: QEMU is done when the bytes are in a buffer."""
    pair = Pair()
    stream = Delivers(pair.link.a, 9.0)
    statuses: list[Status] = []

    async def look() -> None:
        while not await pair.link.b.receive_some():
            pass
        await trio.sleep(8)
        statuses.append(pair.here.status)
        await trio.sleep_forever()

    summary = await sent_through(pair, stream, look)
    assert statuses == [Status.HANDOVER]
    assert not summary.confirmed
    assert summary.downtime_parts.commit == pytest.approx(9.0)
    assert stream.closed == "in order"


@pytest.mark.parametrize(
    ("seconds", "error", "why"),
    [
        (1.0, trimig.TransportFailed("the disk is full"), "the disk is full"),
        (1.0, OSError("gone"), "gone"),
        (31.0, None, "could not say within 30 s"),
    ],
)
async def test_delivery_that_fails_leaves_the_owner_open(
    autojump_clock: trio.testing.MockClock, seconds: float, error: Exception | None, why: str
) -> None:
    """The decision was sent: its delivery is not known, and the message says why."""
    pair = Pair()
    stream = Delivers(pair.link.a, seconds, error)
    with pytest.raises(trimig.HandoverUncertain, match=why) as caught:
        await sent_through(pair, stream)
    assert pair.source.run_state == "paused"
    assert pair.here.status is Status.UNCERTAIN
    assert stream.closed == "by force"
    await caught.value.settle(trimig.Ownership.SOURCE)
    assert pair.source.running


async def test_stream_that_breaks_before_the_decision(autojump_clock: trio.testing.MockClock) -> None:
    """Failed, and the guest is the source's."""
    pair = Pair(running(pages=64), link=VirtualLink(rate=100_000, window=4096))

    async def stop() -> None:
        await pair.link.b.receive_some()
        pair.link.b.close()

    with pytest.raises(trimig.TransportFailed) as caught:
        await sent_through(pair, OnlySends(pair.link.a), stop)
    assert caught.value.owner is trimig.Ownership.SOURCE
    assert pair.source.running


# -- behind a command ----------------------------------------------------------------------------------------------


async def test_peer_that_answers_makes_it_a_return_path(autojump_clock: trio.testing.MockClock) -> None:
    """K1, K9: from the first answer on it is one like any other."""
    pair = Pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.receive)
        summary = await trimig.migrate(pair.source, PerhapsSilent(pair.link.a, 99.0), config())
    assert (summary.confirmed, summary.prepared, summary.warnings) == (True, True, ())


@pytest.mark.parametrize("ends", [True, False], ids=["closes its output", "says nothing"])
async def test_no_answer_comes(autojump_clock: trio.testing.MockClock, ends: bool) -> None:
    """It is stored: a moment is waited, with the guest running, then it is sent one way; delivery is waited for."""
    pair = Pair()

    async def store() -> None:
        if ends:
            await pair.link.b.send_eof()
        while await pair.link.b.receive_some():
            pass

    summary = await sent_through(pair, PerhapsSilent(pair.link.a, 1.0), store)
    assert (summary.confirmed, summary.prepared) == (False, False)
    assert any("no answer comes" in text for text in summary.warnings)
    assert wire.ping(PING_PREPARE) not in pair.link.recorded("a->b")
    assert summary.downtime == pytest.approx(1.0, abs=0.05)
    assert summary.total_time == pytest.approx(1.0 + (0.0 if ends else SILENCE_SECONDS), abs=0.05)


async def test_answer_after_the_first_copy_is_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """A command that takes its time to connect: what counts is the moment before the switchover."""
    pair = Pair()

    async def late() -> None:
        await trio.sleep(SILENCE_SECONDS / 2)
        await pair.receive()
        await trio.sleep_forever()

    summary = await sent_through(pair, PerhapsSilent(pair.link.a, 99.0), late)
    assert summary.confirmed
    assert pair.target.running


@pytest.mark.parametrize(("answer", "completed"), [(ACCEPTED, True), (REFUSED, False)])
async def test_answer_after_the_decision_counts_although_none_was_expected(
    autojump_clock: trio.testing.MockClock, answer: bytes, completed: bool
) -> None:
    """A late answer counts before any doubt about the delivery."""
    pair = Pair()

    async def late() -> None:
        while b'"page_size"' not in pair.link.recorded("a->b"):
            await pair.link.b.receive_some()
        await pair.link.b.send_all(answer)
        await trio.sleep_forever()

    stream = PerhapsSilent(pair.link.a, 1.0, trimig.TransportFailed("no idea"))
    if completed:
        assert (await sent_through(pair, stream, late)).confirmed
        assert not pair.source.running
        return
    with pytest.raises(trimig.PeerFailed):
        await sent_through(pair, stream, late)
    assert pair.source.running


async def test_peer_that_has_answered_and_goes_away_is_a_failure(autojump_clock: trio.testing.MockClock) -> None:
    """T3: from the first message on, the end of that direction is the end of the connection."""
    pair = Pair(running(pages=64), link=VirtualLink(rate=100_000, window=8192))

    async def leave() -> None:
        await pair.link.b.receive_some()
        await pair.link.b.send_all(encode(Pong(value=1)))
        await pair.link.b.send_eof()
        while await pair.link.b.receive_some():
            pass

    with pytest.raises(trimig.TransportFailed, match="without an answer"):
        await sent_through(pair, PerhapsSilent(pair.link.a, 1.0), leave)
    assert pair.source.running


# -- how it is closed ----------------------------------------------------------------------------------------------


class SlowToClose(OnlySends):
    """Has a goodbye to say that the peer does not answer."""

    async def aclose(self) -> None:
        """Waits for ever, and closes by force if that is cut short."""
        try:
            await trio.sleep_forever()
        finally:
            self.stream.close()  # type: ignore[attr-defined]  # a virtual one


async def test_close_in_order_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """TLS and websockets say goodbye; a peer that does not answer it costs the grace and no more."""
    pair = Pair(config_here=config(teardown_grace=3.0))
    started = trio.current_time()
    summary = await sent_through(pair, SlowToClose(pair.link.a))
    assert trio.current_time() - started == pytest.approx(summary.total_time + 3.0)
    assert pair.link.a.closed


async def test_failed_migration_is_closed_by_force(autojump_clock: trio.testing.MockClock) -> None:
    """Then nothing is waited for: the guest and the peer come first."""
    pair = Pair(running(pages=64), link=VirtualLink(rate=100_000, window=4096))

    async def cancel() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        pair.here.cancel("now")
        await trio.sleep_forever()

    started = trio.current_time()
    with pytest.raises(trimig.MigrationCancelled):
        await sent_through(pair, SlowToClose(pair.link.a), cancel)
    assert trio.current_time() - started == pytest.approx(0.0, abs=0.1)
    assert pair.link.a.closed
