"""``ws://HOST:PORT/PATH``: the stream in the binary messages of a websocket, without encryption.

For networks that let only HTTP through: proxies and gateways. A listener without a path accepts any path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from . import _weburl, tcp
from ._weburl import Address, WebSocketListener, upgrade

if TYPE_CHECKING:
    from ..config.config import Config
    from ._websocket import WebSocketStream

#: wss: has TLS below the websocket; TLS over its messages would have no user.
SECURES_ITSELF = True
#: One address accepts several connections at a time.
MULTIPLE_CHANNELS = True


def parse(rest: str) -> Address:
    """The address behind ``ws:``.

    Raises:
        ConfigError: the address is not of the form ``//HOST:PORT/PATH``.
    """
    return _weburl.parse("ws", rest)


def _refuse_tls(config: Config) -> None:
    if config.parameters.tls_creds:
        raise ConfigError("ws: is without TLS, and tls-creds asks for it; use wss:", name="uri")


async def connect(rest: str, config: Config) -> WebSocketStream:
    """Connect, and ask for a websocket.

    Raises:
        ConfigError: bad address, or TLS is asked for.
        TransportFailed: no peer listens there, or the peer is no websocket server.

    **Cancellation:** no connection is left.
    """
    to = parse(rest)
    _refuse_tls(config)
    return await upgrade(await tcp.connect(to.tcp, config), to)


async def listen(rest: str, config: Config) -> WebSocketListener:
    """Listen on a port as ``tcp:`` does.

    Raises:
        ConfigError: bad address, or TLS is asked for.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** nothing is left listening.
    """
    at = parse(rest)
    _refuse_tls(config)
    return WebSocketListener(await tcp.listen(at.tcp, config), at)
