"""``exec:COMMAND``: run by ``/bin/sh -c``. The stream goes to its stdin or comes from its stdout.

The other pipe is the return path, if the command passes it on: ``exec:ssh host nc -U /run/socket`` does, ``exec:gzip >
file`` does not, and is not expected to. QEMU looks neither at the command's exit nor at what it says; here a command
that fails is a migration that failed, with the end of its stderr in the message.

The command gets no terminal (it leads a session of its own): one that asks for a password fails instead of waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ..errors import ConfigError
from ._child import PIPE_BYTES, Child

if TYPE_CHECKING:
    from ..config.config import Config

#: The longest argument that Linux takes (MAX_ARG_STRLEN).
_MAX_COMMAND: Final = (1 << 17) - 1


def parse(command: str) -> str:
    """A command that can be run.

    Raises:
        ConfigError: it is none.
    """
    if not command.strip():
        raise ConfigError("exec: needs a command, for example exec:gzip > guest.gz", name="uri")
    if "\0" in command:
        raise ConfigError(f"a command cannot contain a NUL byte: {command[:80]!r}", name="uri")
    if len(command.encode("utf-8", "surrogateescape")) > _MAX_COMMAND:
        raise ConfigError(f"the command is too long: at most {_MAX_COMMAND} bytes", name="uri")
    return command


class ExecStream(trio.abc.HalfCloseableStream):
    """The stdin and stdout of a command. Not both directions need to lead anywhere.

    Args:
        silent: nobody may ever answer; see :class:`~trimig.channel.channel.PerhapsSilent`.
    """

    def __init__(self, child: Child, *, silent: bool) -> None:
        self._child = child
        self._silent = silent
        self._sending = False

    @property
    def perhaps_silent(self) -> bool:
        """A command that stores the stream has nothing to say; one that brings it has."""
        return self._silent

    @property
    def pid(self) -> int:
        """Of the shell that runs the command."""
        return self._child.pid

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write to the command's stdin.

        Raises:
            BrokenResourceError: it reads no more; the cause says how it ended.

        **Cancellation:** nobody knows how much was sent.
        """
        self._claim()
        try:
            await self._child.stdin.send_all(data)
        except trio.BrokenResourceError:
            failure = await self._child.failure() or self._child.deaf()
            raise trio.BrokenResourceError(str(failure)) from failure
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the pipe takes something.

        **Cancellation:** no effect.
        """
        self._claim()
        try:
            await self._child.stdin.wait_send_all_might_not_block()
        finally:
            self._sending = False

    def _claim(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is writing to the command")
        self._sending = True

    async def send_eof(self) -> None:
        """Close the command's stdin.

        **Cancellation:** it is closed.
        """
        self._claim()
        self._sending = False
        self._child.stdin.close()
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Read from the command's stdout; empty if it has closed that and has not failed.

        Raises:
            BrokenResourceError: it failed; the cause says how.

        **Cancellation:** nothing was read.
        """
        count = PIPE_BYTES if max_bytes is None else min(max_bytes, PIPE_BYTES)  # there is never more in it
        data = await self._child.stdout.receive_some(count)
        if not data and (failure := await self._child.failure()) is not None:
            raise trio.BrokenResourceError(str(failure)) from failure
        return data

    async def delivered(self) -> None:
        """Wait until the command has read everything, close its stdin, and wait until it has ended well.

        Raises:
            TransportFailed: it has not read everything, failed, or was ended by a signal; with the end of its stderr.

        **Cancellation:** its stdin may be closed, and it may be running.
        """
        if self._child.stdin.fileno() != -1:
            await self._child.wait_drained()
            self._child.stdin.close()
        await self._child.wait_exit()
        if (failure := await self._child.failure()) is not None:
            raise failure

    async def aclose(self) -> None:
        """End the command, and all that it has started.

        **Cancellation:** held off for a moment; it is gone.
        """
        await self._child.aclose()


class ExecListener:
    """A command that brings a stream. It is started when it is waited for."""

    def __init__(self, command: str) -> None:
        self._command = command

    @property
    def uri(self) -> str:
        """The command."""
        return f"exec:{self._command}"

    async def accept(self) -> ExecStream:
        """Start the command.

        Raises:
            TransportFailed: it could not be started.

        **Cancellation:** it was not started.
        """
        return ExecStream(await Child.start(self._command), silent=False)

    def close(self) -> None:
        """There is nothing to close."""


async def connect(rest: str, config: Config) -> ExecStream:
    """Start the command that takes the stream.

    Raises:
        ConfigError: there is none, or it cannot be one.
        TransportFailed: it could not be started.

    **Cancellation:** it was not started.
    """
    return ExecStream(await Child.start(parse(rest)), silent=True)


async def listen(rest: str, config: Config) -> ExecListener:
    """Look at the command that brings the stream; nothing runs yet.

    Raises:
        ConfigError: there is none, or it cannot be one.

    **Cancellation:** no effect.
    """
    command = parse(rest)
    await trio.lowlevel.checkpoint()
    return ExecListener(command)
