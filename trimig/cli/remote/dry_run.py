"""``trimig migrate --dry-run``: predicts a migration of this guest.

The guest's memory is streamed to a sink on this host, while the guest runs on. The bandwidth is the one to be predicted
for, or a higher one if whole passes would not fit into the time otherwise. The sink discards the memory. Two settings keep
the stream from becoming a migration: a downtime limit of zero, which no busy guest meets, and pause-before-switchover for
an idle guest. After a few passes the stream is cancelled, every setting is restored, and the guest must be in its former
run state. From the passes :mod:`trimig.policy.forecast` makes the prediction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import click
import trio

from trimig import formats
from trimig.policy import forecast as policy
from trimig.status import QMP_TERMINAL, Status

from .. import display
from ..exit_codes import CANCELLED, DONE
from ..output import write_json
from ..picture import EVERY
from ..tasks import alongside
from .state import CANCEL_LIMIT, Gone, Refused, Settings, State
from .tracker import Tracker

if TYPE_CHECKING:
    from ..stop import StopRequest
    from .client import Remote

#: The number of whole passes that is enough: the first copy, and passes over newly written memory.
PASSES: Final = 3
#: Seconds between two polls; the times of passes are as exact as this.
_LOOK: Final = 0.02
#: Seconds after the cancel in which the guest must be in its former run state.
_BACK_LIMIT: Final = 10.0
_PAGE: Final = 4096
#: The name of the descriptor in the other process.
_NAME: Final = "trimig-dry-run"

#: Capabilities that must be off during the measurement, if the other side knows them. They need an answer from the sink,
#: hand the guest over, or slow it down.
_OFF: Final = (
    "return-path",
    "postcopy-preempt",
    "postcopy-ram",
    "x-colo",
    "background-snapshot",
    "auto-converge",
    "release-ram",
)
_ON: Final = ("pause-before-switchover", "events")
#: The downtime limit 0 prevents the switchover of a busy guest. TLS is off, because the sink has no certificate.
_PARAMETERS: Final[Mapping[str, Any]] = {"downtime-limit": 0, "tls-creds": ""}
#: Settings during the measurement.
_TUNED: Final = Settings(parameters={"max-bandwidth": 0})
#: The largest share of the time for the first copy. A first copy at the real bandwidth would show what the guest dirties in
#: it. But passes after it are needed too, so a slow first copy is made faster.
_FIRST_COPY_SHARE: Final = 0.4


@dataclasses.dataclass(slots=True)
class _Measurement:
    """The measured values: a record that the functions of this module write. Bytes, seconds."""

    samples: list[policy.Sample] = dataclasses.field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0
    total: int = 0
    transferred: int = 0
    #: The size of the first copy on the transport, complete or not; None if nothing was sent.
    first_copy: float | None = None
    bandwidth: float | None = None
    #: True if the stream reached pre-switchover, in which the guest is stopped.
    stopped: bool = False
    ended: State | None = None


async def dry_run(
    remote: Remote, changes: Settings, present: Settings, seconds: float, stop: StopRequest, *, as_json: bool
) -> int:
    """Measure for at most *seconds*, restore everything, and print the prediction; returns the exit code.

    Args:
        changes: the settings to predict for; they are not kept.
        present: all settings in force, which are restored at the end.
        stop: ends the measurement early; everything is restored all the same.

    Raises:
        Refused: the guest cannot be measured, or something could not be restored (the error names it).
    """
    before = await remote.state()
    # A paused guest dirties nothing, so there is nothing to measure; and after the cancel a QEMU would report
    # "postmigrate" for it in place of its former run state.
    if not before.ended or before.run_state != "running":
        raise Refused(f"a dry run needs a running guest that is not being migrated ({before.sentence})")
    locks = Settings(
        capabilities={name: name in _ON for name in (*_OFF, *_ON) if name in present.capabilities},
        parameters={name: value for name, value in _PARAMETERS.items() if name in present.parameters},
    )
    if "pause-before-switchover" not in locks.capabilities:
        raise Refused(
            f"{remote.address} has no pause-before-switchover, without which a dry run could become a real one"
        )
    goal = float(changes.over(present).parameters.get("max-bandwidth", 0))
    wanted = locks.over(changes)
    seen = _Measurement()
    failure: Refused | None = None
    with display.open_view(as_json=as_json) as view:
        view.begin("dry run", seconds=seconds)
        try:
            await remote.apply(wanted, present)
            await _stream(remote, seconds, goal, seen, stop, view)
        except Refused as error:
            failure = error
        # Not in a "finally": nothing cancels this task (a signal only asks for a stop), and errors of restoring
        # must not hide the first error.
        problems = await _put_back(remote, present.of(wanted.over(_TUNED)), before)
        view.end("dry run over")
    if failure is not None or problems:
        texts = ([failure.format_message()] if failure else []) + problems
        raise Refused("; ".join(texts))
    return _tell(seen, changes.over(present), stop, before, as_json)


# -- measuring ---------------------------------------------------------------------------------------------------------


async def _stream(
    remote: Remote, seconds: float, goal: float, seen: _Measurement, stop: StopRequest, view: display.View
) -> None:
    async with _sink(remote) as (uri, serve):

        async def measure() -> None:
            await remote.execute("migrate", uri=uri)
            await _measure(remote, seconds, goal, seen, stop, view)
            await _end(remote)

        await alongside(measure, serve)
    if seen.ended is not None and not seen.samples and seen.first_copy is None:
        raise Refused(f"the memory could not be sent to the sink {uri}: {seen.ended.problem or seen.ended.migration}")


@contextlib.asynccontextmanager
async def _sink(remote: Remote) -> AsyncIterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """A sink for the memory; yields its URI for QMP, and the coroutine function that reads and discards everything.

    Over a unix socket the other process is given one end of a pair of sockets, so that it may belong to another user
    and needs no access to any file. If descriptors cannot be passed, the sink is a port on the loopback device.

    **Cancellation:** nothing is left open.
    """
    ours, theirs = socket.socketpair()
    with trio.socket.from_stdlib_socket(ours) as end:
        with theirs:
            passed = await _passed(remote, theirs)
        if passed:
            yield f"fd:{_NAME}", functools.partial(_swallow, end)
            return
    with trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()

        async def serve() -> None:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                while True:
                    connection, _ = await listener.accept()
                    nursery.start_soon(_swallow, connection)

        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}", serve


async def _passed(remote: Remote, end: socket.socket) -> bool:
    """Whether the other process has *end* now; over TCP, or behind a relay of the unix socket, it has not."""
    if not remote.address.startswith("unix:"):
        return False
    try:
        await remote.pass_descriptor(_NAME, end.fileno())
    except Gone:
        raise
    except Refused:
        return False
    return True


async def _swallow(connection: trio.socket.SocketType) -> None:
    buffer = bytearray(1 << 20)
    with connection, contextlib.suppress(OSError):
        while await connection.recv_into(buffer):
            pass


async def _measure(
    remote: Remote, seconds: float, goal: float, seen: _Measurement, stop: StopRequest, view: display.View
) -> None:
    """Poll until enough passes were seen, the time is up, the stream ended, or the user asks for a stop."""
    hurried = not goal
    tracker = Tracker({"downtime-limit": 0, "max-bandwidth": goal})
    shown = -math.inf
    marks = _Marks()
    seen.started = trio.current_time()
    while len(seen.samples) < PASSES and trio.current_time() - seen.started < seconds and not stop.asked:
        state = await remote.state()
        now = trio.current_time()
        if now - shown >= EVERY:
            shown = now
            for picture in tracker.pictures(state):
                view.show(picture)
        if "ram" in state.info:
            needed = state.info["ram"]["total"] / (seconds * _FIRST_COPY_SHARE)
            if not hurried and needed > goal:
                await remote.execute("migrate-set-parameters", max_bandwidth=round(needed))
            hurried = True
            marks.look(state.info, now, seen)
        if state.migration == Status.PRE_SWITCHOVER.qmp:
            seen.stopped = True
            marks.close(now, seen)
            break
        if state.migration in QMP_TERMINAL:
            seen.ended = state
            break
        with trio.move_on_after(_LOOK):
            await stop.wait()
    seen.seconds = trio.current_time() - seen.started


class _Marks:
    """Finds the beginnings of passes in counters that grow in steps.

    The sum of sent pages and remaining pages only changes when dirty pages are collected. So each step is the number of
    pages that the guest dirtied during one pass, and rare polls miss nothing of it.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._since = 0.0
        self._sent = 0
        self._work = 0
        self._last: tuple[float, int, int] = (0.0, 0, 0)

    def look(self, info: Mapping[str, Any], now: float, seen: _Measurement) -> None:
        """Add one answer to query-migrate."""
        ram = info["ram"]
        sent, remaining, total = ram["transferred"], ram["remaining"], ram["total"]
        work = (ram["normal"] + ram["duplicate"]) * ram.get("page-size", _PAGE) + remaining
        seen.total, seen.transferred = total, sent
        passes = ram["dirty-sync-count"]
        if self._passes == 0:
            # The beginning; several passes may be over already. The first collection is that of all memory.
            copied = (info.get("total-time", 0) - info.get("setup-time", 0)) / 1000
            self._since, self._work, self._passes = now - max(copied, _LOOK / 2), total, 1
        if passes > self._passes:
            self._sample(now, sent, work, seen)
            self._passes = passes
        elapsed = now - self._since
        if not seen.samples and elapsed > 0 and 0 < remaining < total:
            seen.first_copy = sent * total / (total - remaining)
            seen.bandwidth = sent / elapsed
        self._last = (now, sent, work)

    def _sample(self, now: float, sent: int, work: int, seen: _Measurement) -> None:
        seconds = now - self._since
        if seconds <= 0:
            return
        dirtied = max(0, work - self._work)
        seen.samples.append(
            policy.Sample(sent=max(0, sent - self._sent), seconds=seconds, dirty_rate=dirtied / seconds)
        )
        self._since, self._sent, self._work = now, sent, work

    def close(self, now: float, seen: _Measurement) -> None:
        """The stream has ended with the guest stopped: the part before that is a whole pass, too."""
        if not seen.samples:
            _, sent, work = self._last
            self._sample(now, sent, work, seen)


