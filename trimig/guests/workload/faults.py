"""A thread that touches pages for a worker: it sleeps where one is missing, and nobody else does.

A thread that touches a missing page sleeps in the kernel. If it holds Python's global lock meanwhile, the whole process
sleeps with it: a worker could not even be paused. So the pages of the next writes are touched by a call that has
released the lock, and the worker writes them when they are there. A guest's own virtual processor waits in the same way.
"""

from __future__ import annotations

import array
import ctypes
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Final

# A function of CDLL runs without the global lock; one of PyDLL would hold it.
_memmove: Final = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

#: Waits that are remembered; the oldest ones make room.
MAX_WAITS: Final = 100_000


class Toucher:
    """Touches what it is asked to, one list after the other. Readable (see :meth:`fileno`) when a list is done."""

    def __init__(self) -> None:
        self._done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lists: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()
        #: Nanoseconds that each touch took, in their order.
        self.waits = array.array("Q")
        self._thread = threading.Thread(target=self._run, name="trimig.touch", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """A descriptor that becomes readable when a list was touched."""
        return self._done

    def ask(self, addresses: Sequence[int]) -> None:
        """Touch these addresses, in this order."""
        self._lists.put(addresses)

    def finished(self) -> int:
        """How many lists were done since the last call."""
        try:
            return os.eventfd_read(self._done)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """End the thread: no page may be missing any more, or this waits for it."""
        self._lists.put(None)
        self._thread.join()
        os.close(self._done)

    def _run(self) -> None:
        word = ctypes.create_string_buffer(8)
        here = ctypes.addressof(word)
        while (addresses := self._lists.get()) is not None:
            for address in addresses:
                began = time.perf_counter_ns()
                _memmove(here, address, 8)
                self.waits.append(time.perf_counter_ns() - began)
            if len(self.waits) > MAX_WAITS:
                del self.waits[: len(self.waits) - MAX_WAITS]
            os.eventfd_write(self._done, 1)
