"""One stream between the two sides, and the rule that a failed write is the last one.

If ``send_all`` of a trio stream is cancelled or fails, the caller does not know how many bytes were sent. Then the channel
is *poisoned*: nothing more is written to it, not even the farewell. Only one task writes to a channel.

Kernel sockets are written by system calls that return how many bytes they took. So the channel knows *exactly* whether
any byte of a write has left. Pages go from guest memory into the socket without a copy in Python.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import socket
import sys
import termios
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

import numpy as np
import trio
from numpy.typing import NDArray

from ..errors import LocalProtocolError, TransportFailed
from ..guest import PAGE_SIZE
from . import pump, vectored
from .pump import broke, stalled
from .socket_options import enlarge, shorten, shorten_receiving
from .step import Plan, SendPlan, Step
from .streams import IntoBuffer, Layered
from .vectored import Vector

#: Pages that are copied into one buffer for streams that take only bytes.
_STAGED_PAGES = 512
#: Bytes of one ``send_all`` on a stream that is not a socket. Each call must end within the stall timeout, so pieces begin
#: small. After _FAST_PIECES_NEEDED pieces in a row that each took less than _PIECE_SECONDS (more bytes than buffers hold),
#: pieces of _PIECE_MOST bytes follow.
_PIECE_BYTES = 1 << 16
_PIECE_MOST = 1 << 20
_FAST_PIECES_NEEDED = 32
_PIECE_SECONDS = 0.005
#: If a bulk read from a stream that is not a socket got fewer bytes, the next read waits a millisecond for more to come.
_SMALL_READ = 96 << 10
#: That wait, in seconds.
_SMALL_READ_SECONDS = 0.001


#: A stream in both directions, or in one direction; with one direction there is no return path.
AnyStream: TypeAlias = trio.abc.SendStream | trio.abc.ReceiveStream
OpenStream: TypeAlias = Callable[[], Awaitable[AnyStream]]


class Channel:
    """A stream with a byte count and a poison mark.

    Args:
        stream: any trio stream, or only one direction of one. The channel owns it.
        stall_timeout: seconds without progress in a blocked call after which it fails; ``math.inf`` for never.
        first: bytes that were already read from *stream*; the first reads of the channel return them.
    """

    def __init__(self, stream: AnyStream, *, stall_timeout: float = math.inf, first: bytes = b"") -> None:
        self.stream = stream
        self._first = memoryview(first)
        self._send_stream = stream if isinstance(stream, trio.abc.SendStream) else None
        self._receive_stream = stream if isinstance(stream, trio.abc.ReceiveStream) else None
        self.stall_timeout = stall_timeout
        self._sent = 0
        self._received = 0
        self._sending: Step | None = None
        self._receiving: Step | None = None
        self.poisoned = False
        #: The rest of the element or record in which a write to a socket was cancelled; None if it is not known.
        self._unfinished: bytes | None = None
        #: True if more bytes may have left than :attr:`sent` counts: a write to a stream that is not a socket has failed
        #: or was cancelled.
        self.unsure = False
        #: True during a write to a stream that is not a socket. :attr:`sent` counts each piece when the piece was sent.
        self.writing = False
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._backlog_short = False
        self._lent: int | None = None  # a duplicate of its descriptor, in :meth:`lend`
        if self._socket is not None:
            enlarge(self._socket)
        self._into = stream.receive_into if isinstance(stream, IntoBuffer) else None
        self._fast_pieces = 0
        self._last = _SMALL_READ
        self._staging: NDArray[np.uint8] | None = None

    @property
    def sent(self) -> int:
        """Bytes taken by the transport (for streams other than sockets: handed to it completely)."""
        sent, step = self._sent, self._sending  # in this order: a thread may end the step between the two
        return sent + (step.done if step is not None else 0)

    @property
    def received(self) -> int:
        """Bytes taken from the transport."""
        return self._received + (self._receiving.done if self._receiving is not None else 0)

    @property
    def sends(self) -> bool:
        """The stream has the direction to the peer."""
        return self._send_stream is not None

    @property
    def direct(self) -> bool:
        """The stream is a kernel socket, which a thread can use."""
        return self._socket is not None

    @property
    def receives(self) -> bool:
        """The stream has the direction from the peer."""
        return self._receive_stream is not None

    @property
    def socket_fd(self) -> int | None:
        """The descriptor for vectored calls; None if the stream is no kernel socket, or has bytes of *first* left."""
        return self._socket.fileno() if self._socket is not None and not self._first else None

    @property
    def descriptor(self) -> int:
        """The descriptor of a kernel socket, inside of :meth:`lend` its duplicate. TransportFailed if the stream is closed."""
        assert self._socket is not None, "no kernel socket"
        if self._socket.fileno() < 0:
            raise broke("in use", trio.ClosedResourceError("the stream was closed here"))
        return self._socket.fileno() if self._lent is None else self._lent

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Inside the block one thread uses the channel, by its methods ``*_now``, and no task does.

        The thread has a duplicate of the descriptor: if the stream is closed, its number may be given to another file at once.

        Raises:
            OSError: no descriptor is left.
            TransportFailed: the stream is closed.
        """
        self._lent = os.dup(self.descriptor)
        try:
            yield
        finally:
            lent, self._lent = self._lent, None
            os.close(lent)

    def cut(self) -> bool:
        """Break the connection in both directions at once. Waiting tasks get the same error as after a network failure.

        Returns:
            True if the connection is broken now; False if the stream has no kernel socket.
        """
        stream: object = self.stream
        while stream is not None and not isinstance(stream, trio.SocketStream):
            stream = stream.transport if isinstance(stream, Layered) else None
        if stream is None:
            return False
        with contextlib.suppress(OSError):  # the socket is already broken or closed
            stream.socket.shutdown(socket.SHUT_RDWR)
        return True

    def backlog(self) -> int:
        """Bytes that the kernel has taken and the peer's kernel has not acknowledged; 0 if the kernel does not tell."""
        if self._socket is None:
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):  # this kind of socket has no TIOCOUTQ, or the socket is closed
            return 0

    def keep_queue_short(self) -> None:
        """Keep the queue of unsent bytes short from now on (postcopy); :meth:`wait_queue_short` waits for that."""
        if self._socket is not None:
            shorten(self._socket)

    def keep_backlog_short(self) -> None:
        """Keep the queue of received bytes short from now on (postcopy)."""
        self._backlog_short = True

    def _shorten_backlog(self) -> None:
        if self._backlog_short and self._socket is not None:
            self._backlog_short = not shorten_receiving(self._socket)

    async def wait_queue_short(self) -> None:
        """Wait until few unsent bytes are queued on this side, as far as the stream can tell.

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
            raise broke("sending", error) from error
        if limit.cancelled_caught:
            raise stalled("took no data", self.stall_timeout)

    def _check(self) -> None:
        if self.poisoned:
            raise LocalProtocolError("write to a channel after a write that failed half way")

    def mend(self) -> bytes | None:
        """End the poisoning, if the rest of the element in which a write was cancelled is known.

        Returns:
            The rest of the element, which must be sent before anything else; empty if the channel was not poisoned.
            None if the rest is not known: then the channel stays poisoned.
        """
        if not self.poisoned:
            return b""
        unfinished, self._unfinished = self._unfinished, None
        self.poisoned = unfinished is None
        return unfinished

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
                        raise stalled("took no data", self.stall_timeout)
                    self._sent += taken
                    view = view[taken:]
            else:
                await self._send_pieces(view)
            ok = True
        except trio.Cancelled:
            self._unfinished = bytes(view) if self._socket is not None else None
            raise
        except (OSError, MemoryError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise broke("sending", error) from error
        finally:
            if not ok:
                self.poisoned = True
                self.unsure = self._socket is None

    def send_now(self, data: bytes) -> int:
        """Send the part of *data* that the kernel takes without waiting, and return its length in bytes.

        The rest must be sent before anything else. No other task may be sending. The result is 0 if the stream is no
        socket, and 0 if it is broken: then :meth:`send` raises the error.
        """
        if self._socket is None or self.poisoned:
            return 0
        try:
            taken = os.write(self.descriptor, data)
        except (OSError, TransportFailed):
            return 0
        self._sent += taken
        return taken

    async def _send_pieces(self, data: memoryview) -> None:
        """Send *data* in pieces, because ``send_all`` does not show its progress."""
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
                    raise stalled("took no data", self.stall_timeout)
                self._sent += len(piece)
                quick = trio.current_time() - began < _PIECE_SECONDS * (size // _PIECE_BYTES)
                self._fast_pieces = self._fast_pieces + 1 if quick else 0
        finally:
            self.writing = False

    async def send_pages(
        self, lead: bytes, words: NDArray[np.uint64], pages: NDArray[np.uint8], indices: NDArray[np.int64]
    ) -> None:
        """Send PAGE records. The kernel reads their pages from guest memory; for other streams they are copied once.

        Args:
            lead: the word and the block name of the first record, if that record has a name; else empty.
            words: the word of each record, big-endian. If *lead* is not empty, it replaces the first word.
            pages: the block's memory, shape (n, page size).
            indices: the indices of the pages, rising, as many as *words*, at most BATCH_PAGES.

        **Cancellation:** as for :meth:`send`.
        """
        if self._socket is None:
            for start in range(0, len(words), _STAGED_PAGES):
                part = slice(start, start + _STAGED_PAGES)
                await self.send(self._stage(b"" if start else lead, words[part], pages, indices[part]))
            return
        addresses = pages.ctypes.data + indices.astype(np.uint64) * np.uint64(PAGE_SIZE)
        keep = np.frombuffer(lead, np.uint8)
        first = (keep.ctypes.data, len(lead)) if lead else None
        await self.send_vector(vectored.Records(words.ctypes.data, 8, addresses, PAGE_SIZE, first))

    async def send_pieces(self, vector: Vector) -> None:
        """Send bytes from where they lie in memory, see :meth:`send_vector`.

        Args:
            vector: address and size in bytes of each piece, shape (n, 2), at least one. It is used up. The caller keeps the
                memory.

        **Cancellation:** as for :meth:`send`, and :meth:`mend` does not know the rest.
        """
        await self.send_vector(vectored.Pieces(vector))

    async def send_vector(self, plan: SendPlan) -> None:
        """Send all that *plan* says. The kernel reads it from where it lies; for other streams it is copied once.

        The caller holds the memory of the plan until the end.

        **Cancellation:** as for :meth:`send`.
        """
        if self._socket is None:
            step = Step(plan)
            while not step.over:
                for part in vectored.copied(plan.rest, self._room()):
                    await self.send(part)
                    step.moved(len(part))
            return
        step = self._begin(plan)
        try:
            await pump.send(self._socket, step, plan.left, self.stall_timeout)
        except trio.Cancelled:
            self._unfinished = plan.rest_of_unit()
            raise
        finally:
            self.end_sending()

    def _begin(self, plan: SendPlan) -> Step:
        self._check()
        self._sending = Step(plan)
        return self._sending

    def begin_sending(self, plan: SendPlan) -> None:
        """Begin to send what *plan* says, by :meth:`send_more_now`. Nothing else may be sent before :meth:`end_sending`."""
        self._begin(plan)

    def send_more_now(self) -> bool:
        """Send what a kernel socket takes of the plan that was begun; True if nothing of a plan is left. TransportFailed."""
        step = self._sending
        if step is None:
            return True
        if not step.run(pump.sender(self.descriptor)):
            return False
        self.end_sending()
        return True

    async def finish_sending(self) -> None:
        """Send the rest of the plan that was begun, if there is one. TransportFailed.

        **Cancellation:** the channel is poisoned.
        """
        if self._socket is not None and self._sending is not None:
            try:
                await pump.send(self._socket, self._sending, 0, self.stall_timeout)
            finally:
                self.end_sending()

    def end_sending(self) -> None:
        """Send no more of the plan that was begun, if there is one: the channel is poisoned if a part of it is left."""
        if self._sending is not None:
            self.poisoned = not self._sending.whole
            self._sent, self._sending = self.sent, None

    def _stage(
        self, lead: bytes, words: NDArray[np.uint64], pages: NDArray[np.uint8], indices: NDArray[np.int64]
    ) -> memoryview:
        """The records in one buffer, for streams that take only bytes."""
        count = len(words)
        extra = max(0, len(lead) - 8)
        buffer = self._room()[: extra + count * (8 + PAGE_SIZE)]
        records = buffer[extra:].reshape(count, 8 + PAGE_SIZE)
        records[:, :8] = words.view(np.uint8).reshape(count, 8)
        first, last = int(indices[0]), int(indices[-1])
        if last - first == count - 1:  # indices rise, so there is no gap: a slice needs no copy in between
            records[:, 8:] = pages[first : last + 1]
        else:
            records[:, 8:] = pages[indices]
        if lead:
            buffer[: len(lead)] = np.frombuffer(lead, np.uint8)
        return buffer.data

    def _room(self) -> NDArray[np.uint8]:
        if self._staging is None:
            self._staging = np.empty(_STAGED_PAGES * (8 + PAGE_SIZE) + 256, np.uint8)
        return self._staging

    async def receive_into(self, view: memoryview, *, stall_timeout: float | None = None, bulk: bool = False) -> int:
        """Read at least one byte into *view*; 0 at the end of the stream.

        Args:
            bulk: True if many bytes are on the way and the first of them is not urgent.
            stall_timeout: seconds for this call, in place of the channel's own.

        Raises:
            TransportFailed: the connection broke, or nothing came for ``stall_timeout``.

        **Cancellation:** nothing was read.
        """
        if self._first:
            await trio.lowlevel.checkpoint()
            return self._take_first(view)
        try:
            with trio.move_on_after(self.stall_timeout if stall_timeout is None else stall_timeout) as limit:
                if self._socket is not None:
                    count = await self._socket.recv_into(view)
                    self._shorten_backlog()
                else:
                    if bulk and self._last < _SMALL_READ:
                        await trio.sleep(_SMALL_READ_SECONDS)
                    count = self._last = await self._receive_some(view)
            if limit.cancelled_caught:
                raise stalled("sent nothing", self.stall_timeout if stall_timeout is None else stall_timeout)
        except (OSError, MemoryError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise broke("receiving", error) from error
        self._received += count
        return count

    def _take_first(self, view: memoryview) -> int:
        count = min(len(view), len(self._first))
        view[:count], self._first = self._first[:count], self._first[count:]
        self._received += count
        return count

    def receive_now(self, view: memoryview) -> int | None:
        """Read what a kernel socket has into *view*; None if it has nothing, 0 at the end of the stream. TransportFailed."""
        if self._first:
            return self._take_first(view)
        try:
            count = os.readv(self.descriptor, [view])
            self._shorten_backlog()
        except BlockingIOError:
            return None
        except OSError as error:
            raise broke("receiving", error) from error
        self._received += count
        return count

    async def wait_readable(self) -> None:
        """Wait until :meth:`receive_now` finds something, however long that takes. TransportFailed.

        **Cancellation:** no effect.
        """
        try:
            await trio.lowlevel.wait_readable(self.descriptor)
        except (OSError, trio.ClosedResourceError) as error:
            raise broke("receiving", error) from error

    async def _receive_some(self, view: memoryview) -> int:
        if self._into is not None:
            return await self._into(view)
        assert self._receive_stream is not None, "a stream that only sends"
        data = await self._receive_stream.receive_some(len(view))
        view[: len(data)] = data
        return len(data)

    async def receive_vector(self, plan: Plan, size: int) -> bool:
        """Receive into the places that *plan* says, until it wants no more, or nothing comes while it rests; True at the end
        of the stream.

        The kernel puts the bytes there, or another stream that can. The caller holds the memory of the plan until the end.

        Args:
            size: bytes that the plan wants at most.

        Raises:
            TransportFailed: the connection broke, or nothing came for ``stall_timeout``.

        **Cancellation:** all bytes that were read are counted.
        """
        step = Step(plan)
        while not step.over and not step.resting and (self._socket is None or self._first):
            step.moved(await self.receive_into(vectored.view(plan.rest)))
        if step.over or step.resting or self._socket is None:
            return step.ended
        step = self._receiving = Step(plan)
        try:
            await pump.receive(self._socket, step, size, self.stall_timeout)
        finally:
            self._received, self._receiving = self.received, None
        return step.ended
