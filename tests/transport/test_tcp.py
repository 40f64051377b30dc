"""``tcp:`` on real sockets of the loopback device."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from trimig.config import Config
from trimig.errors import ConfigError, TransportFailed
from trimig.transport import _inet, tcp
from trimig.transport._inet import Families


def has_ipv6() -> bool:
    """Whether this machine can listen on ::1; containers without IPv6 are common."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on the loopback device")


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("host:4444", ("host", 4444)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
        (":4444", ("", 4444)),
        ("[::]:1,ipv6=on,ipv4=off", ("::", 1)),
        ("münchen.example:1", ("münchen.example", 1)),
    ],
)
def test_address_is_understood(rest: str, expected: tuple[str, int]) -> None:
    assert tcp.parse(rest) == expected


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("", "needs HOST:PORT"),
        ("host", "needs HOST:PORT"),
        ("host:", "needs HOST:PORT"),
        ("host:http", "needs HOST:PORT"),
        ("host:-1", "needs HOST:PORT"),
        ("host:+1", "needs HOST:PORT"),
        ("host: 1", "needs HOST:PORT"),
        ("host:65536", "from 0 to 65535"),
        ("host:٤٤٤٤", "needs HOST:PORT"),
        ("::1:4444", r"in brackets: tcp:\[::1\]:4444"),
        ("[::1]", "in brackets|needs HOST:PORT"),
        ("[::1:4444", r"in brackets: tcp:\[::1\]:4444"),
        ("::1]:4444", r"in brackets: tcp:\[::1\]:4444"),
        ("fe80::1%eth0:4444", r"in brackets: tcp:\[fe80::1%eth0\]:4444"),
        ("::", r"in brackets: for example tcp:\[::1\]:4444"),
        ("a:b:4444", r"in brackets: for example tcp:\[::1\]:4444"),
        ("host:1,to=5", "option 'to=5' behind tcp:host:1 is not supported"),
        ("host:1,ipv4=maybe", "is not on or off"),
        ("host:1,ipv4,ipv4=on", "comes twice"),
        ("host:1,ipv4=off,ipv6=off", "both IPv4 and IPv6 off"),
        ("a..b:1", "cannot be the name of a host"),
        ("x" * 64 + ":1", "cannot be the name of a host"),
        ("\udcff:1", "cannot be the name of a host"),
    ],
)
async def test_bad_address_is_refused(rest: str, words: str) -> None:
    for call in (tcp.connect, tcp.listen):
        with pytest.raises(ConfigError, match=words) as caught:
            await call(rest, Config())
        assert caught.value.name == "uri"


async def talk(listener: tcp.TcpListener, to: str) -> None:
    """Connect to *to*, send bytes both ways, and close."""
    async with trio.open_nursery() as nursery:
        accepted: list[trio.abc.Stream] = []

        async def accept() -> None:
            accepted.append(await listener.accept())

        nursery.start_soon(accept)
        near = await tcp.connect(to, Config())
    far = accepted[0]
    async with near, far:
        await near.send_all(b"there")
        assert await far.receive_some(5) == b"there"
        await far.send_all(b"back")
        assert await near.receive_some(4) == b"back"


async def test_ipv4_with_a_free_port() -> None:
    """B1, B7."""
    listener = await tcp.listen("127.0.0.1:0", Config())
    try:
        assert listener.uri.startswith("tcp:127.0.0.1:")
        assert int(listener.uri.rpartition(":")[2]) > 0
        await talk(listener, listener.uri.removeprefix("tcp:"))
    finally:
        listener.close()


@needs_ipv6
async def test_ipv6_stands_in_brackets() -> None:
    listener = await tcp.listen("[::1]:0", Config())
    try:
        assert listener.uri.startswith("tcp:[::1]:")
        await talk(listener, listener.uri.removeprefix("tcp:"))
    finally:
        listener.close()


async def test_name_is_resolved() -> None:
    listener = await tcp.listen("localhost:0", Config())
    try:
        await talk(listener, listener.uri.removeprefix("tcp:"))
        port = listener.uri.rpartition(":")[2]
        await talk(listener, f"localhost:{port}")
    finally:
        listener.close()


async def test_empty_host_is_every_address() -> None:
    listener = await tcp.listen(":0", Config())
    try:
        port = listener.uri.rpartition(":")[2]
        host = "[::1]" if "[" in listener.uri else "127.0.0.1"
        await talk(listener, f"{host}:{port}")
    finally:
        listener.close()


@needs_ipv6
async def test_connection_on_any_of_several_addresses_is_taken() -> None:
    """One of two listeners gets the connection, the other waits no longer; the next one may come on the other."""
    listeners = [*await trio.open_tcp_listeners(0, host="127.0.0.1"), *await trio.open_tcp_listeners(0, host="::1")]
    both = tcp.TcpListener(listeners)
    try:
        for listener in [*listeners, *reversed(listeners)]:
            host, port = listener.socket.getsockname()[:2]
            await talk(both, f"[{host}]:{port}")
    finally:
        both.close()


