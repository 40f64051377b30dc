"""Makes one call of the caller's choice fail, or never return.

An instrument can cancel a task but cannot raise into one. So this module wraps the things that an engine calls. All
wrappers with the same :class:`Calls` count together, in the order of the calls, and call number *n* fails. A
sweep over n then fails every call once, without knowing the names of the calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, final

import trio

from ..engine.guest_calls import new_tracker
from ..guest import SheddingGuest

if TYPE_CHECKING:
    from ..errors import Owner
    from ..guest import (
        DeviceProtocol,
        DeviceSection,
        DirtyTracker,
        Guest,
        LazyGuest,
        MissingMemory,
        PageBitmap,
        RamBlock,
    )
    from ..owner import Settle

T = TypeVar("T")


class Calls:
    """Counts calls and makes one of them fail.

    Args:
        fail_at: the number of the call to fail, from 1; None for none.
        error: makes the exception from a text; any exception class with one argument will do.
        hang: the call never returns instead (until cancelled).
        when: ``"before"`` the call has any effect, or ``"after"`` its whole effect (streams only: by the contract of
            a guest's calls, a call that raises had no effect).
        only: names of the calls that count (``"source.pause"``, ``"a.send_all"``); None for all.
    """

    def __init__(
        self,
        *,
        fail_at: int | None = None,
        error: Callable[[str], Exception] = OSError,
        hang: bool = False,
        when: Literal["before", "after"] = "before",
        only: Callable[[str], bool] | None = None,
    ) -> None:
        self.fail_at = fail_at
        self.error = error
        self.hang = hang
        self.when = when
        self.only = only
        self._counting = True
        #: The names of all calls counted, in order.
        self.names: list[str] = []
        #: The failure has been delivered.
        self.fired = False

    def start_counting(self) -> None:
        """Count calls, as from the beginning. A sweep counts those of the part under test only."""
        self._counting = True

    def stop_counting(self) -> None:
        """Let every call through, and count none."""
        self._counting = False

    async def through(self, name: str, call: Callable[[], Awaitable[T]], *, late: bool | None = None) -> T:
        """Make *call*, or fail in its place (or, with *late*, behind it; None follows :attr:`when`).

        **Cancellation:** as for *call*; a hanging call is cancellable.
        """
        strike = self._count(name)
        if late is None:
            late = self.when == "after"
        if strike and not late:
            await self._strike(name)
        result = await call()
        if strike:
            await self._strike(name)
        return result

    async def close(self, name: str, call: Callable[[], Awaitable[None]]) -> None:
        """Make *call*, which closes something, and fail after it even if it was cancelled: it has closed then too.

        **Cancellation:** *call* has been made.
        """
        strike = self._count(name)
        try:
            await call()
        finally:
            if strike:
                await self._strike(name)

    def _count(self, name: str) -> bool:
        """Whether this is the call to fail."""
        if not self._counting or (self.only is not None and not self.only(name)):
            return False
        self.names.append(name)
        return len(self.names) == self.fail_at

    async def _strike(self, name: str) -> None:
        self.fired = True
        if self.hang:
            await trio.sleep_forever()
        raise self.error(f"injected into call {self.fail_at}, {name}")


@final
class FailingStream(trio.abc.HalfCloseableStream):
    """Passes everything on to *stream*, and counts its calls as ``<label>.send_all``, ``<label>.receive_some``, ….

    A failing ``aclose`` has closed the wrapped stream, as the contract of :class:`trio.abc.AsyncResource` demands.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, calls: Calls, *, label: str = "stream") -> None:
        self._stream = stream
        self._calls = calls
        self._label = label

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the wrapped stream. **Cancellation:** any part may have been sent."""
        await self._calls.through(f"{self._label}.send_all", lambda: self._stream.send_all(data))

    async def wait_send_all_might_not_block(self) -> None:
        """As the wrapped stream. **Cancellation:** has no effect."""
        await self._calls.through(f"{self._label}.wait_send", self._stream.wait_send_all_might_not_block)

    async def send_eof(self) -> None:
        """As the wrapped stream, the **Cancellation** too."""
        await self._calls.through(f"{self._label}.send_eof", self._stream.send_eof)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the wrapped stream. **Cancellation:** with ``when="after"``, bytes may be lost."""
        return await self._calls.through(f"{self._label}.receive_some", lambda: self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        """Close the wrapped stream. **Cancellation:** it is closed nevertheless."""
        await self._calls.close(f"{self._label}.aclose", self._stream.aclose)


@final
class FailingTracker:
    """A dirty tracker whose ``start`` and ``sync`` are counted as ``<label>.track`` and ``<label>.sync``."""

    def __init__(self, tracker: DirtyTracker, calls: Calls, *, label: str) -> None:
        self._tracker = tracker
        self._calls = calls
        self._label = label

    @property
    def method(self) -> str:
        """As the wrapped tracker."""
        return self._tracker.method

    async def start(self) -> None:
        """As the wrapped tracker. **Cancellation:** tracking may be on."""
        await self._calls.through(f"{self._label}.track", self._tracker.start, late=False)

    async def sync(self) -> Mapping[str, PageBitmap]:
        """As the wrapped tracker. **Cancellation:** marks may be lost."""
        return await self._calls.through(f"{self._label}.sync", self._tracker.sync, late=False)

    def stop(self) -> None:
        """As the wrapped tracker; never fails."""
        self._tracker.stop()


class FailingGuest:
    """Passes everything on to *guest*, and counts its coroutines as ``<label>.pause``, ``<label>.save_devices``, …."""

    def __init__(self, guest: Guest, calls: Calls, *, label: str = "guest") -> None:
        #: The wrapped guest.
        self.guest = guest
        self._calls = calls
        self._label = label

    @property
    def name(self) -> str:
        """As the wrapped guest."""
        return self.guest.name

    @property
    def ram(self) -> Sequence[RamBlock]:
        """As the wrapped guest."""
        return self.guest.ram

    @property
    def devices(self) -> Mapping[tuple[str, int], DeviceProtocol] | None:
        """As the wrapped guest."""
        return self.guest.devices

    @property
    def run_state(self) -> str:
        """As the wrapped guest."""
        return self.guest.run_state

    @property
    def owner(self) -> Owner:
        """As the wrapped guest."""
        return self.guest.owner

    def set_owner(self, owner: Owner, *, handed_over: bool = False, settle: Settle | None = None) -> None:
        """As the wrapped guest."""
        self.guest.set_owner(owner, handed_over=handed_over, settle=settle)

    async def settle(self, owner: Owner) -> None:
        """As the wrapped guest, the **Cancellation** too."""
        await self.guest.settle(owner)

    def claim(self, purpose: str) -> None:
        """As the wrapped guest."""
        self.guest.claim(purpose)

    def release(self) -> None:
        """As the wrapped guest."""
        self.guest.release()

    def dirty_tracker(self) -> FailingTracker:
        """A counted tracker around a tracker of the wrapped guest."""
        return FailingTracker(new_tracker(self.guest), self._calls, label=self._label)

    async def pause(self) -> None:
        """As the wrapped guest, the **Cancellation** too."""
        await self._through("pause", self.guest.pause)

    async def resume(self) -> None:
        """As the wrapped guest, the **Cancellation** too."""
        await self._through("resume", self.guest.resume)

    async def on_throttle(self, share: float) -> bool:
        """As the wrapped guest, the **Cancellation** too. False if it cannot shed load."""
        guest = self.guest
        if not isinstance(guest, SheddingGuest):
            await trio.lowlevel.checkpoint()
            return False
        return await self._through("on_throttle", lambda: guest.on_throttle(share))

    async def throttle(self, percent: int) -> None:
        """As the wrapped guest, the **Cancellation** too."""
        await self._through("throttle", lambda: self.guest.throttle(percent))

    async def save_devices(self) -> Sequence[DeviceSection]:
        """As the wrapped guest, the **Cancellation** too."""
        return await self._through("save_devices", self.guest.save_devices)

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """As the wrapped guest, the **Cancellation** too."""
        await self._through("load_devices", lambda: self.guest.load_devices(sections))

    async def activate(self, run_state: str) -> None:
        """As the wrapped guest, the **Cancellation** too."""
        await self._through("activate", lambda: self.guest.activate(run_state))

    async def _through(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        return await self._calls.through(f"{self._label}.{name}", call, late=False)


@final
class FailingLazyGuest(FailingGuest):
    """A :class:`FailingGuest` for a guest that can run before its memory is here."""

    def __init__(self, guest: LazyGuest, calls: Calls, *, label: str = "guest") -> None:
        super().__init__(guest, calls, label=label)
        self._lazy = guest

    async def missing_memory(self) -> MissingMemory:
        """As the wrapped guest, the **Cancellation** too."""
        return await self._through("missing_memory", self._lazy.missing_memory)

    async def memory_is_whole(self) -> Sequence[float]:
        """As the wrapped guest, the **Cancellation** too."""
        return await self._through("memory_is_whole", self._lazy.memory_is_whole)
