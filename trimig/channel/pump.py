"""Moves a :class:`.step.Step` through a kernel socket, in a thread beside trio if it is much.

The socket stays non-blocking. The thread waits in poll(2) for the socket or for an eventfd, which a cancellation writes. The
step looks at its flag before every call, and a call moves 2 MiB at most. So one change of threads (about 0.1 ms) is paid for
a whole section of pages, instead of several steps of trio for each MiB, and other tasks go on meanwhile.

The thread has a duplicate of the descriptor: if the stream is closed, its number may be given to another file at once. Both
descriptors are opened for one transfer, and closed behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from .. import formats
from ..errors import Loss, TransportFailed
from . import offload, vectored

if TYPE_CHECKING:
    from .step import Call, Step
    from .vectored import Span

#: From so many bytes on a transfer has a thread. What one system call takes goes at once.
THREAD_BYTES: Final = vectored.CALL_BYTES
#: Without a thread, other tasks get a turn after at most this many bytes, which take about a millisecond.
_SLICE_BYTES: Final = 1 << 20
#: A reader that keeps up with the writer would be woken for every few segments, which costs a system call here and a wake-up
#: at the writer each time. So SO_RCVLOWAT makes the kernel wait for this many bytes, for at most so many seconds.
_HELPING_BYTES: Final = 512 << 10
_HELPING_SECONDS: Final = 0.001
#: Seconds for which a thread waits for more where its plan rests. To leave and to begin again costs about 0.2 ms.
_REST_SECONDS: Final = 0.02
#: Seconds after which a thread that waits looks if the stream was closed.
_LOOK_SECONDS: Final = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """Sending or receiving."""

    #: In words, for messages.
    doing: str
    #: What a peer did that does not keep up.
    fault: str
    call: Callable[[int, Span], int | None]
    wait: Callable[[int], Awaitable[None]]
    #: The event of poll(2).
    ready: int


_OUT: Final = _Way(
    doing="sending", fault="took no data", call=vectored.writev, wait=trio.lowlevel.wait_writable, ready=select.POLLOUT
)
_IN: Final = _Way(
    doing="receiving", fault="sent nothing", call=vectored.readv, wait=trio.lowlevel.wait_readable, ready=select.POLLIN
)


def broke(doing: str, error: BaseException) -> TransportFailed:
    """The error of a connection that broke, with the text of the system's error if trio has wrapped one.

    Args:
        doing: "sending" or "receiving".
    """
    inner = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ else error
    alert = isinstance(inner, ssl.SSLError) and not isinstance(inner, ssl.SSLEOFError)
    return TransportFailed(
        f"the connection broke while {doing}: {str(inner) or type(inner).__name__}", loss=None if alert else Loss.CLOSED
    )


def stalled(fault: str, seconds: float) -> TransportFailed:
    """The error of a peer that did not keep up for *seconds*.

    Args:
        fault: what it did: "took no data" or "sent nothing".
    """
    return TransportFailed(f"the peer {fault} for {formats.duration(seconds)}", loss=Loss.SILENT)


async def send(sock: trio.socket.SocketType, step: Step, size: int, stall_timeout: float) -> None:
    """Send what *step* says.

    Args:
        size: how many bytes that may be.
        stall_timeout: seconds without progress after which it fails; ``math.inf`` for never.

    Raises:
        TransportFailed: the connection broke, or took nothing for ``stall_timeout``.

    **Cancellation:** ``step.done`` bytes have been sent, not one more.
    """
    await _move(sock, step, size, stall_timeout, _OUT)


async def receive(sock: trio.socket.SocketType, step: Step, size: int, stall_timeout: float) -> None:
    """Receive what *step* says, or until the end of the stream (``step.ended``), or until nothing comes where it rests.

    Args:
        size: as for :func:`send`.
        stall_timeout: as for :func:`send`.

    Raises:
        TransportFailed: the connection broke, or nothing came for ``stall_timeout``.

    **Cancellation:** ``step.done`` bytes have come, and the next ones are still in the socket.
    """
    await _move(sock, step, size, stall_timeout, _IN)


async def _move(sock: trio.socket.SocketType, step: Step, size: int, stall_timeout: float, way: _Way) -> None:
    if size <= THREAD_BYTES or not await _in_thread(sock, step, stall_timeout, way):
        await _by_trio(sock, step, stall_timeout, way)


def sender(descriptor: int) -> Call:
    """The system call that sends by *descriptor*, for a :class:`.step.Step`; it raises TransportFailed."""
    return _caller(lambda: descriptor, _OUT)


def _caller(descriptor: Callable[[], int], way: _Way) -> Call:
    """The system call, with TransportFailed for its errors. An error of the plan is not one of the connection."""

    system_call = way.call

    def call(rest: Span) -> int | None:
        try:
            return system_call(descriptor(), rest)
        except OSError as error:
            raise broke(way.doing, error) from error

    return call


# -- in a thread ---------------------------------------------------------------------------------------------------------


async def _in_thread(sock: trio.socket.SocketType, step: Step, stall_timeout: float, way: _Way) -> bool:
    """False if there is no thread for it, or no descriptor: then nothing was moved."""
    try:
        thread = _Thread(sock, step, stall_timeout, way)
    except OSError:
        return False
    with contextlib.closing(thread):
        try:
            await offload.pump(thread.run, thread.stop)
        except trio.WouldBlock:
            return False
    return True


class _Thread:
    """One transfer in a thread. OSError: there are no descriptors left, or the socket is closed."""

    def __init__(self, sock: trio.socket.SocketType, step: Step, stall_timeout: float, way: _Way) -> None:
        self._step = step
        self._way = way
        self._stall_timeout = stall_timeout
        self._original = sock
        self._same = socket.fromfd(sock.fileno(), sock.family, sock.type)
        self._number = self._same.fileno()
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._same.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._same, way.ready)
        self._poll.register(self._wake, select.POLLIN)
        self._wanted = 1  # SO_RCVLOWAT, in bytes

    def close(self) -> None:
        """Close both descriptors."""
        self._same.close()
        os.close(self._wake)

    def stop(self) -> None:
        """Let :meth:`run` end within one system call. For another thread."""
        self._step.stop()
        os.eventfd_write(self._wake, 1)

    def run(self) -> bool:
        """Make calls until the step is over; False if it was stopped before that. TransportFailed."""
        step, call = self._step, _caller(self._descriptor, self._way)
        try:
            while not step.run(call):
                if not self._wait():
                    return True
        finally:
            self._want(1)
        return step.ended or step.whole

    def _descriptor(self) -> int:
        if self._original.fileno() < 0:
            raise broke(self._way.doing, trio.ClosedResourceError("the stream was closed here"))
        return self._number

    def _wait(self) -> bool:
        """Wait for the socket or for a stop, or for _LOOK_SECONDS. TransportFailed after ``stall_timeout``.

        Returns:
            False if nothing has come where the plan rests.
        """
        if self._step.resting:
            self._want(1)
            return bool(self._poll.poll(1000 * _REST_SECONDS))
        if self._way.ready == select.POLLIN:
            self._want(_HELPING_BYTES)
            if self._poll.poll(1000 * _HELPING_SECONDS):
                return True
            self._want(1)
        left = self._stall_timeout
        while not self._poll.poll(1000 * min(left, _LOOK_SECONDS)):
            if self._original.fileno() < 0:
                break
            left -= _LOOK_SECONDS
            if left <= 0:
                raise stalled(self._way.fault, self._stall_timeout)
        return True

    def _want(self, count: int) -> None:
        if self._wanted != count:
            self._wanted = count
            with contextlib.suppress(OSError):  # the next call has the error of a broken connection
                self._same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


# -- by trio -------------------------------------------------------------------------------------------------------------


async def _by_trio(sock: trio.socket.SocketType, step: Step, stall_timeout: float, way: _Way) -> None:
    await trio.lowlevel.checkpoint()
    call, helped = _caller(sock.fileno, way), False
    while not step.over:
        before = step.done
        blocked = not step.run(call, _SLICE_BYTES)
        if step.done > before:
            helped = False
        if not blocked:
            if not step.over:
                await trio.lowlevel.checkpoint()
            continue
        if step.resting:
            return
        try:
            if way is _IN and not helped:
                await _wait_helping(sock)
            else:
                with trio.move_on_after(stall_timeout) as limit:
                    await way.wait(sock.fileno())
                if limit.cancelled_caught:
                    raise stalled(way.fault, stall_timeout)
        except (OSError, trio.ClosedResourceError) as error:
            raise broke(way.doing, error) from error
        helped = not helped


async def _wait_helping(sock: trio.socket.SocketType) -> None:
    """Wait until _HELPING_BYTES bytes can be read, or a millisecond has passed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _HELPING_BYTES)
    try:
        with trio.move_on_after(_HELPING_SECONDS):
            await trio.lowlevel.wait_readable(sock)
    finally:
        with contextlib.suppress(OSError):  # an error here must not replace the exception that ended the wait
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
