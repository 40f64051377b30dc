"""``fd:NUMBER``: a descriptor that the caller has opened: inherited, or passed with ``getfd``.

The transport consumes the descriptor: from the call on the transport owns it and closes it on every path, also if the
descriptor cannot be used. A connected stream socket has both directions. A pipe has only the direction of its open end,
and so no return path.

A pipe is set to non-blocking mode while it is used, and set back when it is closed: the mode belongs to the open file,
which other processes may share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from ..errors import ConfigError, TransportFailed
from ._interface import Listener, Transport

if TYPE_CHECKING:
    from ..config.config import Config

#: The wanted size of a pipe, if the system allows it.
_PIPE_BYTES: Final = 1 << 20
_MAX_FD: Final = 2**31 - 1

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a terminal or another character device"),
    (stat.S_ISBLK, "a block device (use file:PATH)"),
    (stat.S_ISREG, "a file (use file:PATH, which can say where in it the stream begins)"),
)


def parse(rest: str) -> int:
    """The number of ``fd:NUMBER``.

    Raises:
        ConfigError: *rest* is no number.
    """
    if not rest.isascii() or not rest.isdigit() or int(rest) > _MAX_FD:
        raise ConfigError(
            f"fd:{rest[:80]} needs the number of an open descriptor (a name is known only to the QMP server that got "
            "it with getfd)",
            name="uri",
        )
    return int(rest)


class PipeSender(trio.abc.SendStream):
    """The writing end of a pipe.

    Args:
        fd: the stream owns it from now on.
    """

    def __init__(self, fd: int) -> None:
        self._stream = trio.lowlevel.FdStream(fd)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of *data*.

        **Cancellation:** an unknown part of *data* was written.
        """
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the pipe accepts data.

        **Cancellation:** no effect.
        """
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the pipe; the data in it can still be read.

        **Cancellation:** the pipe is closed.
        """
        await self._stream.aclose()

    def close(self) -> None:
        """Close the pipe at once."""
        self._stream.close()


