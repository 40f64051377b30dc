"""The base of guests in a worker process: the run state, dirty tracking, missing memory and the device state.

The memory is memfds that both processes map, so each process sees the data that the other writes. The worker's writes
are tracked through its page tables, by a userfaultfd that the worker made and passed to this process.

The worker dies with this process: it reads the end of file on its socket. The ``open`` of the subclasses kills it on
every way out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from ...errors import ConfigError, GuestFailed, Owner, StateError
from ...guest import PAGE_SIZE, DeviceProtocol, DeviceSection, DirtyTracker, PageBitmap
from ...memory.block import MemfdBlock
from ...memory.faults import FEATURES as FAULT_FEATURES
from ...memory.faults import MissingPages, UffdMemory
from ...memory.linux import TRACKING_FEATURES, MemoryUnavailable, probe_tracking
from ...memory.tracking import CompareTracker, TrackedRange, UffdTracker, log_choice, log_fallback
from ...owner import Settle
from ..base import GuestBase
from .line import Refusal, Worker
from .messages import VERSION, Nonsense, WorkerReply, decimal, quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger("trimig.guests")

#: QEMU's run state of a guest whose machine has failed.
LOST_STATE: Final = "internal-error"

#: Capabilities of a worker: it makes a userfaultfd for dirty tracking, or for missing pages; it can be slowed down.
TRACK: Final = "track"
MISSING: Final = "missing"
THROTTLE: Final = "throttle"


class WorkerState(DeviceProtocol, Protocol):
    """The device that has the worker's state."""

    @property
    def worker_state(self) -> bytes:
        """The bytes that the worker saved, and that it loads."""

    def set_worker_state(self, state: bytes) -> None:
        """Store the bytes that the worker saved. ValueError for bytes that cannot be such a state."""


def check_tracking(method: str) -> None:
    """Raise ConfigError for a dirty tracking that a worker's memory cannot have."""
    if method not in ("auto", "userfaultfd", "compare"):
        raise ConfigError(f"dirty tracking {method!r} is not possible for a guest in a worker process")


