"""The host processes of ``trimig demo``: starts them, exchanges messages with them, and leaves no process behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import trio

import trimig

from .messages import MAX_PACKET

#: Seconds that a host may take to end on request, and a killed process to be gone.
_ENDING: Final = 3.0
_PR_SET_CHILD_SUBREAPER: Final = 36

Message = dict[str, Any]


class HostProcess:
    """One host process and the socket to it."""

    def __init__(self) -> None:
        """Start it. OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(trimig.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            with theirs:
                # From the main thread: the kernel kills the host when the thread that started it ends.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "trimig.cli.demo.host", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # this process handles Ctrl-C in the terminal
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
                )
        except BaseException:
            ours.close()
            raise
        self._socket = ours  # closed through this one, because trio's socket cannot be closed outside of trio
        self._control = trio.socket.from_stdlib_socket(ours)
        self._gone = trio.Event()
        self.pid = self._process.pid
        #: How the process ended, once it has ended.
        self.ended: str | None = None
        self.worker_died = False
        #: The last answer to a request.
        self.report: Message | None = None

    def forget(self) -> None:
        """Forget the last answer: it belongs to an earlier request."""
        self.report = None

    def answered(self, message: Message) -> None:
        """Store the answer to the last request."""
        self.report = message

    def lose_worker(self) -> None:
        """Record that the worker of this host has died."""
        self.worker_died = True

    async def ask(self, op: str, **arguments: Any) -> None:
        """Send a request. A dead host is noticed by the task that reads its reports."""
        if op not in ("cancel", "peer-ended", "quit"):
            self.report = None
        with contextlib.suppress(OSError):
            await self._control.send(json.dumps({"op": op, **arguments}).encode())

    async def read(self, inbox: trio.MemorySendChannel[tuple[HostProcess, Message]]) -> None:
        """Pass all reports of the host on to *inbox*; at the end ``{"event": "gone"}``."""
        with contextlib.suppress(OSError):
            while packet := await self._control.recv(MAX_PACKET):
                message = json.loads(packet)
                await inbox.send((self, message))
        pidfd = os.pidfd_open(self.pid)
        try:
            with trio.move_on_after(_ENDING):
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        self._gone.set()
        await inbox.send((self, {"event": "gone"}))

    def kill_and_reap(self) -> str:
        """Kill the process if it still runs, reap it, and say how it ended."""
        if self.ended is None:
            self._process.kill()
            status = self._process.wait()
            if status < 0:
                self.ended = f"was killed by signal {-status} ({signal.Signals(-status).name})"
            else:
                self.ended = f"ended with exit status {status}"
        return self.ended

    async def quit(self) -> None:
        """Ask the host to end, and wait for its end."""
        if self.ended is None:
            await self.ask("quit")
            with trio.move_on_after(_ENDING):
                await self._gone.wait()

    def close(self) -> None:
        """End the process; :func:`reap_descendants` ends the children of the process."""
        self.kill_and_reap()
        self._socket.close()


@contextlib.contextmanager
def reap_descendants() -> Iterator[None]:
    """Make this process the parent of orphaned descendants that start within the block, and end them at its end.

    A worker dies with its host, but a worker that has just been started notices that a moment later.
    """
    prctl = ctypes.CDLL(None).prctl
    before = _children()
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for pid in _children() - before:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found