class PipeReceiver(trio.abc.ReceiveStream):
    """The reading end of a pipe.

    Args:
        fd: the stream owns it from now on.
    """

    def __init__(self, fd: int) -> None:
        self._stream = trio.lowlevel.FdStream(fd)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Read the available data; empty at the end.

        **Cancellation:** nothing was read.
        """
        return await self._stream.receive_some(_PIPE_BYTES if max_bytes is None else min(max_bytes, _PIPE_BYTES))

    async def aclose(self) -> None:
        """Close the pipe.

        **Cancellation:** the pipe is closed.
        """
        await self._stream.aclose()

    def close(self) -> None:
        """Close the pipe at once."""
        self._stream.close()


_Opened: TypeAlias = trio.SocketStream | PipeSender | PipeReceiver


def adopt(fd: int, *, sending: bool) -> _Opened:
    """A stream on descriptor *fd*, which is consumed.

    Args:
        sending: the direction that a pipe must have.

    Raises:
        TransportFailed: *fd* is not open, or cannot carry a stream; it is closed.
    """
    owned = _take(fd)
    try:
        mode = os.fstat(owned).st_mode
        if stat.S_ISSOCK(mode):
            sock = socket.socket(fileno=owned)
            owned = -1  # the socket owns the descriptor now
            return _socket_stream(fd, sock)
        if not stat.S_ISFIFO(mode):
            what = next((words for test, words in _KINDS if test(mode)), "something of the kernel's")
            raise TransportFailed(f"descriptor {fd} is {what}: a migration needs a socket or a pipe")
        _check_direction(fd, fcntl.fcntl(owned, fcntl.F_GETFL) & os.O_ACCMODE, sending=sending)
        with contextlib.suppress(OSError):  # above the limit of this user; a smaller pipe is only slower
            fcntl.fcntl(owned, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        stream = PipeSender(owned) if sending else PipeReceiver(owned)
        owned = -1
        return stream
    except OSError as error:
        raise TransportFailed(f"descriptor {fd} cannot be used: {error.strerror or error}") from error
    finally:
        if owned != -1:
            os.close(owned)


def _take(fd: int) -> int:
    """The descriptor, owned from now on; a new process does not inherit it."""
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_IFMT(mode):
            # trio's run loop has such descriptors, and closing one of them by mistake would break the loop.
            raise TransportFailed(f"descriptor {fd} is something of the kernel's: a migration needs a socket or a pipe")
        if fd > 2:
            os.set_inheritable(fd, False)
            return fd
        if not stat.S_ISSOCK(mode) and not stat.S_ISFIFO(mode):
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)  # a standard descriptor is refused and stays open
        # Otherwise a file that is opened later could become standard input or output by accident.
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            owned = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
            os.dup2(nothing, fd)
            return owned
        finally:
            os.close(nothing)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise TransportFailed(f"descriptor {fd} is not open") from None
        raise TransportFailed(f"descriptor {fd} cannot be used: {error.strerror or error}") from error


def _socket_stream(fd: int, sock: socket.socket) -> trio.SocketStream:
    try:
        if sock.type != socket.SOCK_STREAM:
            raise TransportFailed(f"descriptor {fd} is a socket of messages: a migration needs one of a stream")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise TransportFailed(f"descriptor {fd} is a listening socket: a migration needs a connected one")
        sock.getpeername()
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    except OSError as error:
        sock.close()
        words = "is not connected" if error.errno == errno.ENOTCONN else f"cannot be used: {error.strerror or error}"
        raise TransportFailed(f"descriptor {fd} is a socket that {words}") from error
    except TransportFailed:
        sock.close()
        raise


def _check_direction(fd: int, access: int, *, sending: bool) -> None:
    if access == os.O_RDWR:
        raise TransportFailed(
            f"descriptor {fd} is a FIFO opened for both directions, which would send the stream back to its sender: open "
            f"it for {'writing' if sending else 'reading'} only"
        )
    if access != (os.O_WRONLY if sending else os.O_RDONLY):
        has, needs = ("reading", "writing") if sending else ("writing", "reading")
        raise TransportFailed(f"descriptor {fd} is the {has} end of a pipe: this side needs the {needs} end")


class FdListener(Listener):
    """A descriptor that brings a stream, once."""

    def __init__(self, fd: int, stream: trio.SocketStream | PipeReceiver) -> None:
        self._fd = fd
        self._stream: trio.SocketStream | PipeReceiver | None = stream

    @property
    def uri(self) -> str:
        """The URI with the given number."""
        return f"fd:{self._fd}"

    async def accept(self) -> trio.SocketStream | PipeReceiver:
        """The stream.

        Raises:
            TransportFailed: the stream has been taken already.

        **Cancellation:** the stream can still be taken.
        """
        await trio.lowlevel.checkpoint()
        stream, self._stream = self._stream, None
        if stream is None:
            raise TransportFailed(f"descriptor {self._fd} has been used already")
        return stream

    def close(self) -> None:
        """Close the descriptor unless :meth:`accept` has taken it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            _close(stream)


async def connect(rest: str, config: Config) -> trio.SocketStream | PipeSender:
    """Send through a descriptor, which is consumed.

    Raises:
        ConfigError: *rest* is no number; then no descriptor is consumed.
        TransportFailed: the descriptor is not open, or cannot carry a stream out; it is closed.

    **Cancellation:** the descriptor is closed.
    """
    stream = adopt(parse(rest), sending=True)
    assert not isinstance(stream, PipeReceiver)
    await _checkpoint(stream)
    return stream


async def listen(rest: str, config: Config) -> FdListener:
    """Receive through a descriptor, which is consumed.

    Raises:
        ConfigError: *rest* is no number; then no descriptor is consumed.
        TransportFailed: the descriptor is not open, or cannot bring a stream; it is closed.

    **Cancellation:** the descriptor is closed.
    """
    number = parse(rest)
    stream = adopt(number, sending=False)
    assert not isinstance(stream, PipeSender)
    await _checkpoint(stream)
    return FdListener(number, stream)


async def _checkpoint(stream: _Opened) -> None:
    """A checkpoint, as every call of trio has one; if cancelled, it closes the descriptor."""
    try:
        await trio.lowlevel.checkpoint()
    except BaseException:
        _close(stream)
        raise


def _close(stream: _Opened) -> None:
    if isinstance(stream, trio.SocketStream):
        stream.socket.close()
    else:
        stream.close()


TRANSPORT: Final = Transport(connect=connect, listen=listen, parse=parse)
