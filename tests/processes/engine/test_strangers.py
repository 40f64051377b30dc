"""Whole receivers among strangers, with sockets, while a real source migrates."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
from tests.engine.test_lobby import HTTP, LIMIT, MULTIFD
from tests.engine.test_postcopy_bad_input import HEAD
from tests.transport.pki import Pki, secure
from tests.transport.test_hostile_handshakes import client_hello
from trimig.guests import LazyAppGuest
from trimig.status import Status
from trimig.wire import Command
from trimig.wire import encoder as wire

SIZE = 4 << 20


class Strangers:
    """Connections of all kinds to one address, before and while a source migrates."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.kept: list[trio.SocketStream] = []
        self.thrown = 0

    async def dial(self) -> trio.SocketStream:
        kind, _, rest = self.uri.partition(":")
        if kind == "unix":
            return await trio.open_unix_socket(rest)
        host, _, port = rest.strip("/").partition("/")[0].rpartition(":")
        return await trio.open_tcp_stream(host, int(port))

    async def throw(self, data: bytes) -> None:
        """Connect, send, and go when it is closed, or at once when nothing was sent."""
        stream = await self.dial()
        self.thrown += 1
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(1):
                await stream.send_all(data)
                while data and await stream.receive_some():
                    pass

    async def sit(self) -> None:
        """Connect, and be silent."""
        self.kept.append(await self.dial())

    async def crowd(self, *, opaque: bool = False) -> None:
        """100 probes, and some of everything else.

        Args:
            opaque: the receiver keeps any machine: a peer that sends a header and a configuration is its source.
        """
        source = random.Random(20)
        for _ in range(20):
            await self.sit()
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(self.throw, b"")
            others = (HTTP, MULTIFD, client_hello(), b"QEVM\0\0\0\2", b"\x16", *map(source.randbytes, [9] * 5))
            for data in others if opaque else (*others, HEAD):
                nursery.start_soon(self.throw, data)
        for _ in range(20):
            await self.sit()

    async def go_on(self) -> None:
        """Until cancelled."""
        source = random.Random(21)
        while True:
            with contextlib.suppress(OSError):  # the listener is closed when all have come
                await self.throw(source.choice((b"", HTTP, MULTIFD, client_hello(), source.randbytes(20))))
            await trio.sleep(0.005)

    def close(self) -> None:
        for stream in self.kept:
            stream.socket.close()


