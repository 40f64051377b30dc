"""postcopy-preempt: what the guest waits for comes on a second connection, and both are lost and found together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
from tests.engine.test_postcopy_bad_input import (
    ALL,
    CLOSE,
    END,
    LIMIT,
    OPENING,
    PACKAGE,
    PAGES,
    able,
    destination,
    devices,
    discard,
    guest,
    part,
)
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.source import migrate_stream
from trimig.errors import ConfigError, Ownership
from trimig.guest import PAGE_SIZE
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.testing import FakeDevice, ScriptedGuest, virtual_link
from trimig.wire import Command, Decoder, RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire import events as ev
from trimig.wire.return_path import PageRequest, Pong, ReceivedPages, ResumeAck, Shut, encode


def preempt(*, early: bool = True) -> trimig.Config:
    """With the second connection, as 7.2 makes it or as 8.0 does."""
    base = able()
    return dataclasses.replace(
        base,
        capabilities=dataclasses.replace(base.capabilities, postcopy_preempt=True),
        peer=dataclasses.replace(base.peer, preempt_pre_7_2=early),
    )


def bare(*pages: int, fill: int = 7) -> bytes:
    """Records without a section."""
    data = np.full((len(pages), PAGE_SIZE), fill, np.uint8)
    return RecordWriter().page_records("ram", np.array(pages, np.int64) * PAGE_SIZE, data)


# -- a destination, whose source is played -----------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False], ids=["7.2", "8.0"])
async def test_pages_come_on_both(*, early: bool) -> None:
    """Row 36: the second connection comes behind the first, or at the switch; the end word is the last of it."""
    target = guest()
    async with destination(target, preempt(early=early)) as there:
        peer = await there.connect()
        if early:
            beside = await there.connect_beside()
            await peer.say(OPENING)
        else:
            await peer.say(OPENING)
            await peer.hear_until(Pong)
            beside = await there.connect_beside()
        await peer.say(PACKAGE)
        await peer.hear_that_it_lives()
        await beside.say(bare(5))
        await peer.say(part(0, 1, 2, 3, 4))
        # The main connection ends before the last urgent page has come.
        await peer.say(END)
        await beside.say(bare(7, 6) + wire.END_WORD)
        await peer.hear_until(Shut)
        assert Shut(status=0) in peer.heard
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert [int(target.ram[0].pages[page, 0]) for page in ALL] == [5, 5, 5, 5, 5, 7, 7, 7]
    assert await beside.stream.receive_some() == b"", "it was left open"


async def test_the_second_connection_that_does_not_come(autojump_clock: trio.testing.MockClock) -> None:
    """While the guest still runs at the source; what to do is in the message."""
    async with destination(config=preempt()) as there:
        peer = await there.connect()
        await peer.say(OPENING)
        await peer.hear_until(Shut)
    assert isinstance(there.outcome, trimig.TransportFailed)
    assert there.outcome.owner is Ownership.SOURCE
    assert "the capability must be on at the source" in str(there.outcome)


async def test_without_postcopy_it_is_never_used(autojump_clock: trio.testing.MockClock) -> None:
    """P2: the migration ends as precopy does, and nothing waits for a second connection any more."""
    async with destination(config=preempt(early=False)) as there:
        peer = await there.connect()
        end = wire.section_continue(Section.END, 2) + CLOSE
        await peer.say(OPENING + part(*ALL) + end + devices() + wire.end_of_stream())
        await peer.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (part(3), "unknown combination of RAM flags"),
        (bare(3) + bare(3), "came a second time"),
        (RecordWriter().page_records("rom", np.zeros(1, np.int64), np.zeros((1, PAGE_SIZE), np.uint8)), "'rom'"),
        (bare(PAGES), "outside of RAM block"),
        (bare(3)[:100], "closed the connection after 100 bytes"),
        (bare(3) + bare(4)[:100], "ends at byte 4208"),
        (b"", "closed the connection without sending anything"),
    ],
    ids=["a section", "twice", "unknown block", "outside", "cut", "cut later", "closed"],
)
async def test_what_goes_wrong_on_the_second_pauses_both_and_is_made_good(stream: bytes, message: str) -> None:
    """Row 37, O6: the guest goes on, and two other connections bring the rest."""
    target = guest()
    async with destination(target, preempt()) as there:
        peer, beside = await there.connect(), await there.connect_beside()
        await peer.say(OPENING + part(0, 1, 2, fill=1) + discard(1) + PACKAGE)
        await peer.hear_that_it_lives()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.hear)  # until it is closed, although nothing was wrong with it
            with contextlib.suppress(trio.BrokenResourceError):
                await beside.say(stream)
                await beside.stream.send_eof()
            again = await there.reconnect()
        text = there.monitor.info()["error-desc"]
        assert "the connection for urgent pages" in text
        assert message in text
        beside = await there.connect_beside()
        again.decoder.expect_bitmap("ram")
        await again.say(wire.command(Command.RECV_BITMAP, b"\x03ram") + wire.command(Command.POSTCOPY_RESUME))
        await again.hear_until(ResumeAck)
        (bitmap,) = [message.pages for message in again.heard if isinstance(message, ReceivedPages)]
        missing = np.flatnonzero(~bitmap).tolist()
        await beside.say(bare(missing[0], fill=8) + wire.END_WORD)
        await again.say(part(*missing[1:], fill=9) + END)
        await again.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert target.ram[0].pages[missing[0], 0] == 8
    assert not target.overwritten


async def test_a_recovery_without_the_second_connection_is_another_pause(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Row 37: the handshake stops, nothing is lost, and the next one goes through."""
    async with destination(config=preempt()) as there:
        peer, _ = await there.connect(), await there.connect_beside()
        await peer.say(OPENING + PACKAGE)
        await peer.hear_that_it_lives()
        await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        there.monitor.pause("the test")
        again = await there.reconnect()
        await again.say(wire.command(Command.POSTCOPY_RESUME))
        await again.hear()
        await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        assert "did not come within" in there.monitor.info()["error-desc"]
        third = await there.reconnect()
        beside = await there.connect_beside()
        await third.say(wire.command(Command.POSTCOPY_RESUME))
        await third.hear_until(ResumeAck)
        await beside.say(bare(*ALL) + wire.END_WORD)
        await third.say(END)
        await third.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary), there.outcome


