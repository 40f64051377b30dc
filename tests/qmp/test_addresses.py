"""``socket-address`` of query-migrate, and the URI that a client makes of it."""

from __future__ import annotations

import pytest

from trimig.errors import ConfigError
from trimig.monitor.statistics import socket_address
from trimig.qmp import uri_of


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:0.0.0.0:4444", {"type": "inet", "host": "0.0.0.0", "port": "4444"}),
        ("tcp:[::]:4444", {"type": "inet", "host": "::", "port": "4444"}),
        ("unix:/run/a:b", {"type": "unix", "path": "/run/a:b"}),
        ("fd:7", {"type": "fd", "str": "7"}),
        ("wss://[::1]:1/x", {"type": "x-uri", "uri": "wss://[::1]:1/x"}),
    ],
)
def test_address_is_qemus_object_and_the_uri_again(uri: str, address: dict[str, str]) -> None:
    """As QEMU, a list of objects; a client makes the URI of either."""
    assert socket_address(uri) == address
    assert uri_of(address) == uri_of(uri) == uri


@pytest.mark.parametrize(
    "address", [{}, {"type": "vsock", "cid": "1", "port": "2"}, {"type": "inet", "host": "x"}, 5, None]
)
def test_an_address_of_another_kind_is_refused(address: object) -> None:
    with pytest.raises(ConfigError, match="no address that can be connected to"):
        uri_of(address)
