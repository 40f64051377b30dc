"""A URI -> a stream. Each transport is one small file, named by its scheme; a new transport changes no other file.

URIs are QEMU's: ``tcp:HOST:PORT``, ``unix:PATH``. An unknown scheme is refused before anything is opened.

A module of this package without a leading underscore *is* the transport of the scheme of that name. It has two
functions::

    async def connect(rest: str, config: Config) -> trio.abc.Stream | trio.abc.SendStream
    async def listen(rest: str, config: Config) -> Listener

*rest* is the text behind the colon. Both raise ConfigError for an address that cannot be understood, before anything is
opened, and TransportFailed for everything else. A transport with only one direction returns a stream of that
direction, and so has no return path. The transport need not know of TLS: if the parameter ``tls-creds`` is set, this
package lays TLS over the stream of the two functions. The transport may have four more names::

    def parse(rest: str) -> object   # raises ConfigError for a wrong address; opens nothing
    def host(rest: str) -> str       # the name that the server's certificate must have
    SECURES_ITSELF = True            # the transport itself handles tls-creds: it lays TLS over itself, or has none
    MULTIPLE_CHANNELS = True         # one address accepts several connections at a time

Modules with a leading underscore are shared by several transports.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import trio

from ..config.config import Config
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..channel.channel import AnyStream


class Listener(Protocol):
    """Waits for one connection at a time."""

    @property
    def uri(self) -> str:
        """The address to connect to; a port 0 is resolved."""

    async def accept(self) -> trio.abc.Stream | trio.abc.ReceiveStream:
        """The next connection.

        **Cancellation:** nothing was accepted.
        """

    def close(self) -> None:
        """Stop listening and remove the socket file. Idempotent."""


@runtime_checkable
class SharedListener(Listener, Protocol):
    """A listener of a transport with ``MULTIPLE_CHANNELS``: the two halves of :meth:`Listener.accept` as two methods.

    So several opening handshakes can run at a time, see :class:`trimig.channel.lobby.Entrance`.
    """

    async def meet(self) -> trio.abc.Stream:
        """The next connection, before any handshake. OSError if the system refuses it.

        **Cancellation:** nothing was accepted.
        """

    async def admit(self, stream: AnyStream) -> AnyStream:
        """Run the opening handshakes of this address on *stream*, without a time limit. *stream* is owned.

        Raises:
            TransportFailed: a handshake failed.

        **Cancellation:** *stream* is closed.
        """


class _Transport(Protocol):
    """The names that a module of this package has."""

    async def connect(self, rest: str, config: Config) -> trio.abc.Stream | trio.abc.SendStream: ...

    async def listen(self, rest: str, config: Config) -> Listener: ...


#: The schemes of this build.
SCHEMES: Final[tuple[str, ...]] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
)

#: The schemes of QEMU that trimig does not have.
_ABSENT: Final = MappingProxyType(
    {
        "rdma": "RDMA is not built into trimig, as in a QEMU that is built without it",
        "vsock": "sockets of virtual machines are not built into trimig",
    }
)


def check(uri: str) -> tuple[str, str]:
    """``(scheme, rest)`` of a URI whose scheme this build has.

    Raises:
        ConfigError: no scheme, an unknown one, or one that is not built; or the transport cannot understand the rest.
    """
    scheme, colon, rest = uri.partition(":")
    known = ", ".join(f"{name}:" for name in SCHEMES)
    if not colon or not scheme:
        raise ConfigError(f"{uri!r} is not a migration URI; give for example tcp:HOST:PORT or unix:PATH", name="uri")
    if scheme in _ABSENT:
        raise ConfigError(f"{uri!r} cannot be used: {_ABSENT[scheme]}; there are {known}", name="uri")
    if scheme not in SCHEMES:
        raise ConfigError(f"unknown protocol {scheme!r} in {uri!r}; there are {known}", name="uri")
    parse: Callable[[str], object] | None = getattr(_module(scheme), "parse", None)
    if parse is not None:
        parse(rest)
    return scheme, rest


def _module(scheme: str) -> _Transport:
    # Imported on first use: some transports import a library that loads slowly.
    module: _Transport = importlib.import_module(f".{scheme}", __name__)
    return module


def _find(uri: str) -> tuple[_Transport, str]:
    scheme, rest = check(uri)
    return _module(scheme), rest


async def connect(uri: str, config: Config | None = None) -> trio.abc.Stream | trio.abc.SendStream:
    """Connect to *uri*.

    Raises:
        ConfigError: the URI cannot be understood, or the TLS credentials cannot be used.
        TransportFailed: no peer listens there, the address cannot be reached, or one side does not accept the other.

    **Cancellation:** no connection is left.
    """
    transport, rest = _find(uri)
    config = config or Config()
    if not _wants_tls(transport, config):
        return await transport.connect(rest, config)
    from . import _credentials, _tls  # imported on first use, as above

    credentials = _credentials.load(config, "client")
    assert credentials is not None
    find_host: Callable[[str], str] | None = getattr(transport, "host", None)
    name = find_host(rest) if find_host is not None else None
    return await _tls.secure(await transport.connect(rest, config), credentials, uri, name)


def multiple_channels(uri: str) -> bool:
    """Whether several connections to *uri* are possible at a time.

    Raises:
        ConfigError: as :func:`check`.
    """
    transport, _ = _find(uri)
    return bool(getattr(transport, "MULTIPLE_CHANNELS", False))


def _wants_tls(transport: _Transport, config: Config) -> bool:
    return bool(config.parameters.tls_creds) and not getattr(transport, "SECURES_ITSELF", False)


async def listen(uri: str, config: Config | None = None) -> Listener:
    """Listen on *uri*; the caller closes the listener.

    Raises:
        ConfigError: the URI cannot be understood, or the TLS credentials cannot be used.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** nothing is left listening.
    """
    config = config or Config()
    transport, rest = _find(uri)
    if not _wants_tls(transport, config):
        return await transport.listen(rest, config)
    from . import _credentials, _tls

    credentials = _credentials.load(config, "server")
    assert credentials is not None
    return _tls.TlsListener(await transport.listen(rest, config), credentials)


@asynccontextmanager
async def listening(uri: str, report: Callable[[str], None], config: Config | None = None) -> AsyncIterator[Listener]:
    """Listen on *uri* while the context is open; *report* is called with the address and its real port. As
    :func:`listen`.

    **Cancellation:** nothing is left listening.
    """
    listener = await listen(uri, config)
    try:
        report(listener.uri)
        yield listener
    finally:
        listener.close()
