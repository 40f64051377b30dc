"""``trimig demo``: a busy guest moves between two processes, and proves that it lost nothing.

The parent supervises two host processes (:mod:`trimig.cli.demo.host`); the guest lives in one of them. In each
hop the other host receives it. If a process dies, the parent finds out which one, and reports the owner of the guest.
The owner follows from the reports of the living hosts, never from a guess.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any, Final, Self

import click
import trio

import trimig
from trimig import formats

from .. import display, postcopy
from ..exit_codes import CANCELLED, DONE, FAILED, INCOMPLETE, NOT_RESUMED, UNCERTAIN
from ..guests.process import default_hot
from ..options import PERCENT, RAM_SIZE, SIZE, config_options, debug_option, encoding_option, json_option
from ..output import say, write_json
from ..picture import Picture
from ..runner import run
from . import figures
from .messages import pack_config
from .options import Options, default_bandwidth, default_dirty_rate, default_write_size
from .process import HostProcess, Message, reap_descendants

#: Seconds that a host may take to report a failure, beyond the limits of the migration itself.
_PATIENCE: Final = 10.0


class Interrupted(Exception):
    """A signal asked for the end."""


class Broken(Exception):
    """The demonstration cannot go on; the reports and the state of the hosts show the situation."""


class Demo:
    """The run of one demonstration. Use it as ``async with Demo(...) as demo``."""

    def __init__(self, options: Options, view: display.View) -> None:
        self._options = options
        self._view = view
        self._hosts: tuple[HostProcess, ...] = ()
        self._send, self._inbox = trio.open_memory_channel[tuple[HostProcess, Message]](1000)
        self._pending: set[HostProcess] = set()
        self._interrupted = False
        self._status = trimig.Status.NONE
        self.interrupts = postcopy.PostcopyInterrupts(lambda: self._status, lambda: None)
        self._started = False
        self._migrating = False
        self._deaths: list[str] = []
        self.hops: list[figures.Hop] = []
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(reap_descendants())
            for _ in range(2):
                host = HostProcess()
                stack.callback(host.close)
                self._hosts = (*self._hosts, host)
            self._stack = stack.pop_all()
        self.source, self.destination = self._hosts
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def doing(self) -> str:
        """The text for a first signal: its consequences."""
        return "ending; the migration under way is cancelled first" if self._migrating else "ending"

    @property
    def pids(self) -> list[int]:
        """Process ids of the hosts."""
        return [host.pid for host in self._hosts]

    def interrupt(self, _signal: str) -> None:
        """Ask for a clean end: a migration that can be cancelled is cancelled."""
        self._interrupted = True
        with contextlib.suppress(trio.WouldBlock):  # a full inbox is being read, and its reader sees the flag
            self._send.send_nowait((self.source, {"event": "interrupt"}))

    async def run(self) -> tuple[int, Message]:
        """Run the whole demonstration; returns the exit code and the object that ``--json`` prints."""
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            for host in self._hosts:
                nursery.start_soon(host.read, self._send.clone())
            code, result = await self._outcome()
            for host in self._hosts:
                await host.quit()
            nursery.cancel_scope.cancel("the demonstration is over")
        return code, result

    async def _outcome(self) -> tuple[int, Message]:
        try:
            proof = await self._run_hops()
        except Interrupted:
            code = self._code(CANCELLED)
            return code, await self._after("cancelled by a signal", code)
        except Broken as error:
            return await self._failed(str(error))
        code = DONE if proof["ok"] else FAILED
        result = {
            "verified": proof["ok"],
            "proof": proof["text"],
            **figures.overall(self.hops),
            "size": self._options.size,
            "hot": self._options.hot,
            "dirty_rate": self._options.dirty_rate,
            "write_size": self._options.write_size,
            "hosts": self.pids,
            "owner": "destination",
            "exit_code": code,
            "notes": self.notes,
            "hops": [hop.record for hop in self.hops],
        }
        if not proof["ok"]:
            result["error"] = f"the guest is not as its journal says: {proof['text']}"
        return code, result

    # -- the hops ----------------------------------------------------------------------------------------------------

    async def _run_hops(self) -> Message:
        options = self._options
        self._view.note(
            f"hosts {self.pids[0]} and {self.pids[1]}; a guest of {formats.size(options.size)} writes {options.writes}",
            hosts=self.pids,
        )
        workload = {"hot": options.hot, "dirty_rate": options.dirty_rate, "write_size": options.write_size}
        await self.source.ask("open", size=options.size, **workload)
        await self._reports(self.source)
        self._started = True
        for number in range(1, options.hops + 1):
            if number > 1:
                self.source, self.destination = self.destination, self.source
            await self._hop(number)
        await self.destination.ask("verify")
        await self._reports(self.destination)
        proof = self.destination.report
        assert proof is not None
        return proof

    async def _hop(self, number: int) -> None:
        title = f"hop {number}/{self._options.hops}: {self.source.pid} -> {self.destination.pid}"
        self._view.begin(title, hop=number, source=self.source.pid, destination=self.destination.pid, hosts=self.pids)
        self.source.forget()
        self._migrating = True
        await self.destination.ask("receive", size=self._options.size, config=pack_config(self._options.config))
        await self._reports(self.destination)
        assert self.source.report is not None
        assert self.destination.report is not None
        self._migrating, self._status = False, trimig.Status.NONE
        hop = figures.Hop.of(
            number,
            (self.source.pid, self.destination.pid),
            self.source.report["summary"],
            self.destination.report["summary"],
            {
                key: report[key]
                for report in (self.source.report, self.destination.report)
                for key in self._options.reported
                if key in report
            },
        )
        self.hops.append(hop)
        self._view.end(f"{title}: {hop.sentence}", **hop.record)

    async def _reports(self, *hosts: HostProcess) -> None:
        """Wait until *hosts*, and hosts that are added meanwhile, have reported.

        Raises:
            Broken: one of them failed or died.
            Interrupted: a signal came, and the hosts have cancelled what could be cancelled.
        """
        self._pending = {host for host in hosts if host.ended is None}
        trouble: str | None = None
        config = self._options.config
        patience = config.handover_timeout + config.teardown_grace + _PATIENCE
        with trio.CancelScope() as scope:
            while self._pending:
                host, message = await self._inbox.receive()
                trouble = await self._take(host, message) or trouble
                if (trouble or self._deaths or self._interrupted) and scope.deadline == math.inf:
                    scope.deadline = trio.current_time() + patience
        for host in self._pending:
            self._deaths.append(f"host {host.pid} did not answer for {formats.duration(patience)} and was killed")
            host.kill_and_reap()
        if self._interrupted:
            raise Interrupted
        if self._deaths or trouble:
            # Report the process that died, not the errors that its death caused in the others.
            raise Broken(self._deaths[0] if self._deaths else self._cause() or trouble)

    def _cause(self) -> str | None:
        """The failure of a host that did not just lose its peer; the source's rather than the destination's."""
        for host in (self.source, self.destination):
            report = host.report or {}
            if report.get("event") == "failed" and report.get("kind") not in ("TransportFailed", "PeerFailed"):
                return f"host {host.pid}: {report['error']}"
        return None

    async def _take(self, host: HostProcess, message: Message) -> str | None:
        """Handle one message; returns the sentence of a host that failed."""
        other = next(each for each in self._hosts if each is not host)
        for note in message.get("notes", ()):
            if note not in self.notes:
                self.notes.append(note)
        match message["event"]:
            case "listening" if not self._interrupted and self.source.ended is None:
                self._pending.add(self.source)
                await self.source.ask(
                    "migrate",
                    uri=message["uri"],
                    config=pack_config(self._options.config),
                    postcopy_after=self._options.postcopy_after,
                    cut_after=self._options.cut_after,
                )
            case "listening":
                await host.ask("cancel")
            case "progress":
                now = Picture.of(message["picture"])
                self._status = trimig.Status(now.status)
                self._view.show(now)
            case "warning":
                self._view.note(f"warning: {message['text']}", warning=message["text"])
            case "interrupt":
                # The source knows whether the migration can still be cancelled. A destination without a source
                # waits in vain.
                await (self.source if self.source in self._pending else self.destination).ask("cancel")
                if not self._migrating:
                    self._pending.clear()
            case "worker-died":
                host.lose_worker()
                role = self._role(host)
                self._deaths.append(f"the worker process {message['pid']} of host {host.pid} ({role}) has died")
            case "done":
                host.answered(message)
                self._pending.discard(host)
            case "failed":
                host.answered(message)
                self._pending.discard(host)
                await other.ask("peer-ended")
                return f"host {host.pid}: {message['error']}"
            case "gone":
                self._deaths.append(f"host {host.pid} ({self._role(host)}) {host.kill_and_reap()}")
                self._pending.discard(host)
                await other.ask("peer-ended")
        return None

    def _role(self, host: HostProcess) -> str:
        return "source" if host is self.source else "destination"

    # -- when it goes wrong ------------------------------------------------------------------------------------------

    def _owner(self) -> trimig.Ownership | None:
        """The owner of the guest, by the reports of the hosts; None if no living host could own it."""
        source, destination = self.source.report, self.destination.report
        if not self._migrating:
            return trimig.Ownership.DESTINATION if self.hops else trimig.Ownership.SOURCE
        if destination is not None and destination["event"] == "done" and destination["op"] == "receive":
            return trimig.Ownership.DESTINATION
        if source is not None and source["op"] == "migrate":
            if source["event"] == "done":
                return trimig.Ownership.DESTINATION
            reported = trimig.Ownership(source.get("owner", "source"))
            # The source does not know the owner; a living destination that has not taken the guest does.
            if reported is trimig.Ownership.UNKNOWN and destination is not None and destination["event"] == "failed":
                return trimig.Ownership.SOURCE
            return reported
        if self.source.ended is None:
            return trimig.Ownership.SOURCE  # the source had no request to send the guest yet
        if destination is not None:
            return trimig.Ownership(destination.get("owner", "source"))
        return None

    async def _failed(self, cause: str) -> tuple[int, Message]:
        code = self._code(FAILED)
        return code, await self._after(cause, code)

    def _code(self, usual: int) -> int:
        """The exit code: *usual* if the source has its guest unchanged."""
        owner, migrating = self._owner(), self._migrating
        if owner is trimig.Ownership.UNKNOWN:
            return UNCERTAIN
        # A destination may die after its last message to the source: then the source knows that no page is missing.
        ends = [report for host in (self.source, self.destination) if (report := host.report) is not None]
        done = any(report["event"] == "done" and report["op"] in ("migrate", "receive") for report in ends)
        if owner is trimig.Ownership.DESTINATION and migrating and not done:
            return INCOMPLETE
        if (self.source.report or {}).get("exit_code") == NOT_RESUMED:
            return NOT_RESUMED
        return usual

    async def _after(self, cause: str, code: int) -> Message:
        """The report of a demonstration that did not complete: the owner of the guest and the guest's state."""
        owner = self._owner()
        keeper = {trimig.Ownership.SOURCE: self.source, trimig.Ownership.DESTINATION: self.destination}.get(
            owner or trimig.Ownership.UNKNOWN
        )
        report: Message = {
            "verified": False,
            "error": cause,
            "owner": None if owner is None else owner.value,
            "survivor": self._survivor(),
            "guest": "lost",
            "hosts": self.pids,
            "exit_code": code,
            "hop": len(self.hops) + (1 if self._migrating or not self.hops else 0),
            "notes": self.notes,
            "hops": [hop.record for hop in self.hops],
        }
        if owner is trimig.Ownership.UNKNOWN:
            report["guest"] = "paused"
            report["fate"] = (
                f"it is uncertain who owns the guest: it stays paused in host {self.source.pid}, because host "
                f"{self.destination.pid} may have been running it"
            )
        elif owner is None:
            report["fate"] = "both hosts have ended, and the guest with them"
        else:
            assert keeper is not None
            report["fate"] = await self._describe_guest(keeper, owner, report)
            if report["guest"] in ("running", "paused"):
                report["survivor"] = owner.value
        return report

    def _survivor(self) -> str | None:
        """The role of the living side, if exactly one lives."""
        left = [host for host in self._hosts if host.ended is None and not host.worker_died]
        return self._role(left[0]) if len(left) == 1 else None

    async def _describe_guest(self, keeper: HostProcess, owner: trimig.Ownership, report: Message) -> str:
        """Ask the owner's worker for its state, and let it prove its memory."""
        where = f"the {owner.value}, host {keeper.pid},"
        if not self._started:
            report["guest"] = "none"
            return "the guest had not been started yet"
        if keeper.ended is None and not keeper.worker_died:
            # In postcopy the destination owns the guest and reports that a part of the memory is missing.
            partial = keeper is self.destination and (keeper.report or {}).get("event") == "failed"
            if (keeper.report or {}).get("owner") == "unknown":
                await self._ask_once(keeper, "settle", owner=owner.value)
            status = await self._ask_once(keeper, "status")
            if status is not None:
                report["guest"] = status["state"]
                if partial:
                    return f"{where} owns the guest, which is {status['state']} there: a part of its memory never came"
                if self._interrupted:
                    return f"{where} owns the guest, which is {status['state']} there"
                proof = await self._ask_once(keeper, "verify")
                if proof is not None:
                    report["guest_verified"] = proof["ok"]
                    return f"{where} owns the guest, which is {status['state']} there ({proof['text']})"
        lost = f"{where} owned the guest, which died with it"
        if owner is trimig.Ownership.SOURCE and self.destination.ended is None:
            lost += f"; it never ran in the destination, host {self.destination.pid}"
        return lost

    async def _ask_once(self, host: HostProcess, op: str, **arguments: Any) -> Message | None:
        """The answer to a request, None if the request fails or the host dies."""
        await host.ask(op, **arguments)
        with trio.move_on_after(_PATIENCE + self._options.size / (20 << 20)):
            while host.ended is None and host.report is None:
                await self._take(*await self._inbox.receive())
        return host.report if host.report is not None and host.report["event"] == "done" else None


