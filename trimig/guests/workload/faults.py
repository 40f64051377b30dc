"""A thread that touches pages for a worker: only this thread sleeps when a page is missing.

A thread that touches a missing page sleeps in the kernel. If the thread holds Python's global lock, the whole process
sleeps with it, and the worker could not even be paused. So a call that has released the lock touches the pages of the
next writes, and the worker writes the pages when they are present. A virtual processor of a guest waits in the same
way.
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

# A function of CDLL runs without the global lock; a function of PyDLL would hold it.
_memmove: Final = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

#: Number of waits that are kept; the oldest are dropped.
MAX_WAITS: Final = 100_000


class FaultThread:
    """Touches lists of addresses, one list after the other. Readable (see :meth:`fileno`) when a list is done."""

    def __init__(self) -> None:
        self._done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lists: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()
        #: Nanoseconds that each touch took, in order.
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
        """Number of lists that were done since the last call."""
        try:
            return os.eventfd_read(self._done)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """End the thread. No page may be missing any more, otherwise this call waits for the page."""
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
