"""A guest whose code is the caller's own program, in any language (protocol/worker.md)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

import trio

from ..errors import ConfigError, GuestFailed, Owner
from ..expected import expect
from ..memory.block import MemfdBlock
from ..wire.devices.vmstate import Field, VMState
from .device import Device
from .worker.guest import WorkerGuest, check_tracking
from .worker.line import Worker
from .worker.messages import MAX_BODY

#: Seconds that a worker may take to end after ``quit``.
_QUITTING: Final = 2.0


class WorkerDevice(Device):
    """The device ``trimig-worker``: the bytes that the worker saves."""

    vmstate = VMState(
        "trimig-worker", fields=(Field("size", "uint32"), Field("state", "buffer", size="size", maximum=MAX_BODY))
    )

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self.state = b""

    @property
    def worker_state(self) -> bytes:
        """What the worker saved, and what it loads."""
        return self.state

    def set_worker_state(self, state: bytes) -> None:
        """See :class:`trimig.guests.worker.guest.WorkerState`."""
        self.size, self.state = len(state), state


class ProcessGuest(WorkerGuest):
    """A guest whose code is a program of the caller, in a process of its own and in any language.

    Made by :meth:`open`. The program, the *worker*, maps the RAM and answers requests on a socket, as the page
    protocol/worker.md says. It decides nothing: this object owns the guest. Its devices are the worker's state
    (``trimig-worker``) and those of :meth:`add_device`, which stay in this process.
    """

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        argv: Sequence[str | os.PathLike[str]],
        *,
        ram: int | Mapping[str, int],
        running: bool = True,
        stopped: bool = False,
        name: str = "trimig-worker",
        settings: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        dirty_tracking: str = "auto",
        call_timeout: float = 10.0,
        start_timeout: float = 30.0,
    ) -> AsyncIterator[ProcessGuest]:
        """``async with ProcessGuest.open(["./worker"], ram=64 * trimig.MiB) as guest:`` starts the worker.

        At the end of the block the worker is asked to quit, has two seconds for it, and is killed and reaped with its
        process group. If the block ends by an error, it is killed at once.

        Args:
            argv: the program and its arguments.
            ram: bytes of the one RAM block ``"ram"``, or the bytes of each block by its name; multiples of 4096.
            running: False for a receiver: memory stays empty, and the run state is ``"inmigrate"``.
            stopped: with *running*: ready, but not started; the run state is ``"prelaunch"`` until :meth:`resume`.
            name: the machine name in the stream.
            settings: the body of the request ``create``, which makes the first state; for your own use.
            env: the environment of the worker; None for this process's own.
            cwd: the working directory of the worker; None for this process's own.
            dirty_tracking: ``"auto"``, ``"userfaultfd"`` or ``"compare"``.
            call_timeout: seconds after which a worker that does not answer is a GuestFailed.
            start_timeout: seconds beyond *call_timeout* for the first answer, and for ``create``.

        Raises:
            ConfigError: an argument that cannot be used.
            GuestFailed: the worker could not be started, or does not come up; or userfaultfd was demanded and is not
                available.

        **Cancellation:** no process is left, during the start and during the end. A cancelled end waits for the kernel only.
        """
        if isinstance(argv, str | bytes) or not argv:
            raise ConfigError(f"the worker's program is a list of a program and its arguments, not {argv!r:.80}")
        expect("ram", ram, (int, Mapping), "an int, in bytes, or a mapping of names to bytes")
        check_tracking(dirty_tracking)
        if len(settings) > MAX_BODY:
            raise ConfigError(f"settings of {len(settings)} bytes; {MAX_BODY} is the most")
        sizes = {"ram": ram} if isinstance(ram, int) else dict(ram)
        if not sizes:
            raise ConfigError("a guest has at least one RAM block")
        with contextlib.ExitStack() as stack:
            try:
                blocks = []
                for block_name, length in sizes.items():
                    blocks.append(MemfdBlock(block_name, length))
                    stack.callback(blocks[-1].close)
                worker = Worker(argv, keep=[block.fd for block in blocks], env=env, cwd=cwd, call_timeout=call_timeout)
            except OSError as exc:
                raise GuestFailed(f"the guest's worker process could not be started: {exc}") from exc
            stack.callback(worker.close)
            guest = cls(name, worker, blocks, WorkerDevice(), dirty_tracking)
            await guest._attach(start_timeout)
            if running:
                await worker.call("create", body=settings, within=start_timeout)
                guest.set_owner(Owner.HERE)
                if stopped:
                    guest._run_state = "prelaunch"
                else:
                    await guest.resume()
            yield guest
            await guest._quit()

    async def _quit(self) -> None:
        with trio.move_on_after(_QUITTING), contextlib.suppress(GuestFailed):
            if not self._worker.closed:
                self._worker.may_end()
                await self._worker.call("quit")
                await self._worker.ended()
