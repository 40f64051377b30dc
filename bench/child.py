"""A child process that exchanges JSON objects, one a line, over its standard input and output.

QEMU does so with ``-qmp stdio``, and the Python sides of these benchmarks do the same. Standard error goes to the
terminal, so that a failing side can report its reason.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from bench.errors import BenchError

MAX_LINE = 1 << 20

JsonObject = dict[str, Any]


class JsonChild:
    """One child. It is killed when its nursery is cancelled."""

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self._process = process
        self._buffer = bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, message: Mapping[str, Any]) -> None:
        """Write one object.

        **Cancellation:** the child may have read a part of it; kill it.
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            await stdin.send_all(json.dumps(message).encode() + b"\n")
        except trio.BrokenResourceError:
            raise BenchError(f"{self.name} closed its standard input") from None

    async def receive(self) -> JsonObject:
        """Read one object.

        **Cancellation:** nothing is lost.
        """
        stdout = self._process.stdout
        assert stdout is not None
        while b"\n" not in self._buffer:
            data = await stdout.receive_some()
            if not data:
                raise BenchError(f"{self.name} ended without an answer; its own message is above")
            self._buffer += data
            if len(self._buffer) > MAX_LINE:
                raise BenchError(f"{self.name} wrote a line of more than {MAX_LINE} bytes")
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        try:
            message = json.loads(line)
        except ValueError:
            raise BenchError(f"{self.name} wrote a line that is not JSON: {line[:80]!r}") from None
        if not isinstance(message, dict):
            raise BenchError(f"{self.name} wrote JSON that is not an object: {line[:80]!r}")
        return message

    async def answer(self, wanted: str) -> Any:
        """The member *wanted* of the next object. BenchError if it says that something failed, or has another member.

        **Cancellation:** as for :meth:`receive`.
        """
        message = await self.receive()
        if "failed" in message:
            raise BenchError(f"{self.name}: {message['failed']}")
        if wanted not in message:
            raise BenchError(f"{self.name} answered {message!r} where {wanted!r} was due")
        return message[wanted]


async def start_child(
    nursery: trio.Nursery, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> JsonChild:
    """Start *command* as a child that lives until *nursery* is cancelled.

    Args:
        environment: variables beside those of this process.

    Raises:
        BenchError: the child cannot be started.
    """
    run = functools.partial(
        trio.run_process,
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        check=False,
        deliver_cancel=_kill,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **(environment or {})},
    )
    try:
        process = await nursery.start(run)
    except OSError as exc:
        raise BenchError(f"{name} cannot be started: {exc}") from exc
    return JsonChild(name, process)


async def start_python_child(
    nursery: trio.Nursery, name: str, module: str, arguments: Sequence[str], prefix: Sequence[str] = ()
) -> JsonChild:
    """Start ``python -m MODULE`` of this installation as a child; *prefix* is a command that starts it."""
    return await start_child(nursery, name, [*prefix, sys.executable, "-m", module, *arguments])


async def _kill(process: trio.Process) -> None:
    process.kill()
