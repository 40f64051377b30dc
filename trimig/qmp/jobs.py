"""Migrations that run in the background while the clients of a QMP server come and go."""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from ..status import RECOVERABLE, Status

if TYPE_CHECKING:
    from ..errors import TrimigError
    from ..monitor.monitor import Monitor
    from ..monitor.statistics import Event

log: Final = logging.getLogger("trimig.qmp")


class IncomingState(enum.Enum):
    """Whether a machine waits for a guest."""

    #: The machine waits for ``migrate-incoming`` with an address.
    DEFERRED = "deferred"
    ACTIVE = "active"
    #: The last attempt has failed; ``migrate-incoming`` may begin another.
    FAILED = "failed"
    #: The machine was never told to wait, or the guest has arrived.
    NONE = "none"


class Job:
    """The state of one background job, for the function that does the work.

    Attributes:
        refusal: why the job could not begin; set before :meth:`begin`.
    """

    def __init__(self) -> None:
        self.refusal: TrimigError | None = None
        self._begun = trio.Event()
        self._over = trio.Event()

    @property
    def begun(self) -> bool:
        """True if the job has begun, or could not begin."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Mark the job as begun, so that the task that started the job goes on."""
        self._begun.set()

    def refuse(self, error: TrimigError) -> None:
        """Record why the job could not begin."""
        self.refusal = error

    def end(self) -> None:
        """Mark the job as ended."""
        self._begun.set()
        self._over.set()

    async def wait_begun(self) -> None:
        """Wait until the job has begun. TrimigError: the job could not begin.

        **Cancellation:** the job goes on.
        """
        await self._begun.wait()
        if self.refusal is not None:
            raise self.refusal

    async def wait_over(self) -> None:
        """Wait for the job's end.

        **Cancellation:** the job goes on.
        """
        await self._over.wait()


class Jobs:
    """All background jobs of one machine.

    Args:
        nursery: the jobs run there.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._jobs: set[Job] = set()

    async def start(self, work: Callable[[Job], Awaitable[None]], name: str) -> None:
        """Run *work* in the background, in a task with that *name*; returns when *work* says that the job has begun.

        Raises:
            TrimigError: the job could not begin.

        **Cancellation:** the job goes on.
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
        """Wait for the end of all present jobs.

        **Cancellation:** the jobs go on.
        """
        for job in tuple(self._jobs):
            await job.wait_over()


def log_not_arrived(status: Status, error: TrimigError, *, ends: bool) -> None:
    """Log why an incoming migration has brought no guest. *ends*: the process ends, too."""
    level = logging.INFO if status is Status.CANCELLED else logging.WARNING
    rest = "" if ends else "; nothing listens here until trimig incoming (migrate-incoming) gives an address"
    log.log(level, "nothing has arrived: %s%s", error, rest)


def abandon_paused(monitor: Monitor, reason: str, _: Event | None = None) -> None:
    """Abandon a paused migration: the process ends, so no client can recover that migration."""
    if monitor.status in RECOVERABLE:
        monitor.abandon(reason)