async def _end(remote: Remote) -> None:
    await remote.execute("migrate_cancel")
    state = await remote.wait_ended(CANCEL_LIMIT)
    if not state.ended:
        raise Refused(f"the stream to the sink was cancelled and has not ended, it is {state.migration}")


async def _put_back(remote: Remote, settings: Settings, before: State) -> list[str]:
    """End the stream if it still runs, restore *settings*, and check the guest; the failures, as sentences."""
    problems = []
    try:
        if not (await remote.state()).ended:
            await _end(remote)
    except Refused as error:
        problems.append(error.format_message())
    await remote.forget_descriptor(_NAME)  # the migration may not have taken it
    try:
        await remote.apply(settings, settings)
    except Refused as error:
        problems.append(
            f"the settings could not be put back ({error.format_message()}); "
            f"do it with: trimig set {settings.words} --qmp {remote.address}"
        )
    try:
        now = await remote.wait(lambda state: state.run_state == before.run_state, _BACK_LIMIT)
        if now.run_state != before.run_state:
            problems.append(f"the guest was {before.run_state} and is {now.run_state}")
    except Refused as error:
        problems.append(f"it is not known how the guest is ({error.format_message()})")
    return problems


# -- telling -----------------------------------------------------------------------------------------------------------


def _tell(seen: _Measurement, settings: Settings, stop: StopRequest, before: State, as_json: bool) -> int:
    if stop.asked and not seen.samples:
        if as_json:
            write_json({"error": f"stopped by {stop.reason}", "kind": "Cancelled", "exit_code": CANCELLED})
        click.echo("stopped before anything could be measured; everything is as it was", err=True)
        return CANCELLED
    found = _forecast(seen, settings)
    code = CANCELLED if stop.asked else DONE
    if as_json:
        write_json({**_record(found, seen), "run_state": before.run_state, "exit_code": code})
        return code
    print(f"{found.verdict.value}: {found.reason}")
    if found.total_time is not None and found.downtime is not None:
        print(f"  total time   {_range(found.total_time)}")
        print(f"  downtime     {_range(found.downtime)}")
    print(f"  first copy   {_range(found.first_copy)}")
    print(f"  bandwidth    {formats.rate(found.bandwidth.likely)}")
    if found.dirty_rate is not None:
        print(f"  dirty rate   {formats.rate(found.dirty_rate)}")
    for clause in found.advice:
        print(f"  would help   {clause}")
    passes = "1 pass" if len(seen.samples) == 1 else f"{len(seen.samples)} passes"
    print(
        f"measured: {passes} in {formats.duration(seen.seconds)}, {formats.size(seen.transferred)} to a sink "
        "on this host"
    )
    stopped = "; it was stopped for a moment, because nothing was left to send" if seen.stopped else ""
    print(
        f"the guest is {before.run_state} as before, its settings are as they were{stopped}; query-migrate shows the "
        "stream to the sink as a migration that was cancelled",
        flush=True,
    )
    return code


