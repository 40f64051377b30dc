"""What a destination may say before the end, and what becomes of the migration then."""

from __future__ import annotations

import math
import struct

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import ACCEPTED, REFUSED, Destination, Pair, config, played, running
from trimig.engine.source.switchover import PING_PREPARE
from trimig.status import Status
from trimig.testing import VirtualLink
from trimig.wire import encoder as wire
from trimig.wire.return_path import PageRequest, Pong, ResumeAck, encode


def message(kind: int, payload: bytes) -> bytes:
    """Any message, legal or not."""
    return struct.pack(">HH", kind, len(payload)) + payload


def busy_pair() -> Pair:
    """A migration that takes a second or so to send its pages."""
    return Pair(running(pages=64), link=VirtualLink(rate=300_000, window=8192, record=True))


async def refused(pair: Pair, said: bytes) -> trimig.TrimigError:
    """The error of a source whose destination says this while pages are sent."""

    async def script(there: Destination) -> None:
        await there.until(wire.ping(1))
        await pair.here.wait_status(Status.ACTIVE)
        await there.say(said)
        await there.until_closed()

    tasks = trio.lowlevel.current_statistics().tasks_living
    async with played(pair, script):
        with pytest.raises(trimig.TrimigError) as caught:
            await pair.migrate()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert caught.value.owner is trimig.Ownership.SOURCE
    assert pair.here.status is Status.FAILED
    assert pair.here.info()["error-desc"] == str(caught.value)
    assert "pause" not in pair.source.events()
    assert pair.source.running
    assert not pair.source.tracking
    assert pair.link.sent("a->b") < 64 * 4096, "it went on sending"
    return caught.value


async def test_early_refusal_ends_the_migration_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """K4, gap G9."""
    error = await refused(busy_pair(), REFUSED)
    assert isinstance(error, trimig.PeerFailed)
    assert error.code == 1


async def test_any_value_but_zero_is_a_refusal(autojump_clock: trio.testing.MockClock) -> None:
    """K4."""
    error = await refused(busy_pair(), message(1, b"\0\0\0\x2a"))
    assert isinstance(error, trimig.PeerFailed)
    assert error.code == 42


async def test_acceptance_of_what_was_not_sent_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    """K5: SHUT 0 before the decision cannot be true."""
    error = await refused(busy_pair(), ACCEPTED)
    assert isinstance(error, trimig.RemoteProtocolError)
    assert "that the guest has arrived (SHUT 0) has no place before the guest is handed over" in str(error)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (message(99, b""), "invalid return-path message type 0x0063"),
        (message(0, b""), "invalid return-path message type 0x0000"),
        (message(1, b"\0\0"), "SHUT with 2 bytes"),
        (message(2, b"12345"), "PONG with 5 bytes"),
        (encode(PageRequest(block="ram", start=0, length=4096)), "a request for pages has no place before"),
        (encode(PageRequest(block="ram", start=0, length=4096, named=False)), "no previous block"),
        (encode(PageRequest(block="rom", start=0, length=4096)), "unknown RAM block 'rom'"),
        (encode(PageRequest(block="ram", start=1, length=4096)), "misaligned"),
        (encode(PageRequest(block="ram", start=64 * 4096, length=4096)), "overruns"),
        (message(3, b"\0" * 11), "REQ_PAGES_ID"),
        (message(3, b"\0" * 12 + b"\x05ram"), "does not fit the name"),
        (encode(ResumeAck()), "its place is in a recovery, behind RESUME"),
        (message(6, b"\0\0\0\2"), "RESUME_ACK with the value 2"),
    ],
)
async def test_invalid_message_fails_the_migration_with_its_reason(
    autojump_clock: trio.testing.MockClock, said: bytes, text: str
) -> None:
    """K3, K7, K8."""
    error = await refused(busy_pair(), said)
    assert isinstance(error, trimig.RemoteProtocolError)
    assert error.section == "return path"
    assert text in str(error)