class WorkerGuest(GuestBase):
    """A guest whose code runs in a worker process. The subclasses have an ``open``, which makes one.

    Args:
        name: the machine name in the stream.
        worker: the process; the guest owns it from now on.
        blocks: the RAM; the worker has inherited its descriptors.
        state: the device with the worker's state.
        dirty_tracking: ``"auto"``, ``"userfaultfd"`` or ``"compare"``.
    """

    def __init__(
        self, name: str, worker: Worker, blocks: Sequence[MemfdBlock], state: WorkerState, dirty_tracking: str
    ) -> None:
        super().__init__(name, run_state="inmigrate")
        self._worker = worker
        self._blocks = tuple(blocks)
        self._ram.extend(blocks)
        self._worker_state = state
        self.add_device(state)
        self._method = dirty_tracking
        self._ranges: Sequence[TrackedRange] = ()
        self._offers: frozenset[str] = frozenset()
        #: The log has said that the worker cannot be slowed down.
        self._told = False
        #: The worker was told to run and has not answered: it may run at any time.
        self._perhaps_runs = False

    def _runs(self) -> bool:
        return super()._runs() or self._perhaps_runs

    @property
    def run_state(self) -> str:
        """QEMU's name of the run state; ``internal-error`` when the guest's worker has died."""
        return super().run_state if self.lost is None else LOST_STATE

    @property
    def lost(self) -> str | None:
        """Why the guest is lost: it is here, and its worker has died. None if it is not."""
        if self.owner is not Owner.HERE or (how := self._worker.death) is None:
            return None
        return f"its worker has died ({how}): the guest is lost"

    async def wait_lost(self) -> None:
        """Return when the worker has ended.

        **Cancellation:** no effect.
        """
        await self._worker.ended()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._worker.pid

    def close(self) -> None:
        """Kill and reap the worker, and give the memory back, before the ``async with`` ends. Idempotent."""
        self._worker.close()
        for block in self._blocks:
            block.close()

    async def ask(self, verb: str, *words: object, body: bytes = b"") -> WorkerReply:
        """Make a request of your own; verbs of your own begin with ``x-``.

        Raises:
            ValueError: a word is empty or not printable ASCII, or the request is too long.
            GuestFailed: the worker refused, died, did not answer in time, or answered nonsense.
            StateError: the guest was closed.

        **Cancellation:** the worker may have carried out the request.
        """
        return await self._worker.call(verb, *words, body=body)

    async def _attach(self, within: float) -> None:
        """Greet the worker, give it the RAM and choose the dirty tracking. *within*: seconds for its start."""
        hello = await self._worker.call("hello", VERSION, within=within)
        if hello.words[:1] != (str(VERSION),):
            said = quoted(" ".join(hello.words))
            raise self._worker.nonsense("hello", f"the version {said}; trimig speaks version {VERSION}")
        self._offers = frozenset(hello.words[1:])
        self._ranges = [await self._map(block) for block in self._blocks]
        await self._choose_tracking()

    async def _map(self, block: MemfdBlock) -> TrackedRange:
        reply = await self._worker.call("ram", block.fd, block.length, body=block.name.encode())
        try:
            address = decimal(reply.words[0] if len(reply.words) == 1 else "")
        except Nonsense as error:
            raise self._worker.nonsense("ram", f"no address: {error}") from error
        if address % PAGE_SIZE or (not address and self._offers & {TRACK, MISSING}):
            raise self._worker.nonsense("ram", f"the address {address}, where no page begins")
        return TrackedRange(name=block.name, address=address, pages=block.length // PAGE_SIZE)

    async def _choose_tracking(self) -> None:
        if self._method == "compare":
            log_choice(CompareTracker.method)
            return
        try:
            await self._probe()
        except MemoryUnavailable as exc:
            if self._method == "userfaultfd":
                raise GuestFailed(f"no dirty tracking by userfaultfd: {exc.strerror}") from exc
            log_fallback(exc)
            self._method = "compare"
            return
        self._method = "userfaultfd"
        log_choice(UffdTracker.method)

    async def _probe(self) -> None:
        """Raise MemoryUnavailable unless the worker's writes can be tracked."""
        if TRACK not in self._offers:
            raise MemoryUnavailable(0, f"the worker does not offer {TRACK!r}")
        try:
            os.close(await self._worker.call_receiving(TRACK, TRACKING_FEATURES))
        except Refusal as exc:
            raise MemoryUnavailable(0, str(exc)) from exc
        probe_tracking(self._worker.pid)

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

    def set_owner(self, owner: Owner, *, handed_over: bool = False, settle: Settle | None = None) -> None:
        """For the engine: see :class:`trimig.guest.Guest`.

        A worker that was told to run and has not answered could run later: if this side does not own the guest any
        more, the worker is killed.
        """
        super().set_owner(owner, handed_over=handed_over, settle=settle)
        if owner is not Owner.HERE and self._perhaps_runs:
            log.warning("the guest's worker process %d was killed: it did not answer whether it runs", self._worker.pid)
            self._worker.close()

    async def throttle(self, percent: int) -> None:
        """Slow the worker down, if it offers that.

        Raises:
            ValueError: not within 0 to 99.
            GuestFailed: the worker died or does not answer.

        **Cancellation:** the old or the new value is in force.
        """
        self._check_percent(percent)
        if THROTTLE in self._offers:
            await self._worker.call("throttle", percent)
        elif percent and not self._told:
            self._told = True
            log.warning("guest %r runs at full speed: its worker does not offer %r", self.name, THROTTLE)
        await super().throttle(percent)

    def dirty_tracker(self) -> DirtyTracker:
        """A tracker of the worker's writes."""
        if self._method == "compare":
            return CompareTracker(self._ram)
        return WorkerTracker(self._worker, self._ranges)

    async def missing_memory(self) -> UffdMemory:
        """Make the worker wait from now on when it touches a page without memory; the guest must not run now.

        This process must not touch such a page itself: the page would become zero for both processes.

        Raises:
            GuestFailed: the worker does not offer it, userfaultfd is not available, or the worker runs, died or does
                not answer.

        **Cancellation:** the worker may touch pages before it writes them, which is slower and changes nothing else.
        """
        if MISSING not in self._offers:
            raise GuestFailed(
                f"guest {self._name!r} cannot run before its memory has come: its worker does not offer {MISSING!r}"
            )
        descriptor = await self._worker.call_receiving(MISSING, FAULT_FEATURES)
        os.set_blocking(descriptor, False)  # a read must never wait
        memory = UffdMemory(MissingPages(descriptor), self._ranges)
        try:
            memory.open()
        except BaseException as error:
            memory.close()
            if isinstance(error, OSError):
                raise GuestFailed(f"missing pages cannot be waited for: {error.strerror}") from error
            raise
        return memory

    async def memory_is_whole(self) -> Sequence[float]:
        """Tell the worker that no page is missing any more; returns the seconds that each of its threads has waited for
        pages, as far as the worker measured it.

        Raises:
            GuestFailed: the worker died, does not answer, or was not told that pages are missing.

        **Cancellation:** the worker may have been told; then it cannot be told again.
        """
        return self._waited(await self._worker.call("whole"))

    def _waited(self, reply: WorkerReply) -> Sequence[float]:
        try:
            return [decimal(word) / 1e9 for word in reply.words]
        except Nonsense as error:
            raise self._worker.nonsense("whole", error) from error

    async def save_devices(self) -> Sequence[DeviceSection]:
        """The worker's state, and the other devices. GuestFailed if the worker runs.

        **Cancellation:** has no effect on the guest.
        """
        reply = await self._worker.call("save")
        try:
            self._worker_state.set_worker_state(reply.body)
        except ValueError as error:
            raise self._worker.nonsense("save", f"a state that cannot be: {quoted(str(error))}") from error
        return await super().save_devices()

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """Load the devices, and give the worker its state.

        **Cancellation:** the worker may have it; the guest must not be run before the next whole load.
        """
        await super().load_devices(sections)
        await self._worker.call("load", body=self._worker_state.worker_state)


class WorkerTracker:
    """:class:`UffdTracker` over the worker's memory, with a userfaultfd that the worker makes at the start."""

    method: Final = UffdTracker.method

    def __init__(self, worker: Worker, areas: Sequence[TrackedRange]) -> None:
        self._worker = worker
        self._areas = areas
        self._inner: UffdTracker | None = None

    async def start(self) -> None:
        """See :class:`trimig.guest.DirtyTracker`."""
        await (await self._prepare()).start()

    async def start_late(self) -> None:
        """See :class:`trimig.memory.tracking.LateTracker`."""
        await (await self._prepare()).start_late()

    async def _prepare(self) -> UffdTracker:
        if self._inner is not None:
            raise StateError("dirty tracking was started already; take a new tracker for a new attempt")
        uffd = await self._worker.call_receiving(TRACK, TRACKING_FEATURES)
        self._inner = UffdTracker(self._areas, pid=self._worker.pid, uffd=uffd)
        return self._inner

    async def protect(self, name: str, indices: NDArray[np.int64]) -> None:
        """See :class:`trimig.memory.tracking.LateTracker`."""
        if self._inner is None:
            raise StateError("dirty tracking is not on")
        await self._inner.protect(name, indices)

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
        await self._worker.call("ping")
        if failure is not None:
            raise failure
        return result

    def stop(self) -> None:
        """See :class:`trimig.guest.DirtyTracker`."""
        if self._inner is not None:
            self._inner.stop()