@click.command(short_help="Move a busy guest between two processes, and prove that it lost nothing.")
@click.option("--size", type=RAM_SIZE, default="256M", show_default=True, metavar="SIZE", help="Memory of the guest.")
@click.option(
    "--dirty-rate", type=SIZE, metavar="SIZE", help="Bytes it writes each second.  [default: 50M, with compress 10M]"
)
@click.option(
    "--hot",
    type=SIZE,
    metavar="SIZE",
    help="How much of its memory it writes again and again.  [default: 32M, or an eighth of a smaller guest]",
)
@click.option(
    "--write-size",
    type=SIZE,
    metavar="SIZE",
    help="How much of a page one write changes, a multiple of 8.  [default: 4K, with xbzrle 64]",
)
@click.option("--bandwidth", type=SIZE, metavar="SIZE", help="Bytes sent per second, 0 for no limit.  [default: 0]")
@click.option(
    "--downtime-limit",
    type=click.IntRange(0, 2_000_000),
    metavar="MS",
    help="Stop the guest when the rest can be sent in this time.  [default: 300]",
)
@click.option(
    "--hops",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    metavar="N",
    help="Migrate N times, back and forth.",
)
@functools.partial(postcopy.options, also=("postcopy-preempt",))
@click.option(
    "--cut-after",
    type=PERCENT,
    metavar="PERCENT",
    help="With postcopy: cut the connection when that much of the rest has followed, and let both sides recover.",
)
@config_options(trimig.Config(parameters=trimig.Parameters(max_bandwidth=0)))
@json_option
@debug_option
@encoding_option
def demo(
    size: int,
    dirty_rate: int | None,
    hot: int | None,
    write_size: int | None,
    bandwidth: int | None,
    downtime_limit: int | None,
    hops: int,
    postcopy_after: float | None,
    cut_after: float | None,
    config: trimig.Config,
    as_json: bool,
) -> int:
    """Move a busy guest between two processes of this machine, and prove that it lost nothing.

    Starts two hosts, and in one of them a guest that keeps writing its memory. The guest is migrated to the other host
    while it runs. At the end every word of its memory is compared with what its journal of writes says. Needs neither
    root nor QEMU.

    With --postcopy the guest goes first, and its memory follows while the guest runs there. Pages that the guest waits
    for come on a second connection (-c postcopy-preempt=off: on the same). --cut-after shows the effect of a lost
    connection.

    With -c auto-converge the guest is slowed down until it converges, and with -c xbzrle pages that it has changed go as
    differences. Without --bandwidth the limit is nine tenths of the dirty rate then. Half of its pages can be
    compressed (-c compress, or -c multifd -p multifd-compression=zstd).

    The figures go to stdout, progress to stderr. With --json there is one object on stdout, and progress is one object
    on each line of stderr.
    """
    postcopy.refuse_pause(config, "demo")
    hot = default_hot(size) if hot is None else hot
    if hot > size:
        raise click.UsageError(f"--hot {formats.size(hot)} does not fit into --size {formats.size(size)}")
    dirty_rate = default_dirty_rate(config) if dirty_rate is None else dirty_rate
    if dirty_rate and hot < 4096:
        raise click.UsageError("--dirty-rate needs at least one page of 4096 bytes in --hot to write to")
    if postcopy_after is None and cut_after is not None:
        raise click.UsageError("--cut-after needs --postcopy: before the switch a lost connection ends the migration")
    if postcopy_after is not None:
        config = postcopy.recovering(config, None)
        if downtime_limit is None:
            downtime_limit = 0  # with any limit, a rest that fits the limit would be sent before the switch
    bandwidth = default_bandwidth(config, dirty_rate) if bandwidth is None else bandwidth
    write_size = default_write_size(config) if write_size is None else write_size
    if not 8 <= write_size <= 4096 or write_size % 8:
        raise click.UsageError(
            f"--write-size: {formats.size(write_size)} is not a multiple of 8 up to a page of 4096 bytes"
        )
    changes = {"max_bandwidth": bandwidth, "downtime_limit": downtime_limit}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(config, parameters=config.parameters.replace(**changes))
    options = Options(
        size=size, hot=hot, dirty_rate=dirty_rate, write_size=write_size, hops=hops, config=config,
        postcopy_after=postcopy_after, cut_after=cut_after,
    )  # fmt: skip
    with display.open_view(as_json=as_json) as view, Demo(options, view) as demo:
        results: list[Message] = []

        async def job() -> int:
            code, result = await demo.run()
            results.append(result)
            return code

        code = run(job, as_json=as_json, interrupt=demo.interrupt, doing=demo.doing, decide=demo.interrupts.decide)
    return _tell(code, results[0], as_json=as_json)


def _tell(code: int, result: Message, *, as_json: bool) -> int:
    if as_json:
        write_json(result)
    for note in result["notes"]:
        say(f"note: {note}")
    if "fate" in result:
        say(f"{result['error']}; {result['fate']}")
    elif not as_json:
        click.echo(figures.text(result))
    if code == FAILED and "fate" not in result:
        say(result["error"])
    return code
