"""Buffers of sockets without the privilege to exceed the system's maximum: never smaller than they were."""

from __future__ import annotations

import io
import socket
from typing import Any, cast

import pytest
import trio

from trimig.channel import socket_options
from trimig.channel.socket_options import SOCKET_BUFFER, UNIX_BUFFER, enlarge

ASKED = {socket.SO_SNDBUF, socket.SO_RCVBUF}


class Unprivileged:
    """A socket that refuses what needs CAP_NET_ADMIN, as the kernel does."""

    def __init__(self, family: socket.AddressFamily) -> None:
        self.family = family
        self.sizes: dict[int, int] = {}

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if level != socket.SOL_SOCKET:
            return
        if option not in ASKED:
            raise PermissionError(1, "Operation not permitted")
        self.sizes[option] = value


def enlarged(family: socket.AddressFamily) -> dict[int, int]:
    """The sizes that are asked for."""
    sock = Unprivileged(family)
    enlarge(cast(trio.socket.SocketType, sock))
    return sock.sizes


def maximum(monkeypatch: pytest.MonkeyPatch, content: str | OSError) -> None:
    """Give the system that maximum, in the text of its file."""

    def opened(path: str, **_: Any) -> io.StringIO:
        if isinstance(content, OSError):
            raise content
        return io.StringIO(content)

    monkeypatch.setattr(socket_options, "open", opened, raising=False)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_tcp_asks_only_where_the_maximum_allows_it(
    monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily
) -> None:
    maximum(monkeypatch, f"{SOCKET_BUFFER}\n")
    assert enlarged(family) == dict.fromkeys(ASKED, SOCKET_BUFFER)
    maximum(monkeypatch, f"{SOCKET_BUFFER - 1}\n")
    assert enlarged(family) == {}


@pytest.mark.parametrize("content", ["", "many\n", FileNotFoundError(2, "No such file or directory")])
def test_tcp_keeps_its_size_where_the_maximum_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, content: str | OSError
) -> None:
    maximum(monkeypatch, content)
    assert enlarged(socket.AF_INET) == {}


def test_unix_socket_asks_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    maximum(monkeypatch, "1\n")
    assert enlarged(socket.AF_UNIX) == dict.fromkeys(ASKED, UNIX_BUFFER)
