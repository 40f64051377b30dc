"""Socket buffers large enough that neither side sleeps for every few hundred KiB.

Waking a sleeping core costs tens of microseconds, more on a virtual machine; with the small buffers that a new
connection starts with, both sides of a fast link spend their time waking each other. The kernel grows the buffers of
TCP by itself, but slowly, and those of unix sockets not at all.
"""

from __future__ import annotations

import socket
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
#: Bytes that may be on the way to a receiving TCP socket, or wait in it, in postcopy.
_WINDOW_SHORT: Final = 1 << 18


def shorten(sock: trio.socket.SocketType) -> None:
    """Let *sock* count as writable only while its queue is short. Bytes that are already queued stay in the queue."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_SHORT)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_SHORT)


def shorten_receiving(sock: trio.socket.SocketType) -> None:
    """Limit the bytes that wait in *sock* to be read: they delay a requested page that is sent behind them.

    The TCP window becomes smaller; the buffer keeps its size. With a smaller buffer the kernel would drop the bytes that
    do not fit, and the peer would send them again only 200 ms later. For a unix socket :func:`shorten` at the sender
    sets the limit, so this function does nothing.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, _WINDOW_SHORT)


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
