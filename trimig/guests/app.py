"""A trio application as guest: its own memory and devices, in this process.

The engine must be able to stop an application: when :meth:`AppGuest.pause` returns, nothing may write the memory or a
device any more. For this the application changes them only inside the gate::

    guest = AppGuest("sessions")
    table = guest.add_ram("table", 64 * MiB)

    async def worker():
        while True:
            request = await next_request()
            async with guest.running():          # waits here while the guest is paused
                apply(request, table.view)       # hold it briefly: pause() waits for the end of this block

Any number of tasks may be inside at once. A pause closes the gate for new tasks, waits until the tasks inside have
left, and then calls :meth:`AppGuest.on_pause`. After the guest was handed over, the gate stays closed: this copy of the
guest must never change again, and the application cancels its tasks.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from ..errors import ConfigError, GuestFailed, Owner, StateError
from ..expected import expect
from ..memory.block import MemfdBlock
from ..memory.tracking import MarkTracker, check_method, choose_tracker
from .base import GuestBase

if TYPE_CHECKING:
    from ..guest import DirtyTracker
    from ..owner import OwnerState, Settle

Hook = Callable[[], Awaitable[None]]
#: Gets the share of its load that the application should shed, 0 to 0.99.
ThrottleHook = Callable[[float], Awaitable[None]]


class AppGuest(GuestBase):
    """State of this application that can be migrated, or that waits to be received.

    Use it as a context manager, or call :meth:`close`, to give the memory back.

    Args:
        name: the machine name; both ends must agree on it.
        running: False on the receiving side: the gate is closed (run state ``"inmigrate"``) until the guest arrives.
        dirty_tracking: ``"auto"`` (by the kernel, or else by comparing), ``"userfaultfd"``, ``"compare"``, or
            ``"marks"`` if the application calls :meth:`mark_dirty` after each write.
        on_pause: awaited by every pause, after the last task has left the gate. It may still change the state.
        on_resume: awaited by every resume, before the gate opens. It may change the state already.
        on_throttle: awaited where the application writes faster than can be sent (auto-converge), with the share of its
            load that it should shed: 0 to 0.99, and 0 at the end. With it, ``running()`` does not slow the tasks down.

    Raises:
        ConfigError: a bad name or method.
    """

    def __init__(
        self,
        name: str = "app",
        *,
        running: bool = True,
        dirty_tracking: str = "auto",
        on_pause: Hook | None = None,
        on_resume: Hook | None = None,
        on_throttle: ThrottleHook | None = None,
    ) -> None:
        super().__init__(name, run_state="running" if running else "inmigrate")
        check_method(dirty_tracking)
        self._method = dirty_tracking
        self._pause_hook = on_pause
        self._resume_hook = on_resume
        self._throttle_hook = on_throttle
        self._blocks: list[MemfdBlock] = []
        self._marks: MarkTracker | None = None
        self._closed = False
        self._gate = Gate(self._owner, is_open=running)
        #: Held by a task that pauses or resumes. Only one at a time, otherwise a cancelled call would undo the work of
        #: the other.
        self._turn = trio.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all RAM blocks. Arrays that were made from a block keep its memory alive. Idempotent; never fails.

        Do not call it while a migration runs: cancel the migration and wait for its end first.
        """
        self._closed = True
        for block in self._blocks:
            block.close()
        self._blocks.clear()
        self._ram.clear()

    def claim(self, purpose: str) -> None:
        """Reserve the guest for one migration. StateError if it is reserved or closed."""
        if self._closed:
            raise StateError(f"{self._title} is closed, and has no memory any more: migrate it before close()")
        super().claim(purpose)

    def add_ram(self, name: str, length: int) -> MemfdBlock:
        """A new RAM block of *length* bytes, all zero. Both ends must add the same names and lengths.

        Raises:
            ConfigError: the name is taken or does not fit the wire; the length is not a multiple of 4096.
            StateError: a migration is under way.
        """
        expect("name", name, str, "a str")
        expect("length", length, int, "an int, in bytes")
        self._check_unclaimed("RAM cannot be added")
        if any(block.name == name for block in self._blocks):
            raise ConfigError(f"guest {self._name!r} has a RAM block {name!r} already")
        block = self._make_block(name, length)
        self._blocks.append(block)
        self._ram.append(block)
        return block

    def _make_block(self, name: str, length: int) -> MemfdBlock:
        return MemfdBlock(name, length)

    def running(self) -> Hold:
        """``async with guest.running():`` holds off a pause; entering waits while the guest does not run.

        One task may nest it. A throttled guest is slowed down here: entering waits, in proportion to the time that the
        guest's tasks spent inside before.

        Raises:
            NotOwner: on entering: the guest was handed over, also during the wait; or the guest has not arrived, or its
                owner is not known, when the wait begins. Tasks that wait already go on waiting while the owner is not
                known.

        **Cancellation:** a cancelled task has not entered. The code inside is the caller's.
        """
        return Hold(self._gate)

    async def wait_running(self) -> None:
        """Return when the guest runs, if need be after its arrival. It may be paused again at the caller's next
        checkpoint.

        Raises:
            NotOwner: the guest was handed over.

        **Cancellation:** no effect.
        """
        await self._gate.wait_open()

    def mark_dirty(self, block: str, start: int, length: int) -> None:
        """Record that bytes ``[start, start + length)`` of *block* were written; for ``dirty_tracking="marks"``.

        Call it after the write and within the same ``running()`` block. The call is cheap, and harmless with other
        methods or while no migration runs.

        Raises:
            ValueError: the range is not in such a block.
        """
        size = next((ram.length for ram in self._blocks if ram.name == block), -1)
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start}..{start + length} are not in a RAM block {block!r}")
        if self._marks is not None:
            self._marks.mark(block, start, length)

    def dirty_tracker(self) -> DirtyTracker:
        """A tracker over all blocks. GuestFailed if userfaultfd was demanded and is not available."""
        tracker = choose_tracker(self._ram, prefer=self._method)
        if isinstance(tracker, MarkTracker):
            self._marks = tracker
        return tracker

    async def on_pause(self) -> None:
        """Called by :meth:`pause` when no task is inside; override it or pass ``on_pause=``.

        **Cancellation:** the guest goes on running without a call of :meth:`on_resume`, so undo a partial pause.
        """
        if self._pause_hook is not None:
            await self._pause_hook()

    async def on_resume(self) -> None:
        """Called by :meth:`resume` before any task may enter; override it or pass ``on_resume=``.

        **Cancellation:** as an error: the gate stays closed, and :meth:`resume` may be called again.
        """
        if self._resume_hook is not None:
            await self._resume_hook()

    async def on_throttle(self, share: float) -> bool:
        """Called by the engine before :meth:`throttle`; override it or pass ``on_throttle=``.

        See :class:`trimig.guest.SheddingGuest`. Without a hook this returns False, and ``running()`` slows the tasks
        down.

        **Cancellation:** the old or the new value is in force.
        """
        if self._throttle_hook is None:
            await trio.lowlevel.checkpoint()
            return False
        await self._throttle_hook(share)
        return True

    async def pause(self) -> None:
        """Close the gate, wait until every task has left it, call :meth:`on_pause`. No effect if the guest does not
        run.

        Raises:
            GuestFailed: ``on_pause`` failed, or the caller itself is inside the gate. The guest goes on running.

        **Cancellation:** the guest is as it was.
        """
        if self._gate.held_by_caller():
            raise GuestFailed("a task cannot pause the guest while it is inside guest.running()")
        async with self._turn:
            if self._run_state != "running":
                return
            self._gate.close()
            try:
                await self._gate.wait_empty()
                await self.on_pause()
            except Exception as exc:  # the application's own code: after any exception the guest is not paused
                self._gate.open()
                raise GuestFailed(f"the application refused to pause: {exc!r}") from exc
            except BaseException:
                self._gate.open()
                raise
            self._run_state = "paused"

    async def resume(self) -> None:
        """Call :meth:`on_resume` and open the gate. No effect if the guest runs.

        Raises:
            NotOwner: this side does not own the guest.
            GuestFailed: ``on_resume`` failed. The guest does not run.

        **Cancellation:** the guest is as it was.
        """
        if self._run_state == "running":  # or a pause is in progress, which takes precedence
            await trio.lowlevel.checkpoint()
            return
        async with self._turn:
            if self._run_state == "running":
                return
            with self._owner.starting():
                try:
                    await self.on_resume()
                except Exception as exc:  # the application's own code
                    raise GuestFailed(f"the application refused to resume: {exc!r}") from exc
            self._run_state = "running"
            self._gate.open()

    def set_owner(self, owner: Owner, *, handed_over: bool = False, settle: Settle | None = None) -> None:
        """For the engine: see :class:`trimig.guest.Guest`. Wakes the tasks that wait for a guest that was handed over."""
        super().set_owner(owner, handed_over=handed_over, settle=settle)
        if self._owner.handed_over:
            self._gate.wake()

    async def throttle(self, percent: int) -> None:
        """Make ``running()`` wait so that tasks are inside for at most 100 - *percent* of the time.

        Raises:
            ValueError: not within 0 to 99.

        **Cancellation:** the old value is in force.
        """
        await super().throttle(percent)
        self._gate.throttle(percent)


