"""``wss://HOST:PORT/PATH``: as ``ws:``, over TLS.

The credentials are those of ``tls-creds``. A client without credentials trusts the CAs of this machine, as a browser
does, and shows no certificate; a server needs credentials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import ConfigError
from . import _credentials, _tls, _weburl, tcp
from ._interface import Tls, Transport
from ._weburl import Address, WebSocketListener, upgrade

if TYPE_CHECKING:
    from ..config.config import Config
    from ._websocket import WebSocketStream


def parse(rest: str) -> Address:
    """The address behind ``wss:``.

    Raises:
        ConfigError: the address is not of the form ``//HOST:PORT/PATH``.
    """
    return _weburl.parse("wss", rest)


async def connect(rest: str, config: Config) -> WebSocketStream:
    """Connect, check the server's certificate, and ask for a websocket.

    Raises:
        ConfigError: bad address, or credentials that cannot be used.
        TransportFailed: no peer listens there, the peer is no websocket server, or one side does not accept the other.

    **Cancellation:** no connection is left.
    """
    to = parse(rest)
    name = tcp.server_name(to.tcp)
    credentials = _credentials.load(config, "client") or _credentials.system(config.parameters.tls_hostname or None)
    return await upgrade(await _tls.secure(await tcp.connect(to.tcp, config), credentials, str(to), name), to)


async def listen(rest: str, config: Config) -> WebSocketListener:
    """Listen on a port as ``tcp:`` does.

    Raises:
        ConfigError: bad address, no credentials, or credentials that cannot be used.
        TransportFailed: the address cannot be listened on.

    **Cancellation:** nothing is left listening.
    """
    at = parse(rest)
    credentials = _credentials.load(config, "server")
    if credentials is None:
        raise ConfigError(f"{at} needs a certificate to show; set tls-creds", name="tls-creds")
    return WebSocketListener(_tls.TlsListener(await tcp.listen(at.tcp, config), credentials), at)


#: TLS lies below the websocket, not above it.
TRANSPORT: Final = Transport(connect=connect, listen=listen, parse=parse, tls=Tls.OWN, multiple_channels=True)
