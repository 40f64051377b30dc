"""A process that writes the pages it is told to, and its dirty tracker."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np

from trimig.memory import MemfdBlock, TrackedRange, UffdTracker

CHILD = """
import mmap, os, socket, sys
import numpy as np
from trimig.memory import linux
control = socket.socket(fileno=int(sys.argv[1]))
memory = mmap.mmap(int(sys.argv[2]), int(sys.argv[3]))
words = np.frombuffer(memory, np.uint64).reshape(-1, 512)
uffd = linux.open_userfaultfd()
socket.send_fds(control, [str(words.ctypes.data).encode()], [uffd])
os.close(uffd)
while request := control.recv(65536):
    if request == b"loop":                       # writes until the next request, and counts
        control.setblocking(False)
        count = 0
        rng = np.random.default_rng(5)
        while True:
            for page in rng.integers(0, len(words), 64).tolist():
                count += 1
                words[page, 511] = count
            try:
                control.recv(1)
                break
            except BlockingIOError:
                pass
        control.setblocking(True)
    else:
        words[np.frombuffer(request, np.int64), 0] += 1
    control.send(b"k")
"""


class Writer:
    """A process that writes the pages it is told to, through its own mapping."""

    def __init__(self, ram: MemfdBlock) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(theirs.fileno()), str(ram.fd), str(ram.length)],
                pass_fds=(theirs.fileno(), ram.fd),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        data, fds, _, _ = socket.recv_fds(self.control, 100, 1)
        self.tracker = UffdTracker(
            [TrackedRange(name="ram", address=int(data), pages=len(ram.pages))], pid=self.process.pid, uffd=fds[0]
        )

    async def write(self, pages: list[int]) -> None:
        self.control.send(np.array(pages, dtype=np.int64).tobytes())
        assert self.control.recv(1) == b"k"

    def close(self) -> None:
        self.tracker.stop()
        self.control.close()
        assert self.process.wait(10) == 0
