"""``ws://HOST:PORT/PATH``: the stream in the binary messages of a websocket, without encryption.

For networks that let only HTTP through: proxies and gateways. A listener without a path accepts any path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from . import _weburl, tcp
from ._interface import Tls, Transport
from ._weburl import Address, WebSocketListener, upgrade

if TYPE_CHECKING:
    from ..config.config import Config
    from ._websocket import WebSocketStream


def parse(rest: str) -> Address:
    """The address behind ``ws:``.

    Raises:
        ConfigError: the address is not of the form ``//HOST:PORT/PATH``.
    """
    return _weburl.parse("ws", rest)


async def connect(rest: str, config: Config) -> WebSocketStream:
    """Connect, and ask for a websocket.

    Raises:
        ConfigError: bad address.
        TransportFailed: no peer listens there, or the peer is no websocket server.

    **Cancellation:** no connection is left.
    """
    to = parse(rest)
    return await upgrade(await tcp.connect(to.tcp, config), to)


async def listen(rest: str, config: Config) -> WebSocketListener:
    """Listen on a port as ``tcp:`` does.

    Raises:
        ConfigError: bad address.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** nothing is left listening.
    """
    at = parse(rest)
    return WebSocketListener(await tcp.listen(at.tcp, config), at)


#: TLS over the messages of a websocket would have no user, because wss: has TLS below the websocket.
TRANSPORT: Final = Transport(connect=connect, listen=listen, parse=parse, tls=Tls.NONE, multiple_channels=True)
