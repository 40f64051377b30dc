"""A service in a thread: it is called until it needs trio, and nothing stays behind, whatever ends it."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from trimig.channel import offload
from trimig.channel.channel import Channel
from trimig.channel.service import Attendant, Awaited
from trimig.errors import TransportFailed

LIMIT = 30


class Echo:
    """Reads what comes, until an ``x`` has come; its owner is told of each call."""

    def __init__(self, channel: Channel, seconds: float = 30.0, called: Callable[[], None] = lambda: None) -> None:
        self._channel = channel
        self._seconds = seconds
        self._called = called
        self.heard = b""
        self.threads: set[str] = set()

    def advance(self) -> Awaited | None:
        self.threads.add(threading.current_thread().name)
        self._called()
        buffer = memoryview(bytearray(16))
        while count := self._channel.receive_now(buffer):
            self.heard += buffer[:count]
        if b"x" in self.heard:
            return None
        if count == 0:
            raise TransportFailed("it has ended")
        ports = {self._channel.descriptor: select.POLLIN}
        return Awaited(ports=ports, progress=len(self.heard), seconds=self._seconds, fault="sent nothing")


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Channel, socket.socket]]:
    """A channel and its other end; afterwards no descriptor and no thread is left."""
    files, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    near, far = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(near))
    with trio.fail_after(LIMIT):
        yield Channel(stream), far
    await trio.aclose_forcefully(stream)
    far.close()
    assert offload.pumps().borrowed_tokens == 0
    assert threading.active_count() <= threads + 1  # trio keeps a thread for the next call
    assert len(set(os.listdir("/proc/self/fd")) - files) <= 1  # the directory itself


async def test_it_runs_in_a_thread_until_it_needs_trio(ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    service = Echo(channel)
    far.send(b"abcx")
    assert await Attendant().run(service, [channel])
    assert service.heard == b"abcx"
    assert threading.current_thread().name not in service.threads
    assert channel.received == 4


async def test_a_recall_ends_it_and_it_can_go_on(ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    attendant, service = Attendant(), Echo(channel)
    attendant.recall()  # no effect: it does not run

    async def recall() -> None:
        attendant.recall()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(recall)
        assert await attendant.run(service, [channel])
    far.send(b"x")
    assert await attendant.run(service, [channel])
    assert service.heard == b"x"


async def test_a_cancellation_ends_it_and_no_byte_is_lost(ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    token, scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
    service = Echo(channel, called=lambda: token.run_sync_soon(scope.cancel))
    with scope:
        await Attendant().run(service, [channel])
    assert scope.cancelled_caught
    far.send(b"after")
    assert channel.receive_now(memoryview(bytearray(16))) == 5


@pytest.mark.parametrize("how", ["cut", "closed", "silent"])
async def test_a_lost_connection_is_its_error(how: str, ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    service = Echo(channel, seconds=0.05 if how == "silent" else 30.0)

    async def lose() -> None:
        if how == "cut":
            far.shutdown(socket.SHUT_RDWR)
        elif how == "closed":
            await channel.stream.aclose()

    words = {"cut": "it has ended", "closed": "the stream was closed here", "silent": "the peer sent nothing for"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose)
        with pytest.raises(TransportFailed, match=words[how]):
            await Attendant().run(service, [channel])


async def test_without_a_thread_it_is_not_called(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    service = Echo(channel)
    holders = [object() for _ in range(offload.MAX_PUMPS)]
    for holder in holders:
        offload.pumps().acquire_on_behalf_of_nowait(holder)
    assert not await Attendant().run(service, [channel])
    for holder in holders:
        offload.pumps().release_on_behalf_of(holder)
    assert not service.threads
