"""The worker process of a :class:`trimig.guests.workload.guest.ProcessGuest`: ``python -m trimig.guests.workload.worker FD PARENT``.

It runs the workload of :mod:`trimig.guests.workload.state` on memory that it shares with its host, and does what the host
says over a socket. No trio, and one thread: writes are made in batches of at most a few hundred microseconds, and
requests are looked at between batches, so a pause always falls between two writes. While pages are missing (postcopy) a
second thread touches the pages of a batch first, and requests are answered although it sleeps (:mod:`.touching`).

It never outlives its host: it ends at the end of file on the socket, and the kernel kills it when the thread that
started it ends.

Requests and replies are JSON objects, one to a packet (SOCK_SEQPACKET). A request has ``id`` and ``op`` (a method
``do_<op>`` below, the other members are its arguments); its reply has the same ``id`` and either results or
``error``, a sentence. Descriptors travel with the packet.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Final

import numpy as np

from ...guest import PAGE_SIZE
from ...memory.faults import FEATURES as FAULT_FEATURES
from ...memory.linux import TRACKING_FEATURES, MemoryUnavailable, open_userfaultfd
from .faults import Toucher
from .state import BATCH, WORDS_PER_PAGE, Words, WorkloadState, initialise, pages_of_writes, verify, write

#: No packet is longer.
MAX_PACKET: Final = 1 << 16
_PR_SET_PDEATHSIG: Final = 1
#: How long the workload tries to catch up with what it could not write in time; older arrears are forgotten.
_MAX_ARREARS: Final = 0.05
#: Milliseconds between two looks at the clock.
_TICK: Final = 1


class RequestRefused(Exception):
    """The request cannot be met; its text is the reply, and the worker goes on."""


#: Nanoseconds. A touch that takes longer had to wait for another process at least; one that finds its page takes one or
#: two thousand, some tens of thousands if the processor is taken away meanwhile.
WAITED: Final = 60_000


class Pacer:
    """How many writes are due. Time is an argument, in seconds."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._since = 0.0
        self._made = 0

    def restart(self, now: float, bytes_per_second: float) -> None:
        """Count from *now* on, at this rate."""
        self._rate = bytes_per_second / (WORDS_PER_PAGE * 8)
        self._since = now
        self._made = 0

    def due(self, now: float) -> int:
        """Writes to make now. Arrears beyond a limit are dropped, so that a stall is not followed by a burst."""
        due = int((now - self._since) * self._rate) - self._made
        limit = int(_MAX_ARREARS * self._rate) + 1
        if due > limit:
            self._made += due - limit
            due = limit
        return due

    def made(self, count: int) -> None:
        """*count* of them have been made."""
        self._made += count


