"""One of the two hosts of ``trimig demo``: ``python -m trimig.cli.demo.host FD PARENT``.

The process keeps one guest, whose worker is another process. The host migrates the guest, receives a guest, and takes
the demo's requests over a socket. The host never outlives the demo: it ends at the end of file on the socket, and the
kernel kills it when the thread that started it ends.

Requests and reports are JSON objects, one to a packet (SOCK_SEQPACKET). A request has ``op``, which names a method
``do_<op>`` below; the other members are its arguments. The host answers each request with one report with the same
``op`` and the ``event`` ``done`` or ``failed`` (``failed`` adds the members of :func:`trimig.cli.errors.error_record`).
Other reports may come before the answer: ``listening`` with the ``uri``, ``progress`` with a picture, ``worker-died``.
Two requests have no answer: ``cancel`` (cancel the present migration) and ``peer-ended`` (stop waiting for a peer that
will not come).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import signal
import socket
import sys
from typing import Any, Final

import trio

import trimig
from trimig.status import IN_POSTCOPY

from .. import postcopy
from ..errors import error_record
from ..picture import Picture, Pictures, follow
from ..summary import summary_record
from ..tasks import alongside
from .messages import MAX_PACKET, unpack_config

_PR_SET_PDEATHSIG: Final = 1


class Host:
    """The state of the process, and one method for each request."""

    def __init__(
        self, control: trio.socket.SocketType, nursery: trio.Nursery, guests: contextlib.AsyncExitStack
    ) -> None:
        self._control = control
        self._nursery = nursery
        self._guests = guests
        self._guest: trimig.WorkloadGuest | None = None
        self._alive = False
        self._monitor = trimig.Monitor()
        self._job = trio.CancelScope()
        self._reason = ""
        self._uncertain: trimig.HandoverUncertain | None = None
        self._notes = _Notes()

    async def serve(self) -> None:
        """Take requests until the end of file. A demo sends its requests one after the other, except for ``cancel``."""
        while packet := await self._control.recv(MAX_PACKET):
            request = json.loads(packet)
            match request.pop("op"):
                case "cancel":
                    self._cancel("cancelled by a signal")
                case "peer-ended":
                    # A connected peer's end is noticed on the connection; in postcopy the host must wait for a new one.
                    if self._monitor.addresses or self._monitor.status in IN_POSTCOPY:
                        self._cancel("the other host has ended before it connected")
                case "quit":
                    return
                case op:
                    # Made here and not in the task, so that a cancel also works before the task has begun to run.
                    self._job, self._reason = trio.CancelScope(), ""
                    self._nursery.start_soon(self._do, op, request, self._job)

    def _cancel(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._job.cancel(reason)
        postcopy.drop(self._monitor)  # otherwise the cancellation is held off; the demo sends it only on purpose

    async def _do(self, op: str, arguments: dict[str, Any], job: trio.CancelScope) -> None:
        report: dict[str, Any] = {}
        try:
            with job:
                report = {"event": "done", **await getattr(self, f"do_{op}")(**arguments)}
        except (trimig.TrimigError, OSError) as error:
            if isinstance(error, trimig.HandoverUncertain):
                self._uncertain = error
            report = {"event": "failed", **error_record(error)[1]}
        # A cancelled migration leaves the guest with the source, except for an abandoned postcopy. A late
        # cancel does not change the report.
        lost = self._monitor.status is trimig.Status.POSTCOPY_LOST
        owner = trimig.Ownership.DESTINATION if lost else trimig.Ownership.SOURCE
        report = report or {"event": "failed", "error": self._reason, "kind": "Cancelled", "owner": owner.value}
        await self._tell(op=op, guest=self._guest_state(), notes=self._notes.take(), **report)

    async def _tell(self, **message: Any) -> None:
        try:
            await self._control.send(json.dumps(message).encode())
        except OSError:
            # The demo is gone, so this process has no purpose any more.
            self._nursery.cancel_scope.cancel("the demo has ended")

    def _guest_state(self) -> str | None:
        if self._guest is None:
            return None
        return self._guest.run_state if self._alive and self._guest.lost is None else "dead"

    # -- requests ----------------------------------------------------------------------------------------------------

    async def do_open(self, **options: Any) -> dict[str, Any]:
        """Make a guest; an earlier guest is ended first."""
        self.end_guest()
        guest = await self._guests.enter_async_context(trimig.WorkloadGuest.open(**options))
        self._guest, self._alive = guest, True
        self._nursery.start_soon(self._watch_worker, guest, os.pidfd_open(guest.pid))
        return {"worker": guest.pid}

    async def do_receive(self, size: int, config: str) -> dict[str, Any]:
        """Be the destination: make an empty guest, report its address, and fill it."""
        await self.do_open(size=size, hot=0, dirty_rate=0, running=False)
        assert self._guest is not None
        monitor = self._monitor = trimig.Monitor()
        receive = functools.partial(
            trimig.receive, self._guest, "tcp:127.0.0.1:0", unpack_config(config), monitor=monitor
        )
        summary = await alongside(receive, functools.partial(self._announce, monitor))
        times = self._guest.touch_times
        return {
            "summary": summary_record(summary),
            "page_faults": 0 if times is None else times.waits,
            "fault_median_ms": 0.0 if times is None else round(times.median / 1e6, 3),
            "fault_p99_ms": 0.0 if times is None else round(times.p99 / 1e6, 3),
        }

    async def _announce(self, monitor: trimig.Monitor) -> None:
        while not monitor.addresses:
            await monitor.wait_changed()
        await self._tell(event="listening", op="receive", uri=monitor.addresses[0])

    async def do_migrate(
        self, uri: str, config: str, postcopy_after: float | None = None, cut_after: float | None = None
    ) -> dict[str, Any]:
        """Migrate the guest, and end it here once the destination owns it."""
        assert self._guest is not None
        monitor = self._monitor = trimig.Monitor()
        migrate = functools.partial(trimig.migrate, self._guest, uri, unpack_config(config), monitor=monitor)
        if postcopy_after is not None:
            schedule = postcopy.PostcopySchedule(after=postcopy_after, cut_after=cut_after)
            migrate = functools.partial(alongside, migrate, functools.partial(schedule.run, monitor))
        recoveries = throttle = 0

        def count(event: trimig.Event) -> None:
            nonlocal recoveries, throttle
            throttle = max(throttle, event.data["percent"] if event.name == "THROTTLE" else 0)
            recoveries += event.name == "MIGRATION" and event.data["status"] == trimig.Status.POSTCOPY_RECOVER.value

        monitor.add_listener(count)
        pictures = Pictures(monitor)
        warnings: list[str] = []

        async def tell(now: Picture) -> None:
            while warnings:
                await self._tell(event="warning", op="migrate", text=warnings.pop(0))
            await self._tell_picture(now)

        summary = await alongside(migrate, functools.partial(follow, pictures, monitor, tell, warnings.append))
        # The display's task may have been cancelled before it reported the last pass.
        await tell(pictures.now())
        self.end_guest()
        return {"summary": summary_record(summary), "recoveries": recoveries, "throttle_percent": throttle}

    async def _tell_picture(self, now: Picture) -> None:
        await self._tell(event="progress", op="migrate", picture=dataclasses.asdict(now))

    async def do_settle(self, owner: str) -> dict[str, Any]:
        """Settle the owner of a guest whose owner this host did not know."""
        if self._uncertain is not None:
            await self._uncertain.settle(trimig.Ownership(owner))
            self._uncertain = None
        return {}

    async def do_status(self) -> dict[str, Any]:
        """Ask the worker for its state."""
        if self._guest is None or not self._alive:
            return {"state": "none"}
        stats = await self._guest.stats()
        return {"state": "running" if stats.running else self._guest.run_state, "writes": stats.writes}

    async def do_verify(self) -> dict[str, Any]:
        """Pause the guest, and compare every word of every page with the guest's journal."""
        assert self._guest is not None
        await self._guest.pause()
        proof = await self._guest.verify()
        return {"ok": proof.ok, "text": str(proof), "writes": proof.writes, "pages": proof.pages_checked}

    # -- the worker --------------------------------------------------------------------------------------------------

    def end_guest(self) -> None:
        """End the worker of the present guest, if there is one."""
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()

    async def _watch_worker(self, guest: trimig.WorkloadGuest, pidfd: int) -> None:
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        if guest is self._guest:  # this host has not ended it
            self._alive = False
            self._cancel(f"the guest's worker process {guest.pid} has died")
            await self._tell(event="worker-died", op="open", pid=guest.pid)


class _Notes(logging.Handler):
    """Collects the library's warnings for the next report."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []
        logger = logging.getLogger("trimig")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def take(self) -> list[str]:
        """All warnings since the last call."""
        texts, self._texts = self._texts, []
        return texts


async def _main(control: socket.socket) -> None:
    async with contextlib.AsyncExitStack() as guests, trio.open_nursery(strict_exception_groups=True) as nursery:
        host = Host(trio.socket.from_stdlib_socket(control), nursery, guests)
        with contextlib.suppress(OSError):
            await host.serve()
        nursery.cancel_scope.cancel("the demo has ended")


def main() -> None:
    """Tie this process to the demo, then serve it."""
    # The demo handles Ctrl-C in the terminal and SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[2]):  # the demo died before prctl took effect
        return
    with socket.socket(fileno=int(sys.argv[1])) as control:
        trio.run(_main, control, strict_exception_groups=True)


if __name__ == "__main__":
    main()