@needs_ipv6
async def test_of_two_connections_at_once_one_is_kept_and_none_is_leaked() -> None:
    listeners = [*await trio.open_tcp_listeners(0, host="127.0.0.1"), *await trio.open_tcp_listeners(0, host="::1")]
    both = tcp.TcpListener(listeners)
    peers = []
    for listener in listeners:
        host, port = listener.socket.getsockname()[:2]
        peers.append(await tcp.connect(f"[{host}]:{port}", Config()))
    try:
        async with await both.accept() as taken:
            await taken.send_all(b"x")
            got = []
            for peer in peers:
                with trio.move_on_after(0.2):
                    got.append(await peer.receive_some(1))
            assert b"x" in got
    finally:
        for peer in peers:
            await peer.aclose()
        both.close()


class TwoAddresses(trio.abc.HostnameResolver):
    """A name with an address of each family, like "localhost" on many machines."""

    async def getaddrinfo(self, host: object, port: object, family: int = 0, *_: object, **__: object) -> list[Any]:
        await trio.lowlevel.checkpoint()
        found: list[Any] = [
            (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)),
        ]
        if host in ("::1", "127.0.0.1"):
            found = [entry for entry in found if entry[4][0] == host]
        return [entry for entry in found if family in (socket.AF_UNSPEC, entry[0])]

    async def getnameinfo(self, sockaddr: object, flags: int) -> tuple[str, str]:
        raise NotImplementedError


@pytest.fixture
async def two_addresses() -> AsyncIterator[None]:
    """Every name has the two addresses of the loopback device."""
    previous = trio.socket.set_custom_hostname_resolver(TwoAddresses())
    yield
    trio.socket.set_custom_hostname_resolver(previous)


@needs_ipv6
async def test_free_port_is_the_same_on_every_address_of_a_name(two_addresses: None) -> None:
    """The listener reports one address, and a client that resolves the name itself can connect as well."""
    listener = await tcp.listen("name:0", Config())
    try:
        host, _, port = listener.uri.rpartition(":")
        assert host == "tcp:[::1]"
        await talk(listener, f"[::1]:{port}")
        await talk(listener, f"127.0.0.1:{port}")
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("options", "family", "both"),
    [
        ("", socket.AF_UNSPEC, True),
        (",ipv4", socket.AF_INET, False),
        (",ipv4=on", socket.AF_INET, False),
        (",ipv6=off", socket.AF_INET, False),
        (",ipv6", socket.AF_INET6, False),
        (",ipv4=off", socket.AF_INET6, False),
        (",ipv4,ipv6", socket.AF_UNSPEC, True),
        (",ipv6=on,ipv4=off", socket.AF_INET6, False),
    ],
)
def test_families_are_those_of_qemu(options: str, family: int, both: bool) -> None:
    _, families = _inet.split(f"host:1{options}")
    assert (families.family, families.both) == (family, both)


@needs_ipv6
@pytest.mark.parametrize(
    ("at", "reached", "not_reached"),
    [
        ("[::]:0", ("127.0.0.1", "[::1]"), ()),
        (":0", ("127.0.0.1", "[::1]"), ()),
        (":0,ipv4,ipv6", ("127.0.0.1", "[::1]"), ()),
        ("0.0.0.0:0", ("127.0.0.1",), ("[::1]",)),
        ("[::]:0,ipv6", ("[::1]",), ("127.0.0.1",)),
        (":0,ipv6=off", ("127.0.0.1",), ("[::1]",)),
        (":0,ipv4=off", ("[::1]",), ("127.0.0.1",)),
    ],
)
async def test_listener_takes_the_families_that_qemu_takes(
    at: str, reached: tuple[str, ...], not_reached: tuple[str, ...]
) -> None:
    """Both families, one, or the family that the options name."""
    listener = await tcp.listen(at, Config())
    port = listener.uri.rpartition(":")[2]
    try:
        for host in reached:
            await talk(listener, f"{host}:{port}")
        for host in not_reached:
            with pytest.raises(TransportFailed):
                await tcp.connect(f"{host}:{port}", Config())
    finally:
        listener.close()


@needs_ipv6
async def test_port_that_another_has_for_ipv4_is_listened_on_for_ipv6() -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        listener = await tcp.listen(f"[::]:{port}", Config())
        await talk(listener, f"[::1]:{port}")
        listener.close()