async def test_flood_of_answers_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A destination cannot make the source remember without end."""
    pair = busy_pair()
    error = await refused(pair, b"".join(encode(Pong(value=n)) for n in range(2000)))
    assert "1024" in str(error)


async def test_any_answer_to_a_ping_is_accepted(autojump_clock: trio.testing.MockClock) -> None:
    """K6: PONG of anything, at any time, changes nothing; only the one asked for proves the prepare step."""
    pair = Pair()

    async def script(there: Destination) -> None:
        await there.say(*(Pong(value=n) for n in (0, 1, 1, 77, 2**32 - 1)))
        await there.until(wire.ping(PING_PREPARE))
        await trio.sleep(1)
        assert pair.here.status is Status.DEVICE
        await there.say(Pong(value=5))
        await trio.sleep(1)
        assert pair.here.status is Status.DEVICE
        await there.prepare()
        await there.until(b'"page_size"')
        await there.say(ACCEPTED)
        await there.until_closed()

    async with played(pair, script):
        summary = await pair.migrate()
    assert summary.prepared
    assert summary.downtime_parts.prepare == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("part", range(1, 8))
async def test_message_cut_short_is_told_as_such(autojump_clock: trio.testing.MockClock, part: int) -> None:
    """K3: short read."""
    pair = busy_pair()

    async def script(there: Destination) -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await there.say(REFUSED[:part])
        await there.stream.send_eof()
        await there.until_closed()

    async with played(pair, script):
        with pytest.raises(trimig.TransportFailed, match=rf"in the middle of a message \({part} bytes"):
            await pair.migrate()
    assert pair.source.running


async def test_peer_that_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    """T3, F11: after stall_timeout the guest is free again; before, a cancel frees it at once."""
    for cancel in (False, True):
        pair = Pair(link=VirtualLink(window=4096), config_here=config(stall_timeout=9.0))

        async def script(there: Destination, pair: Pair = pair) -> None:
            await trio.sleep(1)
            if cancel:  # noqa: B023 - runs within this turn of the loop
                pair.here.cancel("it does not read")
            await trio.sleep(20)

        began = trio.current_time()
        async with played(pair, script):
            with pytest.raises(trimig.MigrationCancelled if cancel else trimig.TransportFailed):
                await pair.migrate()
            assert trio.current_time() - began == pytest.approx(1 if cancel else 9)
        assert pair.source.running
        assert pair.here.status is (Status.CANCELLED if cancel else Status.FAILED)


@pytest.mark.parametrize("stall", [6.0, 60.0, 120.0, math.inf])
async def test_a_destination_that_never_answers_ends_it_while_the_guest_runs(
    autojump_clock: trio.testing.MockClock, stall: float
) -> None:
    """It takes all of the memory into its buffers, and reads none of it: a QEMU that waits for channels of multifd."""
    pair = Pair(config_here=config(stall_timeout=stall))

    async def script(there: Destination) -> None:
        await there.until_closed()

    ended = {6.0: 6.0, 60.0: 30.0, 120.0: 60.0, math.inf: math.inf}[stall]
    async with played(pair, script):
        with trio.move_on_after(1000) as patience:
            with pytest.raises(trimig.TransportFailed, match=rf"answered nothing for {ended:g} s; if multifd is on"):
                await pair.migrate()
            assert trio.current_time() == pytest.approx(ended, abs=0.1)
    assert patience.cancelled_caught == (ended == math.inf)
    assert any("multifd" in text for text in pair.here.counters.warnings)
    assert "pause" not in pair.source.events()
    assert pair.source.running


async def test_a_destination_that_answers_late_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """The guest runs meanwhile."""
    pair = Pair()

    async def script(there: Destination) -> None:
        await trio.sleep(25)
        await there.prepare()
        await there.until(b'"devices"')
        await there.say(ACCEPTED)

    async with played(pair, script):
        summary = await pair.migrate()
    assert summary.confirmed
    assert summary.downtime < 1
