"""What a transport is: the type of the ``TRANSPORT`` that each file of this package has, and the type of a listener."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    import trio

    from ..channel.channel import AnyStream
    from ..config.config import Config

#: The question in the error of a connection that no process accepts.
DESTINATION_MISSING: Final = "does a destination listen there?"


class Listener(abc.ABC):
    """Waits for one connection at a time.

    A listener with opening handshakes has a :meth:`meet` and an :meth:`admit` of its own: the two halves of
    :meth:`accept`. So several handshakes can run at a time, see :class:`trimig.channel.lobby.Entrance`.
    """

    @property
    @abc.abstractmethod
    def uri(self) -> str:
        """The address to connect to; a port 0 is resolved."""

    @abc.abstractmethod
    async def accept(self) -> AnyStream:
        """The next connection, after its handshakes.

        Raises:
            TransportFailed: a handshake failed, or there will be no connection.

        **Cancellation:** nothing was accepted.
        """

    async def meet(self) -> AnyStream:
        """The next connection, before any handshake. OSError if the system refuses it.

        **Cancellation:** nothing was accepted.
        """
        return await self.accept()

    async def admit(self, stream: AnyStream) -> AnyStream:
        """Run the opening handshakes of this address on *stream*, without a time limit. *stream* is owned.

        Raises:
            TransportFailed: a handshake failed.

        **Cancellation:** *stream* is closed.
        """
        return stream

    @abc.abstractmethod
    def close(self) -> None:
        """Stop listening and remove the socket file. Idempotent."""


class Tls(enum.Enum):
    """What a transport does if the parameter ``tls-creds`` is set."""

    #: It does nothing: TLS is laid over its streams.
    LAYERED = enum.auto()
    #: It uses the credentials itself.
    OWN = enum.auto()
    #: It has no TLS: the address is refused.
    NONE = enum.auto()


#: ``connect(rest, config)``; a stream of one direction has no return path.
Connect: TypeAlias = "Callable[[str, Config], Awaitable[trio.abc.SendStream]]"
#: ``listen(rest, config)``; the caller closes the listener.
Listen: TypeAlias = "Callable[[str, Config], Awaitable[Listener]]"


def _nameless(rest: str) -> None:
    """An address without the name of a host."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """The way to the addresses of one scheme. *rest* is the text behind the colon of a URI.

    Attributes:
        connect: raises ConfigError for a wrong address, before anything is opened, and TransportFailed for everything
            else.
        listen: as *connect*.
        parse: raises ConfigError for a wrong address, and opens nothing. By default every text is an address.
        server_name: the name that the certificate of the server must have; None if the address has no name.
        tls: what happens if ``tls-creds`` is set.
        multiple_channels: one address accepts several connections at a time.
    """

    connect: Connect
    listen: Listen
    parse: Callable[[str], object] = str
    server_name: Callable[[str], str | None] = _nameless
    tls: Tls = Tls.LAYERED
    multiple_channels: bool = False
