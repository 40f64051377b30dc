"""A URI -> a stream. One small file for each transport; adding one touches nothing but the table below.

A URI is QEMU's: ``tcp:HOST:PORT``, ``unix:PATH``. An unknown scheme is refused before anything is touched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Final, Protocol

import trio

from ..errors import ConfigError
from . import tcp, unix


class Listener(Protocol):
    """Waits for one connection at a time."""

    @property
    def uri(self) -> str:
        """Where to connect to; a port 0 is resolved."""

    async def accept(self) -> trio.abc.Stream:
        """The next connection.

        **Cancellation:** nothing was accepted.
        """

    def close(self) -> None:
        """Stop listening and leave nothing behind. Idempotent."""


_CONNECT: Final[Mapping[str, Callable[[str], Awaitable[trio.abc.Stream]]]] = MappingProxyType(
    {"tcp": tcp.connect, "unix": unix.connect}
)
_LISTEN: Final[Mapping[str, Callable[[str], Awaitable[Listener]]]] = MappingProxyType(
    {"tcp": tcp.listen, "unix": unix.listen}
)

#: QEMU has these, trimig not yet.
_NOT_BUILT: Final = frozenset({"exec", "fd", "file", "rdma", "vsock", "ws", "wss"})


def check(uri: str) -> tuple[str, str]:
    """``(scheme, rest)`` of a URI that this build can use.

    Raises:
        ConfigError: no scheme, an unknown one, or one that is not built.
    """
    scheme, colon, rest = uri.partition(":")
    if not colon or not scheme:
        raise ConfigError(f"{uri!r} is not a migration URI; give for example tcp:HOST:PORT or unix:PATH", name="uri")
    if scheme in _NOT_BUILT:
        raise ConfigError(f"the transport {scheme}: is not built yet; there are tcp: and unix:", name="uri")
    if scheme not in _CONNECT:
        raise ConfigError(f"unknown protocol {scheme!r} in {uri!r}; there are tcp: and unix:", name="uri")
    return scheme, rest


async def connect(uri: str) -> trio.abc.Stream:
    """Connect to *uri*.

    Raises:
        ConfigError: the URI cannot be understood.
        TransportFailed: there is nobody, or no way there.

    **Cancellation:** no connection is left.
    """
    scheme, rest = check(uri)
    return await _CONNECT[scheme](rest)


@asynccontextmanager
async def listening(uri: str, told: Callable[[str], None]) -> AsyncIterator[Listener]:
    """Listen on *uri* while the context is open; *told* gets the address with its port resolved.

    Raises:
        ConfigError: the URI cannot be understood.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** nothing is left listening.
    """
    scheme, rest = check(uri)
    listener = await _LISTEN[scheme](rest)
    try:
        told(listener.uri)
        yield listener
    finally:
        listener.close()
