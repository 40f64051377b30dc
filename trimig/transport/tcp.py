"""``tcp:HOST:PORT[,ipv4[=on|off]][,ipv6[=on|off]]``: IPv4, IPv6 (in brackets) and names."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
from typing import TYPE_CHECKING, Final

import trio

from ..errors import ConfigError, TransportFailed
from ._inet import Families, addresses, open_listeners, split
from ._interface import DESTINATION_MISSING, Listener, Transport

if TYPE_CHECKING:
    from ..config.config import Config

log = logging.getLogger("trimig.transport")

#: Attempts to find a port that is free on every address of a name.
_PORT_TRIES: Final = 20


def parse(rest: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; the options of :func:`._inet.split` may follow.

    Raises:
        ConfigError: *rest* is not of that form.
    """
    address, _ = split(rest)
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"an IPv6 address stands in brackets: {_suggestion(host, port)}", name="uri")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"tcp:{rest} needs HOST:PORT with a port from 0 to 65535", name="uri")
    try:
        host.encode("idna")  # the resolver does the same later
    except UnicodeError as error:
        raise ConfigError(f"{host[:80]!r} cannot be the name of a host: {error}", name="uri") from None
    return host, int(port)


def _suggestion(host: str, port: str) -> str:
    """The address in its right form; an example if *host* is no address."""
    address = host.strip("[]")
    try:
        ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return "for example tcp:[::1]:4444"
    return f"tcp:[{address}]:{port}"


def server_name(rest: str) -> str:
    """The name, or the address, that a TLS server must have in its certificate."""
    return parse(rest)[0].partition("%")[0] or "localhost"


def _uri(host: str, port: int) -> str:
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


async def connect(rest: str, config: Config, *, missing: str = DESTINATION_MISSING) -> trio.SocketStream:
    """Connect, trying all addresses of a name.

    Args:
        missing: a question for the error when the connection is refused.

    Raises:
        ConfigError: bad address.
        TransportFailed: refused, unreachable or unknown name.

    **Cancellation:** no connection is left.
    """
    host, port = parse(rest)
    try:
        stream = await _dial(host or "localhost", port, split(rest)[1])
    except OSError as error:
        raise TransportFailed(f"cannot connect to {_uri(host, port)}: {_reason(error, missing)}") from error
    _keep_alive(stream.socket)
    return stream


async def _dial(host: str, port: int, families: Families) -> trio.SocketStream:
    """A connection to one of the addresses of *host*. OSError of the last one.

    **Cancellation:** no connection is left.
    """
    if families.both:
        return await trio.open_tcp_stream(host, port)
    found = await addresses(host, port, families)
    for address in found[:-1]:
        with contextlib.suppress(OSError):  # try the next address
            return await trio.open_tcp_stream(address, port)
    return await trio.open_tcp_stream(found[-1], port)


def _keep_alive(socket: trio.socket.SocketType) -> None:
    """Let TCP notice within two minutes that the peer's host is gone, even if silence is allowed. Accepted sockets
    inherit the setting."""
    socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_KEEPALIVE, 1)
    socket.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPIDLE, 60)
    socket.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPINTVL, 10)
    socket.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPCNT, 6)


class TcpListener(Listener):
    """Listens on every address of one name, with one port."""

    def __init__(self, listeners: list[trio.SocketListener]) -> None:
        for listener in listeners:
            _keep_alive(listener.socket)
        self._listeners = listeners
        self._next = listeners[0]
        self._surplus: list[trio.abc.Stream] = []

    @property
    def uri(self) -> str:
        """The first address, with its real port; the other addresses have the same port."""
        host, port = self._next.socket.getsockname()[:2]
        return _uri(host, port)

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        hosts = (listener.socket.getsockname()[0] for listener in self._listeners)
        return all(ipaddress.ip_address(host).is_loopback for host in hosts)

    async def accept(self) -> trio.abc.Stream:
        """The next connection on any address.

        Raises:
            OSError: accept() failed on one of them.
            trio.ClosedResourceError: the listener was closed, perhaps at the moment of a connection.

        **Cancellation:** nothing was accepted.
        """
        if len(self._listeners) == 1:
            return await self._next.accept()
        accepted = self._surplus
        if accepted:
            await trio.lowlevel.checkpoint()
            return accepted.pop(0)
        failed: list[OSError | trio.ClosedResourceError] = []
        async with trio.open_nursery(strict_exception_groups=True) as nursery:

            async def one(listener: trio.SocketListener) -> None:
                try:
                    accepted.append(await listener.accept())
                except (OSError, trio.ClosedResourceError) as error:
                    failed.append(error)
                nursery.cancel_scope.cancel("there is a connection, or an error")

            for listener in self._listeners:
                nursery.start_soon(one, listener)
        if accepted:
            return accepted.pop(0)  # a second connection, on another address at the same moment, is the next
        raise failed[0] if failed else trio.ClosedResourceError("the listener was closed meanwhile")

    def close(self) -> None:
        """Stop listening."""
        for surplus in self._surplus:
            if isinstance(surplus, trio.SocketStream):
                surplus.socket.close()
        self._surplus.clear()
        for listener in self._listeners:
            listener.socket.close()


async def listen(rest: str, config: Config) -> TcpListener:
    """Listen; an empty host means every address of this machine, port 0 picks a port that is free on all of them.
    ``[::]`` takes IPv4 as well, unless ``ipv4=off`` or ``ipv6`` follows.

    Without TLS a stranger who can reach the port can read the guest and replace it. So one warning is logged, unless
    only this machine can reach the port.

    Raises:
        ConfigError: bad address.
        TransportFailed: the port is in use, or the address does not belong to this machine.

    **Cancellation:** nothing is left listening.
    """
    host, port = parse(rest)
    try:
        listener = TcpListener(await _open(host or None, port, split(rest)[1]))
    except OSError as error:
        raise TransportFailed(f"cannot listen on {_uri(host, port)}: {_reason(error)}") from error
    if not config.parameters.tls_creds and not listener.local:
        log.warning(
            "%s is reachable from other machines and is not encrypted: any client that connects can read the stream "
            "and send another one (set tls-creds if both sides have TLS, or listen on 127.0.0.1)",
            listener.uri,
        )
    return listener


async def _open(host: str | None, port: int, families: Families) -> list[trio.SocketListener]:
    """Sockets for every address of *host*, all with the same port."""
    for left in reversed(range(_PORT_TRIES)):
        listeners = await open_listeners(host, port, families)
        if port or len(listeners) == 1:
            return listeners
        # The kernel has picked one port for each address. The caller gets only one port: that of the first address.
        chosen = listeners[0].socket.getsockname()[1]
        for listener in listeners:
            listener.socket.close()
        try:
            return await open_listeners(host, chosen, families)
        except OSError as error:
            if not left or not _is_taken(error):
                raise
    raise AssertionError("the last try returns or raises")


def _is_taken(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_is_taken(inner) for inner in error.exceptions)
    taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    return taken or (error.__cause__ is not None and _is_taken(error.__cause__))


def _reason(error: OSError, missing: str = DESTINATION_MISSING) -> str:
    """The reason of an error of the system; trio puts the errors of several addresses in a group."""
    cause: BaseException | None = error.__cause__
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    first = cause if isinstance(cause, OSError) else error
    if first.errno == errno.EADDRINUSE:
        return "the port is in use"
    if first.errno == errno.ECONNREFUSED:
        return f"connection refused ({missing})"
    return first.strerror or str(first)


TRANSPORT: Final = Transport(
    connect=connect, listen=listen, parse=parse, server_name=server_name, multiple_channels=True
)
