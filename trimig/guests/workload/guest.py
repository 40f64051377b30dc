"""A guest that checks itself: its worker writes memory at a given rate, and can prove that no write was lost.

Its worker speaks the protocol of every worker (protocol/worker.md), with verbs of its own to verify and to report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from ...errors import ConfigError, GuestFailed, Owner
from ...guest import PAGE_SIZE
from ...memory.block import MemfdBlock
from ..worker.guest import WorkerGuest, check_tracking
from ..worker.line import Worker
from .state import Journal, Verification, WorkloadState

MiB: Final = 1 << 20
#: Bytes per second that initialising and verifying reach at least, also on a busy machine.
_SLOWEST: Final = 20 * MiB
#: Seconds that a Python process may take to start, in addition to the time limit of a call.
_STARTING: Final = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """The result of :meth:`WorkloadGuest.stats`."""

    #: Writes since the workload began, on all hosts.
    writes: int
    running: bool
    #: Percent.
    throttle: int
    #: True if the next write is to a missing page.
    waiting: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TouchTimes:
    """The times that the worker waited for missing pages, all in nanoseconds."""

    #: Number of pages touched.
    touches: int
    #: Number of touches that had to wait; the other values are about these.
    waits: int
    median: float
    #: The 99th percentile.
    p99: float
    #: The sum.
    blocked: float


class WorkloadGuest(WorkerGuest):
    """A worker process that writes memory at a given rate, and can prove that no write was lost or replayed.

    Made by :meth:`open`. Its RAM is one block, ``"ram"``; its one device is the journal ``trimig-workload``
    (:mod:`trimig.guests.workload.state`).
    """

    def __init__(self, name: str, worker: Worker, block: MemfdBlock, state: WorkloadState, dirty_tracking: str) -> None:
        self._journal = Journal(state)
        super().__init__(name, worker, [block], self._journal, dirty_tracking)
        self._block = block
        #: The waits for missing pages in the last incoming postcopy.
        self.touch_times: TouchTimes | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        *,
        size: int = 256 * MiB,
        hot: int = 32 * MiB,
        dirty_rate: int = 50 * MiB,
        write_size: int = PAGE_SIZE,
        seed: int | None = None,
        running: bool = True,
        stopped: bool = False,
        name: str = "trimig-workload",
        dirty_tracking: str = "auto",
        call_timeout: float = 10.0,
    ) -> AsyncIterator[WorkloadGuest]:
        """``async with WorkloadGuest.open() as guest:`` starts the worker; it is killed and reaped at the end.

        Args:
            size: bytes of RAM, a multiple of 4096.
            hot: bytes at the start of the RAM that are written again and again; rounded down to whole pages.
            dirty_rate: bytes per second that the worker writes; each write counts a page.
            write_size: bytes of a page that a write changes, a multiple of 8; the whole page by default.
            seed: seed of content and order; None takes a random one.
            running: False for a receiver: memory stays empty, and the run state is ``"inmigrate"``. The settings of the
                workload (hot, dirty_rate, write_size, seed) then come with the guest; only *size* must agree.
            stopped: with *running*: ready, but not started; the run state is ``"prelaunch"`` until :meth:`resume`.
            name: the machine name in the stream.
            dirty_tracking: ``"auto"``, ``"userfaultfd"`` or ``"compare"``.
            call_timeout: seconds after which a worker that does not answer is a GuestFailed.

        Raises:
            ConfigError: sizes that do not fit together.
            GuestFailed: the worker could not be started, or does not come up; or userfaultfd was demanded and is not
                available.

        **Cancellation:** no process is left, during the start and during the end. The end waits for the kernel only.
        """
        check_tracking(dirty_tracking)
        if size <= 0 or size % PAGE_SIZE:
            raise ConfigError(f"{size} bytes of RAM are not a positive multiple of {PAGE_SIZE}")
        try:
            state = WorkloadState(
                seed=random.getrandbits(64) if seed is None else seed,
                ram_pages=size // PAGE_SIZE,
                hot_pages=hot // PAGE_SIZE,
                dirty_rate=dirty_rate,
                write_size=write_size,
            )
        except ValueError as exc:
            raise ConfigError(str(exc)) from exc
        with contextlib.ExitStack() as stack:
            try:
                block = MemfdBlock("ram", size)
                stack.callback(block.close)
                worker = _start([block.fd], call_timeout)
            except OSError as exc:
                raise GuestFailed(f"the guest's worker process could not be started: {exc}") from exc
            stack.callback(worker.close)
            guest = cls(name, worker, block, state, dirty_tracking)
            await guest._attach(_STARTING)
            if running:
                await worker.call("create", body=state.pack(), within=size / _SLOWEST)
                guest.set_owner(Owner.HERE)
                if stopped:
                    guest._run_state = "prelaunch"
                else:
                    await guest.resume()
            yield guest

    @property
    def block(self) -> MemfdBlock:
        """The RAM block of the guest."""
        return self._block

    @property
    def state(self) -> WorkloadState:
        """The last journal that was saved or loaded here."""
        return self._journal.state

    async def memory_is_whole(self) -> Sequence[float]:
        """As :meth:`WorkerGuest.memory_is_whole`. The details are in :attr:`touch_times` from then on.

        **Cancellation:** the worker may have been told; then it cannot be told again.
        """
        reply = await self._worker.call("whole")
        self.touch_times = TouchTimes(**json.loads(reply.body))
        return self._waited(reply)

    async def verify(self) -> Verification:
        """Let the worker compare every word of its memory with its journal; it does nothing else meanwhile.

        Raises:
            GuestFailed: the worker died, does not answer, or has no state yet.

        **Cancellation:** the worker goes on comparing, and answers no other call before it is done.
        """
        reply = await self._worker.call("x-verify", within=self._block.length / _SLOWEST)
        return Verification(**json.loads(reply.body))

    async def stats(self) -> WorkerStats:
        """The present activity of the worker. GuestFailed.

        **Cancellation:** has no effect on the worker.
        """
        reply = await self._worker.call("x-stats")
        return WorkerStats(**json.loads(reply.body))


def _start(keep: Sequence[int], call_timeout: float) -> Worker:
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's threads are not used, and start slowly
    }
    argv = [sys.executable, "-P", "-m", "trimig.guests.workload.worker"]
    return Worker(argv, keep=keep, env=env, cwd=None, call_timeout=call_timeout)
