"""``unix:PATH``: a socket in the file system, readable and writable by its owner only."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

import trio

from ..errors import ConfigError, TransportFailed
from ._interface import DESTINATION_MISSING, Listener, Transport

if TYPE_CHECKING:
    from ..config.config import Config

#: sizeof(sockaddr_un.sun_path) on Linux, the terminator included.
_MAX_PATH: Final = 108
#: Errors of a connection to an address at which no process listens.
_NO_LISTENER: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED})


def parse(path: str) -> str:
    """A path that a socket can have.

    Raises:
        ConfigError: *path* is not valid.
    """
    if not path:
        raise ConfigError("unix: needs a path", name="uri")
    if "\0" in path:
        raise ConfigError(f"a path cannot contain a NUL byte: {path!r}", name="uri")
    if len(os.fsencode(path)) >= _MAX_PATH:
        raise ConfigError(f"unix:{path} is too long for a socket: at most {_MAX_PATH - 1} bytes", name="uri")
    return path


async def connect(rest: str, config: Config, *, missing: str = DESTINATION_MISSING) -> trio.SocketStream:
    """Connect.

    Args:
        missing: a question for the error when no process listens there.

    Raises:
        ConfigError: bad path.
        TransportFailed: no process listens there.

    **Cancellation:** no connection is left.
    """
    path = parse(rest)
    try:
        stream = await trio.open_unix_socket(path)
    except OSError as error:
        hint = f" ({missing})" if error.errno in _NO_LISTENER else ""
        raise TransportFailed(f"cannot connect to unix:{path}: {error.strerror or error}{hint}") from error
    try:
        stream.socket.getpeername()
    except OSError as error:
        # If the listener's queue is full, connect fails with EAGAIN, which trio takes for "in progress".
        stream.socket.close()
        raise TransportFailed(f"cannot connect to unix:{path}: too many others are waiting there") from error
    return stream


class UnixListener(Listener):
    """A listening socket and its file."""

    def __init__(self, path: str, sock: trio.socket.SocketType) -> None:
        self._path = path
        self._socket = sock
        self._inode = os.stat(path).st_ino

    @property
    def uri(self) -> str:
        """The address to connect to."""
        return f"unix:{self._path}"

    async def accept(self) -> trio.abc.Stream:
        """The next connection.

        **Cancellation:** nothing was accepted.
        """
        sock, _ = await self._socket.accept()
        return trio.SocketStream(sock)

    def close(self) -> None:
        """Stop listening and remove the file, unless another file has replaced it."""
        if self._socket.fileno() == -1:
            return
        self._socket.close()
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass


async def listen(rest: str, config: Config, *, backlog: int = 128) -> UnixListener:
    """Listen; a socket file that no process listens on is replaced, a live one never.

    Args:
        backlog: connections that may wait for being accepted.

    Raises:
        ConfigError: bad path.
        TransportFailed: the path is in use, or cannot be created.

    **Cancellation:** no socket and no file is left.
    """
    path = parse(rest)
    await trio.lowlevel.checkpoint()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        # The file gets the permissions that the socket has at the moment of bind.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)
        sock.listen(backlog)
        return UnixListener(path, trio.socket.from_stdlib_socket(sock))
    except OSError as error:
        sock.close()
        raise TransportFailed(f"cannot listen on unix:{path}: {_why_unbound(path, error)}") from error


def _why_unbound(path: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE and not _is_socket(path):
        return f"{path} exists and is no socket; remove it, or take another path"
    return error.strerror or str(error)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _remove_stale(path: str) -> None:
    """Remove a socket file that no process has open; leave every other file, so that bind reports the error.

    The probe has another socket type, so that a listener cannot take it for a peer. A live socket answers EPROTOTYPE
    and notices nothing; an abandoned one answers ECONNREFUSED.
    """
    if not _is_socket(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                os.unlink(path)


TRANSPORT: Final = Transport(connect=connect, listen=listen, parse=parse, multiple_channels=True)
