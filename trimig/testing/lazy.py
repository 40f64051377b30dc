"""A scripted guest that can run before its memory is here, for tests of postcopy on a virtual clock.

Its page faults are a script: once the guest runs, it touches given pages one after the other, and waits at each absent
page until the engine places it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import trio

from ..guest import PageBitmap, Pages, Wait
from .fakes import ScriptedGuest
from .parts import FakeBlock


class LazyFakeBlock(FakeBlock):
    """A block whose pages can be made absent."""

    def __init__(self, block: FakeBlock) -> None:
        super().__init__(block.name, block.pages, lambda: None)
        self.gone: PageBitmap = np.zeros(len(block.pages), np.bool_)

    def discard_slice(self, first_page: int, count: int) -> None:
        """Make those pages zero and absent."""
        self.pages[first_page : first_page + count] = 0
        self.gone[first_page : first_page + count] = True


class LazyScriptedGuest(ScriptedGuest):
    """Implements :class:`trimig.guest.LazyGuest`; a destination.

    Args:
        touches: pages of the first block that the guest touches once it runs, in this order. It writes nothing.
        options: as for :class:`ScriptedGuest`.
    """

    def __init__(self, *, touches: Sequence[int] = (), **options: Any) -> None:
        super().__init__(**options)
        self._lazy = tuple(LazyFakeBlock(block) for block in super().ram)
        self.touches = list(touches)
        #: Pages that were placed although they were present.
        self.overwritten: list[tuple[int, int]] = []
        #: The number of pages that the guest had to wait for.
        self.faults = 0
        #: The open memory, if any.
        self.memory: ScriptedMemory | None = None
        self.on_event(self._look_who_runs)

    @property
    def ram(self) -> Sequence[LazyFakeBlock]:
        """The RAM blocks."""
        return self._lazy

    def _look_who_runs(self, event: str) -> None:
        if event == "start" and self.memory is not None:
            self.memory.go_on()

    async def missing_memory(self) -> ScriptedMemory:
        """Make the guest wait for absent pages from now on. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()
        if self.running:
            self.misuse.append("missing_memory() of a running guest")
        self.memory = ScriptedMemory(self)
        return self.memory

    async def memory_is_whole(self) -> Sequence[float]:
        """End postcopy: no page is missing any more. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()
        return (0.0,)

    def count_fault(self) -> None:
        """For the memory: count a page that the guest has to wait for."""
        self.faults += 1

    def forget_memory(self) -> None:
        """For the memory: it was closed."""
        self.memory = None


class ScriptedMemory:
    """Implements :class:`trimig.guest.MissingMemory`."""

    def __init__(self, guest: LazyScriptedGuest) -> None:
        self._guest = guest
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waits: list[Wait] = []
        self._waiting: int | None = None

    def fileno(self) -> int:
        """A descriptor that is readable while the guest waits."""
        return self._event

    def waits(self) -> Sequence[Wait]:
        """The faults since the last call."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return ()
        waits, self._waits = self._waits, []
        return waits

    def go_on(self) -> None:
        """Let the guest touch its next pages, until one is absent."""
        guest = self._guest
        gone = guest.ram[0].gone
        if not guest.running or (self._waiting is not None and gone[self._waiting]):
            return
        self._waiting = None
        while guest.touches:
            page = guest.touches.pop(0)
            if gone[page]:
                self._waiting = page
                guest.count_fault()
                self._waits.append(Wait(block=0, page=page, thread=1))
                os.eventfd_write(self._event, 1)
                return

    def place(self, block: int, first: int, pages: Pages) -> int:
        """Place *pages* where they are absent."""
        target = self._guest.ram[block]
        placed = 0
        for page in range(first, first + len(pages)):
            if target.gone[page]:
                target.pages[page] = pages[page - first]
                target.gone[page] = False
                placed += 1
            else:
                self._guest.overwritten.append((block, page))
        self.go_on()
        return placed

    def place_zeros(self, block: int, first: int, count: int) -> int:
        """As :meth:`place`, with zeros; a present page is not changed."""
        target = self._guest.ram[block]
        placed = int(np.count_nonzero(target.gone[first : first + count]))
        target.gone[first : first + count] = False  # its content is zero already
        self.go_on()
        return placed

    def close(self) -> None:
        """Idempotent."""
        if self._event >= 0:
            if self._guest.running and any(block.gone.any() for block in self._guest.ram):
                self._guest.misuse.append("memory was closed under a running guest that lacks pages")
            os.close(self._event)
            self._event = -1
            self._guest.forget_memory()
