"""A worker process and the control socket to it: requests and replies.

Requests are answered one at a time, and a call reads the socket only while it waits for its own reply. One task in the
background keeps the end of what the worker writes to its standard error.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from array import array
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from ... import formats
from ...errors import GuestFailed, StateError
from .messages import (
    MAX_PACKET,
    MOST_QUOTED,
    Nonsense,
    WorkerReply,
    WorkerRequest,
    encode_request,
    parse_reply,
    quoted,
)

#: The environment variables of a worker: the number of its control socket, and the process id of its host.
SOCKET_VARIABLE: Final = "TRIMIG_WORKER_SOCKET"
HOST_VARIABLE: Final = "TRIMIG_WORKER_HOST"

_MAX_FDS: Final = 4
_FD_SIZE: Final = array("i").itemsize
#: Seconds from the end of file on the control socket to the end of the process.
_DYING: Final = 2.0
_SIGNALS: Final = {number.value: number.name for number in signal.Signals}
#: Bytes of the worker's standard error that are kept.
_KEPT: Final = 4096


class Refusal(GuestFailed):
    """The worker has refused a request."""


class LastWords:
    """The end of what a process writes to its standard error."""

    def __init__(self) -> None:
        """Make the pipe. OSError."""
        self._read, self.write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        self._text = b""

    async def keep(self) -> None:
        """Read until the end of file, or until :meth:`close`.

        **Cancellation:** what was read is kept.
        """
        try:
            while self._take():
                await trio.lowlevel.wait_readable(self._read)
        except trio.ClosedResourceError:
            return

    def line(self) -> str:
        """The last line, at most :data:`MOST_QUOTED` characters."""
        self._take()
        last = self._text.decode(errors="replace").strip().rpartition("\n")[2]
        return last if len(last) <= MOST_QUOTED else f"…{last[-MOST_QUOTED:]}"

    def started(self) -> None:
        """Close this side's copy of the writing end, after the process has inherited it."""
        os.close(self.write)
        self.write = -1

    def close(self) -> None:
        """Close the pipe. Idempotent."""
        if self._read >= 0:
            trio.lowlevel.notify_closing(self._read)
            os.close(self._read)
            self._read = -1
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def _take(self) -> bool:
        """Read the available bytes, at most the size of a pipe, so that endless output is no endless loop. False at the end."""
        for _ in range(16):
            if self._read < 0:
                return False
            try:
                part = os.read(self._read, _KEPT)
            except BlockingIOError:
                return True
            if not part:
                return False
            self._text = (self._text + part)[-_KEPT:]
        return True


