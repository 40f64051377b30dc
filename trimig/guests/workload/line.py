"""The control socket to the worker process of a :class:`trimig.guests.workload.guest.WorkloadGuest`: requests and
replies.

No task runs in the background: requests are answered one at a time, and a call reads the socket only while it waits
for its own reply.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from ... import formats
from ...errors import GuestFailed, StateError

_MAX_PACKET: Final = 1 << 16
_MAX_FDS: Final = 4
_FD_SIZE: Final = array("i").itemsize
#: Seconds from the end of file on the control socket to the end of the process.
_DYING: Final = 2.0


class Refusal(GuestFailed):
    """The worker has refused a request."""


class Worker:
    """The worker process and the control socket to it.

    Every request has a number, and replies with other numbers are dropped: if a call is cancelled after its request was
    sent, its reply comes later, and the next call skips it.
    """

    def __init__(self, call_timeout: float) -> None:
        """Start the process. OSError."""
        self._timeout = call_timeout
        self._number = 0
        self._lock = trio.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The worker's error output. A file in memory, so that no task has to read it meanwhile.
        self._stderr = os.memfd_create("trimig-worker-stderr", os.MFD_CLOEXEC)
        root = str(Path(__file__).resolve().parents[3])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            with theirs:
                # Not trio.lowlevel.open_process: it starts the process from a pool thread. The parent-death signal is
                # tied to that thread, which ends when it has been idle for a while.
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "trimig.guests.workload.worker",
                        str(theirs.fileno()),
                        str(os.getpid()),
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    process_group=0,  # Ctrl-C in the terminal goes to the foreground group only
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(paths),
                        "OPENBLAS_NUM_THREADS": "1",  # NumPy's threads are not used, and start slowly
                    },
                )
        except BaseException:
            ours.close()
            os.close(self._stderr)
            raise
        self._socket = trio.socket.from_stdlib_socket(ours)
        self._closed = False

    @property
    def pid(self) -> int:
        """The process id; the process is not reaped before :meth:`close` or its own end."""
        return self._process.pid

    async def call(self, op: str, *, within: float = 0.0, **arguments: Any) -> dict[str, Any]:
        """Make a request and return the reply.

        Args:
            within: seconds beyond the time limit that every call has.

        Raises:
            GuestFailed: the worker refused, died, or did not answer in time.
            StateError: the guest was closed.

        **Cancellation:** the request may have been carried out.
        """
        reply, fds = await self._call(op, (), within, arguments)
        _close_all(fds)
        return reply

    async def call_sending(self, op: str, fds: Sequence[int], *, within: float, **arguments: Any) -> dict[str, Any]:
        """As :meth:`call`, and send the worker duplicates of *fds*."""
        reply, received = await self._call(op, fds, within, arguments)
        _close_all(received)
        return reply

    async def call_receiving(self, op: str) -> int:
        """As :meth:`call`, for a request that is answered with one descriptor, which the caller then owns."""
        _, fds = await self._call(op, (), 0.0, {})
        if len(fds) != 1:
            _close_all(fds)
            raise GuestFailed(f"the worker answered {op!r} with {len(fds)} descriptors instead of one")
        return fds[0]

    def close(self) -> None:
        """Kill and reap the process. Idempotent; takes no longer than the kernel needs to end it."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        self._process.wait()
        self._socket.close()
        os.close(self._stderr)

    async def _call(
        self, op: str, fds: Sequence[int], within: float, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[int]]:
        if self._closed:
            raise StateError("the guest is closed")
        limit = self._timeout + within
        answer: tuple[dict[str, Any], list[int]] | None = None
        cut: Exception | None = None
        try:
            with trio.move_on_after(limit):
                async with self._lock:
                    self._number += 1
                    request = json.dumps({"id": self._number, "op": op, **arguments}).encode()
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
                    await self._socket.sendmsg([request], rights)
                    answer = await self._reply(self._number)
        except (OSError, EOFError, trio.ClosedResourceError) as exc:
            cut = exc
        if cut is not None:
            if self._closed:
                raise StateError("the guest was closed") from cut
            raise GuestFailed(await self._obituary(op)) from cut
        if answer is None:
            raise GuestFailed(
                f"the guest's worker process {self.pid} did not answer {op!r} within {formats.duration(limit)}"
            )
        reply, received = answer
        if "error" in reply:
            _close_all(received)
            raise Refusal(f"the guest's worker process {self.pid} refused {op!r}: {reply['error']}")
        return reply, received

    async def _reply(self, number: int) -> tuple[dict[str, Any], list[int]]:
        while True:
            # A packet is received whole, or not at all if this is cancelled.
            data, ancillary, _, _ = await self._socket.recvmsg(
                _MAX_PACKET, socket.CMSG_SPACE(_MAX_FDS * _FD_SIZE), socket.MSG_CMSG_CLOEXEC
            )
            fds = array("i")
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
            if not data:
                raise EOFError
            reply = json.loads(data)
            if reply["id"] == number:
                return reply, list(fds)
            _close_all(fds)

    async def _obituary(self, op: str) -> str:
        """A sentence on how the worker ended."""
        if self._process.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                with trio.move_on_after(_DYING):
                    await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        status = None if self._closed else self._process.poll()
        if status is None:
            how = "closed its control socket"
        elif status < 0:
            how = f"was killed by signal {-status} ({signal.Signals(-status).name})"
        else:
            how = f"ended with exit status {status}"
        said = b"" if self._closed else os.pread(self._stderr, 4096, max(0, os.fstat(self._stderr).st_size - 4096))
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        return f"the guest's worker process {self.pid} {how} (seen at {op!r}){': ' + last if last else ''}"


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
