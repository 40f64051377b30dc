"""``trimig migrate``: migrates a guest behind a QMP socket, and reports its outcome.

With ``--wait`` a signal or the end of ``--timeout`` cancels the migration in the *other* process. The command ends only
when it knows what became of the guest, so a user who presses Ctrl-C always learns the outcome.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import click
import trio

import trimig
from trimig import formats
from trimig.status import Status

from .. import display
from ..encodings import encoding_records_of, encoding_words
from ..exit_codes import CANCELLED, DONE, FAILED
from ..options import PERCENT, SECONDS, debug_option, json_option
from ..output import write_json
from ..picture import EVERY
from ..postcopy import followed
from ..runner import run
from ..stop import StopRequest
from .client import Remote, connected
from .dry_run import dry_run
from .options import qmp_option, read_settings, settings_options
from .state import CANCEL_LIMIT, POLL, Busy, Gone, Refused, Settings, State
from .tracker import Tracker

#: Seconds in which a migration that cannot be cancelled any more must end.
_DECIDED_LIMIT = 60.0
#: Seconds between two polls of a migration that is paused in postcopy.
_PAUSED_EVERY = 1.0


@click.command()
@click.argument("uri", required=False)
@qmp_option
@settings_options
@click.option("--wait", is_flag=True, help="Show progress, and end when the migration has ended. Ctrl-C cancels it.")
@click.option(
    "--timeout",
    type=SECONDS,
    metavar="SECONDS",
    help="With --wait: cancel the migration if it has not ended by then.",
)
@click.option(
    "--postcopy",
    is_flag=True,
    help="Switch to postcopy after the first pass over the memory: the guest runs at URI first, and the rest follows. "
    "The destination must have -c postcopy-ram. Implies --wait.",
)
@click.option(
    "--postcopy-after",
    type=PERCENT,
    metavar="PERCENT",
    help="The same, as soon as that much of the memory has been sent.",
)
@click.option("--resume", is_flag=True, help="Take a paused postcopy migration up again, over a connection to URI.")
@click.option(
    "--dry-run",
    "dry",
    is_flag=True,
    help="Migrate nothing: send the memory to a sink on this host for a while, and predict time and downtime. URI is "
    "not contacted.",
)
@click.option(
    "--seconds",
    type=SECONDS,
    metavar="SECONDS",
    default=10.0,
    show_default=True,
    help="With --dry-run: measure for at most so long.",
)
@json_option
@debug_option
def migrate(
    uri: str | None,
    address: str,
    capabilities: tuple[str, ...],
    parameters: tuple[str, ...],
    wait: bool,
    timeout: float | None,
    postcopy: bool,
    postcopy_after: float | None,
    resume: bool,
    dry: bool,
    seconds: float,
    as_json: bool,
) -> int:
    """Have the guest behind a QMP socket migrated to URI.

    Without --wait the command ends as soon as the migration has been accepted. The settings of -c and -p stay in force
    afterwards, as they do in QEMU; those of a dry run do not: there -p max-bandwidth and -p downtime-limit say what to
    predict for.
    """
    share = postcopy_after if postcopy_after is not None else (1.0 if postcopy else None)
    wait = wait or share is not None
    _check_usage(uri, share, wait=wait, timeout=timeout, resume=resume, dry=dry)
    stop = StopRequest()

    async def begin(remote: Remote, present: Settings, changes: Settings) -> Tracker:
        assert uri is not None
        if not resume or parameters:
            await remote.apply(changes, present)
        await remote.execute("migrate", uri=uri, **({"resume": True} if resume else {}))
        now = changes.over(present)
        return Tracker(now.parameters, postcopy=now.capabilities.get("postcopy-ram", False))

    async def job() -> int:
        with contextlib.ExitStack() as stack:
            async with connected(address) as remote:
                present = await remote.settings()
                implied = ("postcopy-ram",) if share is not None else ()
                changes = read_settings((*capabilities, *implied), parameters, present)
                if dry:
                    return await dry_run(remote, changes, present, seconds, stop, as_json=as_json)
                assert uri is not None
                tracker = await begin(remote, present, changes)
                if not wait:
                    return await _begun(remote, uri, as_json=as_json)
                view = stack.enter_context(display.open_view(as_json=as_json))
                view.begin(f"migrating to {uri}", destination=uri)
                watch = _MigrationWatch(view, tracker, stop, timeout=timeout, postcopy=None if resume else share)
                state = await watch.follow(remote)
            while state.migration == Status.PRE_SWITCHOVER.qmp or (
                state.migration == Status.POSTCOPY_PAUSED.qmp and not stop.asked
            ):
                state = await watch.look_again(address, state)
            code, text = _outcome(state, address, uri, stop)
            view.end(text, on_stdout=code == DONE)
        if code == DONE:
            _report(state, uri, text, as_json)
        elif as_json:
            write_json({"error": text, "kind": "Cancelled", **state.record(), "exit_code": code})
        return code

    def doing() -> str:
        if dry:
            return "ending; every setting is put back first"
        return "the migration is to be cancelled" if wait else "ending; what was asked for may have been accepted"

    return run(job, as_json=as_json, interrupt=stop.ask if wait or dry else None, doing=doing)


def _check_usage(
    uri: str | None, share: float | None, *, wait: bool, timeout: float | None, resume: bool, dry: bool
) -> None:
    if uri is None and not dry:
        raise click.UsageError("missing argument 'URI': where to migrate to, for example tcp:host-b:4444")
    if dry and (share is not None or resume):
        raise click.UsageError("a dry run moves nothing: --postcopy and --resume have no meaning for it")
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait: without it the command ends before it could cancel")
    if dry and wait:
        raise click.UsageError("--dry-run and --wait exclude each other: a dry run always waits")


async def _begun(remote: Remote, uri: str, *, as_json: bool) -> int:
    if as_json:
        write_json({"destination": uri, **(await remote.state()).record()})
    else:
        print(f"the migration to {uri} has begun; trimig status --qmp {remote.address} says how it stands", flush=True)
    return DONE


class _MigrationWatch:
    """Follows a migration, shows it and stops it; uses several connections if the migration rests meanwhile."""

    def __init__(
        self,
        view: display.View,
        tracker: Tracker,
        stop: StopRequest,
        *,
        timeout: float | None = None,
        postcopy: float | None = None,
    ) -> None:
        """
        Args:
            timeout: seconds from now until *stop* is requested; None for no limit.
            postcopy: switch to postcopy when that share of the memory has been sent; None for no switch.
        """
        self._view = view
        self._tracker = tracker
        self._stop = stop
        self._timeout = timeout
        self._timer = math.inf if timeout is None else trio.current_time() + timeout
        self._postcopy = postcopy
        self._last = Status.SETUP.qmp
        self._held = False  # the note about pre-switchover has been shown
        self._busy = False

    async def follow(self, remote: Remote) -> State:
        """Follow until the migration has ended, is paused in postcopy, is held before the switchover, or should have
        ended long ago.

        **Cancellation:** the migration goes on.
        """
        end, asked = math.inf, False
        feed = remote.client.events()
        while True:
            try:
                state = await remote.state()
            except Gone as error:
                self._last = await _last_told(feed) or self._last
                raise lost(remote.address, self._last, error) from error
            self._last = state.migration
            self._show(state)
            if state.migration == Status.PRE_SWITCHOVER.qmp and not self._stop.asked:
                if not self._held:
                    self._view.note(f"waiting in pre-switchover; trimig continue --qmp {remote.address} lets it go on")
                self._held = True
                return state
            self._held = False
            if self._postcopy is not None and state.migration == Status.ACTIVE.qmp and _sent(state) >= self._postcopy:
                self._postcopy = None
                await remote.execute("migrate-start-postcopy")
                self._view.note("switching to postcopy: the guest goes first, and its memory follows")
            if state.migration == Status.POSTCOPY_PAUSED.qmp:
                self._view.note(
                    "the connection is lost, and the guest waits at the destination for its memory: trimig recover "
                    f"there, and then trimig recover --qmp {remote.address}, take it up again"
                )
                return state
            if (
                state.ended and state.migration != Status.NONE.qmp
            ):  # none: the migration was accepted, and has not begun yet
                return state
            self._check_timer()
            if self._stop.asked and not asked:
                asked = True
                end = trio.current_time() + await _cancel(remote, self._view)
            if trio.current_time() >= end:
                return state
            if asked:
                await trio.sleep(POLL)
            else:
                await self._pass(EVERY)

    def _show(self, state: State) -> None:
        if self._held and state.migration == Status.PRE_SWITCHOVER.qmp:
            return  # an unchanged state is shown once
        for picture in self._tracker.pictures(state):
            self._view.show(picture)
        while self._tracker.warnings:
            text = self._tracker.warnings.pop(0)
            self._view.note(f"warning: {text}", warning=text)

    async def look_again(self, address: str, state: State) -> State:
        """Check a migration at rest in *state* a while later, and follow it if it has moved.

        This command leaves the QMP socket meanwhile: a QEMU serves one client at a time, and another client has to
        recover the migration or let it go on.

        **Cancellation:** the migration is unchanged.
        """
        await self._pass(_PAUSED_EVERY)
        self._check_timer()
        if self._stop.asked and state.migration == Status.POSTCOPY_PAUSED.qmp:
            return state
        try:
            async with connected(address) as remote:
                now = await remote.state()
                return now if now.migration == Status.POSTCOPY_PAUSED.qmp else await self.follow(remote)
        except Busy:
            if self._stop.asked and not self._busy:
                self._busy = True
                self._view.note(f"{address} serves another client; the migration is cancelled as soon as it is free")
            return state  # the other client may recover the migration or continue it
        except Refused as error:
            raise lost(address, self._last, error) from error

    def _check_timer(self) -> None:
        if trio.current_time() >= self._timer and not self._stop.asked:
            self._stop.ask(f"--timeout {formats.plain(self._timeout or 0)}")

    async def _pass(self, seconds: float) -> None:
        """Wait for *seconds*, or until a stop is requested, or until the end of the timeout."""
        with trio.move_on_after(min(seconds, max(0.0, self._timer - trio.current_time()))):
            await self._stop.wait()


def _sent(state: State) -> float:
    """The share of the memory that has been sent; 1 after the first pass."""
    ram = state.info.get("ram", {})
    if ram.get("dirty-sync-count", 0) > 1:
        return 1.0
    total = ram.get("total", 0)
    return (ram.get("normal", 0) + ram.get("duplicate", 0)) * ram.get("page-size", 4096) / total if total else 0.0


async def _cancel(remote: Remote, view: display.View) -> float:
    """Request the cancel; returns the seconds that the end may take from now on."""
    try:
        await remote.execute("migrate_cancel")
    except Gone:
        return 0.0  # the next request finds the reason and reports it
    except Refused as error:
        view.note(error.format_message())
        return _DECIDED_LIMIT
    return CANCEL_LIMIT


async def _last_told(feed: AsyncIterator[Mapping[str, Any]]) -> str:
    """The status in the last event MIGRATION that a closed connection has brought; empty without one.

    **Cancellation:** events may have been read.
    """
    last = ""
    with contextlib.suppress(trimig.TransportFailed), trio.move_on_after(POLL):
        async for event in feed:
            if event["event"] == "MIGRATION":
                last = str(event["data"]["status"])
    return last


def lost(address: str, last: str, error: Refused) -> trimig.HandoverUncertain | Refused:
    """The error for a source that is gone.

    Args:
        last: the last status that it has shown, as QMP names it.
    """
    # Not after `failed`: QMP calls a postcopy whose memory is lost so, too, and the destination has that guest.
    if last == Status.CANCELLED.qmp:
        return Refused(f"{error.format_message()}; before that the migration was {last}: the source has kept its guest")
    return trimig.HandoverUncertain(
        f"{error.format_message()}; the migration was {last}, and goes on if the process still runs. Ask again: "
        f"trimig status --qmp {address}; and ask the destination before the guest is started anywhere"
    )


def _outcome(state: State, address: str, uri: str, stop: StopRequest) -> tuple[int, str]:
    """Exit code and sentence.

    Raises:
        HandoverUncertain: the owner of the guest is not certain.
        Refused: the migration has failed, or does not end.
    """
    here = f"the guest is {state.run_state} at {address}" + (f": {state.lost_guest}" if state.lost_guest else "")
    if state.owner == "unknown":
        why = f": {state.problem}" if state.problem else ""
        settle = "; then say it with the QMP command x-trimig-settle" if "owner" in state.info else ""
        raise trimig.HandoverUncertain(
            f"it is not certain who owns the guest{why}. Look whether it runs at {uri} before it is started "
            f"anywhere{settle}"
        )
    if state.migration == Status.COMPLETED.qmp:
        late = f" ({stop.reason} came too late)" if stop.asked else ""
        return DONE, f"migrated to {uri} in {formats.duration(state.info.get('total-time', 0) / 1000)}{late}"
    if state.migration == Status.CANCELLED.qmp:
        if not stop.asked:
            return FAILED, f"the migration was cancelled by another client; {here}"
        return FAILED if stop.reason.startswith("--") else CANCELLED, f"cancelled by {stop.reason}; {here}"
    if state.migration == Status.POSTCOPY_PAUSED.qmp:
        raise trimig.PostcopyLost(
            f"{stop.reason}: this command does not wait any more. The guest is at {uri} and lacks memory that is here: "
            f"{address} must stay until trimig recover has brought it there"
        )
    if state.lost:
        raise trimig.PostcopyLost(f"the guest is at {uri}, and the rest of its memory did not follow: {state.problem}")
    if state.migration == Status.FAILED.qmp:
        raise Refused(f"the migration has failed: {state.problem or 'no reason is given'}; {here}")
    raise Refused(f"the migration was to be cancelled and has not ended, it is {state.migration}; {here}")


def _report(state: State, uri: str, text: str, as_json: bool) -> None:
    info = state.info
    ram = info.get("ram", {})
    seconds = info.get("total-time", 0) / 1000
    moved = (ram.get("normal", 0) + ram.get("duplicate", 0)) * ram.get("page-size", 4096)
    speed = moved / seconds if seconds else 0.0
    if as_json:
        record: dict[str, Any] = {
            "destination": uri,
            **state.record(),
            "total_ms": info.get("total-time"),
            "setup_ms": info.get("setup-time"),
            "downtime_ms": info.get("downtime"),
            "iterations": ram.get("dirty-sync-count"),
            "ram_bytes": ram.get("total"),
            "transferred_bytes": ram.get("transferred"),
            "postcopy_bytes": ram.get("postcopy-bytes"),
            "throughput_bytes_per_s": round(speed),
            "encodings": encoding_records_of(info),
        }
        write_json(record)
        return
    print(text, flush=True)
    print(
        f"  downtime {formats.duration(info.get('downtime', 0) / 1000)}, "
        f"{formats.counted(ram.get('dirty-sync-count', 0), 'pass', 'passes')} over {formats.size(ram.get('total', 0))}"
    )
    print(f"  {formats.transfer(ram.get('transferred', 0), speed)}{followed(info)}")
    if chosen := encoding_words(encoding_records_of(info)):
        print(f"  {chosen}")
