"""The bridge for callers that do not run on trio: synchronous code, asyncio, and byte streams of anyio.

The engine runs on trio and on nothing else. A :class:`Portal` runs it in a thread of its own, and lets other code start
migrations there, watch them, and cancel them::

    with trimig.portal.Portal() as portal:
        summary = portal.migrate(guest, "tcp:host-b:4444")      # blocks; Ctrl-C puts the guest back first

    async with trimig.portal.Portal() as portal:                # in asyncio
        summary = await portal.start_migrate(guest, "tcp:host-b:4444")

The engine's promises about cancellation hold through the portal: a KeyboardInterrupt or an asyncio cancellation cancels
the migration, and is raised only when the migration has been undone (or was over already), in bounded time. No thread
outlives the portal, except that trio keeps an idle worker thread for a few seconds if a hook needed one.

:func:`from_anyio` is for applications that run anyio *on trio*: it wraps one of their streams as a channel.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, overload

import anyio
import anyio.abc
import anyio.from_thread
import trio

from .. import api
from ..channel.offload import offload
from ..errors import GuestNotResumed, MigrationCancelled, Ownership, TrimigError
from ..expected import expect
from ..monitor.monitor import Monitor, Statistics, Summary
from ..status import IDLE, Status

if TYPE_CHECKING:
    from ..config.config import Config
    from ..config.parameters import Parameters
    from ..guest import Guest


P = ParamSpec("P")
T = TypeVar("T")

#: A hook as for :func:`trimig.migrate`, or a plain function, which is called in a thread.
CommitHook = Callable[[], Awaitable[None] | None]
FenceHook = Callable[[], Awaitable[Ownership] | Ownership]


class Portal:
    """A trio run in a thread of its own. Use it as a context manager, in asyncio as an asynchronous one.

    Leaving the context waits for running migrations; leaving it by an exception cancels them first.
    """

    def __init__(self) -> None:
        self._context: contextlib.AbstractContextManager[anyio.from_thread.BlockingPortal] | None = None
        self._portal: anyio.from_thread.BlockingPortal | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._handles: set[Handle] = set()

    def __enter__(self) -> Self:
        if self._context is not None:
            raise RuntimeError("this portal is open already")
        context = anyio.from_thread.start_blocking_portal("trio", name="trimig.portal")
        self._portal = context.__enter__()
        self._context = context
        self._token = self._portal.call(trio.lowlevel.current_trio_token)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for handle in tuple(self._handles):
                if error is not None:
                    handle._abort("the portal was left by an exception")
                handle._settle()
        finally:
            self._close(kind, error, trace)

    async def __aenter__(self) -> Self:
        return self.__enter__()  # starting a thread takes about a millisecond

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for handle in tuple(self._handles):
                if error is not None:
                    handle._abort("the portal was left by an exception")
                await handle._settle_asyncio()
        finally:
            self._close(kind, error, trace)  # no migration is running any more, so this does not block

    def _close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context, self._context, self._portal = self._context, None, None
        if context is not None:
            context.__exit__(kind, error, trace)

    # -- migrations ------------------------------------------------------------------------------------------------

    def migrate(
        self,
        guest: Guest,
        to: str | trio.abc.SendStream,
        config: Config | None = None,
        *,
        monitor: Monitor | None = None,
        commit: CommitHook | None = None,
        fence: FenceHook | None = None,
    ) -> Summary:
        """:func:`trimig.migrate` for synchronous code: it blocks, and returns or raises the same.

        Raises:
            KeyboardInterrupt: the migration was cancelled, and the guest is as it was, unless the destination had it
                already. A note at the exception and ``monitor.owner`` tell which side owns the guest.
        """
        handle, begin = self._migration(guest, to, config, monitor, commit, fence)
        return handle._wait(begin)

    def start_migrate(
        self,
        guest: Guest,
        to: str | trio.abc.SendStream,
        config: Config | None = None,
        *,
        monitor: Monitor | None = None,
        commit: CommitHook | None = None,
        fence: FenceHook | None = None,
    ) -> Handle:
        """Begin :func:`trimig.migrate` and return at once; :class:`Handle` gives the result.

        Hooks are coroutine functions, which then run in the portal's thread as trio code, or plain functions, which
        are called in a thread.
        """
        handle, begin = self._migration(guest, to, config, monitor, commit, fence)
        return handle._start(begin)

    def receive(
        self,
        guest: Guest,
        at: str | trio.abc.ReceiveStream,
        config: Config | None = None,
        *,
        monitor: Monitor | None = None,
    ) -> Summary:
        """:func:`trimig.receive` for synchronous code; KeyboardInterrupt as for :meth:`migrate`."""
        handle, begin = self._reception(guest, at, config, monitor)
        return handle._wait(begin)

    def start_receive(
        self,
        guest: Guest,
        at: str | trio.abc.ReceiveStream,
        config: Config | None = None,
        *,
        monitor: Monitor | None = None,
    ) -> Handle:
        """Begin :func:`trimig.receive` and return at once; :meth:`Handle.wait_listening` has the address."""
        handle, begin = self._reception(guest, at, config, monitor)
        return handle._start(begin)

    def _migration(
        self,
        guest: Guest,
        to: str | trio.abc.SendStream,
        config: Config | None,
        monitor: Monitor | None,
        commit: CommitHook | None,
        fence: FenceHook | None,
    ) -> tuple[Handle, Callable[[], object]]:
        api.check_migrate(guest, to, config, monitor, commit, fence)
        monitor = monitor or Monitor()
        call = functools.partial(
            api.migrate, guest, to, config, monitor=monitor, commit=_trio_hook(commit), fence=_trio_hook(fence)
        )
        return self._prepare(call, monitor)

    def _reception(
        self, guest: Guest, at: str | trio.abc.ReceiveStream, config: Config | None, monitor: Monitor | None
    ) -> tuple[Handle, Callable[[], object]]:
        api.check_receive(guest, at, config, monitor)
        monitor = monitor or Monitor()
        return self._prepare(functools.partial(api.receive, guest, at, config, monitor=monitor), monitor)

    def _prepare(self, call: Callable[[], Awaitable[Summary]], monitor: Monitor) -> tuple[Handle, Callable[[], object]]:
        """A handle, and the function that begins its migration. An interrupt between the two can cancel through the
        handle.
        """
        portal = self._running()
        assert self._token is not None
        handle = Handle(self, monitor, self._token)
        self._handles.add(handle)
        handle._outcome.add_done_callback(lambda _: self._handles.discard(handle))
        return handle, functools.partial(portal.start_task_soon, handle._run, call, name="trimig.portal.migration")

    # -- anything else ---------------------------------------------------------------------------------------------

    @overload
    def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call *function* in the portal's thread and return its result; a coroutine function runs on trio.

        Use it to prepare a guest for a migration, and for the methods of a monitor.
        """
        return self._running().call(functools.partial(function, *args, **kwargs))

    def context(
        self, manager: contextlib.AbstractAsyncContextManager[T, Any]
    ) -> contextlib.AbstractContextManager[T, bool | None]:
        """An asynchronous context manager of the trio side, such as a :class:`trimig.WorkloadGuest`, as a plain one."""
        return self._running().wrap_async_context_manager(manager)

    def _running(self) -> anyio.from_thread.BlockingPortal:
        if self._portal is None:
            raise RuntimeError("this portal is not open; use it in a with block")
        return self._portal


