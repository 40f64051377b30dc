"""The processes of ``trimig demo``: one host each, the line to it, and that nothing of them is left behind."""

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

from .host import MAX_PACKET

#: Seconds that a host may take to end when it is asked to, and a killed process to be gone.
_ENDING: Final = 3.0
_PR_SET_CHILD_SUBREAPER: Final = 36

Message = dict[str, Any]


class HostProcess:
    """One host process, and the line to it."""

    def __init__(self) -> None:
        """Start it. OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(trimig.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            with theirs:
                # From the main thread: the signal that ends the host with us is tied to the thread that starts it.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "trimig.cli.demo.host", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C in the terminal is for us to deal with
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
                )
        except BaseException:
            ours.close()
            raise
        self._socket = ours  # closed through this one, because trio's refuses to be closed outside of trio
        self._control = trio.socket.from_stdlib_socket(ours)
        self._gone = trio.Event()
        self.pid = self._process.pid
        #: How it ended, once it has.
        self.ended: str | None = None
        self.worker_died = False
        #: The last answer to a request.
        self.report: Message | None = None

    def forget(self) -> None:
        """The last answer is about something else."""
        self.report = None

    async def ask(self, op: str, **arguments: Any) -> None:
        """Send a request. That the host is gone is noticed where its reports are read."""
        if op not in ("cancel", "peer-ended", "quit"):
            self.report = None
        with contextlib.suppress(OSError):
            await self._control.send(json.dumps({"op": op, **arguments}).encode())

    async def read(self, inbox: trio.MemorySendChannel[tuple[HostProcess, Message]]) -> None:
        """Pass everything that it reports on to *inbox*; at the end ``{"event": "gone"}``."""
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
        """Kill it if it is still there, reap it, and tell how it ended."""
        if self.ended is None:
            self._process.kill()
            status = self._process.wait()
            if status < 0:
                self.ended = f"was killed by signal {-status} ({signal.Signals(-status).name})"
            else:
                self.ended = f"ended with exit status {status}"
        return self.ended

    async def quit(self) -> None:
        """Ask it to end, and wait for that."""
        if self.ended is None:
            await self.ask("quit")
            with trio.move_on_after(_ENDING):
                await self._gone.wait()

    def close(self) -> None:
        """Leave nothing behind of it; what its own children were is dealt with by :func:`reap_descendants`."""
        self.kill_and_reap()
        self._socket.close()


@contextlib.contextmanager
def reap_descendants() -> Iterator[None]:
    """Whatever the processes leave behind that are started within becomes a child of this one, and is ended here.

    A worker dies with its host; but one that has just been started takes a moment until it has found out.
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
