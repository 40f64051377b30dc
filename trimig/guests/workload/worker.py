"""The worker process of a :class:`trimig.guests.workload.guest.WorkloadGuest`: ``python -m trimig.guests.workload.worker``.

It runs the workload of :mod:`trimig.guests.workload.state` on memory that it shares with its host process, and serves
the host's requests over a socket (protocol/worker.md). It uses one thread and no trio: writes are made in batches of at
most a few hundred microseconds, and requests are served between batches, so a pause is always between two writes. While
pages are missing (postcopy) a second thread touches the pages of a batch first, and requests are answered while that
thread sleeps (:mod:`.faults`).

The worker never outlives its host: it ends at the end of file on the socket, and the kernel kills it when the thread
that started it ends.
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
import time
from typing import Final

import numpy as np

from ...guest import PAGE_SIZE
from ...memory.linux import MemoryUnavailable, open_userfaultfd
from ..worker.line import HOST_VARIABLE, SOCKET_VARIABLE
from ..worker.messages import MAX_PACKET, VERSION, WorkerReply, WorkerRequest, decimal, encode_reply, parse_request
from .faults import FaultThread
from .state import BATCH, WORDS_PER_PAGE, Verification, Words, WorkloadState, initialise, pages_of_writes, verify, write

_PR_SET_PDEATHSIG: Final = 1
#: Seconds for which the workload catches up with late writes; older arrears are dropped.
_MAX_ARREARS: Final = 0.05
#: Milliseconds between two readings of the clock.
_TICK: Final = 1


class RequestRefused(Exception):
    """The request cannot be served; the error's text is the reply, and the worker goes on."""


#: Nanoseconds. A touch that takes longer has waited at least for another process. A touch of a present page takes one
#: or two thousand nanoseconds, or some tens of thousands if the thread is preempted meanwhile.
WAITED: Final = 60_000


class Pacer:
    """Computes the number of due writes. Time is an argument, in seconds."""

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
        """Number of writes to make now. Arrears above a limit are dropped, so that no burst follows a stall."""
        due = int((now - self._since) * self._rate) - self._made
        limit = int(_MAX_ARREARS * self._rate) + 1
        if due > limit:
            self._made += due - limit
            due = limit
        return due

    def made(self, count: int) -> None:
        """Record that *count* writes have been made."""
        self._made += count