class Handle:
    """A migration that was started through a :class:`Portal`; every method may be called from any other thread.

    In asyncio the handle can be awaited: this gives the summary or raises the error, and cancelling the waiting task
    cancels the migration.
    """

    def __init__(self, portal: Portal, monitor: Monitor, token: trio.lowlevel.TrioToken) -> None:
        """For :class:`Portal` only."""
        self._portal = portal
        self._monitor = monitor
        self._token = token
        self._scope = trio.CancelScope()
        self._begun = False
        self._reason = "the caller was cancelled"
        self._outcome: concurrent.futures.Future[Summary] = concurrent.futures.Future()
        # From now on a caller cannot cancel the future without cancelling the migration.
        self._outcome.set_running_or_notify_cancel()

    def __repr__(self) -> str:
        return f"<trimig.portal.Handle {'done, ' if self.done else ''}{self.status.value}>"

    @property
    def status(self) -> Status:
        """The status of the migration."""
        return self._monitor.status

    @property
    def owner(self) -> Ownership:
        """The side that may run the guest."""
        return self._monitor.owner

    @property
    def done(self) -> bool:
        """Whether the migration has ended, with success or not."""
        return self._outcome.done()

    def statistics(self) -> Statistics:
        """The present figures, or those at the end."""
        return self._portal.call(self._monitor.statistics)

    def info(self) -> dict[str, Any]:
        """See :meth:`trimig.Monitor.info`."""
        return self._portal.call(self._monitor.info)

    def set_parameters(self, **changes: Any) -> Parameters:
        """See :meth:`trimig.Monitor.set_parameters`."""
        return self._portal.call(functools.partial(self._monitor.set_parameters, **changes))

    def wait_listening(self, timeout: float | None = None) -> tuple[str, ...]:
        """Wait until a receiver listens, and return its addresses; empty if the migration ended before.

        Raises:
            TimeoutError: not within *timeout* seconds.
        """

        async def wait() -> tuple[str, ...]:
            with trio.move_on_after(float("inf") if timeout is None else timeout):
                while not self._monitor.addresses and not self.done:
                    with trio.move_on_after(0.01):  # a call that ends before it begins changes no monitor, so poll
                        await self._monitor.wait_changed()
                return self._monitor.addresses
            raise TimeoutError("the receiver does not listen yet")

        return self._portal.call(wait)

    def cancel(self, reason: str = "no reason was given") -> None:
        """Cancel the migration; :meth:`result` then raises :class:`trimig.MigrationCancelled`.

        Does nothing if the migration is over.

        Raises:
            StateError: the decision to hand over has been sent and cannot be taken back.
        """
        expect("reason", reason, str, "a str")
        if not self.done:
            self._portal.call(self._cancel, reason)

    def _cancel(self, reason: str) -> None:
        if self.done:
            return
        if self._monitor.status in IDLE:  # the migration has not begun yet
            self._reason = reason
            self._scope.cancel(reason)
        else:
            self._monitor.cancel(reason)

    def result(self, timeout: float | None = None) -> Summary:
        """Wait for the end; return the summary, or raise the error of the migration.

        Raises:
            TimeoutError: not over within *timeout* seconds; the migration goes on.
            KeyboardInterrupt: the migration was cancelled, and is over: see :meth:`Portal.migrate`.
        """
        try:
            return self._outcome.result(timeout)
        except KeyboardInterrupt as interrupt:
            self._interrupted(interrupt)
            raise

    def __await__(self) -> Generator[Any, None, Summary]:
        return self._wait_asyncio().__await__()

    async def _wait_asyncio(self) -> Summary:
        try:
            return await asyncio.wrap_future(self._outcome)
        except asyncio.CancelledError as cancelled:
            self._abort("the waiting task was cancelled")
            await self._settle_asyncio()
            cancelled.add_note(self._fate())
            raise

    # -- inside ----------------------------------------------------------------------------------------------------

    def _start(self, begin: Callable[[], object]) -> Self:
        """Begin the migration. If an interrupt comes meanwhile, the migration does not begin or is undone."""
        try:
            begin()
        except KeyboardInterrupt as interrupt:
            self._interrupted(interrupt)
            raise
        return self

    def _wait(self, begin: Callable[[], object]) -> Summary:
        """Begin the migration and wait for its end. At no moment an interrupt leaves the migration running unattended."""
        try:
            begin()
            return self._outcome.result()
        except KeyboardInterrupt as interrupt:
            self._interrupted(interrupt)
            raise

    def _interrupted(self, interrupt: KeyboardInterrupt) -> None:
        self._abort("KeyboardInterrupt")
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._never)
        self._settle()
        interrupt.add_note(self._fate())

    def _never(self) -> None:
        """Prevent a migration that has not begun from beginning; runs in the portal's thread."""
        if not self._begun and not self.done:
            self._outcome.set_exception(MigrationCancelled(self._reason))

    async def _run(self, call: Callable[[], Awaitable[Summary]]) -> None:
        """Run the migration; in the portal's thread."""
        if self.done:
            return  # interrupted before it began
        self._begun = True
        try:
            with self._scope:
                self._outcome.set_result(await call())
        except TrimigError as error:
            self._outcome.set_exception(error)
        except Exception as error:
            self._outcome.set_exception(error)
            raise
        finally:
            if not self._outcome.done():
                self._outcome.set_exception(MigrationCancelled(self._reason))

    def _abort(self, reason: str) -> None:
        """Cancel the migration through its cancel scope; safe in any thread and at any time."""
        self._reason = reason if not self.done else self._reason
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel, reason)

    def _settle(self) -> None:
        """Wait for the end of the migration. An interrupt cancels the migration, and is raised at the end."""
        interrupted: KeyboardInterrupt | None = None
        while not self.done:
            try:
                concurrent.futures.wait([self._outcome])
            except KeyboardInterrupt as interrupt:
                # Undoing takes bounded time; returning earlier would leave the guest unattended.
                interrupted = interrupt
                self._abort("KeyboardInterrupt")
        if interrupted is not None:
            raise interrupted

    async def _settle_asyncio(self) -> None:
        """As :meth:`_settle`; a cancellation cancels the migration, and is raised at the end."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def tell(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits any more
                loop.call_soon_threadsafe(over.set)

        self._outcome.add_done_callback(tell)
        cancelled: asyncio.CancelledError | None = None
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError as error:
                cancelled = error
                self._abort("the waiting task was cancelled")
        if cancelled is not None:
            raise cancelled

    def _fate(self) -> str:
        """The state of the guest after a cancellation, as a sentence."""
        error = self._outcome.exception()
        if error is None:
            return "it was too late to cancel the migration: the destination owns the guest"
        if isinstance(error, GuestNotResumed):
            return f"the migration was cancelled, and the guest stands still at the source: {error}"
        owner = error.owner if isinstance(error, TrimigError) else self.owner
        if owner is Ownership.UNKNOWN:
            return f"the migration was interrupted, and the owner of the guest is not known: {error}"
        return f"the migration was cancelled; the owner of the guest is the {(owner or self.owner).value}"


def _trio_hook(hook: Callable[[], Awaitable[T] | T] | None) -> Callable[[], Awaitable[T]] | None:
    """The hook as an async function: a plain function is called in a thread."""
    if hook is None:
        return None
    if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(type(hook).__call__):
        return hook  # type: ignore[return-value]  # the check above shows that it returns an awaitable
    return functools.partial(offload, hook)  # type: ignore[return-value]  # the check shows that it returns none


# -- streams of anyio --------------------------------------------------------------------------------------------------
