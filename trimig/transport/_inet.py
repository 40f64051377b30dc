"""Internet addresses: the families that a name may have, and listening sockets for all of them.

The rules are QEMU's: without an option both families are allowed, and a socket on ``::`` takes IPv4 as well, unless
another socket has that port.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
from typing import Final

import trio

from ..errors import ConfigError

_SWITCH: Final = {"": True, "on": True, "off": False}
#: The backlog. The kernel limits it to its own maximum.
_BACKLOG: Final = 65535


@dataclasses.dataclass(frozen=True, slots=True)
class Families:
    """The options ``ipv4`` and ``ipv6`` of an address; None where they are not given."""

    ipv4: bool | None = None
    ipv6: bool | None = None

    @property
    def family(self) -> int:
        """The family to resolve: AF_UNSPEC for both."""
        if self.ipv4 and self.ipv6:
            return socket.AF_UNSPEC
        if self.ipv6 or self.ipv4 is False:
            return socket.AF_INET6
        if self.ipv4 or self.ipv6 is False:
            return socket.AF_INET
        return socket.AF_UNSPEC

    @property
    def both(self) -> bool:
        """Whether a socket on ``::`` takes IPv4, too."""
        return self.family == socket.AF_UNSPEC


def split(rest: str) -> tuple[str, Families]:
    """``HOST:PORT`` and the options behind it: ``,ipv4``, ``,ipv6``, each alone or with ``=on`` or ``=off``.

    Raises:
        ConfigError: an unknown option, an option that comes twice, or both families off.
    """
    address, *options = rest.split(",")
    found: dict[str, bool] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("ipv4", "ipv6"):
            raise ConfigError(f"the option {option!r} behind tcp:{address} is not supported", name="uri")
        if name in found or value not in _SWITCH:
            raise ConfigError(
                f"the option {option!r} behind tcp:{address} comes twice, or is not on or off", name="uri"
            )
        found[name] = _SWITCH[value]
    if found.get("ipv4") is False and found.get("ipv6") is False:
        raise ConfigError(f"tcp:{rest} switches both IPv4 and IPv6 off", name="uri")
    return address, Families(ipv4=found.get("ipv4"), ipv6=found.get("ipv6"))


async def open_listeners(host: str | None, port: int, families: Families) -> list[trio.SocketListener]:
    """Listening sockets on every address of *host*; None: on every address of this machine.

    Raises:
        OSError: the name is unknown, or one of its addresses cannot be listened on. An address of a family that this
            machine does not have is left out, unless it is the only one.

    **Cancellation:** nothing is left open.
    """
    found = await trio.socket.getaddrinfo(host, port, families.family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[trio.SocketListener] = []
    absent: OSError | None = None
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                listeners.append(bind(family, kind, protocol, address, both=families.both))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                absent = error
        if absent is not None and not listeners:
            raise absent
    except OSError:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


def bind(family: int, kind: int, protocol: int, address: object, *, both: bool) -> trio.SocketListener:
    """A listening socket. OSError."""
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        try:
            sock.bind(address)  # type: ignore[arg-type]  # of the family, as the resolver gave it
        except OSError as error:
            # Another socket may have the port for IPv4.
            if error.errno != errno.EADDRINUSE or family != socket.AF_INET6 or not both:
                raise
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)  # type: ignore[arg-type]
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


async def addresses(host: str, port: int, families: Families) -> list[str]:
    """The addresses of *host* of the wanted family, in the system's order. OSError.

    **Cancellation:** no effect.
    """
    found = await trio.socket.getaddrinfo(host, port, families.family, socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
