"""One stream between the two sides, and the rule that a failed write is the last one.

``send_all`` of any trio stream leaves unknown how much was sent when it is cancelled or fails. So a channel that this
happened to is *poisoned*: nothing more is ever written to it, the farewell included. One task writes a channel.

Kernel sockets get special treatment: there bytes are handed over by system calls that say how many were taken, so it
is known *exactly* whether anything of a write has left, and pages go straight from guest memory into the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import socket
import sys
import termios
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import trio
from numpy.typing import NDArray

from .. import formats
from ..errors import LocalProtocolError, TransportFailed
from ..guest import PAGE_SIZE
from . import vectored
from .socket_options import enlarge, shorten, shorten_receiving

#: Pages that are prepared for sending at once. One system call takes MAX_ELEMENTS // 2 of them; preparing many more
#: spreads the cost of the arrays.
BATCH_PAGES = 4096
#: Pages copied together for streams that take nothing but bytes.
_STAGED_PAGES = 512
#: What streams other than sockets get at once: it must be through within the stall timeout. They get the larger number
#: when that many pieces in a row, more than buffers swallow, have taken less than so many seconds each.
_PIECE_BYTES = 1 << 16
_PIECE_MOST = 1 << 20
_FAST_PIECES_NEEDED = 32
_PIECE_SECONDS = 0.005
#: A stream other than a socket that brings less than this of a bulk is given a millisecond to gather more.
_SMALL_READ = 96 << 10
#: Other tasks get a turn after this many bytes at the latest; that takes about a millisecond.
_SLICE_BYTES = 1 << 20
#: What is worth a call while pages are read in bulk, and how long is waited for it.
_RCVLOWAT_BYTES = 256 << 10
_RCVLOWAT_SECONDS = 0.001


#: A stream of both directions, or of one: then there is no return path.
AnyStream: TypeAlias = trio.abc.SendStream | trio.abc.ReceiveStream
OpenStream: TypeAlias = Callable[[], Awaitable[AnyStream]]


@runtime_checkable
class Delivering(Protocol):
    """A stream that can tell more than that its buffer took the bytes: a child that ends well, a file that is on disk.

    Without a return path this is the only word there is on what became of the stream.
    """

    async def delivered(self) -> None:
        """Nothing more will be sent: return when what was sent is where it was to go.

        Raises:
            TransportFailed: it is not, or that cannot be known.

        **Cancellation:** as for an error.
        """


@runtime_checkable
class PerhapsSilent(Protocol):
    """A stream that can be read from, but perhaps no program at its other end ever answers.

    A command that passes the stream on answers; one that stores it does not.
    """

    @property
    def perhaps_silent(self) -> bool:
        """True if the end of this direction, or silence, is not an error before the peer has said anything."""


@runtime_checkable
class Layered(Protocol):
    """A stream over another one."""

    @property
    def transport(self) -> object:
        """The one below."""


@runtime_checkable
class IntoBuffer(Protocol):
    """A stream that can be received from without a bytes object in between."""

    async def receive_into(self, view: memoryview) -> int:
        """As ``receive_some``, into *view*; how many bytes, 0 at the end.

        **Cancellation:** nothing was taken.
        """


class Channel:
    """A stream with a byte count and a poison mark.

    Args:
        stream: any trio stream, or only one direction of one. The channel owns it.
        stall_timeout: seconds without progress in a blocked call after which it fails; ``math.inf`` for never.
        first: bytes that were read from *stream* already; they come before everything else.
    """

    def __init__(self, stream: AnyStream, *, stall_timeout: float = math.inf, first: bytes = b"") -> None:
        self.stream = stream
        self._first = memoryview(first)
        self._send_stream = stream if isinstance(stream, trio.abc.SendStream) else None
        self._receive_stream = stream if isinstance(stream, trio.abc.ReceiveStream) else None
        self.stall_timeout = stall_timeout
        #: Bytes taken by the transport (for streams other than sockets: handed to it completely).
        self.sent = 0
        self.received = 0
        self.poisoned = False
        #: What a cancelled write to a socket would have to go on with to reach the end of its element or record.
        self._unfinished: bytes | None = None
        #: Something may have left although :attr:`sent` does not show it (a write of a stream that is not a socket
        #: ended in an error).
        self.unsure = False
        #: A stream that is not a socket is in the middle of a write, which :attr:`sent` will show when it is done.
        self.writing = False
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        if self._socket is not None:
            enlarge(self._socket)
        self._into = stream.receive_into if isinstance(stream, IntoBuffer) else None
        self._fast_pieces = 0
        self._last = _SMALL_READ
        self._staging: NDArray[np.uint8] | None = None

    @property
    def sends(self) -> bool:
        """The stream has the direction to the peer."""
        return self._send_stream is not None

    @property
    def receives(self) -> bool:
        """The stream has the direction from the peer."""
        return self._receive_stream is not None

    @property
    def socket_fd(self) -> int | None:
        """The descriptor for vectored calls, or None if the stream is not a kernel socket, or if something that was read
        before stands in front of what it will bring.
        """
        return self._socket.fileno() if self._socket is not None and not self._first else None

    def cut(self) -> bool:
        """Break the connection in both directions, at once; who waits for it is told as if the network had broken it.

        Returns:
            Whether there is a kernel socket that can be broken, or was broken before.
        """
        stream: object = self.stream
        while stream is not None and not isinstance(stream, trio.SocketStream):
            stream = stream.transport if isinstance(stream, Layered) else None
        if stream is None:
            return False
        with contextlib.suppress(OSError):  # it is broken, or closed, already
            stream.socket.shutdown(socket.SHUT_RDWR)
        return True

    def backlog(self) -> int:
        """Bytes that the kernel has taken and the peer's kernel has not acknowledged; 0 where that cannot be told."""
        if self._socket is None:
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):  # no such request for this socket, or it is closed
            return 0

    def keep_queue_short(self) -> None:
        """From here on what is sent should be on its way soon (postcopy); :meth:`wait_queue_short` says when it is."""
        if self._socket is not None:
            shorten(self._socket)

    def keep_backlog_short(self) -> None:
        """The same for what comes in."""
        if self._socket is not None:
            shorten_receiving(self._socket)

    async def wait_queue_short(self) -> None:
        """Wait until little of what was sent still waits on this side, as far as that can be told.

        Raises:
            TransportFailed: the connection broke, or took nothing for ``stall_timeout``.

        **Cancellation:** no effect.
        """
        assert self._send_stream is not None, "a stream that only receives"
        try:
            with trio.move_on_after(self.stall_timeout) as limit:
                if self._socket is not None:
                    await trio.lowlevel.wait_writable(self._socket)
                else:
                    await self._send_stream.wait_send_all_might_not_block()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise TransportFailed(f"the connection broke while sending: {_cause(error)}") from error
        if limit.cancelled_caught:
            raise self._stalled("took no data")

    def _check(self) -> None:
        if self.poisoned:
            raise LocalProtocolError("write to a channel after a write that failed half way")

    def mend(self) -> bytes | None:
        """What must be sent before anything else, so that the peer reads a whole element; the channel can then be written
        again. Nothing of a channel that is not poisoned.

        Returns:
            None if it stays poisoned: it is not known how much of the last write has left.
        """
        if not self.poisoned:
            return b""
        unfinished, self._unfinished = self._unfinished, None
        self.poisoned = unfinished is None
        return unfinished

    def _stalled(self, what: str, seconds: float | None = None) -> TransportFailed:
        return TransportFailed(
            f"the peer {what} for {formats.duration(self.stall_timeout if seconds is None else seconds)}"
        )

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of *data*.

        Raises:
            TransportFailed: the connection broke, or took nothing for ``stall_timeout``.

        **Cancellation:** the channel is poisoned; on sockets :attr:`sent` tells how much has left.
        """
        self._check()
        ok = False
        view = memoryview(data)
        try:
            if self._socket is not None:
                while len(view):
                    with trio.move_on_after(self.stall_timeout) as limit:
                        taken = await self._socket.send(view)
                    if limit.cancelled_caught:
                        raise self._stalled("took no data")
                    self.sent += taken
                    view = view[taken:]
            else:
                await self._send_pieces(view)
            ok = True
        except trio.Cancelled:
            self._unfinished = bytes(view) if self._socket is not None else None
            raise
        except (OSError, MemoryError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise TransportFailed(f"the connection broke while sending: {_cause(error)}") from error
        finally:
            if not ok:
                self.poisoned = True
                self.unsure = self._socket is None

    def send_now(self, data: bytes) -> int:
        """Hand over what the kernel takes of *data* without waiting; how many bytes. The rest must be sent before anything
        else, and no task may be in the middle of sending.

        Always 0 where the stream is no socket, or is broken: then sending in the ordinary way says why.
        """
        if self._socket is None or self.poisoned:
            return 0
        try:
            taken = os.write(self._socket.fileno(), data)
        except (OSError, ValueError):
            return 0
        self.sent += taken
        return taken

    async def _send_pieces(self, data: memoryview) -> None:
        """Hand *data* over in pieces, because the progress within one cannot be seen."""
        assert self._send_stream is not None, "a stream that only receives"
        self.writing = True
        try:
            while len(data):
                size = _PIECE_MOST if self._fast_pieces >= _FAST_PIECES_NEEDED else _PIECE_BYTES
                piece, data = data[:size], data[size:]
                began = trio.current_time()
                with trio.move_on_after(self.stall_timeout) as limit:
                    await self._send_stream.send_all(piece)
                if limit.cancelled_caught:
                    raise self._stalled("took no data")
                self.sent += len(piece)
                quick = trio.current_time() - began < _PIECE_SECONDS * (size // _PIECE_BYTES)
                self._fast_pieces = self._fast_pieces + 1 if quick else 0
        finally:
            self.writing = False

    async def send_pages(
        self, lead: bytes, words: NDArray[np.uint64], pages: NDArray[np.uint8], indices: NDArray[np.int64]
    ) -> None:
        """Send PAGE records whose content is read from guest memory by the kernel (or copied once, off sockets).

        Args:
            lead: the first record's word and block name if it is a named one, else empty.
            words: the word of every record, big-endian; the first is replaced by *lead* if that is not empty.
            pages: the block's memory, shape (n, page size).
            indices: which of its pages, rising, same length as *words*, at most BATCH_PAGES.

        **Cancellation:** as for :meth:`send`.
        """
        if self._socket is None:
            for start in range(0, len(words), _STAGED_PAGES):
                part = slice(start, start + _STAGED_PAGES)
                await self.send(self._stage(b"" if start else lead, words[part], pages, indices[part]))
            return
        self._check()
        addresses = pages.ctypes.data + indices.astype(np.uint64) * np.uint64(PAGE_SIZE)
        keep = np.frombuffer(lead, np.uint8)
        first = (keep.ctypes.data, len(lead)) if lead else None
        await self._write(vectored.Records(words.ctypes.data, 8, addresses, PAGE_SIZE, first))

    async def _write(self, records: vectored.Records) -> None:
        assert self._socket is not None
        fd = self._socket.fileno()
        try:
            await trio.lowlevel.checkpoint()
            turn = self.sent
            while records.left:
                taken = vectored.writev(fd, records.rest)
                if taken is None:
                    with trio.move_on_after(self.stall_timeout) as limit:
                        await trio.lowlevel.wait_writable(fd)
                    if limit.cancelled_caught:
                        raise self._stalled("took no data")
                    turn = self.sent
                    continue
                self.sent += taken
                records.advance(taken)
                if self.sent - turn >= _SLICE_BYTES and records.left:
                    await trio.lowlevel.checkpoint()
                    turn = self.sent
        except trio.Cancelled:
            self._unfinished = records.rest_of_record()
            raise
        except (OSError, trio.ClosedResourceError) as error:
            raise TransportFailed(f"the connection broke while sending: {_cause(error)}") from error
        finally:
            if records.left:
                self.poisoned = True

    def _stage(
        self, lead: bytes, words: NDArray[np.uint64], pages: NDArray[np.uint8], indices: NDArray[np.int64]
    ) -> memoryview:
        """The records copied together, for streams that take nothing but bytes."""
        count = len(words)
        extra = max(0, len(lead) - 8)
        if self._staging is None:
            self._staging = np.empty(_STAGED_PAGES * (8 + PAGE_SIZE) + 256, np.uint8)
        buffer = self._staging[: extra + count * (8 + PAGE_SIZE)]
        records = buffer[extra:].reshape(count, 8 + PAGE_SIZE)
        records[:, :8] = words.view(np.uint8).reshape(count, 8)
        first, last = int(indices[0]), int(indices[-1])
        if last - first == count - 1:  # in order, as they always are, so without a gap: no copy in between
            records[:, 8:] = pages[first : last + 1]
        else:
            records[:, 8:] = pages[indices]
        if lead:
            buffer[: len(lead)] = np.frombuffer(lead, np.uint8)
        return buffer.data

    async def receive_into(self, view: memoryview, *, stall_timeout: float | None = None, bulk: bool = False) -> int:
        """Read at least one byte into *view*; 0 at the end of the stream.

        Args:
            bulk: much is on its way, and its first byte is not urgent.
            stall_timeout: for this call, instead of the channel's own.

        Raises:
            TransportFailed: the connection broke, or nothing came for ``stall_timeout``.

        **Cancellation:** nothing was read.
        """
        if self._first:
            await trio.lowlevel.checkpoint()
            count = min(len(view), len(self._first))
            view[:count], self._first = self._first[:count], self._first[count:]
            self.received += count
            return count
        try:
            with trio.move_on_after(self.stall_timeout if stall_timeout is None else stall_timeout) as limit:
                if self._socket is not None:
                    count = await self._socket.recv_into(view)
                else:
                    if bulk and self._last < _SMALL_READ:
                        await trio.sleep(_RCVLOWAT_SECONDS)
                    count = self._last = await self._receive_some(view)
            if limit.cancelled_caught:
                raise self._stalled("sent nothing", stall_timeout)
        except (OSError, MemoryError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise TransportFailed(f"the connection broke while receiving: {_cause(error)}") from error
        self.received += count
        return count

    async def _receive_some(self, view: memoryview) -> int:
        if self._into is not None:
            return await self._into(view)
        assert self._receive_stream is not None, "a stream that only sends"
        data = await self._receive_stream.receive_some(len(view))
        view[: len(data)] = data
        return len(data)

    async def read_records(self, records: vectored.Records) -> int:
        """Let the kernel place what comes next, and step over it; sockets only. 0 at the end of the stream.

        Who reads as fast as the sender writes gets a few segments at a time, and pays for a call each and the sender
        for a wake-up each. So the kernel is asked to wait until there is a helping, for a millisecond at most.

        **Cancellation:** what was read is counted.
        """
        assert self._socket is not None
        fd = self._socket.fileno()
        try:
            if (count := vectored.readv(fd, records.rest)) is None:
                await self._wait_rcvlowat()
                while (count := vectored.readv(fd, records.rest)) is None:
                    with trio.move_on_after(self.stall_timeout) as limit:
                        await trio.lowlevel.wait_readable(fd)
                    if limit.cancelled_caught:
                        raise self._stalled("sent nothing")
            self.received += count
            records.advance(count)
            if 0 < count < _RCVLOWAT_BYTES // 2:
                await self._wait_rcvlowat()
        except (OSError, trio.ClosedResourceError) as error:
            raise TransportFailed(f"the connection broke while receiving: {_cause(error)}") from error
        return count

    async def _wait_rcvlowat(self) -> None:
        """Wait until _RCVLOWAT_BYTES bytes can be read, or a millisecond has passed."""
        assert self._socket is not None
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _RCVLOWAT_BYTES)
        try:
            with trio.move_on_after(_RCVLOWAT_SECONDS):
                await trio.lowlevel.wait_readable(self._socket)
        finally:
            with contextlib.suppress(OSError):  # nothing may hide what ended the waiting
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _cause(error: BaseException) -> str:
    """The most telling text of a transport error: trio wraps the system's own."""
    inner = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ else error
    return str(inner) or type(inner).__name__
