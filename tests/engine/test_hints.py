"""What the error of a lost connection says: as much as this side knows of the reason, and no more."""

from __future__ import annotations

import ssl

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Destination, Pair, config, played, running
from trimig.channel import pump
from trimig.errors import Loss
from trimig.testing import VirtualLink
from trimig.wire import encoder as wire
from trimig.wire.return_path import Pong

LISTS = "another name of the guest"


async def left(pair: Pair, *, answer: bool, seen: bytes = b"", much: int = 0) -> str:
    """The error of a source whose destination goes away, after it has answered, or read so much, or read *seen*."""

    async def script(there: Destination) -> None:
        await there.until(wire.ping(1))
        if answer:
            await there.say(Pong(value=1))
            await trio.sleep(0.1)
        while len(there.read) < much or seen not in there.read:
            there.read += await there.stream.receive_some(1 << 20)

    async with played(pair, script):
        with pytest.raises(trimig.TransportFailed) as caught:
            await pair.migrate()
    assert pair.here.info()["error-desc"] == str(caught.value)
    assert pair.source.running
    return str(caught.value)


async def test_destination_that_never_answered_may_have_tls(autojump_clock: trio.testing.MockClock) -> None:
    text = await left(Pair(), answer=False)
    assert text.index("Perhaps TLS is on there") < text.index(LISTS)
    assert "multifd" not in text


async def test_destination_that_answered_has_no_tls(autojump_clock: trio.testing.MockClock) -> None:
    text = await left(Pair(running(pages=64), link=VirtualLink(rate=300_000, window=8192)), answer=True)
    assert ("TLS" in text, LISTS in text) == (False, True)


async def test_announced_postcopy_is_the_first_suspicion(autojump_clock: trio.testing.MockClock) -> None:
    settings = trimig.Config(capabilities=trimig.Capabilities(postcopy_ram=True))
    pair = Pair(running(pages=64), link=VirtualLink(rate=300_000, window=8192), config_here=settings)
    text = await left(pair, answer=True)
    assert text.index("postcopy-ram is off there") < text.index(LISTS)


async def test_destination_that_took_much_has_died(autojump_clock: trio.testing.MockClock) -> None:
    """Pages were accepted, so names and sizes were right."""
    pair = Pair(running(pages=4096, content="random"), link=VirtualLink(rate=10 << 20), config_here=config())
    text = await left(pair, answer=True, much=9 << 20)
    assert text.endswith("; it has died, or the link broke")


async def test_destination_without_the_device_says_it_at_the_end(autojump_clock: trio.testing.MockClock) -> None:
    text = await left(Pair(), answer=True, seen=b"clock")
    assert "it cannot load the devices" in text


async def test_alert_of_tls_is_no_lost_connection() -> None:
    """It says the reason itself."""
    alert = trio.BrokenResourceError()
    alert.__cause__ = ssl.SSLError(1, "tlsv13 alert certificate required")
    assert pump.broke("receiving", alert).loss is None
    assert pump.broke("receiving", ConnectionResetError()).loss is Loss.CLOSED


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            b'{"QMP": {"version": 1}}\r\n',
            "no migration destination at that address: it is a QMP socket",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it is an HTTP server"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it answered with 'SSH-'"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "TLS is on there"),
    ],
)
async def test_peer_of_another_protocol_is_shown(
    autojump_clock: trio.testing.MockClock, said: bytes, text: str
) -> None:
    pair = Pair()

    async def script(there: Destination) -> None:
        await there.say(said)
        await there.until_closed()

    async with played(pair, script):
        with pytest.raises(trimig.RemoteProtocolError) as caught:
            await pair.migrate()
    assert text in str(caught.value)


async def test_receiver_with_its_own_error_suggests_no_multifd(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair()
    pair.target._run_state = "running"
    here, there = trio.testing.memory_stream_pair()

    async def refuses() -> None:
        with pytest.raises(trimig.StateError):
            await trimig.receive(pair.target, there)
        await there.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuses)
        with pytest.raises(trimig.TransportFailed) as caught:
            await trimig.migrate(pair.source, here)
    assert "multifd" not in str(caught.value)


async def test_destination_says_that_its_source_has_ended(autojump_clock: trio.testing.MockClock) -> None:
    pair = Pair(running(pages=64), link=VirtualLink(rate=300_000, window=8192))

    async def cut() -> None:
        await pair.here.wait_status(trimig.Status.ACTIVE)
        await trio.sleep(0.1)
        pair.link.a.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        _, there = await pair.both()
    assert isinstance(there, trimig.TransportFailed)
    assert str(there).endswith("; the source has ended, or the link broke"), str(there)
