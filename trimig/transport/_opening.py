"""The opening handshake of a websocket, for both ends and for every server of trimig.

wsproto parses requests and answers, and builds those of trimig. For a hostile head wsproto also raises errors of other
libraries. So each call into wsproto is inside :func:`_understood`: then only that one connection fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import trio
from wsproto.connection import ConnectionType
from wsproto.events import AcceptConnection, RejectConnection, Request
from wsproto.handshake import H11Handshake
from wsproto.utilities import LocalProtocolError
from wsproto.utilities import RemoteProtocolError as WsRemoteProtocolError

from ..errors import ConfigError, TransportFailed

#: The largest head of a request or response.
MAX_HEAD: Final = 1 << 13

T = TypeVar("T")

#: Returns the HTTP status and the reason with which a request is refused; None to accept the request.
Judge = Callable[[Request], tuple[int, str] | None]


class NotUnderstood(Exception):
    """The bytes are no opening handshake.

    Attributes:
        status: the HTTP status with which a server refuses the request.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def _understood(handshake: H11Handshake, head: bytes) -> list[object]:
    """The events that wsproto reads from *head*.

    Raises:
        NotUnderstood: wsproto raised any error for the head.
    """
    try:
        handshake.receive_data(head)
        return list(handshake.events())
    except Exception as error:
        # wsproto's decoders may raise any exception for the bytes of a stranger.
        hint = error.event_hint if isinstance(error, WsRemoteProtocolError) else None
        status = 426 if isinstance(hint, RejectConnection) and hint.status_code == 426 else 400
        raise NotUnderstood(str(error) or type(error).__name__, status) from error


def _refusal(status: int) -> bytes:
    """The HTTP answer that refuses a request."""
    words = {400: "Bad Request", 403: "Forbidden", 404: "Not Found", 426: "Upgrade Required"}
    version = "Sec-WebSocket-Version: 13\r\n" if status == 426 else ""
    head = f"HTTP/1.1 {status} {words.get(status, 'Service Unavailable')}\r\n{version}"
    return f"{head}Connection: close\r\nContent-Length: 0\r\n\r\n".encode()


async def welcome(transport: trio.abc.Stream, judge: Judge) -> bytes:
    """Read a client's request and answer it; returns the bytes that came behind the request.

    Raises:
        NotUnderstood: the client asked for something else, sent no request, or is refused. The client has been told.
        trio.BrokenResourceError: the connection broke.

    **Cancellation:** *transport* can only be closed.
    """
    head, early = await _read_head(transport)
    handshake = H11Handshake(ConnectionType.SERVER)
    try:
        events = _understood(handshake, head)
        request = events[0] if events else None
        if not isinstance(request, Request):
            raise NotUnderstood("what came is no request")
    except NotUnderstood as error:
        await transport.send_all(_refusal(error.status))
        raise NotUnderstood(f"what came is no request for a websocket ({error})") from error
    if (refused := judge(request)) is not None:
        status, words = refused
        await transport.send_all(_refusal(status))
        raise NotUnderstood(words, status)
    await transport.send_all(handshake.send(AcceptConnection()))
    return early


async def knock(transport: trio.abc.Stream, host: str, target: str, where: str) -> bytes:
    """Ask a server for a websocket; returns the bytes that came behind the answer.

    Raises:
        ConfigError: the host cannot be written in a request.
        TransportFailed: the server refused, or is no websocket server.
        NotUnderstood: the answer is not HTTP.
        trio.BrokenResourceError: the connection broke.

    **Cancellation:** *transport* can only be closed.
    """
    handshake = H11Handshake(ConnectionType.CLIENT)
    try:
        request = handshake.send(Request(host=host, target=target))
    except (UnicodeError, LocalProtocolError) as error:
        raise ConfigError(f"{where} cannot be asked for: {error}", name="uri") from error
    await transport.send_all(request)
    head, early = await _read_head(transport)
    for event in _understood(handshake, head):
        if isinstance(event, RejectConnection):
            raise TransportFailed(f"no websocket at {where}: the server answered {event.status_code}")
        if isinstance(event, AcceptConnection):
            return early
    raise NotUnderstood("the answer is none to a websocket")


def from_a_page(request: Request) -> bool:
    """Whether the request has an Origin, which only browsers send: a page on any site may connect to every address that
    the browser can reach."""
    return any(name.lower() == b"origin" for name, _ in request.extra_headers)


async def _read_head(transport: trio.abc.Stream) -> tuple[bytes, bytes]:
    """The head of a request or response, and the bytes behind it."""
    data = bytearray()
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > MAX_HEAD:
            raise NotUnderstood("what came is not HTTP")
        part = await transport.receive_some(MAX_HEAD)
        if not part:
            raise NotUnderstood("the connection was closed in the opening handshake")
        data += part
    return bytes(data[: end + 4]), bytes(data[end + 4 :])
