"""A shell command with pipes to it. Closing it ends the command and everything that the command started, and reaps it.

The command leads a session of its own. So a Ctrl-C at the terminal reaches the command only through trimig. And all
processes that the command starts can be ended together, by the number of their process group. No other group can get
that number before the leader is reaped, so this module first looks at the leader's exit and reaps the leader last.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import struct
import subprocess
import termios
from typing import Final

import trio

from .. import formats
from ..channel import closing
from ..errors import TransportFailed

log = logging.getLogger("trimig.transport")

#: Seconds between SIGTERM and SIGKILL, and seconds SIGKILL may take.
TERM_SECONDS: Final = 0.5
KILL_SECONDS: Final = 5.0
#: Seconds for which a child that has closed a pipe may take to end, so that the error can tell the reason.
VERDICT_SECONDS: Final = 0.5
#: The wanted size of the pipes, if the system allows it: each full pipe costs a switch to the other process.
PIPE_BYTES: Final = 1 << 20
#: Bytes of the end of stderr that are kept, and how many of them go into a message.
_TAIL_BYTES: Final = 4096
_TAIL_SHOWN: Final = 400
#: Seconds between two polls if the kernel has no descriptors for processes (before Linux 5.3).
_POLL: Final = 0.02


class Child:
    """One running command. :meth:`start` makes it; the caller must close it.

    Attributes:
        what: the command, for messages.
        stdin: the pipe to it.
        stdout: the pipe from it.
    """

    def __init__(self, command: str, process: trio.Process) -> None:
        assert isinstance(process.stdin, trio.lowlevel.FdStream)
        assert isinstance(process.stdout, trio.lowlevel.FdStream)
        assert isinstance(process.stderr, trio.lowlevel.FdStream)
        self.what = f"the command {_shortened(command)!r}"
        self.stdin = process.stdin
        self.stdout = process.stdout
        self._stderr = process.stderr
        self._process = process
        self._pid = process.pid
        self._collected = False
        self._gone = False
        #: The exit status, negative for a signal, as soon as it is known.
        self._status: int | None = None
        self._tail = b""
        self._silent = trio.Event()
        self._exited = trio.Event()
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except OSError:
            self._pidfd = -1
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        # Stderr must be read all the time, or a child with many messages would block. Only one task may wait for a
        # descriptor, but a reader and a writer may both wait for the exit. A nursery would have to be open for the
        # whole life of the child; system tasks end when the descriptors are closed.
        trio.lowlevel.spawn_system_task(self._listen, name="trimig.child_stderr")
        trio.lowlevel.spawn_system_task(self._watch, name="trimig.child_exit")

    @classmethod
    async def start(cls, command: str) -> Child:
        """Run *command* by ``/bin/sh -c``, as QEMU does; the command inherits nothing but the three pipes.

        Raises:
            TransportFailed: the command could not be started.

        **Cancellation:** nothing was started.
        """
        try:
            process = await trio.lowlevel.open_process(
                ["/bin/sh", "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise TransportFailed(
                f"the command {_shortened(command)!r} cannot be started: {error.strerror or error}"
            ) from error
        return cls(command, process)

    @property
    def pid(self) -> int:
        """The process id of the shell; also the number of its process group."""
        return self._pid

    async def _listen(self) -> None:
        """Keep the end of stderr. A system task: no error may leave it."""
        try:
            while data := await self._stderr.receive_some(_TAIL_BYTES):
                self._tail = (self._tail + bytes(data))[-_TAIL_BYTES:]
        except (OSError, MemoryError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._silent.set()

    async def _watch(self) -> None:
        """Wait until the command has ended. A system task: no error may leave it."""
        try:
            while not self._look() and not self._collected:
                if self._pidfd == -1:
                    await trio.sleep(_POLL)
                else:
                    await trio.lowlevel.wait_readable(self._pidfd)
        except (OSError, trio.ClosedResourceError):
            pass
        finally:
            self._exited.set()

    # -- how it ends -----------------------------------------------------------------------------------------------

    def _look(self) -> bool:
        """Whether the command has ended; it stays a zombie, which keeps its number taken."""
        if self._gone:
            return True
        try:
            found = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._gone = True  # if SIGCHLD is ignored, the kernel reaps the child and reports no exit
            return True
        if found is not None:
            self._status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            self._gone = True
        return self._gone

    async def wait_exit(self) -> None:
        """Wait until the command has ended.

        **Cancellation:** no effect.
        """
        await self._exited.wait()

    async def wait_drained(self) -> None:
        """Wait until the command has read everything from the pipe: bytes that are not read are not delivered.

        The kernel does not notify when a pipe becomes empty, so this method polls.

        Raises:
            TransportFailed: the command will not read the rest.

        **Cancellation:** no effect.
        """
        poll = select.poll()
        poll.register(self.stdin.fileno(), select.POLLOUT)
        pause = _POLL / 16
        while left := struct.unpack("i", fcntl.ioctl(self.stdin.fileno(), termios.FIONREAD, bytes(4)))[0]:
            if any(events & select.POLLERR for _, events in poll.poll(0)):
                raise await self.failure() or self.deaf(f" ({left} bytes were left)")
            await trio.sleep(pause)
            pause = min(pause * 2, _POLL)

    def deaf(self, more: str = "") -> TransportFailed:
        """The error for a command that does not read everything."""
        return TransportFailed(f"{self.what} does not read its input any more{more}{self._stderr_note()}")

    async def failure(self) -> TransportFailed | None:
        """How the command failed, if it has ended or is about to; None if it succeeded or still runs.

        **Cancellation:** no effect.
        """
        with trio.move_on_after(VERDICT_SECONDS):
            await self.wait_exit()
            # A background process of the command may keep the pipe open: then the text so far is all there is.
            await self._silent.wait()
        if not self._look() or self._status == 0:
            return None
        return TransportFailed(f"{self.what} {self._ended()}{self._stderr_note()}")

    def _ended(self) -> str:
        if self._status is None:
            return "ended with an unknown status (SIGCHLD is ignored in this process)"
        if self._status >= 0:
            return f"failed with exit status {self._status}"
        try:
            name = signal.Signals(-self._status).name
        except ValueError:
            name = str(-self._status)
        return f"was ended by signal {name}"

    def _stderr_note(self) -> str:
        """The end of stderr as the end of a sentence; empty without stderr output."""
        text = " ".join(self._tail.decode("utf-8", "replace").split())
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        if len(text) > _TAIL_SHOWN:
            text = "…" + text[1 - _TAIL_SHOWN :]
        return f'; it said: "{text}"' if text else ""

    # -- the end ---------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close the pipes, and end the command and its process group: SIGTERM first, SIGKILL soon after.

        **Cancellation:** held off, for at most ``2 * TERM_SECONDS + KILL_SECONDS``; the command is gone.
        """
        self.stdin.close()
        self.stdout.close()
        if not self._collected:
            self._signal(signal.SIGTERM)
            await closing.bounded(self._quiet, TERM_SECONDS, otherwise=None)
            # Also if the leader is gone: other processes of the group may still run.
            self._signal(signal.SIGKILL)
            await closing.bounded(self._quiet, TERM_SECONDS, otherwise=None)
            await closing.bounded(self.wait_exit, KILL_SECONDS, otherwise=None)
            self._collect()
        if not self._silent.is_set():
            self._stderr.close()
            await closing.bounded(self._silent.wait, KILL_SECONDS, otherwise=None)
        self._stderr.close()
        await trio.lowlevel.checkpoint()

    async def _quiet(self) -> None:
        """The command has ended, and so have its children as far as is visible: no process holds the stderr pipe."""
        await self.wait_exit()
        await self._silent.wait()

    def _signal(self, number: int) -> None:
        if self._collected:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # PermissionError: the rest of the group runs as another user.
            os.killpg(self._pid, number)

    def _collect(self) -> None:
        if self._collected:
            return
        if not self._look():
            waited = formats.duration(KILL_SECONDS)
            log.warning("%s (process %d) has not ended %s after SIGKILL", self.what, self._pid, waited)
        self._process.poll()
        self._collected = True
        if self._pidfd != -1:
            trio.lowlevel.notify_closing(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def _shortened(command: str) -> str:
    return command if len(command) <= 100 else command[:99] + "…"
