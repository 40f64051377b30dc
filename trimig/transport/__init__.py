"""A URI -> a stream. Each transport is one small file, named by its scheme; a new transport changes no other file.

URIs are QEMU's: ``tcp:HOST:PORT``, ``unix:PATH``. An unknown scheme is refused before anything is opened.

A module of this package without a leading underscore is the transport of the scheme of that name. It has one name that
this package reads, a :class:`._interface.Transport`::

    TRANSPORT: Final = Transport(connect=connect, listen=listen, parse=parse)

Modules with a leading underscore are shared by several transports.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from ..config.config import Config
from ..errors import ConfigError
from ._interface import Tls, Transport

if TYPE_CHECKING:
    import trio

    from ._interface import Listener

#: The schemes of this build.
SCHEMES: Final[tuple[str, ...]] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
)

#: The schemes of QEMU that trimig does not have.
ABSENT: Final = MappingProxyType(
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
    if scheme in ABSENT:
        raise ConfigError(f"{uri!r} cannot be used: {ABSENT[scheme]}; there are {known}", name="uri")
    if scheme not in SCHEMES:
        hint = f"did you mean tcp:{uri}?" if rest.isascii() and rest.isdigit() else f"there are {known}"
        raise ConfigError(f"unknown protocol {scheme!r} in {uri!r}; {hint}", name="uri")
    _load(scheme).parse(rest)
    return scheme, rest


def _load(scheme: str) -> Transport:
    # Imported on first use: some transports import a library that loads slowly.
    module = importlib.import_module(f".{scheme}", __name__)
    found: object = vars(module).get("TRANSPORT")
    if not isinstance(found, Transport):
        raise TypeError(f"the module {module.__name__} has no TRANSPORT of the type Transport")
    return found


def _find(uri: str) -> tuple[Transport, str]:
    scheme, rest = check(uri)
    return _load(scheme), rest


async def connect(uri: str, config: Config | None = None) -> trio.abc.SendStream:
    """Connect to *uri*; a stream of one direction has no return path.

    Raises:
        ConfigError: the URI cannot be understood, or the TLS credentials cannot be used.
        TransportFailed: no peer listens there, the address cannot be reached, or one side does not accept the other.

    **Cancellation:** no connection is left.
    """
    config = config or Config()
    transport, rest = _find(uri)
    if not _layers_tls(transport, uri, config):
        return await transport.connect(rest, config)
    from . import _credentials, _tls  # imported on first use, as above

    credentials = _credentials.load(config, "client")
    assert credentials is not None
    return await _tls.secure(await transport.connect(rest, config), credentials, uri, transport.server_name(rest))


def multiple_channels(uri: str) -> bool:
    """Whether several connections to *uri* are possible at a time.

    Raises:
        ConfigError: as :func:`check`.
    """
    transport, _ = _find(uri)
    return transport.multiple_channels


def _layers_tls(transport: Transport, uri: str, config: Config) -> bool:
    """Whether this package lays TLS over the streams of *transport*.

    Raises:
        ConfigError: TLS is asked for, and the transport has none.
    """
    if not config.parameters.tls_creds:
        return False
    if transport.tls is Tls.NONE:
        scheme = uri.partition(":")[0]
        raise ConfigError(f"{scheme}: is without TLS, and tls-creds asks for it; use wss: or tcp:", name="uri")
    return transport.tls is Tls.LAYERED


async def listen(uri: str, config: Config | None = None) -> Listener:
    """Listen on *uri*; the caller closes the listener.

    Raises:
        ConfigError: the URI cannot be understood, or the TLS credentials cannot be used.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** nothing is left listening.
    """
    config = config or Config()
    transport, rest = _find(uri)
    if not _layers_tls(transport, uri, config):
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
