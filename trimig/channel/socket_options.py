"""Socket buffers large enough that neither side sleeps for every few hundred KiB.

Waking a sleeping core costs tens of microseconds, more on a virtual machine; with the small buffers that a new
connection starts with, both sides of a fast link spend their time waking each other. The kernel grows the buffers of
TCP by itself, but slowly, and those of unix sockets not at all.
"""

from __future__ import annotations

import functools
import socket
import struct
from typing import Final

import trio

#: Bytes asked for in each direction; the kernel doubles that for its own book-keeping.
SOCKET_BUFFER: Final = 8 << 20

#: The same for unix sockets, in bytes. A larger queue is slower: the data has left the processor's cache before the peer
#: reads it (throughput against TCP in one run: 0.6 to 1.0 with 8 MiB, 1.3 with 1 MiB).
UNIX_BUFFER: Final = 1 << 20

#: Linux numbers that Python's socket module does not name. They are SO_SNDBUF and SO_RCVBUF without the system-wide
#: maximum, for processes that may administer the network (CAP_NET_ADMIN).
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

#: Bytes that may wait in a TCP socket without having been sent. trio sets 16 KiB, which suits protocols that reorder
#: queued data: the kernel then takes a few segments in each call and wakes the sender for each of them. A migration can
#: queue a few megabytes, because the queued bytes are counted before the guest is stopped.
UNSENT: Final = 4 << 20


#: The same in postcopy. There a requested page waits behind all bytes that were queued before it.
UNSENT_SHORT: Final = 1 << 17
#: Bytes that may be on the way to a receiving TCP socket in postcopy.
_WINDOW_SHORT: Final = 1 << 18
#: The size of its buffer then, in bytes of memory, if nothing more is in it: 256 KiB of pages fit.
_BUFFER_SHORT: Final = 384 << 10
#: A segment takes up to so many times its bytes of the buffer.
_OVERHEAD: Final = 2
#: Bytes of the buffer that are left free above that.
_SPARE: Final = 64 << 10
#: SO_MEMINFO: memory that received bytes take, and the buffer's size, in the first two of nine numbers.
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=II")
_MEMINFO_BYTES: Final = 36
#: The window that the peer was told last, in the kernel's struct tcp_info from Linux 6.2 on.
_TCP_INFO_WINDOW: Final = 232
_WINDOW: Final = struct.Struct("=I")


def shorten(sock: trio.socket.SocketType) -> None:
    """Let *sock* count as writable only while its queue is short. Bytes that are already queued stay in the queue."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_SHORT)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_SHORT)


def shorten_receiving(sock: trio.socket.SocketType) -> bool:
    """Limit the bytes that wait in *sock* to be read: they delay a requested page that is sent behind them.

    Call it after each read, until it returns True: then nothing is left to do. The TCP window becomes smaller. That limits only what
    is on the way: the kernel takes bytes as long as its buffer has room. So the buffer becomes smaller, too, step by step. It always
    has room for what is in it and for what the peer was allowed to send: the kernel would drop the bytes that do not fit, and the peer would send them again only 200 ms later.
    Before Linux 6.2 that is not known, and the buffer keeps its size. For a unix socket :func:`shorten` at the sender sets the limit,
    so this function does nothing.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, _WINDOW_SHORT)
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_WINDOW + _WINDOW.size)
    if len(info) < _TCP_INFO_WINDOW + _WINDOW.size:
        return True
    (window,) = _WINDOW.unpack_from(info, _TCP_INFO_WINDOW)
    held, size = _MEMINFO.unpack_from(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_BYTES))
    wanted = max(_BUFFER_SHORT, held + _OVERHEAD * window + _SPARE)
    if 4 * wanted < 3 * size or (wanted == _BUFFER_SHORT and wanted < size):
        _set_receive_buffer(sock, wanted // 2)
    return bool(size <= _BUFFER_SHORT)


def _set_receive_buffer(sock: trio.socket.SocketType, size: int) -> None:
    """Set SO_RCVBUF, if *size* can be set exactly: the kernel would cut it without privileges."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:
        if size <= _most_receiving():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


@functools.cache
def _most_receiving() -> int:
    """The system-wide maximum for SO_RCVBUF when it was looked at first."""
    return _number_in("/proc/sys/net/core/rmem_max")


def enlarge(sock: trio.socket.SocketType) -> None:
    """Give *sock* large buffers, unless a request would make them smaller.

    Setting a size ends the kernel's own adjustment. Without privileges the kernel cuts the size to a system-wide maximum.
    By default this maximum is less than the size to which TCP grows by itself. So a TCP socket keeps its size then.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    size = UNIX_BUFFER if sock.family == socket.AF_UNIX else SOCKET_BUFFER
    for option, force, limit in (
        (socket.SO_SNDBUF, _SO_SNDBUFFORCE, "/proc/sys/net/core/wmem_max"),
        (socket.SO_RCVBUF, _SO_RCVBUFFORCE, "/proc/sys/net/core/rmem_max"),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, size)
        except OSError:
            if sock.family == socket.AF_UNIX or _number_in(limit) >= size:
                sock.setsockopt(socket.SOL_SOCKET, option, size)


def _number_in(path: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
