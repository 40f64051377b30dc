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

#: The same for unix sockets, where nothing is on its way: what is queued has left the processor's cache before it is read
#: (8 MiB: 0.6 to 1.0 of TCP in one run, 1 MiB: 1.3).
UNIX_BUFFER: Final = 1 << 20

#: Linux numbers that Python's socket module does not name: the same options for processes that may administer the network.
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

#: Bytes that may wait in a TCP socket without having been sent. trio sets 16 KiB, which suits protocols that change
#: their mind: the kernel then takes a few segments per call and wakes us for each lot. Here a few megabytes cost nothing,
#: because what is queued is counted before the guest is stopped.
UNSENT: Final = 4 << 20


#: The same in postcopy, where a page that the guest waits for queues behind what was handed over before it.
UNSENT_SHORT: Final = 1 << 17
#: What may be on its way to, or wait in, a receiving TCP socket then.
_WINDOW_SHORT: Final = 1 << 18


def shorten(sock: trio.socket.SocketType) -> None:
    """*sock* counts as writable only while little waits in it. What a TCP socket has sent, or waits there, stays."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_SHORT)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_SHORT)


def shorten_receiving(sock: trio.socket.SocketType) -> None:
    """Little may wait in *sock* to be read from here on: what was sent before the page that is waited for delays it.

    The window is made smaller, not the buffer: what does not fit into a smaller buffer would be dropped, and come again
    only 200 ms later. A unix socket's sender sets how much may wait.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, _WINDOW_SHORT)


def enlarge(sock: trio.socket.SocketType) -> None:
    """Give *sock* large buffers where that is allowed; leave it alone where asking would make them smaller.

    Setting a size ends the kernel's own adjustment. Without privileges the size is cut to a system-wide maximum, which
    by default is less than what TCP grows to by itself: then it is better not asked for.
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
