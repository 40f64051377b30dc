"""``tcp:HOST:PORT``: IPv4, IPv6 (in brackets) and names."""

from __future__ import annotations

import errno
import socket

import trio

from ..config import Config
from ..errors import ConfigError, TransportFailed


def parse(rest: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; options behind a comma are refused.

    Raises:
        ConfigError: it is not of that form.
    """
    address, comma, options = rest.partition(",")
    if comma:
        raise ConfigError(f"the option {options!r} behind tcp:{address} is not supported", name="uri")
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"an IPv6 address stands in brackets: tcp:[{host}]:{port}", name="uri")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"tcp:{rest} needs HOST:PORT with a port from 0 to 65535", name="uri")
    try:
        host.encode("idna")  # what the resolver will do with it
    except UnicodeError as error:
        raise ConfigError(f"{host[:80]!r} cannot be the name of a host: {error}", name="uri") from None
    return host, int(port)


def _uri(host: str, port: int) -> str:
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


async def connect(rest: str, config: Config) -> trio.SocketStream:
    """Connect, trying all addresses of a name.

    Raises:
        ConfigError: bad address.
        TransportFailed: refused, unreachable or unknown name.

    **Cancellation:** no connection is left.
    """
    host, port = parse(rest)
    try:
        return await trio.open_tcp_stream(host or "localhost", port)
    except OSError as error:
        raise TransportFailed(f"cannot connect to {_uri(host, port)}: {_reason(error)}") from error


class TcpListener:
    """Listens on every address of one name."""

    def __init__(self, listeners: list[trio.SocketListener]) -> None:
        self._listeners = listeners
        self._next = listeners[0]

    @property
    def uri(self) -> str:
        """The first address, with its real port."""
        host, port = self._next.socket.getsockname()[:2]
        return _uri(host, port)

    async def accept(self) -> trio.abc.Stream:
        """The next connection on any address.

        **Cancellation:** nothing was accepted.
        """
        if len(self._listeners) == 1:
            return await self._next.accept()
        accepted: list[trio.abc.Stream] = []
        async with trio.open_nursery(strict_exception_groups=True) as nursery:

            async def one(listener: trio.SocketListener) -> None:
                accepted.append(await listener.accept())
                nursery.cancel_scope.cancel("somebody has connected")

            for listener in self._listeners:
                nursery.start_soon(one, listener)
        for surplus in accepted[1:]:
            if isinstance(surplus, trio.SocketStream):
                surplus.socket.close()
        return accepted[0]

    def close(self) -> None:
        """Stop listening."""
        for listener in self._listeners:
            listener.socket.close()


async def listen(rest: str, config: Config) -> TcpListener:
    """Listen; an empty host means every address of this machine, port 0 picks a free one.

    Raises:
        ConfigError: bad address.
        TransportFailed: the port is in use, or the address is not of this machine.

    **Cancellation:** nothing is left listening.
    """
    host, port = parse(rest)
    try:
        return TcpListener(await trio.open_tcp_listeners(port, host=host or None))
    except OSError as error:
        raise TransportFailed(f"cannot listen on {_uri(host, port)}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """Words for an error of the system; trio gathers those of several addresses in a group."""
    cause: BaseException | None = error.__cause__
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    first = cause if isinstance(cause, OSError) else error
    if first.errno == errno.EADDRINUSE:
        return "the port is in use"
    if first.errno == errno.ECONNREFUSED:
        return "connection refused (is the destination waiting there?)"
    return first.strerror or str(first)
