"""Runs a :class:`Service` in a thread beside trio, so that what the run loop does meanwhile delays nothing in it.

A service has neither a thread nor a descriptor of its own: a test calls :meth:`Service.advance` itself, with scripted channels.

The rule for what a service and the tasks of trio share: it belongs to one of them at a time. While :meth:`Attendant.run` has not
returned, it belongs to the thread: the channels, their byte counts, the decoders, and what the service was made of. Tasks only
read numbers of it, for statistics; such a number may be some bytes or pages old. There is no lock, because nothing is used by two
threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import select
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import trio

from . import offload
from .pump import stalled

if TYPE_CHECKING:
    from .channel import Channel

#: Seconds after which a thread that waits looks if a stream was closed.
_LOOK_SECONDS: Final = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Awaited:
    """What a service waits for.

    Attributes:
        ports: the events of poll(2) for each descriptor.
        progress: a number that changes as long as the peer keeps up.
        seconds: after so long without progress the peer has failed; ``math.inf`` for never.
        fault: what it did then, see :func:`.pump.stalled`.
        busy: there is work left that waits for nothing: the next call follows at once.
    """

    ports: Mapping[int, int]
    progress: int
    seconds: float
    fault: str
    busy: bool = False


class Service(Protocol):
    """Work on channels of one side, of which no part waits."""

    def advance(self) -> Awaited | None:
        """Do what can be done without waiting, for about a millisecond at most; None if trio has to go on.

        Raises:
            TrimigError: it cannot go on.
        """


class Attendant:
    """Runs one service at a time, in a thread."""

    def __init__(self) -> None:
        self._working: _Thread | None = None

    async def run(self, service: Service, channels: Sequence[Channel]) -> bool:
        """Call *service* until it needs trio, or until :meth:`recall`.

        Args:
            channels: that it uses: kernel sockets.

        Returns:
            False if there is no thread for it, or no descriptor: then it was not called.

        Raises:
            TransportFailed: the peer made no progress, or an error of *service*.
            TrimigError: an error of *service*.

        **Cancellation:** *service* has returned, and is not called any more.
        """
        with contextlib.ExitStack() as stack:
            try:
                for channel in channels:
                    stack.enter_context(channel.lend())
                thread = stack.enter_context(contextlib.closing(_Thread(service)))
            except OSError:
                return False
            self._working = thread
            try:
                await offload.pump(thread.run, thread.cancel)
            except trio.WouldBlock:
                return False
            finally:
                self._working = None
        return True

    def recall(self) -> None:
        """Let :meth:`run` return soon, if it runs."""
        if self._working is not None:
            self._working.recall()


class _Thread:
    """One run. OSError: there are no descriptors left."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = self._cancelled = False
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._ports: dict[int, int] = {}

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._wake)

    def recall(self) -> None:
        """Let :meth:`run` end soon, with True. For another thread."""
        self._stopped = True
        os.eventfd_write(self._wake, 1)

    def cancel(self) -> None:
        """Let :meth:`run` end soon, with False. For another thread."""
        self._cancelled = True
        self.recall()

    def run(self) -> bool:
        progress, left = -1, math.inf
        while not self._stopped:
            awaited = self._service.advance()
            if awaited is None:
                return True
            if awaited.progress != progress:
                progress, left = awaited.progress, awaited.seconds
            began = time.monotonic()
            self._register(awaited.ports)
            self._poll.poll(0 if awaited.busy else 1000 * min(left, _LOOK_SECONDS))
            left -= time.monotonic() - began
            if left <= 0:
                raise stalled(awaited.fault, awaited.seconds)
        return not self._cancelled

    def _register(self, ports: Mapping[int, int]) -> None:
        if ports == self._ports:
            return
        for descriptor in self._ports:
            self._poll.unregister(descriptor)
        for descriptor, events in ports.items():
            self._poll.register(descriptor, events)
        self._ports = dict(ports)
