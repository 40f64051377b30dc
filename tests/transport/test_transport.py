"""URIs: accepted ones, those refused before anything is opened, and schemes that trimig does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

import trimig
from trimig import transport
from trimig.errors import ConfigError, TransportFailed
from trimig.status import Status
from trimig.testing import ScriptedGuest


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("tcp:host:4444", ("tcp", "host:4444")),
        ("tcp:[::1]:1", ("tcp", "[::1]:1")),
        ("unix:/run/a:b", ("unix", "/run/a:b")),
    ],
)
def test_uri_is_taken_apart(uri: str, expected: tuple[str, str]) -> None:
    assert transport.check(uri) == expected


@pytest.mark.parametrize("uri", ["unix:", "tcp:foo", "tcp:h:x", "exec: ", "fd:x", "file:", "ws:host", "wss://h:x/"])
def test_address_that_cannot_be_understood_is_refused_before_anything_is_touched(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        transport.check(uri)
    assert caught.value.name == "uri"


@pytest.mark.parametrize("uri", ["", "tcp", "/run/socket", ":4444", "host"])
def test_what_is_no_uri_is_called_that(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a migration URI; give for example tcp:HOST:PORT") as caught:
        transport.check(uri)
    assert caught.value.name == "uri"


@pytest.mark.parametrize("uri", ["quic:host:1", "TCP:host:1", "http://host", "tcp4:host:1", "defer:"])
def test_unknown_scheme_is_named(uri: str) -> None:
    """B6, B8."""
    with pytest.raises(ConfigError, match="unknown protocol") as caught:
        transport.check(uri)
    assert repr(uri.partition(":")[0]) in str(caught.value)
    assert uri in str(caught.value)


@pytest.mark.parametrize("scheme", ["rdma", "vsock"])
def test_scheme_that_is_not_built_is_named(scheme: str) -> None:
    """B5."""
    with pytest.raises(
        ConfigError, match=rf"'{scheme}:anything' cannot be used: .*not built into trimig.*; there are "
    ):
        transport.check(f"{scheme}:anything")


def test_schemes_are_the_files_of_the_package() -> None:
    assert {"tcp", "unix"} <= set(transport.SCHEMES)


@pytest.mark.parametrize("uri", ["quic:host:1", "rdma:host:1", "nothing"])
async def test_bad_uri_is_refused_by_both_calls_before_anything_happens(uri: str) -> None:
    """B6, B8: the error names the URI, the status stays none, and the attempt may be repeated."""
    for call in (trimig.migrate, trimig.receive):
        monitor = trimig.Monitor()
        guest = ScriptedGuest(run_state="running" if call is trimig.migrate else "prelaunch")
        before = guest.run_state
        with pytest.raises(ConfigError):
            await call(guest, uri, monitor=monitor)
        assert guest.run_state == before
        guest.claim("another attempt")  # the first attempt's claim was released
        guest.release()
        assert monitor.status in (Status.NONE, Status.FAILED)


async def test_address_is_told_before_a_peer_connects() -> None:
    told: list[str] = []
    async with transport.listening("tcp:127.0.0.1:0", told.append) as listener:
        assert told == [listener.uri]
        assert not listener.uri.endswith(":0")


async def test_listening_ends_with_the_context() -> None:
    told: list[str] = []
    with pytest.raises(RuntimeError, match="inside"):
        async with transport.listening("tcp:127.0.0.1:0", told.append):
            raise RuntimeError("inside")
    with pytest.raises(TransportFailed, match="connection refused"):
        await transport.connect(told[0])


async def test_listening_ends_if_the_address_cannot_be_told() -> None:
    told: list[str] = []

    def fail(uri: str) -> None:
        told.append(uri)
        raise RuntimeError("an error of the listener")

    with pytest.raises(RuntimeError, match="an error of the listener"):
        async with transport.listening("tcp:127.0.0.1:0", fail):
            raise AssertionError("it was entered")
    with pytest.raises(TransportFailed):
        await transport.connect(told[0])


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_waiting_for_a_connection_can_be_cancelled(kind: str, tmp_path: Path) -> None:
    """T3, gap G12: no socket is left, and no file."""
    uri = "tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s"
    told: list[str] = []
    async with trio.open_nursery() as nursery:
        waiting = trio.Event()

        async def wait() -> None:
            async with transport.listening(uri, told.append) as listener:
                waiting.set()
                await listener.accept()

        nursery.start_soon(wait)
        await waiting.wait()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel(reason="the test")
    with pytest.raises(TransportFailed):
        await transport.connect(told[0])


async def test_cancelled_receive_leaves_no_address() -> None:
    """T3: a receiver without a connection ends at once, and its guest may be used again."""
    monitor, guest = trimig.Monitor(), ScriptedGuest(run_state="prelaunch")
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            await trimig.receive(guest, "tcp:127.0.0.1:0", monitor=monitor)

        nursery.start_soon(receive)
        while not monitor.addresses:
            await monitor.wait_changed()
        address = monitor.addresses[0]
        nursery.cancel_scope.cancel(reason="the test")
    with pytest.raises(TransportFailed):
        await transport.connect(address)
    guest.claim("another attempt")
    guest.release()