class Worker:
    """The worker process and the control socket to it.

    Every request has a number, and replies to earlier requests are dropped: if a call is cancelled after its request
    was sent, its reply comes later, and the next call skips it.

    Args:
        argv: the program and its arguments.
        keep: descriptors that the process inherits under the same numbers.
        env: the environment; None for this process's own. The variables of the protocol are added.
        cwd: the working directory; None for this process's own.
        call_timeout: seconds after which a worker that does not answer is a GuestFailed.

    Raises:
        OSError: the process could not be started.
    """

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        keep: Sequence[int],
        env: Mapping[str, str] | None,
        cwd: str | os.PathLike[str] | None,
        call_timeout: float,
    ) -> None:
        self._timeout = call_timeout
        self._number = 0
        self._lock = trio.Lock()
        self._last_words = LastWords()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        variables = {SOCKET_VARIABLE: str(theirs.fileno()), HOST_VARIABLE: str(os.getpid())}
        try:
            with theirs:
                # Not trio.lowlevel.open_process: it starts the process from a pool thread. The parent-death signal is
                # tied to that thread, which ends when it has been idle for a while.
                self._process = subprocess.Popen(
                    argv,
                    pass_fds=[theirs.fileno(), *keep],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._last_words.write,
                    process_group=0,  # Ctrl-C in the terminal goes to the foreground group only
                    env={**(os.environ if env is None else env), **variables},
                    cwd=cwd,
                )
        except BaseException:
            ours.close()
            self._last_words.close()
            raise
        self._last_words.started()
        self._socket = trio.socket.from_stdlib_socket(ours)
        self._closed = False
        self._ending = False
        self._death: str | None = None
        trio.lowlevel.spawn_system_task(self._last_words.keep, name="trimig.worker.stderr")

    @property
    def pid(self) -> int:
        """The process id; the process is not reaped before :meth:`close`."""
        return self._process.pid

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    async def call(self, verb: str, *words: object, body: bytes = b"", within: float = 0.0) -> WorkerReply:
        """Make a request and return the reply.

        Args:
            words: the words behind the verb.
            within: seconds beyond the time limit that every call has.

        Raises:
            GuestFailed: the worker refused, died, did not answer in time, or answered nonsense.
            StateError: the guest was closed.

        **Cancellation:** the request may have been carried out.
        """
        reply, fds = await self._call(verb, words, body, within)
        _close_all(fds)
        return reply

    async def call_receiving(self, verb: str, *words: object) -> int:
        """As :meth:`call`, for a request that is answered with one descriptor, which the caller then owns."""
        _, fds = await self._call(verb, words, b"", 0.0)
        if len(fds) != 1:
            _close_all(fds)
            raise self.nonsense(verb, f"{len(fds)} descriptors instead of one")
        return fds[0]

    def nonsense(self, verb: str, what: object) -> GuestFailed:
        """The error for a reply that makes no sense."""
        return GuestFailed(f"the guest's worker process {self.pid} answered {verb!r} with {what}")

    @property
    def death(self) -> str | None:
        """How the process has ended, if it was not to end; None as long as it lives."""
        if self._death is None and not self._closed and not self._ending and self._status() is not None:
            last = self._last_words.line()
            self._death = f"process {self.pid} {self._end()}{': ' + last if last else ''}"
        return self._death

    def may_end(self) -> None:
        """From now on the end of the process is no death."""
        self._ending = self.death is None

    async def ended(self) -> None:
        """Return when the process has ended.

        **Cancellation:** no effect.
        """
        if self._closed:
            return
        pidfd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """Kill the process with its process group, and reap it. Idempotent; takes no longer than the kernel needs."""
        if self._closed:
            return
        self.may_end()
        self._closed = True
        if self._process.returncode is None:
            # The process is not reaped yet, so no other process or group can have its number.
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        self._last_words.close()

    async def _call(
        self, verb: str, words: Sequence[object], body: bytes, within: float
    ) -> tuple[WorkerReply, list[int]]:
        if self._closed:
            raise StateError("the guest is closed")
        limit = self._timeout + within
        answer: tuple[WorkerReply, list[int]] | None = None
        cut: Exception | None = None
        try:
            with trio.move_on_after(limit):
                async with self._lock:
                    self._number += 1
                    request = WorkerRequest(self._number, verb, tuple(map(str, words)), body)
                    await self._socket.send(encode_request(request))
                    answer = await self._reply(self._number)
        except Nonsense as exc:
            raise self.nonsense(verb, exc) from exc
        except (OSError, EOFError, trio.ClosedResourceError) as exc:
            cut = exc
        if cut is not None:
            if self._closed:
                raise StateError("the guest was closed") from cut
            raise GuestFailed(await self._obituary(verb)) from cut
        if answer is None:
            raise GuestFailed(
                f"the guest's worker process {self.pid} did not answer {verb!r} within {formats.duration(limit)}"
            )
        reply, received = answer
        if reply.refused is not None:
            _close_all(received)
            raise Refusal(f"the guest's worker process {self.pid} refused {verb!r}: {quoted(reply.refused)[1:-1]}")
        return reply, received

    async def _reply(self, number: int) -> tuple[WorkerReply, list[int]]:
        while True:
            # A packet is received whole, or not at all if this is cancelled.
            data, ancillary, flags, _ = await self._socket.recvmsg(
                MAX_PACKET, socket.CMSG_SPACE(_MAX_FDS * _FD_SIZE), socket.MSG_CMSG_CLOEXEC
            )
            fds = array("i")
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
            if not data:
                _close_all(fds)
                raise EOFError
            try:
                if flags & socket.MSG_TRUNC:
                    raise Nonsense(f"a packet of more than {MAX_PACKET} bytes")
                reply = parse_reply(data)
                if reply.number > number:
                    raise Nonsense(f"the number {reply.number}, which no request has had")
            except Nonsense:
                _close_all(fds)
                raise
            if reply.number == number:
                return reply, list(fds)
            _close_all(fds)

    async def _obituary(self, verb: str) -> str:
        """A sentence on how the worker ended."""
        with trio.move_on_after(_DYING):
            await self.ended()
        how = self._end()
        last = self._last_words.line()
        return f"the guest's worker process {self.pid} {how} (seen at {verb!r}){': ' + last if last else ''}"

    def _status(self) -> os.waitid_result | None:
        # WNOWAIT: the process stays a zombie, because close() needs its number.
        if self._closed:
            return None
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # it was reaped elsewhere in this process
            return None

    def _end(self) -> str:
        end = self._status()
        if end is None:
            return "closed its control socket"
        if end.si_code == os.CLD_EXITED:
            return f"ended with exit status {end.si_status}"
        name = _SIGNALS.get(end.si_status)
        return f"was killed by signal {end.si_status}{f' ({name})' if name else ''}"


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
