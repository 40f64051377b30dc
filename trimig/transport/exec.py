"""``exec:COMMAND``: a command, run by ``/bin/sh -c``. The stream goes to its stdin or comes from its stdout.

The other pipe is the return path, if the command passes it on. ``exec:ssh host nc -U /run/socket`` does; ``exec:gzip >
file`` does not, and need not. QEMU ignores the command's exit status and its stderr. In trimig a command
that fails makes the migration fail, and the error has the end of its stderr.

The command gets no terminal (it leads a session of its own): a command that asks for a password fails instead of
waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ..errors import ConfigError
from ._child import PIPE_BYTES, Child
from ._interface import Listener, Transport
from ._one_task import OneTask

if TYPE_CHECKING:
    from ..config.config import Config

#: The longest argument that Linux takes (MAX_ARG_STRLEN).
_MAX_COMMAND: Final = (1 << 17) - 1


def parse(command: str) -> str:
    """A valid command.

    Raises:
        ConfigError: *rest* is no valid command.
    """
    if not command.strip():
        raise ConfigError("exec: needs a command, for example exec:gzip > guest.gz", name="uri")
    if "\0" in command:
        raise ConfigError(f"a command cannot contain a NUL byte: {command[:80]!r}", name="uri")
    if len(command.encode("utf-8", "surrogateescape")) > _MAX_COMMAND:
        raise ConfigError(f"the command is too long: at most {_MAX_COMMAND} bytes", name="uri")
    return command


class ExecStream(trio.abc.HalfCloseableStream):
    """The stdin and stdout of a command. A direction may have no other end.

    Args:
        silent: the peer may never answer; see :class:`~trimig.channel.channel.PerhapsSilent`.
    """

    def __init__(self, child: Child, *, silent: bool) -> None:
        self._child = child
        self._silent = silent
        self._sending = OneTask("writing to the command")

    @property
    def perhaps_silent(self) -> bool:
        """Whether an answer may never come: a command that stores the stream sends none, a command that brings one
        does."""
        return self._silent

    @property
    def pid(self) -> int:
        """The process id of the shell that runs the command."""
        return self._child.pid

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write to the command's stdin.

        Raises:
            BrokenResourceError: the command reads no more; the cause says how it ended.

        **Cancellation:** an unknown part of *data* was sent.
        """
        with self._sending:
            try:
                await self._child.stdin.send_all(data)
            except trio.BrokenResourceError:
                failure = await self._child.failure() or self._child.deaf()
                raise trio.BrokenResourceError(str(failure)) from failure

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the pipe accepts data.

        **Cancellation:** no effect.
        """
        with self._sending:
            await self._child.stdin.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Close the command's stdin.

        **Cancellation:** stdin is closed.
        """
        with self._sending:
            self._child.stdin.close()
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Read from the command's stdout; empty if the command has closed it and has not failed.

        Raises:
            BrokenResourceError: the command failed; the cause says how.

        **Cancellation:** nothing was read.
        """
        count = PIPE_BYTES if max_bytes is None else min(max_bytes, PIPE_BYTES)  # a pipe never holds more
        data = await self._child.stdout.receive_some(count)
        if not data and (failure := await self._child.failure()) is not None:
            raise trio.BrokenResourceError(str(failure)) from failure
        return data

    async def delivered(self) -> None:
        """Wait until the command has read everything, close its stdin, and wait for its success.

        Raises:
            TransportFailed: the command did not read everything, failed, or was ended by a signal; with its last
                stderr.

        **Cancellation:** stdin may be closed, and the command may be running.
        """
        if self._child.stdin.fileno() != -1:
            await self._child.wait_drained()
            self._child.stdin.close()
        await self._child.wait_exit()
        if (failure := await self._child.failure()) is not None:
            raise failure

    async def aclose(self) -> None:
        """End the command and all processes that it has started.

        **Cancellation:** held off for a moment; the command is gone.
        """
        await self._child.aclose()


class ExecListener(Listener):
    """A command that brings a stream. :meth:`accept` starts the command."""

    def __init__(self, command: str) -> None:
        self._command = command

    @property
    def uri(self) -> str:
        """The command."""
        return f"exec:{self._command}"

    async def accept(self) -> ExecStream:
        """Start the command.

        Raises:
            TransportFailed: the command could not be started.

        **Cancellation:** the command was not started.
        """
        return ExecStream(await Child.start(self._command), silent=False)

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


async def connect(rest: str, config: Config) -> ExecStream:
    """Start the command that takes the stream.

    Raises:
        ConfigError: there is no command, or it is not valid.
        TransportFailed: the command could not be started.

    **Cancellation:** the command was not started.
    """
    return ExecStream(await Child.start(parse(rest)), silent=True)


async def listen(rest: str, config: Config) -> ExecListener:
    """Check the command that brings the stream; nothing runs yet.

    Raises:
        ConfigError: there is no command, or it is not valid.

    **Cancellation:** no effect.
    """
    command = parse(rest)
    await trio.lowlevel.checkpoint()
    return ExecListener(command)


TRANSPORT: Final = Transport(connect=connect, listen=listen, parse=parse)
