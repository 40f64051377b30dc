"""A guest in its own process: a worker on shared memory that is controlled over a socket.

The memory is a memfd that both processes map, so each process sees the data that the other writes. The worker's writes
are tracked through its page tables, by a userfaultfd that the worker made and passed to this process.

The worker dies with this process (end of file on its socket, and the kernel's parent-death
signal), and :meth:`WorkloadGuest.open` kills it on every way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from ...errors import ConfigError, GuestFailed, Owner, StateError
from ...guest import PAGE_SIZE, DeviceSection, DirtyTracker, PageBitmap
from ...memory.block import MemfdBlock
from ...memory.faults import MissingPages, UffdMemory
from ...memory.linux import MemoryUnavailable, probe_tracking
from ...memory.tracking import CompareTracker, TrackedRange, UffdTracker, log_choice, log_fallback
from ...owner import OwnerState, Settle
from ..base import GuestBase
from .line import Refusal, Worker
from .state import Journal, Verification, WorkloadState

log = logging.getLogger("trimig.guests")

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


class WorkloadGuest(GuestBase):
    """A worker process that writes memory at a given rate, and can prove that no write was lost or replayed.

    Made by :meth:`open`. Its RAM is one block, ``"ram"``; its one device is the journal ``trimig-workload``
    (:mod:`trimig.guests.workload.state`).
    """

    def __init__(self, name: str, worker: Worker, block: MemfdBlock, state: WorkloadState, dirty_tracking: str) -> None:
        super().__init__(name, run_state="inmigrate")
        self._worker = worker
        self._block = block
        self._ram.append(block)
        self._journal = Journal(state)
        self.add_device(self._journal)
        self._method = dirty_tracking
        self._range = TrackedRange(name=block.name, address=0, pages=state.ram_pages)
        #: The worker was told to run and has not answered: it may run at any time.
        self._perhaps_runs = False
        self._owner = OwnerState(Owner.ELSEWHERE, runs=lambda: self._run_state == "running" or self._perhaps_runs)
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
            dirty_rate: bytes per second that the worker writes.
            seed: seed of content and order; None takes a random one.
            running: False for a receiver: memory stays empty, and the run state is ``"inmigrate"``. The settings of the
                workload (hot, dirty_rate, seed) then come with the guest; only *size* must agree.
            stopped: with *running*: ready, but not started; the run state is ``"prelaunch"`` until :meth:`resume`.
            name: the machine name in the stream.
            dirty_tracking: ``"auto"``, ``"userfaultfd"`` or ``"compare"``.
            call_timeout: seconds after which a worker that does not answer is a GuestFailed.

        Raises:
            ConfigError: sizes that do not fit together.
            GuestFailed: the worker could not be started, or does not come up; or userfaultfd was demanded and is not
                available.

        **Cancellation:** nothing is left, on entering as on leaving; leaving does not wait for anything but the kernel.
        """
        if dirty_tracking not in ("auto", "userfaultfd", "compare"):
            raise ConfigError(f"dirty tracking {dirty_tracking!r} is not possible for a guest in a worker process")
        if size <= 0 or size % PAGE_SIZE:
            raise ConfigError(f"{size} bytes of RAM are not a positive multiple of {PAGE_SIZE}")
        try:
            state = WorkloadState(
                seed=random.getrandbits(64) if seed is None else seed,
                ram_pages=size // PAGE_SIZE,
                hot_pages=hot // PAGE_SIZE,
                dirty_rate=dirty_rate,
            )
        except ValueError as exc:
            raise ConfigError(str(exc)) from exc
        with contextlib.ExitStack() as stack:
            try:
                block = MemfdBlock("ram", size)
                stack.callback(block.close)
                worker = Worker(call_timeout)
            except OSError as exc:
                raise GuestFailed(f"the guest's worker process could not be started: {exc}") from exc
            stack.callback(worker.close)
            guest = cls(name, worker, block, state, dirty_tracking)
            await guest._attach()
            if running:
                await worker.call("initialise", within=size / _SLOWEST, state=dataclasses.asdict(state))
                guest.set_owner(Owner.HERE)
                if stopped:
                    guest._run_state = "prelaunch"
                else:
                    await guest.resume()
            yield guest

    async def _attach(self) -> None:
        reply = await self._worker.call_sending("attach", [self._block.fd], within=_STARTING, length=self._block.length)
        self._range = dataclasses.replace(self._range, address=reply["address"])
        if self._method == "compare":
            log_choice(CompareTracker.method)
            return
        try:
            if reply["untracked"] is not None:
                raise MemoryUnavailable(0, reply["untracked"])
            probe_tracking(self._worker.pid)
        except MemoryUnavailable as exc:
            if self._method == "userfaultfd":
                raise GuestFailed(f"no dirty tracking by userfaultfd: {exc.strerror}") from exc
            log_fallback(exc)
            self._method = "compare"
            return
        self._method = "userfaultfd"
        log_choice(UffdTracker.method)

    @property
    def block(self) -> MemfdBlock:
        """The RAM block of the guest."""
        return self._block

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._worker.pid

    @property
    def state(self) -> WorkloadState:
        """The last journal that was saved or loaded here."""
        return self._journal.state

    def close(self) -> None:
        """Kill and reap the worker, and give the memory back, before the ``async with`` ends. Idempotent."""
        self._worker.close()
        self._block.close()

    # Send the request in every run state: after a cancelled call the worker may be in another state.

    async def pause(self) -> None:
        """Pause the worker; after the return it makes no more writes. Harmless while it does not run.

        Raises:
            GuestFailed: the worker died or does not answer.

        **Cancellation:** the worker may be paused; call :meth:`resume`.
        """
        await self._worker.call("pause")
        self._perhaps_runs = False
        if self._run_state == "running":
            self._run_state = "paused"

    async def resume(self) -> None:
        """Resume the worker. Harmless while it runs.

        Raises:
            NotOwner: this side does not own the guest.
            GuestFailed: the worker died, does not answer, or has no state.

        **Cancellation:** the worker may be running; call :meth:`pause`.
        """
        with self._owner.starting():
            self._perhaps_runs = True
            try:
                await self._worker.call("resume")
            except Refusal:
                self._perhaps_runs = False
                raise
        self._perhaps_runs = False
        self._run_state = "running"

    def set_owner(self, owner: Owner, *, gone: bool = False, settle: Settle | None = None) -> None:
        """For the engine: see :class:`trimig.guest.Guest`.

        A worker that was told to run and has not answered could run later: if this side does not own the guest any
        more, the worker is killed.
        """
        super().set_owner(owner, gone=gone, settle=settle)
        if owner is not Owner.HERE and self._perhaps_runs:
            log.warning("the guest's worker process %d was killed: it did not answer whether it runs", self._worker.pid)
            self._worker.close()

    async def throttle(self, percent: int) -> None:
        """Take *percent* of the dirty rate away.

        Raises:
            ValueError: not within 0 to 99.
            GuestFailed: the worker died or does not answer.

        **Cancellation:** the old or the new value is in force.
        """
        self._check_percent(percent)
        await self._worker.call("throttle", percent=percent)
        self._throttle = percent

    def dirty_tracker(self) -> DirtyTracker:
        """A tracker of the worker's writes."""
        if self._method == "compare":
            return CompareTracker(self._ram)
        return WorkerTracker(self._worker, self._range)

    async def missing_memory(self) -> UffdMemory:
        """Make the worker wait from now on when it touches a page without memory; the guest must not run now.

        This process must not touch such a page itself: the page would become zero for both processes.

        Raises:
            GuestFailed: userfaultfd is not available, or the worker runs, died or does not answer.

        **Cancellation:** the worker may touch pages before it writes them, which is slower and changes nothing else.
        """
        missing = MissingPages(await self._worker.call_receiving("missing"))
        memory = UffdMemory(missing, [self._range])
        try:
            memory.open()
        except BaseException as error:
            memory.close()
            if isinstance(error, OSError):
                raise GuestFailed(f"missing pages cannot be waited for: {error.strerror}") from error
            raise
        return memory

    async def memory_is_whole(self) -> Sequence[float]:
        """Tell the worker that no page is missing any more; returns the seconds that it waited for pages (as one
        processor).

        The details are in :attr:`touch_times` from then on.

        Raises:
            GuestFailed: the worker died, does not answer, or was not told that pages are missing.

        **Cancellation:** the worker may have been told; then it cannot be told again.
        """
        reply = await self._worker.call("whole")
        self.touch_times = TouchTimes(**{key: value for key, value in reply.items() if key != "id"})
        return (self.touch_times.blocked / 1e9,)

    async def save_devices(self) -> Sequence[DeviceSection]:
        """The journal. GuestFailed if the worker runs.

        **Cancellation:** has no effect on the guest.
        """
        reply = await self._worker.call("save")
        self._journal.state = WorkloadState(**reply["state"])
        return await super().save_devices()

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """Load the journal, and send it to the worker.

        **Cancellation:** the worker may have it; the guest must not be run before the next whole load.
        """
        await super().load_devices(sections)
        await self._worker.call("load", state=dataclasses.asdict(self._journal.state))

    async def verify(self) -> Verification:
        """Let the worker compare every word of its memory with its journal; it does nothing else meanwhile.

        Raises:
            GuestFailed: the worker died, does not answer, or has no state yet.

        **Cancellation:** the worker goes on comparing, and answers no other call before it is done.
        """
        reply = await self._worker.call("verify", within=self._block.length / _SLOWEST)
        return Verification(**{key: value for key, value in reply.items() if key != "id"})

    async def stats(self) -> WorkerStats:
        """The present activity of the worker. GuestFailed.

        **Cancellation:** has no effect on the worker.
        """
        reply = await self._worker.call("stats")
        return WorkerStats(**{key: value for key, value in reply.items() if key != "id"})


