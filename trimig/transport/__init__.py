"""A URI -> a stream. One small file for each transport, named by its scheme; adding one touches nothing else.

A URI is QEMU's: ``tcp:HOST:PORT``, ``unix:PATH``. An unknown scheme is refused before anything is touched.

A module of this package whose name has no underscore in front *is* the transport of that scheme. It has two functions::

    async def connect(rest: str, config: Config) -> trio.abc.Stream | trio.abc.SendStream
    async def listen(rest: str, config: Config) -> Listener

*rest* is what follows the colon. Both raise ConfigError for an address that cannot be understood, before anything is
touched, and TransportFailed for everything else. A transport that has only one direction returns a stream of that
direction only, and so has no return path. It need not know of TLS: where the parameter ``tls-creds`` is set, that is
laid over what the two functions give. It may have four more names::

    def parse(rest: str) -> object   # raises ConfigError for what it cannot understand, and looks at nothing else
    def host(rest: str) -> str       # the name that a server there must have in its certificate
    SECURES_ITSELF = True            # it lays TLS over itself, or has none: it looks at tls-creds alone
    MULTIPLE_CHANNELS = True                   # there can be several connections to one address at a time

Modules with an underscore in front are what several of them share.
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
        """Where to connect to; a port 0 is resolved."""

    async def accept(self) -> trio.abc.Stream | trio.abc.ReceiveStream:
        """The next connection.

        **Cancellation:** nothing was accepted.
        """

    def close(self) -> None:
        """Stop listening and leave nothing behind. Idempotent."""


@runtime_checkable
class SharedListener(Listener, Protocol):
    """A listener of a transport with ``MULTIPLE_CHANNELS``: what :meth:`Listener.accept` does, in its two halves.

    So several connections can be in their opening handshakes at a time, see :class:`trimig.channel.lobby.Entrance`.
    """

    async def meet(self) -> trio.abc.Stream:
        """The next connection, as it is accepted. OSError where the system refuses it.

        **Cancellation:** nothing was accepted.
        """

    async def admit(self, stream: AnyStream) -> AnyStream:
        """*stream* behind the opening handshakes of this address, without a limit of time. *stream* is owned.

        Raises:
            TransportFailed: they failed.

        **Cancellation:** *stream* is closed.
        """


class _Transport(Protocol):
    """What a module of this package looks like."""

    async def connect(self, rest: str, config: Config) -> trio.abc.Stream | trio.abc.SendStream: ...

    async def listen(self, rest: str, config: Config) -> Listener: ...


#: The schemes that can be used.
SCHEMES: Final[tuple[str, ...]] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
)

#: What QEMU has and trimig has not.
_ABSENT: Final = MappingProxyType(
    {
        "rdma": "RDMA is not built into trimig, as in a QEMU that is built without it",
        "vsock": "sockets of virtual machines are not built into trimig",
    }
)


def check(uri: str) -> tuple[str, str]:
    """``(scheme, rest)`` of a URI that this build can use.

    Raises:
        ConfigError: no scheme, an unknown one, or one that is not built; or its transport cannot understand the rest.
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
    # Imported when it is asked for: some bring a library that takes its time.
    module: _Transport = importlib.import_module(f".{scheme}", __name__)
    return module


def _find(uri: str) -> tuple[_Transport, str]:
    scheme, rest = check(uri)
    return _module(scheme), rest


async def connect(uri: str, config: Config | None = None) -> trio.abc.Stream | trio.abc.SendStream:
    """Connect to *uri*.

    Raises:
        ConfigError: the URI cannot be understood, or the TLS credentials cannot be used.
        TransportFailed: there is nobody, or no way there, or one side does not accept the other.

    **Cancellation:** no connection is left.
    """
    transport, rest = _find(uri)
    config = config or Config()
    if not _wants_tls(transport, config):
        return await transport.connect(rest, config)
    from . import _credentials, _tls  # imported when it is asked for, as above

    credentials = _credentials.load(config, "client")
    assert credentials is not None
    find_host: Callable[[str], str] | None = getattr(transport, "host", None)
    name = find_host(rest) if find_host is not None else None
    return await _tls.secure(await transport.connect(rest, config), credentials, uri, name)


def multiple_channels(uri: str) -> bool:
    """There can be several connections to *uri* at a time.

    Raises:
        ConfigError: as :func:`check`.
    """
    transport, _ = _find(uri)
    return bool(getattr(transport, "MULTIPLE_CHANNELS", False))


def _wants_tls(transport: _Transport, config: Config) -> bool:
    return bool(config.parameters.tls_creds) and not getattr(transport, "SECURES_ITSELF", False)


async def listen(uri: str, config: Config | None = None) -> Listener:
    """Listen on *uri*; the caller closes what is returned.

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
async def listening(uri: str, told: Callable[[str], None], config: Config | None = None) -> AsyncIterator[Listener]:
    """Listen on *uri* while the context is open; *told* gets the address with its port resolved. As :func:`listen`.

    **Cancellation:** nothing is left listening.
    """
    listener = await listen(uri, config)
    try:
        told(listener.uri)
        yield listener
    finally:
        listener.close()