def _forecast(seen: _Measurement, settings: Settings) -> policy.Forecast:
    """The bandwidth in the settings, or the measured one if that is less."""
    limit = float(settings.parameters.get("max-bandwidth", 0))
    measured = seen.bandwidth
    if seen.samples:
        largest = max(seen.samples, key=lambda s: s.sent)
        measured = largest.sent / largest.seconds
    if seen.first_copy is None and seen.samples:
        seen.first_copy = seen.samples[0].sent
    if not measured or seen.first_copy is None:
        raise Refused("nothing was sent that a bandwidth could be told from; measure for longer with --seconds")
    if seen.samples:
        seen.first_copy = seen.samples[0].sent
    given = limit if 0 < limit < measured else (None if seen.samples else measured)
    return policy.forecast(
        seen.samples,
        first_copy=seen.first_copy,
        total=float(seen.total),
        downtime_limit=settings.parameters.get("downtime-limit", 300) / 1000,
        bandwidth=given,
    )


def _range(interval: policy.Interval) -> str:
    high = "no end" if math.isinf(interval.high) else formats.duration(interval.high)
    return f"{formats.duration(interval.likely)} ({formats.duration(interval.low)} to {high})"


def _record(found: policy.Forecast, seen: _Measurement) -> dict[str, Any]:
    """The JSON form, with units in the names; null for an unknown or endless time."""

    def times(value: policy.Interval | float | None) -> Any:
        if isinstance(value, policy.Interval):
            return {name: times(getattr(value, name)) for name in ("low", "likely", "high")}
        return None if value is None or math.isinf(value) else formats.ms(value)

    return {
        "verdict": found.verdict.value,
        "total_time_ms": times(found.total_time),
        "downtime_ms": times(found.downtime),
        "passes": found.passes,
        "first_copy_ms": times(found.first_copy),
        "bandwidth_bytes_per_s": {name: round(getattr(found.bandwidth, name)) for name in ("low", "likely", "high")},
        "dirty_rate_bytes_per_s": None if found.dirty_rate is None else round(found.dirty_rate),
        "shortest_downtime_ms": times(found.shortest_downtime),
        "reason": found.reason,
        "advice": list(found.advice),
        "measured": {
            "total_ms": formats.ms(seen.seconds),
            "transferred_bytes": seen.transferred,
            "passes": [
                {
                    "sent_bytes": round(sample.sent),
                    "pass_ms": formats.ms(sample.seconds),
                    "dirty_rate_bytes_per_s": round(sample.dirty_rate),
                }
                for sample in seen.samples
            ],
            "guest_stopped": seen.stopped,
        },
    }
