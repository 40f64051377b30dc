"""The set of connections of one side."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import waiting
from trimig.channel.channel import Channel
from trimig.channel.channels import MAIN, MULTIFD, PREEMPT, Channels
from trimig.engine.sections.ram import beside_of
from trimig.testing import VirtualLink
from trimig.wire.pages.multifd import MAGIC


async def test_bytes_of_closed_connections_stay_in_the_sums(autojump_clock: trio.testing.MockClock) -> None:
    """Each connection counts once, whatever becomes of it."""
    channels, links = Channels(), [VirtualLink(seed=n) for n in range(3)]
    assert (channels.sent, channels.received, channels.cut()) == (0, 0, True)
    main, preempt, later = (Channel(link.a) for link in links)
    channels.add(MAIN, main)
    channels.add(PREEMPT, preempt)
    await main.send(b"12345")
    await preempt.send(b"123")
    await links[0].b.send_all(b"1")
    await main.receive_into(memoryview(bytearray(8)))
    assert (channels.sent, channels.received) == (8, 1)
    await channels.close_beside()
    assert channels.has(MAIN)
    assert not channels.has(PREEMPT)
    assert channels.sent == 8
    await channels.close()
    await channels.close()
    channels.add(MAIN, later)
    await later.send(b"12")
    assert (channels.sent, channels.received) == (10, 1)


async def test_the_main_connection_is_closed_first(autojump_clock: trio.testing.MockClock) -> None:
    """Its end tells the other side more than that of one beside it."""
    order: list[str] = []

    class Noted(trio.abc.SendStream):
        """It is only closed: any other call fails the test."""

        def __init__(self, name: str) -> None:
            self._name = name

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            raise NotImplementedError

        async def wait_send_all_might_not_block(self) -> None:
            raise NotImplementedError

        async def aclose(self) -> None:
            order.append(self._name)
            await trio.lowlevel.checkpoint()

    channels = Channels()
    channels.add(PREEMPT, Channel(Noted("beside")))
    channels.add(MAIN, Channel(Noted("main")))
    assert not channels.cut()  # no kernel socket
    await channels.close(1.0)
    assert order == ["main", "beside"]


def test_connections_beside_the_main_one() -> None:
    """S13: the parameter says how many; they are opened with the main one and begin with the magic of a hello."""
    assert beside_of(trimig.Config()) == ()
    both = trimig.Config(
        capabilities=trimig.Capabilities(multifd=True, postcopy_ram=True, postcopy_preempt=True),
        parameters=trimig.Parameters(multifd_channels=3),
    )
    first, second = beside_of(both)
    assert (first.kind, first.count, first.early, first.magic) == (MULTIFD, 3, True, MAGIC)
    assert (second.kind, second.magic) == (PREEMPT, b"")


async def test_where_multifd_cannot_be_used_it_is_refused() -> None:
    config = trimig.Config(capabilities=trimig.Capabilities(multifd=True))
    link = VirtualLink()
    with pytest.raises(trimig.ConfigError, match="multifd needs several connections, and there is only one"):
        await trimig.receive(waiting(), link.b, config)