class WorkerMain:
    """The state of the worker; one method for each request."""

    def __init__(self) -> None:
        self._words: Words = np.zeros((0, WORDS_PER_PAGE), dtype=np.uint64)
        self._state: WorkloadState | None = None
        self._running = False
        self._throttle = 0
        self._pacer = Pacer()
        #: Not None while pages may be missing. The next two: the pages that were touched, and the page that is being
        #: touched.
        self.fault_thread: FaultThread | None = None
        self._touched = np.zeros(0, np.bool_)
        self._awaited: int | None = None

    def tick(self) -> int | None:
        """Make the due writes, at most one batch; returns the milliseconds until the next work (None: no work)."""
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
        """Number of writes that can be made without touching a missing page; None if the first page is missing and
        being touched.
        """
        if self.fault_thread is None:
            return count
        if self._awaited is not None:
            if not self.fault_thread.finished():
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
        self.fault_thread.ask([int(self._words.ctypes.data) + self._awaited * PAGE_SIZE])
        return None

    def handle(self, request: WorkerRequest) -> tuple[WorkerReply, list[int]]:
        """The reply to *request* and the descriptors to send with it (which are then closed here)."""
        out: list[int] = []
        words: tuple[str, ...] = ()
        body = b""
        try:
            match request.verb, request.words:
                case "hello", _:
                    words = (str(VERSION), "track", "missing", "throttle")
                case "ram", (fd, length):
                    words = (str(self.ram(decimal(fd), decimal(length))),)
                case "create", ():
                    self.create(WorkloadState.unpack(request.body))
                case "load", ():
                    self.load(WorkloadState.unpack(request.body))
                case "save", ():
                    body = self.save().pack()
                case "pause", ():
                    self._running = False
                case "resume", ():
                    self.resume()
                case "throttle", (percent,):
                    self._throttle = decimal(percent)
                    self._repace()
                case "track", (features,):
                    out = [self.userfaultfd(decimal(features))]
                case "missing", (features,):
                    out = [self.missing(decimal(features))]
                case "whole", ():
                    times = self.whole()
                    words, body = (str(round(times["blocked"])),), json.dumps(times).encode()
                case "x-verify", ():
                    body = json.dumps(dataclasses.asdict(self.verify())).encode()
                case "x-stats", ():
                    body = json.dumps(self.stats()).encode()
                case "ping", ():
                    pass
                case verb, rest:
                    raise RequestRefused(f"{' '.join((verb, *rest))!r} is no request of this worker")
        except RequestRefused as exc:
            return WorkerReply(request.number, str(exc)), []
        return WorkerReply(request.number, None, words, body), out

    def ram(self, fd: int, length: int) -> int:
        """Map the shared memory; returns its address."""
        mapping = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        self._words = np.frombuffer(mapping, dtype=np.uint64).reshape(-1, WORDS_PER_PAGE)
        return int(self._words.ctypes.data)

    def userfaultfd(self, features: int) -> int:
        """Make a userfaultfd of this process. The host registers and arms it: the descriptor acts on this process's
        memory.
        """
        try:
            return open_userfaultfd(features)
        except MemoryUnavailable as exc:
            raise RequestRefused(exc.strerror or str(exc)) from exc

    def missing(self, features: int) -> int:
        """Make a userfaultfd for missing pages; from now on pages are touched before they are written."""
        if self._running:
            raise RequestRefused("the guest runs")
        # A userfaultfd for faults of user code is enough, because no system call of this process touches the memory.
        fd = self.userfaultfd(features)
        self._touched = np.zeros(len(self._words), np.bool_)
        if self.fault_thread is None:
            self.fault_thread = FaultThread()
        return fd

    def whole(self) -> dict[str, float]:
        """End postcopy: no page is missing any more. Returns the times of the touches, in nanoseconds."""
        if self.fault_thread is None:
            raise RequestRefused("no page was missing")
        self.fault_thread.close()
        touches = np.frombuffer(self.fault_thread.waits, np.uint64)
        waits = touches[touches > WAITED]
        self.fault_thread, self._awaited = None, None
        return {
            "touches": len(touches),
            "waits": len(waits),
            "median": float(np.median(waits)) if len(waits) else 0.0,
            "p99": float(np.percentile(waits, 99)) if len(waits) else 0.0,
            "blocked": float(waits.sum()),
        }

    def _all_here(self) -> None:
        if self.fault_thread is not None:
            raise RequestRefused("pages of its memory are missing")

    def create(self, state: WorkloadState) -> None:
        """Fill the memory, which must be zero, as *state* says. The workload does not run yet."""
        self._all_here()
        initialise(state, self._words)
        self._state = state

    def resume(self) -> None:
        """Go on with the next write."""
        if self._state is None:
            raise RequestRefused("there is nothing to run: its state has not been loaded")
        if not self._running:
            self._running = True
            self._repace()

    def save(self) -> WorkloadState:
        """The state. The workload must not run, or the state would be out of date at once."""
        if self._running or self._state is None:
            raise RequestRefused("the guest runs" if self._running else "it has no state yet")
        return self._state

    def load(self, state: WorkloadState) -> None:
        """Take over a state."""
        if self._running:
            raise RequestRefused("the guest runs")
        self._state = state

    def verify(self) -> Verification:
        """Compare all memory with the state. It is done between two writes, so the workload may be running."""
        if self._state is None:
            raise RequestRefused("it has no state yet")
        self._all_here()
        return verify(self._state, self._words)

    def stats(self) -> dict[str, int]:
        """The present activity."""
        writes = 0 if self._state is None else self._state.writes
        waiting = self._running and self._awaited is not None
        return {"writes": writes, "running": self._running, "throttle": self._throttle, "waiting": waiting}

    def _repace(self) -> None:
        if self._state is not None:
            self._pacer.restart(time.monotonic(), self._state.dirty_rate * (100 - self._throttle) / 100)


def serve(control: socket.socket) -> None:
    """Make writes and answer requests until the end of file on *control*."""
    worker = WorkerMain()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    rest = None
    watched: int | None = None
    while True:
        ready = {fd for fd, _ in poll.poll(rest)}
        if control.fileno() in ready:
            data = control.recv(MAX_PACKET)
            if not data:
                return
            reply, out = worker.handle(parse_request(data))
            socket.send_fds(control, [encode_reply(reply)], out)
            for fd in out:
                os.close(fd)
        wanted = worker.fault_thread.fileno() if worker.fault_thread is not None else None
        if wanted != watched:
            if watched is not None:
                poll.unregister(watched)
            if wanted is not None:
                poll.register(wanted, select.POLLIN)
            watched = wanted
        rest = worker.tick()


def main() -> None:
    """Tie the process's life to the host, then call :func:`serve`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host handles Ctrl-C in the terminal
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[HOST_VARIABLE]):  # the host died before PR_SET_PDEATHSIG was set
        return
    with socket.socket(fileno=int(os.environ[SOCKET_VARIABLE])) as control:
        try:
            serve(control)
        except ConnectionError:
            return  # the host ended during the reply


if __name__ == "__main__":
    main()