class WorkerMain:
    """The state of the worker; one method for each request."""

    def __init__(self) -> None:
        self._words: Words = np.zeros((0, WORDS_PER_PAGE), dtype=np.uint64)
        self._state: WorkloadState | None = None
        self._running = False
        self._throttle = 0
        self._pacer = Pacer()
        #: There while pages may be missing; then the pages that were touched, and the one that is being touched.
        self.toucher: Toucher | None = None
        self._touched = np.zeros(0, np.bool_)
        self._awaited: int | None = None

    def tick(self) -> int | None:
        """Write what is due, one batch at most; returns for how many milliseconds there is nothing to do (None: ever)."""
        if self._state is None or not self._running or not self._state.dirty_rate:
            return None
        due = self._pacer.due(time.monotonic())
        before = self._state.writes
        batch = self._present(self._state, min(due, BATCH))
        if batch is None:
            return None
        self._state = write(self._state, self._words, batch)
        made = self._state.writes - before
        self._pacer.made(made)
        return _TICK if made == due else 0

    def _present(self, state: WorkloadState, count: int) -> int | None:
        """How many writes can be made without touching a missing page; None: not one, and it is being touched."""
        if self.toucher is None:
            return count
        if self._awaited is not None:
            if not self.toucher.finished():
                return None
            self._touched[self._awaited] = True
            self._awaited = None
        count = min(count, state.hot_pages)
        if not count:
            return 0
        pages = pages_of_writes(state, state.writes + 1, count)
        absent = ~self._touched[pages]
        if not absent.any():
            return count
        ready = int(absent.argmax())
        if ready:
            return ready
        self._awaited = int(pages[0])
        self.toucher.ask([int(self._words.ctypes.data) + self._awaited * PAGE_SIZE])
        return None

    def handle(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """The reply to *request* and the descriptors to send with it (which are then closed here)."""
        arguments = {key: value for key, value in request.items() if key not in ("id", "op")}
        out: list[int] = []
        try:
            if request["op"] == "attach":
                result = self.attach(fds[0], **arguments)
            elif request["op"] == "uffd":
                result, out = {}, [self.userfaultfd(TRACKING_FEATURES)]
            elif request["op"] == "missing":
                result, out = {}, [self.missing()]
            else:
                result = getattr(self, f"do_{request['op']}")(**arguments)
        except RequestRefused as exc:
            result = {"error": str(exc)}
        return {"id": request["id"], **result}, out

    def attach(self, fd: int, length: int) -> dict[str, Any]:
        """Map the shared memory; tell where, and whether its writes can be tracked (``untracked`` says why not)."""
        mapping = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        self._words = np.frombuffer(mapping, dtype=np.uint64).reshape(-1, WORDS_PER_PAGE)
        untracked = None
        try:
            os.close(open_userfaultfd())
        except MemoryUnavailable as exc:
            untracked = exc.strerror
        return {"address": int(self._words.ctypes.data), "untracked": untracked}

    def userfaultfd(self, features: int) -> int:
        """A new userfaultfd of this process. The host registers and arms it: the descriptor carries our memory."""
        try:
            return open_userfaultfd(features)
        except MemoryUnavailable as exc:
            raise RequestRefused(exc.strerror or str(exc)) from exc

    def missing(self) -> int:
        """A userfaultfd for pages that are not here yet; from now on they are touched before they are written."""
        if self._running:
            raise RequestRefused("the guest runs")
        # One that only sees faults of user code will do: no system call of ours touches the memory.
        fd = self.userfaultfd(FAULT_FEATURES)
        self._touched = np.zeros(len(self._words), np.bool_)
        if self.toucher is None:
            self.toucher = Toucher()
        return fd

    def do_whole(self) -> dict[str, Any]:
        """No page is missing any more. Answers how long the touches took."""
        if self.toucher is None:
            raise RequestRefused("no page was missing")
        self.toucher.close()
        touches = np.frombuffer(self.toucher.waits, np.uint64)
        waits = touches[touches > WAITED]
        self.toucher, self._awaited = None, None
        return {
            "touches": len(touches),
            "waits": len(waits),
            "median": float(np.median(waits)) if len(waits) else 0.0,
            "p99": float(np.percentile(waits, 99)) if len(waits) else 0.0,
            "blocked": float(waits.sum()),
        }

    def _all_here(self) -> None:
        if self.toucher is not None:
            raise RequestRefused("pages of its memory are missing")

    def do_initialise(self, state: dict[str, int]) -> dict[str, Any]:
        """Fill the memory, which must be zero, and begin with no write made. Does not run yet."""
        self._all_here()
        fresh = WorkloadState(**state)
        initialise(fresh, self._words)
        self._state = fresh
        return {}

    def do_pause(self) -> dict[str, Any]:
        """No write is made after the reply."""
        self._running = False
        return {}

    def do_resume(self) -> dict[str, Any]:
        """Go on with the next write."""
        if self._state is None:
            raise RequestRefused("there is nothing to run: its state has not been loaded")
        if not self._running:
            self._running = True
            self._repace()
        return {}

    def do_throttle(self, percent: int) -> dict[str, Any]:
        """Make only (100 - *percent*) % of the writes."""
        self._throttle = percent
        self._repace()
        return {}

    def do_save(self) -> dict[str, Any]:
        """The journal; of a guest that does not run only, or it would be out of date at once."""
        if self._running or self._state is None:
            raise RequestRefused("the guest runs" if self._running else "it has no state yet")
        return {"state": dataclasses.asdict(self._state)}

    def do_load(self, state: dict[str, int]) -> dict[str, Any]:
        """Take a journal over."""
        if self._running:
            raise RequestRefused("the guest runs")
        self._state = WorkloadState(**state)
        return {}

    def do_verify(self) -> dict[str, Any]:
        """Compare all memory with the journal. Between two writes, so the guest may be running."""
        if self._state is None:
            raise RequestRefused("it has no state yet")
        self._all_here()
        return dataclasses.asdict(verify(self._state, self._words))

    def do_stats(self) -> dict[str, Any]:
        """What it does at present."""
        writes = 0 if self._state is None else self._state.writes
        waiting = self._running and self._awaited is not None
        return {"writes": writes, "running": self._running, "throttle": self._throttle, "waiting": waiting}

    def _repace(self) -> None:
        if self._state is not None:
            self._pacer.restart(time.monotonic(), self._state.dirty_rate * (100 - self._throttle) / 100)


def serve(control: socket.socket) -> None:
    """Work and answer until the end of file on *control*."""
    worker = WorkerMain()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    rest = None
    watched: int | None = None
    while True:
        ready = {fd for fd, _ in poll.poll(rest)}
        if control.fileno() in ready:
            data, fds, _, _ = socket.recv_fds(control, MAX_PACKET, 1)
            if not data:
                return
            reply, out = worker.handle(json.loads(data), fds)
            socket.send_fds(control, [json.dumps(reply).encode()], out)
            for fd in out:
                os.close(fd)
        wanted = worker.toucher.fileno() if worker.toucher is not None else None
        if wanted != watched:
            if watched is not None:
                poll.unregister(watched)
            if wanted is not None:
                poll.register(wanted, select.POLLIN)
            watched = wanted
        rest = worker.tick()


def main() -> None:
    """Set up the ties to the host, then :func:`serve`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the host to deal with
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[2]):  # it died before we could ask to be told
        return
    with socket.socket(fileno=int(sys.argv[1])) as control:
        try:
            serve(control)
        except ConnectionError:
            return  # the host went away while we answered


if __name__ == "__main__":
    main()