class Gate:
    """A gate that tasks may enter while it is open; it can be closed, and waited for until empty. All changes are
    synchronous.
    """

    def __init__(self, owner: OwnerState, *, is_open: bool) -> None:
        self._owner = owner
        self._holders: dict[trio.lowlevel.Task, int] = {}
        self._opened: trio.Event | None = None if is_open else trio.Event()
        self._emptied = trio.Event()
        self._percent = 0
        self._changed = trio.Event()
        #: The throttle: no task may enter before this time, in proportion to the time spent inside.
        self._not_before = -math.inf

    def open(self) -> None:
        """Open the gate for waiting and new tasks. Idempotent."""
        if self._opened is not None:
            self._opened.set()
            self._opened = None

    def close(self) -> None:
        """Close the gate. Idempotent."""
        if self._opened is None:
            self._opened = trio.Event()

    def wake(self) -> None:
        """Wake the waiting tasks, which check again whether this side owns the guest."""
        if self._opened is not None:
            self._opened.set()
            self._opened = trio.Event()
        self._changed.set()
        self._changed = trio.Event()

    def throttle(self, percent: int) -> None:
        """Set the throttle; 0 lets tasks that wait because of it enter at once."""
        self._percent = percent
        self._not_before = -math.inf
        self._changed.set()
        self._changed = trio.Event()

    def held_by_caller(self) -> bool:
        """Whether the calling task is inside."""
        return trio.lowlevel.current_task() in self._holders

    async def wait_open(self) -> None:
        """Wait until the gate is open. NotOwner for a guest that was handed over."""
        await trio.lowlevel.checkpoint()
        while self._opened is not None:
            if self._owner.handed_over:
                self._owner.check("be waited for")
            await self._opened.wait()

    async def wait_empty(self) -> None:
        """Wait until no task is inside."""
        await trio.lowlevel.checkpoint()
        while self._holders:
            if self._emptied.is_set():
                self._emptied = trio.Event()
            await self._emptied.wait()

    async def enter(self) -> None:
        """Wait and enter. No checkpoint follows the entering, so a cancelled task is always outside. NotOwner."""
        task = trio.lowlevel.current_task()
        await trio.lowlevel.checkpoint()
        if task not in self._holders:
            self._owner.check("be used")
        # A task that is inside may enter again even if the gate has closed: the pause waits for this task anyway.
        while task not in self._holders:
            if self._owner.handed_over:
                self._owner.check("be used")
            if trio.current_time() < self._not_before:
                with trio.move_on_at(self._not_before):
                    await self._changed.wait()
            elif self._opened is not None:
                await self._opened.wait()
            else:
                break
        self._holders[task] = self._holders.get(task, 0) + 1

    def leave(self, held: float) -> None:
        """Leave after *held* seconds inside."""
        task = trio.lowlevel.current_task()
        self._holders[task] -= 1
        if not self._holders[task]:
            del self._holders[task]
            if self._percent:
                now = trio.current_time()
                self._not_before = max(now, self._not_before) + held * self._percent / (100 - self._percent)
        if not self._holders:
            self._emptied.set()


class Hold:
    """The context manager that :meth:`AppGuest.running` returns, for one stay inside the gate. For one task, once at a
    time.
    """

    __slots__ = ("_gate", "_since")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._since = math.nan

    async def __aenter__(self) -> None:
        await self._gate.enter()
        self._since = trio.current_time()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._gate.leave(trio.current_time() - self._since)