class Moved:
    """A guest that was migrated among strangers."""

    def __init__(self, config: trimig.Config, there: trimig.Config | None = None) -> None:
        self.config = config
        self.there = there or config
        self.lazy = config.capabilities.postcopy_ram
        self.sender, self.taker = trimig.Monitor(), trimig.Monitor()
        self.dropped: list[str] = []
        self.statuses: list[str] = []
        self.taker.add_listener(lambda event: self.statuses.append(str(event.data.get("status", ""))))
        self.taker.add_listener(
            lambda event: self.dropped.append(event.data["reason"]) if event.name == "CONNECTION_DROPPED" else None
        )

    async def run(self, uri: str) -> Strangers:
        source = trimig.AppGuest("g", running=True)
        source.add_ram("ram", SIZE).pages[:] = np.random.default_rng(1).integers(0, 256, (SIZE >> 12, 4096), np.uint8)
        target = (LazyAppGuest if self.lazy else trimig.AppGuest)("g", running=False)
        target.add_ram("ram", SIZE)
        with trio.fail_after(LIMIT), source, target:
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as both:

                    async def receive() -> None:
                        await trimig.receive(target, uri, self.there, monitor=self.taker)

                    both.start_soon(receive)
                    while not self.taker.addresses:
                        await self.taker.wait_changed()
                    address = self.taker.addresses[0]
                    strangers = Strangers(address)
                    await strangers.crowd()
                    nursery.start_soon(strangers.go_on)
                    if self.lazy:
                        self.sender.add_listener(
                            lambda event: self.sender.start_postcopy() if event.data.get("status") == "setup" else None
                        )
                        nursery.start_soon(self._ask, target)
                    summary = await trimig.migrate(source, address, self.config, monitor=self.sender)
                nursery.cancel_scope.cancel("it has moved")
            strangers.close()
            assert summary.confirmed
            assert target.run_state == "running"
            np.testing.assert_array_equal(source.ram[0].pages, target.ram[0].pages)
        return strangers

    async def _ask(self, target: trimig.AppGuest) -> None:
        """What the guest touches once it runs: some of it comes on the second connection."""
        assert isinstance(target, LazyAppGuest)
        await self.taker.wait_status(Status.POSTCOPY_ACTIVE)
        for page in range(SIZE // 4096 - 1, 0, -100):
            await target.ensure_present("ram", page * 4096, 4096)


def slow(**capabilities: bool) -> trimig.Config:
    profile = capabilities.pop("newer", False)
    peer = trimig.PeerProfile.named("qemu-8.0" if profile else "qemu-7.2")
    parameters = trimig.Parameters(max_bandwidth=8 << 20, downtime_limit=1000, max_postcopy_bandwidth=4 << 20)
    return trimig.Config(capabilities=trimig.Capabilities(**capabilities), parameters=parameters, peer=peer)


@pytest.mark.parametrize("kind", ["tcp", "unix", "ws", "tls", "wss"])
async def test_receiver_survives_strangers(kind: str, tmp_path: Path) -> None:
    """By each transport that several can connect to."""
    near = there = trimig.Config(parameters=trimig.Parameters(max_bandwidth=8 << 20))
    if kind in ("tls", "wss"):
        pki = Pki(tmp_path / "pki")
        directory = pki.make("server")
        pki.write(directory, "client", common_name="host-a")
        near = there = secure(directory)
    uri = {"unix": f"unix:{tmp_path}/s", "ws": "ws://127.0.0.1:0/", "wss": "wss://127.0.0.1:0/"}
    moved = Moved(near, there)
    strangers = await moved.run(uri.get(kind, "tcp:127.0.0.1:0"))
    assert strangers.thrown >= 100
    assert moved.dropped


@pytest.mark.parametrize("newer", [False, True], ids=["7.2", "8.0"])
async def test_second_connection_is_found_among_strangers(*, newer: bool) -> None:
    """Postcopy-preempt, with strangers that are silent from before to the end, and others all the time."""
    moved = Moved(slow(postcopy_ram=True, postcopy_preempt=True, newer=newer))
    await moved.run("tcp:127.0.0.1:0")
    assert moved.sender.status is moved.taker.status is Status.COMPLETED
    assert "postcopy-paused" not in moved.statuses


@pytest.mark.parametrize("preempt", [False, True], ids=["one", "two"])
async def test_recovery_with_a_silent_stranger(*, preempt: bool) -> None:
    """The stranger is there before the source, and stays; nothing waits for it."""
    moved = Moved(slow(postcopy_ram=True, postcopy_preempt=preempt))
    statuses: list[str] = []
    silent: list[Strangers] = []

    async def sit(uri: str) -> None:
        strangers = Strangers(uri)
        silent.append(strangers)
        for _ in range(3):
            await strangers.sit()
        await strangers.throw(HTTP)
        await strangers.throw(wire.command(Command.RECV_BITMAP, b"\x05other"))
        await moved.sender.wait_status(Status.POSTCOPY_PAUSED)
        moved.sender.recover(uri)

    async with trio.open_nursery() as nursery:

        def follow(event: trimig.Event) -> None:
            statuses.append(str(event.data.get("status", "")))
            if statuses.count("postcopy-paused") == 1 and event.name == "LISTENING":
                nursery.start_soon(sit, event.data["addresses"][0])

        def recover() -> None:
            if moved.taker.status is Status.POSTCOPY_PAUSED:
                moved.taker.recover("tcp:127.0.0.1:0")

        moved.taker.add_listener(follow)
        moved.taker.add_listener(lambda event: recover() if event.data.get("status") == "postcopy-paused" else None)
        moved.taker.add_listener(
            lambda event: nursery.start_soon(cut) if event.data.get("status") == "postcopy-active" else None
        )

        async def cut() -> None:
            if "postcopy-paused" not in statuses:
                await moved.sender.wait_status(Status.POSTCOPY_ACTIVE)
                moved.taker.pause("the test")

        await moved.run("tcp:127.0.0.1:0")
    for strangers in silent:
        strangers.close()
    assert statuses.count("postcopy-recover") == 1
    assert any("'other'" in reason for reason in moved.dropped)
    assert moved.taker.status is Status.COMPLETED


@pytest.mark.parametrize(
    ("data", "words"),
    [(MULTIFD, "multifd off at the source"), (client_hello(), "set tls-creds there"), (HTTP, "HTTP request")],
)
async def test_likely_reason_is_in_the_error(data: bytes, words: str) -> None:
    """A source that is set up in another way. The receiver waits on; its error at the end says why nothing came."""
    target, monitor = trimig.AppGuest("g", running=False), trimig.Monitor()
    target.add_ram("ram", 4096)
    with trio.fail_after(LIMIT), target:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trimig.MigrationCancelled) as caught:
                    await trimig.receive(target, "tcp:127.0.0.1:0", monitor=monitor)
                assert words in str(caught.value)

            nursery.start_soon(receive)
            while not monitor.addresses:
                await monitor.wait_changed()
            await Strangers(monitor.addresses[0]).throw(data)
            assert monitor.status is Status.SETUP
            monitor.cancel("enough")


@pytest.mark.parametrize("preempt", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("ends", [False, True], ids=["it waits", "it ends"])
async def test_multifd_at_the_source_is_named(*, preempt: bool, ends: bool) -> None:
    """Main first, data channels beside it; the source gives up when these are closed, or waits for what never comes."""
    config = slow(postcopy_ram=True, postcopy_preempt=True) if preempt else trimig.Config()
    target, monitor = LazyAppGuest("g", running=False), trimig.Monitor()
    target.add_ram("ram", 4096)
    with trio.fail_after(LIMIT), target:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(
                    trimig.MigrationError,
                    match=r"; the source has the capability multifd on.*turn multifd off at the source",
                ):
                    await trimig.receive(target, "tcp:127.0.0.1:0", config, monitor=monitor)

            nursery.start_soon(receive)
            while not monitor.addresses:
                await monitor.wait_changed()
            strangers = Strangers(monitor.addresses[0])
            async with await strangers.dial() as main:
                await main.send_all(wire.file_header() + wire.configuration("g", ()) + wire.command(1) + wire.ping(1))
                await monitor.wait_status(Status.ACTIVE)
                await strangers.throw(MULTIFD)
                if not ends:
                    await monitor.wait_status(Status.FAILED)
