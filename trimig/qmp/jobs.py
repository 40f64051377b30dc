"""Migrations that go on in the background while the clients of a QMP server come and go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from ..errors import TrimigError


class Job:
    """One of them, for the function that does it.

    Attributes:
        refusal: why it could not begin; set before :meth:`begin`.
    """

    def __init__(self) -> None:
        self.refusal: TrimigError | None = None
        self._begun = trio.Event()
        self._over = trio.Event()

    @property
    def begun(self) -> bool:
        """It has begun, or never will."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Whoever has started it can go on."""
        self._begun.set()

    def end(self) -> None:
        """It is over."""
        self._begun.set()
        self._over.set()

    async def wait_begun(self) -> None:
        """Wait until it has begun. TrimigError: it could not.

        **Cancellation:** it goes on.
        """
        await self._begun.wait()
        if self.refusal is not None:
            raise self.refusal

    async def wait_over(self) -> None:
        """Wait for its end.

        **Cancellation:** it goes on.
        """
        await self._over.wait()


class Jobs:
    """All of them.

    Args:
        nursery: where they run.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._jobs: set[Job] = set()

    async def start(self, work: Callable[[Job], Awaitable[None]], name: str) -> None:
        """Let *work* go on in the background, in a task with that *name*; returns when it says that it has begun.

        Raises:
            TrimigError: it could not begin.

        **Cancellation:** it goes on.
        """
        job = Job()
        self._jobs.add(job)
        self._nursery.start_soon(self._run, work, job, name=name)
        await job.wait_begun()

    async def _run(self, work: Callable[[Job], Awaitable[None]], job: Job) -> None:
        try:
            await work(job)
        finally:
            self._jobs.discard(job)
            job.end()

    async def wait(self) -> None:
        """Wait for the end of those that go on now.

        **Cancellation:** they go on.
        """
        for job in tuple(self._jobs):
            await job.wait_over()
