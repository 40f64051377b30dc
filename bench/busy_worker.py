"""The worker process of the busy guest in trimig: ``python -m bench.busy_worker``.

It speaks the worker protocol (protocol/worker.md) and uses one thread. A tick is made late if a request is served
meanwhile, and more than one tick is made up for, as a timer does that injects its lost ticks.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import select
import socket
import time
from typing import Final

import numpy as np

from bench.busy import TICKS_PER_SECOND, Workload
from bench.memory import Pages, as_pages
from trimig.guests.worker.line import SOCKET_VARIABLE
from trimig.guests.worker.messages import (
    MAX_PACKET,
    VERSION,
    WorkerReply,
    WorkerRequest,
    decimal,
    encode_reply,
    parse_request,
)
from trimig.memory.linux import MemoryUnavailable, open_userfaultfd

_TICK: Final = 1 / TICKS_PER_SECOND
#: Ticks that are made up for at most.
_LATE: Final = 10


class BusyWorker:
    """The state of the worker."""

    def __init__(self) -> None:
        self._pages: Pages | None = None
        self._workload: Workload | None = None
        self._made = 0
        self._next: float | None = None
        self._throttle = 0

    def rest(self) -> float | None:
        """Seconds until the next tick; None while the guest does not run."""
        return None if self._next is None else max(0.0, self._next - time.monotonic())

    def tick(self) -> None:
        """Make the writes of one tick, if it is due."""
        if self._next is None or self._workload is None or self._pages is None:
            return
        now = time.monotonic()
        if now < self._next:
            return
        count = self._workload.per_tick * (100 - self._throttle) // 100
        self._pages.view(np.uint32)[self._workload.indices(self._made, count), 0] += 1
        self._made += count
        self._next = max(self._next + _TICK, now - _LATE * _TICK)

    def handle(self, request: WorkerRequest) -> tuple[WorkerReply, list[int]]:
        """The reply, and the descriptors that go with it."""
        out: list[int] = []
        words: tuple[str, ...] = ()
        body = b""
        match request.verb, request.words:
            case "hello", _:
                words = (str(VERSION), "track", "throttle")
            case "ram", (fd, length):
                words = (str(self._map(decimal(fd), decimal(length))),)
            case "create", ():
                self._load(request.body, fill=True)
            case "load", ():
                self._load(request.body)
            case "save", ():
                body = self._save()
            case "pause", ():
                self._next = None
            case "resume", ():
                self._next = time.monotonic() if self._next is None else self._next
            case "throttle", (percent,):
                self._throttle = decimal(percent)
            case "track", (features,):
                try:
                    out = [open_userfaultfd(decimal(features))]
                except MemoryUnavailable as exc:
                    return WorkerReply(request.number, exc.strerror or str(exc)), []
            case (("ping" | "quit"), ()):
                pass
            case verb, _:
                return WorkerReply(request.number, f"{verb!r} is no request of this worker"), []
        return WorkerReply(request.number, None, words, body), out

    def _map(self, fd: int, length: int) -> int:
        pages = as_pages(mmap.mmap(fd, length))
        os.close(fd)
        self._pages = pages
        return int(pages.ctypes.data)

    def _load(self, state: bytes, *, fill: bool = False) -> None:
        settings = json.loads(state)
        self._made = settings.pop("made")
        self._workload = Workload(**settings)
        if fill and self._pages is not None:
            self._workload.fill(self._pages)

    def _save(self) -> bytes:
        assert self._workload is not None, "trimig saves no worker that was not created"
        return json.dumps({"made": self._made, **dataclasses.asdict(self._workload)}).encode()


def serve(control: socket.socket) -> None:
    """Make writes and answer requests, until the end of file on *control* or ``quit``."""
    worker, verb = BusyWorker(), ""
    while verb != "quit":
        if select.select([control], [], [], worker.rest())[0]:
            if not (packet := control.recv(MAX_PACKET)):
                return
            request = parse_request(packet)
            verb = request.verb
            reply, out = worker.handle(request)
            socket.send_fds(control, [encode_reply(reply)], out)
            for fd in out:
                os.close(fd)
        worker.tick()


def main() -> None:
    with socket.socket(fileno=int(os.environ[SOCKET_VARIABLE])) as control:
        serve(control)


if __name__ == "__main__":
    main()
