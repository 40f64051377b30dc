"""Two trimigs recognise each other, tell each other why they give up, and do not mix two migrations.

A stock QEMU sees one more PING and nothing else.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.engine.pair import ACCEPTED, Destination, Pair, config, played, running, waiting
from trimig.guest import PAGE_SIZE
from trimig.status import Status
from trimig.testing import FakeDevice
from trimig.wire import encoder as wire
from trimig.wire.marks import PING_MARK, PONG_MARK, Mark
from trimig.wire.return_path import Message, Pong, Reason, ReturnPathDecoder, Shut, encode

LIMIT = 60


# -- a destination that is no trimig ---------------------------------------------------------------------------------------


async def test_a_qemu_gets_one_more_ping_and_nothing_else(autojump_clock: trio.testing.MockClock) -> None:
    """It echoes every PING, and never answers the mark."""
    pair = Pair()
    read: list[bytes] = []

    async def script(there: Destination) -> None:
        await there.until(wire.ping(PING_MARK))
        assert wire.ping(1) + wire.ping(PING_MARK) in there.read
        await there.say(Pong(value=1), Pong(value=PING_MARK))
        await there.prepare()
        await there.until(b'"devices"')
        await there.say(ACCEPTED)
        read.append(bytes(there.read))

    async with played(pair, script):
        assert (await pair.migrate()).confirmed
    assert all(wire.command(mark)[:3] not in read[0] for mark in Mark)


async def test_a_qemu_source_gets_no_mark(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair()
    device = FakeDevice("clock", size=8)
    heard = bytearray()
    opening = wire.file_header() + wire.configuration("scripted", ()) + wire.command(1) + wire.ping(1)

    async def source() -> None:
        await pair.link.a.send_all(opening + b"\xff")
        while data := await pair.link.a.receive_some():
            heard.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source)
        with pytest.raises(trimig.RemoteProtocolError):
            await pair.receive()
    assert bytes(heard) == encode(Pong(value=1)) + bytes.fromhex("00010004 00000001")
    assert device.data is not None


# -- reasons ---------------------------------------------------------------------------------------------------------------


async def test_a_refusal_says_why(autojump_clock: trio.testing.MockClock) -> None:
    device = FakeDevice("clock", size=8, load_error=trimig.RemoteProtocolError("no such clock", section="clock"))
    here, there = await Pair(running(), waiting(devices=[device])).both()
    assert isinstance(there, trimig.RemoteProtocolError)
    assert isinstance(here, trimig.PeerFailed)
    assert f"(it sent SHUT 1): {there}" in str(here)


async def test_a_cancel_at_the_destination_says_why(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair(running(pages=64), config_here=config(max_bandwidth=100_000), config_there=config())

    async def cancel() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await trio.sleep(0.5)
        pair.there.cancel("the host\nis going down")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        here, there = await pair.both()
    assert isinstance(there, trimig.MigrationCancelled)
    assert isinstance(here, trimig.PeerFailed)
    assert "the host is going down" in str(here)


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
async def test_a_cancel_at_the_source_says_why(autojump_clock: trio.testing.MockClock, at: float) -> None:
    """Where the rate limit holds it up, the stream stands at the end of a record."""
    pair = Pair(running(pages=64), config_here=config(max_bandwidth=100_000), config_there=config())

    async def cancel() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await trio.sleep(0.05 + at)
        pair.here.cancel("maintenance is over")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        here, there = await pair.both()
    assert isinstance(here, trimig.MigrationCancelled)
    assert isinstance(there, trimig.PeerFailed)
    assert str(there) == "the source ended the migration: it was cancelled: maintenance is over"


@pytest.mark.parametrize("stage", [1, 2, 3, 5, 8, 13])
async def test_a_cancel_in_the_middle_of_a_write_finishes_the_record(stage: int) -> None:
    """On sockets it is known how much has left; the guest runs again before the record is finished."""
    left, right = socket.socketpair()
    for end in (left, right):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    source = trimig.AppGuest("m")
    target = trimig.AppGuest("m", running=False)
    with source, target, trio.fail_after(LIMIT):
        source.add_ram("ram", 8 << 20).pages[:] = np.random.default_rng(stage).integers(
            1, 256, (2048, PAGE_SIZE), np.uint8
        )
        target.add_ram("ram", 8 << 20)
        monitor = trimig.Monitor()
        ends: dict[str, Any] = {}

        async def side(name: str, call: Callable[[], Awaitable[trimig.Summary]]) -> None:
            try:
                ends[name] = await call()
            except trimig.TrimigError as error:
                ends[name] = error

        here, there = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (left, right))
        async with trio.open_nursery() as nursery:
            there_monitor = trimig.Monitor()
            nursery.start_soon(side, "there", lambda: trimig.receive(target, there, monitor=there_monitor))
            nursery.start_soon(
                side, "here", lambda: trimig.migrate(source, here, config(max_bandwidth=0), monitor=monitor)
            )
            async for picture in monitor.watch(0.0):
                if picture.transferred > stage * 100_000 or picture.status is not Status.ACTIVE:
                    if picture.status is Status.SETUP:
                        continue
                    break
            cancelled = monitor.status is Status.ACTIVE
            if cancelled:
                monitor.cancel("enough")
        if not cancelled:
            return  # this machine was faster than the test
        assert isinstance(ends["here"], trimig.MigrationCancelled)
        assert source.run_state == "running"
        # The mark may not have been answered when the cancel came: then the connection only ends.
        assert isinstance(ends["there"], trimig.PeerFailed | trimig.TransportFailed)
        if isinstance(ends["there"], trimig.PeerFailed):
            assert "it was cancelled: enough" in str(ends["there"])


@pytest.mark.parametrize("marked", [False, True], ids=["QEMU", "trimig"])
async def test_a_cancel_in_the_middle_of_an_answer_is_told(marked: bool) -> None:
    """The source reads no answers until their buffers are full. It then reads whole messages, the refusal last."""
    left, right = socket.socketpair()
    for end in (left, right):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    here, there = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (left, right))
    opening = wire.file_header() + wire.configuration("m", ()) + wire.command(1)
    target, monitor = trimig.AppGuest("m", running=False), trimig.Monitor()
    target.add_ram("ram", PAGE_SIZE)
    decoder = ReturnPathDecoder({}, marks=True)
    heard: list[Message] = []
    with target, here.socket, trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trimig.MigrationCancelled):
                    await trimig.receive(target, there, config(), monitor=monitor)

            nursery.start_soon(receive)
            await here.send_all(opening + (wire.ping(PING_MARK) if marked else b""))
            with trio.move_on_after(1):  # which the destination does not take: it waits until its answers are
                for value in range(1 << 20):
                    await here.send_all(wire.ping(value & 511))
            monitor.cancel("the host is going down")
            while data := await here.receive_some():
                heard += decoder.feed(memoryview(data))
    assert not decoder.pending
    assert heard[-1] == Shut(status=1)
    assert any(isinstance(message, Reason) and b"going down" in message.payload for message in heard) == marked


def test_what_is_told_is_a_strangers_text() -> None:
    assert encode(Reason(payload=b"x"))[:2] == Mark.REASON.to_bytes(2)
    assert encode(Pong(value=PONG_MARK)) == bytes.fromhex("00020004 74726d81")


# -- attempts ----------------------------------------------------------------------------------------------------------------


class Postcopy:
    """One postcopy over a socket pair, paused by the test, and what became of its two ends."""

    def __init__(self, name: str, fill: int) -> None:
        self.source = trimig.AppGuest("twin")
        self.target = trimig.LazyAppGuest("twin", running=False)
        self.source.add_ram("ram", 64 * PAGE_SIZE).pages[:] = fill
        self.target.add_ram("ram", 64 * PAGE_SIZE)
        self.name, self.fill = name, fill
        self.here, self.there = trimig.Monitor(), trimig.Monitor()
        self.ends: dict[str, Any] = {}

    async def side(self, name: str, call: Callable[[], Awaitable[trimig.Summary]]) -> None:
        try:
            self.ends[name] = await call()
        except trimig.TrimigError as error:
            self.ends[name] = error

    async def begin(self, nursery: trio.Nursery) -> None:
        """Both ends run until the memory follows; then the connection is lost."""
        slow = trimig.Config(
            capabilities=trimig.Capabilities(postcopy_ram=True),
            parameters=trimig.Parameters(max_bandwidth=50_000, downtime_limit=1, max_postcopy_bandwidth=50_000),
        )
        a, b = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
        nursery.start_soon(self.side, "there", lambda: trimig.receive(self.target, b, slow, monitor=self.there))
        nursery.start_soon(self.side, "here", lambda: trimig.migrate(self.source, a, slow, monitor=self.here))
        await self.here.wait_status(Status.ACTIVE)
        self.here.start_postcopy()
        await self.here.wait_status(Status.POSTCOPY_ACTIVE)
        self.here.pause("lost")
        await self.there.wait_status(Status.POSTCOPY_PAUSED)
        await self.here.wait_status(Status.POSTCOPY_PAUSED)

    def close(self) -> None:
        self.source.close()
        self.target.close()


async def refused(monitor: trimig.Monitor) -> str:
    """Wait until a recovery has been refused and the status is paused again; why."""
    while not (
        monitor.status is Status.POSTCOPY_PAUSED and "another migration" in str(monitor.info().get("error-desc"))
    ):
        await monitor.wait_changed()
    return str(monitor.info()["error-desc"])


async def test_a_recovery_to_another_migrations_destination_is_refused(tmp_path: Path) -> None:
    """Both have the same machine and the same blocks: only the id of the attempt tells them apart."""
    one, two = Postcopy("one", 65), Postcopy("two", 66)
    try:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await one.begin(nursery)
                await two.begin(nursery)
                for pair in (one, two):
                    pair.there.recover(f"unix:{tmp_path}/{pair.name}")
                while not all((tmp_path / pair.name).exists() for pair in (one, two)):  # noqa: ASYNC110 - no event for both
                    await trio.sleep(0.01)
                one.here.recover(f"unix:{tmp_path}/two")
                assert "the id of the attempt is another one" in await refused(one.here)
                await refused(two.there)
                assert two.target.owner is trimig.Owner.HERE
                for pair in (one, two):
                    if pair.there.status is Status.POSTCOPY_PAUSED and not pair.there.addresses:
                        pair.there.recover(f"unix:{tmp_path}/{pair.name}")
                    while not pair.there.addresses:
                        await pair.there.wait_changed()
                    pair.here.recover(pair.there.addresses[0])
        for pair in (one, two):
            assert isinstance(pair.ends["here"], trimig.Summary), pair.ends
            assert isinstance(pair.ends["there"], trimig.Summary), pair.ends
            assert (pair.target.ram[0].pages == pair.fill).all()
    finally:
        one.close()
        two.close()
