"""Addresses as query-migrate shows them."""

from __future__ import annotations

from ..errors import ConfigError


def uri_of(address: object) -> str:
    """The URI of one ``socket-address`` of query-migrate, which is an object as QEMU's or the URI itself.

    Raises:
        ConfigError: connecting to an address of this type is not possible.
    """
    match address:
        case str():
            return address
        case {"type": "inet", "host": str(host), "port": str(port)}:
            return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
        case {"type": "unix", "path": str(path)}:
            return f"unix:{path}"
        case {"type": "fd", "str": str(fd)}:
            return f"fd:{fd}"
        case {"type": "x-uri", "uri": str(uri)}:
            return uri
    raise ConfigError(f"{str(address)[:200]!r} is no address that can be connected to", name="socket-address")
