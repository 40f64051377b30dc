"""The common parts of ``ws:`` and ``wss:``: their addresses, and a websocket over ``tcp:`` with or without TLS."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import trio

from ..errors import ConfigError
from . import tcp
from ._interface import Listener
from ._websocket import WebSocketStream, open_client, open_server

if TYPE_CHECKING:
    from ..channel.channel import AnyStream

_PORTS = {"ws": 80, "wss": 443}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """``SCHEME://HOST:PORT/PATH``, taken apart."""

    scheme: str
    #: Host and port, as ``tcp:`` takes them.
    tcp: str
    #: With the query; empty if none is given.
    target: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.tcp}{self.target or '/'}"


def parse(scheme: str, rest: str) -> Address:
    """The address behind the colon of ``ws:`` or ``wss:``.

    Raises:
        ConfigError: the address is not of that form.
    """
    shape = f"{scheme}://HOST:PORT/PATH"
    if not rest.startswith("//"):
        raise ConfigError(f"{scheme}:{rest[:200]} is not of the form {shape}", name="uri")
    try:
        parts = urlsplit(f"{scheme}:{rest}")
    except ValueError as error:
        raise ConfigError(f"{scheme}:{rest[:200]} is not of the form {shape}: {error}", name="uri") from error
    if parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"{scheme}:{rest[:200]} has a user or a fragment, which {shape} has not", name="uri")
    address = parts.netloc
    if ":" not in address.rpartition("]")[2]:
        address = f"{address}:{_PORTS[scheme]}"
    tcp.parse(address)
    target = quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target = f"{target or '/'}?{quote(parts.query, safe='/%:@!$&()*+,;=?~-._')}"
    return Address(scheme=scheme, tcp=address, target=target)


async def upgrade(stream: trio.abc.Stream, to: Address) -> WebSocketStream:
    """A websocket over a connection to *to*.

    **Cancellation:** the connection is closed.
    """
    host = to.tcp if not to.tcp.startswith(":") else f"localhost{to.tcp}"
    return await open_client(stream, host, to.target or "/", str(to))


class WebSocketListener(Listener):
    """Websockets over the connections of another listener.

    A client that fails in the opening handshake makes :meth:`accept` raise; the listener can go on to the next one.
    """

    def __init__(self, inner: Listener, at: Address) -> None:
        self._inner = inner
        self._at = at

    @property
    def uri(self) -> str:
        """The address to connect to, with the real port."""
        return str(dataclasses.replace(self._at, tcp=self._inner.uri.removeprefix("tcp:")))

    async def accept(self) -> WebSocketStream:
        """The next connection, after its opening handshake.

        Raises:
            TransportFailed: the handshake failed.

        **Cancellation:** the connection, if there was one, is closed.
        """
        stream = await self._inner.accept()
        assert isinstance(stream, trio.abc.Stream)
        return await open_server(stream, self._path, self.uri)

    async def meet(self) -> AnyStream:
        """The next connection, before its handshakes. OSError if the system refuses it.

        **Cancellation:** nothing was accepted.
        """
        return await self._inner.meet()

    async def admit(self, stream: AnyStream) -> WebSocketStream:
        """*stream* after its handshakes, without a time limit.

        Raises:
            TransportFailed: a handshake failed.

        **Cancellation:** *stream* is closed.
        """
        below = await self._inner.admit(stream)
        assert isinstance(below, trio.abc.Stream)
        return await open_server(below, self._path, self.uri, seconds=math.inf)

    @property
    def _path(self) -> str:
        return self._at.target.partition("?")[0].rstrip("/")

    def close(self) -> None:
        """Stop listening."""
        self._inner.close()