@needs_ipv6
@pytest.mark.parametrize("option", ["ipv4", "ipv6"])
async def test_connection_is_of_the_family_that_was_asked_for(two_addresses: None, option: str) -> None:
    listener = await tcp.listen("[::]:0", Config())
    port = listener.uri.rpartition(":")[2]
    try:
        async with await tcp.connect(f"name:{port},{option}", Config()) as near, await listener.accept():
            assert (":" in near.socket.getpeername()[0]) is (option == "ipv6")
    finally:
        listener.close()


@needs_ipv6
async def test_port_that_is_free_on_one_address_only_is_not_taken(
    two_addresses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next address is used; if there is none, the error says so, and no socket is left open."""
    real = _inet.open_listeners
    taken: list[socket.socket] = []
    most = 2

    async def crowded(host: str | None, port: int, families: Families) -> list[trio.SocketListener]:
        if port and len(taken) < most:
            taken.append(socket.create_server(("127.0.0.1", port)))
        return await real(host, port, families)

    monkeypatch.setattr(tcp, "open_listeners", crowded)
    try:
        listener = await tcp.listen("name:0", Config())
        port = int(listener.uri.rpartition(":")[2])
        listener.close()
        assert len(taken) == 2
        assert port not in [sock.getsockname()[1] for sock in taken]
        most = 1000
        with pytest.raises(TransportFailed, match="the port is in use"):
            await tcp.listen("name:0", Config())
    finally:
        for sock in taken:
            sock.close()


@pytest.mark.parametrize(("rest", "warns"), [(":0", True), ("0.0.0.0:0", True), ("127.0.0.1:0", False)])
async def test_listening_for_other_machines_without_tls_is_warned_of(
    rest: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    listener = await tcp.listen(rest, Config())
    listener.close()
    assert len(caplog.messages) == warns
    if warns:
        assert "is reachable from other machines and is not encrypted" in caplog.messages[0]


async def test_port_in_use_is_called_that() -> None:
    listener = await tcp.listen("127.0.0.1:0", Config())
    try:
        with pytest.raises(TransportFailed, match=rf"cannot listen on {listener.uri}: the port is in use"):
            await tcp.listen(listener.uri.removeprefix("tcp:"), Config())
    finally:
        listener.close()


async def test_refused_connection_is_called_that() -> None:
    """B16."""
    listener = await tcp.listen("127.0.0.1:0", Config())
    address = listener.uri
    listener.close()
    with pytest.raises(TransportFailed, match=rf"cannot connect to {address}: connection refused"):
        await tcp.connect(address.removeprefix("tcp:"), Config())


async def test_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(TransportFailed, match=r"cannot listen on tcp:192\.0\.2\.1:0: "):
        await tcp.listen("192.0.2.1:0", Config())


async def test_closing_twice_is_harmless() -> None:
    listener = await tcp.listen("127.0.0.1:0", Config())
    listener.close()
    listener.close()


async def test_connecting_can_be_cancelled() -> None:
    """Gap G12: a QEMU waits until the attempt ends by itself. No socket is left (see the check for descriptors)."""
    listener = await tcp.listen("127.0.0.1:0", Config())
    try:
        with trio.CancelScope() as scope:
            scope.cancel(reason="the test")
            await tcp.connect(listener.uri.removeprefix("tcp:"), Config())
        assert scope.cancelled_caught
    finally:
        listener.close()


class Unreachable(trio.abc.SocketFactory):
    """Sockets whose connect never ends, as to a host that drops every packet."""

    def __init__(self) -> None:
        self.closed = 0

    def socket(self, family: int = 0, type: int = 0, proto: int = 0) -> trio.socket.SocketType:
        return NeverConnects(self)


class NeverConnects(trio.socket.SocketType):
    """One such socket."""

    def __init__(self, factory: Unreachable) -> None:
        self._factory = factory

    def setsockopt(self, *args: object) -> None:
        """Nothing to set."""

    async def connect(self, address: object) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        self._factory.closed += 1


async def test_connecting_to_a_silent_host_can_be_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """F10, gap G12."""
    factory = Unreachable()
    previous = trio.socket.set_custom_socket_factory(factory)
    try:
        with trio.move_on_after(5) as scope:
            await tcp.connect("192.0.2.1:4444", Config())
        assert scope.cancelled_caught
        assert factory.closed == 1
    finally:
        trio.socket.set_custom_socket_factory(previous)


async def test_both_ends_notice_a_host_that_is_gone() -> None:
    """Keepalive: a held source may be silent, so only keepalive notices that its host is gone."""
    listener = await tcp.listen("127.0.0.1:0", Config())
    try:
        stream = await tcp.connect(listener.uri.removeprefix("tcp:"), Config())
        accepted = await listener.accept()
        async with stream, accepted:
            for end in (stream, accepted):
                assert isinstance(end, trio.SocketStream)
                assert end.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert end.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
    finally:
        listener.close()