class WorkerTracker:
    """:class:`UffdTracker` over the worker's memory, with a userfaultfd that the worker makes at the start."""

    method: Final = UffdTracker.method

    def __init__(self, worker: Worker, area: TrackedRange) -> None:
        self._worker = worker
        self._area = area
        self._inner: UffdTracker | None = None

    async def start(self) -> None:
        """See :class:`trimig.guest.DirtyTracker`."""
        if self._inner is not None:
            raise StateError("dirty tracking was started already; take a new tracker for a new attempt")
        uffd = await self._worker.call_receiving("uffd")
        self._inner = UffdTracker([self._area], pid=self._worker.pid, uffd=uffd)
        await self._inner.start()

    async def sync(self) -> Mapping[str, PageBitmap]:
        """See :class:`trimig.guest.DirtyTracker`."""
        if self._inner is None:
            raise StateError("dirty tracking is not on")
        result: Mapping[str, PageBitmap] = {}
        failure: GuestFailed | None = None
        try:
            result = await self._inner.sync()
        except GuestFailed as exc:
            failure = exc
        # For the kernel a process that has died may look like one that has written nothing. An answer after the scan
        # proves that the process lived. Without an answer, the error says that it died.
        await self._worker.call("stats")
        if failure is not None:
            raise failure
        return result

    def stop(self) -> None:
        """See :class:`trimig.guest.DirtyTracker`."""
        if self._inner is not None:
            self._inner.stop()