# -- a source, whose destination is played -----------------------------------------------------------------------------


class Played:
    """The destination's end of both connections."""

    def __init__(self) -> None:
        self.main = virtual_link()
        self.beside = virtual_link()
        self.order: list[str] = []
        self.pages: dict[str, list[int]] = {"main": [], "beside": []}
        self.ended = trio.Event()

    def connections(self) -> Connections:
        return Connections(first=self._opener("main"), beside=self._opener("beside"))

    def _opener(self, which: str) -> Callable[[], Awaitable[AnyStream]]:
        async def opener() -> AnyStream:
            await trio.lowlevel.checkpoint()
            self.order.append(which)
            stream: AnyStream = getattr(self, which)[0]
            return stream

        return opener

    def count(self, which: str, event: ev.Element) -> None:
        """Remember the pages in *event*."""
        if isinstance(event, ev.PageRun | ev.ZeroRun):
            self.pages[which] += (event.offsets // PAGE_SIZE).tolist()

    async def take_main(self, ask: tuple[int, ...]) -> None:
        """Answer as a destination does; when the guest lives, ask for pages."""
        stream = self.main[1]
        decoder = self.decoder = Decoder(measure=lambda *_: 8, description=False)
        while data := await stream.receive_some():
            decoder.feed(data)
            while (event := decoder.next_event()) is not None:
                self.order.append(type(event).__name__)
                self.count("main", event)
                match event:
                    case ev.CommandElement(number=Command.PING):
                        await stream.send_all(encode(Pong(value=int.from_bytes(event.payload))))
                    case ev.PackageElement():
                        await stream.send_all(encode(Pong(value=3)))
                        for page in ask:
                            request = PageRequest(block="ram", start=page * PAGE_SIZE, length=PAGE_SIZE)
                            await stream.send_all(encode(request))
                    case ev.EndOfStream():
                        await self.ended.wait()
                        await stream.send_all(encode(Shut(status=0)))
                        return

    async def take_beside(self) -> None:
        """Until the end word."""
        stream, data = self.beside[1], b""
        while len(data) < 8 or data[-8:] != wire.END_WORD:
            more = await stream.receive_some()
            assert more, "closed without an end word"
            data += more
        decoder = Decoder(measure=None, continues=self.decoder, records_only=True)
        decoder.feed(data)
        while (event := decoder.next_event()) is not None:
            self.count("beside", event)
        self.ended.set()


@pytest.mark.parametrize("early", [True, False], ids=["7.2", "8.0"])
async def test_what_is_asked_for_goes_on_the_second_connection(
    autojump_clock: trio.testing.MockClock, *, early: bool
) -> None:
    """Row 36: each page once, whichever way it goes; the second connection is made when the peer expects it."""
    source = ScriptedGuest(blocks={"ram": 64}, content="random", seed=3, devices=[FakeDevice("clock", size=8)])
    config = preempt(early=early)
    # A page or two each 100 ms: all of these are asked for before their turn.
    slow = trimig.Parameters(max_bandwidth=0, downtime_limit=1, max_postcopy_bandwidth=64 << 10)
    config = dataclasses.replace(config, parameters=slow)
    played, monitor = Played(), MonitorCore()
    monitor.add_listener(lambda event: monitor.start_postcopy() if event.data.get("status") == "setup" else None)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(played.take_main, (63, 40, 20, 63))
            nursery.start_soon(played.take_beside)
            await migrate_stream(source, played.connections(), config, monitor)
    assert sorted(played.pages["main"] + played.pages["beside"]) == list(range(64))
    assert played.pages["beside"] == [63, 40, 20]
    assert monitor.info()["ram"]["postcopy-requests"] == 3
    at = played.order.index("beside")
    assert played.order[:at].count("RamList") == (0 if early else 1)
    assert "Package" not in played.order[:at]


async def test_where_there_is_one_connection_only_it_is_refused_at_once(tmp_path: Path) -> None:
    """Cause and way out; the guest was not touched, and the stream that was given is closed."""
    source = ScriptedGuest(blocks={"ram": 4}, devices=[FakeDevice("clock", size=8)])
    ours, theirs = virtual_link()
    for to in (ours, f"file:{tmp_path}/f", "exec:cat"):
        with pytest.raises(ConfigError, match="several connections") as caught:
            await trimig.migrate(source, to, preempt())
        assert caught.value.owner is Ownership.SOURCE
        assert source.running
    assert await theirs.receive_some() == b""
    assert not os.listdir(tmp_path)
    with pytest.raises(ConfigError, match="several connections"):
        await trimig.receive(guest(), f"file:{tmp_path}/f", preempt())


def test_it_needs_postcopy() -> None:
    with pytest.raises(ConfigError, match="needs postcopy-ram"):
        trimig.Capabilities(postcopy_preempt=True).check()
