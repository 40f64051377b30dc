"""``trimig status``, ``info``, ``cancel``, ``set``, ``continue``, ``postcopy``, ``events`` and similar commands: each
sends one command to a guest behind a QMP socket, of a ``trimig run`` as well as of a QEMU."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import click

import trimig
from trimig import formats, qmp
from trimig.status import QMP_BEFORE_POSTCOPY, QMP_PAUSABLE, QMP_TERMINAL, Status

from ..exit_codes import DONE, FAILED, UNCERTAIN
from ..options import debug_option, json_option
from ..output import say, write_json
from ..runner import run
from .client import Remote, connected
from .options import qmp_option, read_settings, settings_options
from .state import CANCEL_LIMIT, Gone, Refused, State


def _run(address: str, as_json: bool, job: Callable[[Remote], Awaitable[int]]) -> int:
    async def connect() -> int:
        async with connected(address) as remote:
            return await job(remote)

    return run(connect, as_json=as_json)


def _tell(text: str, record: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        write_json(record)
    else:
        print(text, flush=True)


@click.command()
@qmp_option
@json_option
@debug_option
def status(address: str, as_json: bool) -> int:
    """Say in one line how a guest stands: its run state, its migration, and who owns it.

    The exit code is 3 if the owner is not certain, and 4 if the destination has the guest without all of its memory.
    """

    async def job(remote: Remote) -> int:
        state = await remote.state()
        _tell(state.sentence, state.record(), as_json)
        return state.code

    return _run(address, as_json, job)


@click.command()
@qmp_option
@json_option
@debug_option
def info(address: str, as_json: bool) -> int:
    """Show everything that is known of a guest's migration: the members of query-migrate."""

    async def job(remote: Remote) -> int:
        members = (await remote.state()).info
        if as_json:
            write_json(members)
            return DONE
        rows = list(_rows(members))
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows or [("", "there has been no migration")]:
            print(f"{name:{width}}  {value}".strip())
        return DONE

    return _run(address, as_json, job)


_TIMES: Final = frozenset({"total-time", "setup-time", "downtime", "expected-downtime"})
_SIZES: Final = frozenset({"transferred", "remaining", "total", "page-size", "cache-size"})


def _rows(members: Mapping[str, Any], prefix: str = "") -> Any:
    """Name and value of every member; inner members have names like ``ram.total``."""
    for name, value in members.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{name}.")
        elif name in _TIMES:
            yield prefix + name, formats.whole_ms(value / 1000)
        elif name in _SIZES or name.endswith("bytes"):
            yield prefix + name, f"{value} ({formats.size(value)})" if value >= 1024 else f"{value}"
        elif isinstance(value, list):
            yield prefix + name, ", ".join(_address(item) for item in value)
        else:
            yield prefix + name, formats.plain(value) if isinstance(value, float) else f"{value}"


def _address(value: Any) -> str:
    """A QMP socket address as a URI; any other value unchanged."""
    if isinstance(value, Mapping) and value.get("type") == "inet":
        return f"tcp:{value.get('host')}:{value.get('port')}"
    if isinstance(value, Mapping) and value.get("type") == "unix":
        return f"unix:{value.get('path')}"
    return str(value)


@click.command()
@qmp_option
@json_option
@debug_option
def cancel(address: str, as_json: bool) -> int:
    """Cancel a guest's migration, and say what became of the guest."""

    async def job(remote: Remote) -> int:
        before = await remote.state()
        if before.migration == Status.POSTCOPY_PAUSED.qmp:
            raise Refused(
                "the migration waits for a connection in postcopy, and cannot be cancelled: the guest is at the destination "
                "without all of its memory. trimig recover takes it up again; to give it up, end the destination (quit or "
                f"SIGTERM): it keeps what has come, and ends with exit code 4 ({before.sentence})"
            )
        refusal = ""
        try:
            await remote.execute("migrate_cancel")
        except Gone:
            raise
        except Refused as error:
            refusal = error.format_message()
        state = await remote.wait_ended(CANCEL_LIMIT)
        code = FAILED
        if before.ended:
            text, code = "there is no migration to cancel", DONE
        elif state.owner == "unknown":
            text, code = refusal or "it is too late: the decision to hand over is on its way", UNCERTAIN
        elif state.migration == Status.CANCELLED.qmp:
            text, code = "cancelled", DONE
        elif not state.ended:
            text = f"the migration has not ended within {formats.duration(CANCEL_LIMIT)}"
        else:
            text = refusal or f"too late to cancel: the migration has {state.migration}"
        _tell(f"{text} ({state.sentence})", {**state.record(), "text": text, "exit_code": code}, as_json)
        return code

    return _run(address, as_json, job)


@click.command("set")
@settings_options
@qmp_option
@json_option
@debug_option
def set_(address: str, capabilities: tuple[str, ...], parameters: tuple[str, ...], as_json: bool) -> int:
    """Set migration capabilities and parameters of a guest, all of them or none; without any, show them.

    Sizes may be written as 32M, times are in the unit of the parameter (downtime-limit: milliseconds). Parameters may
    also be set while a migration runs; max-bandwidth and downtime-limit then act at once.
    """

    async def job(remote: Remote) -> int:
        present = await remote.settings()
        changes = read_settings(capabilities, parameters, present)
        if changes:
            await remote.apply(changes, present)
            present = await remote.settings()
        shown = present.of(changes) if changes else present
        if as_json:
            write_json({"capabilities": shown.capabilities, "parameters": shown.parameters})
            return DONE
        for name, state in shown.capabilities.items():
            print(f"-c {name}={'on' if state else 'off'}")
        for name, value in shown.parameters.items():
            print(f"-p {name}={str(value).lower() if isinstance(value, bool) else value}")
        return DONE

    return _run(address, as_json, job)


def _command(
    name: str,
    text: str,
    arguments: Mapping[str, Any],
    address: str,
    as_json: bool,
    *,
    only_in: frozenset[str],
    wanted: str,
) -> int:
    """Execute one QMP command, and print *text* if the command was accepted.

    A QEMU accepts some commands in any status and then does nothing. So the status is checked first: a status outside
    *only_in* is an error, which says that there is no *wanted* migration.
    """

    async def job(remote: Remote) -> int:
        before = await remote.state()
        if before.migration not in only_in:
            raise Refused(f"there is {wanted} ({before.sentence})")
        await remote.execute(name, **arguments)
        _tell(text, {"command": name, **(await remote.state()).record()}, as_json)
        return DONE

    return _run(address, as_json, job)


@click.command("continue")
@qmp_option
@json_option
@debug_option
def continue_(address: str, as_json: bool) -> int:
    """Let a migration that waits in pre-switchover go on to the switchover."""
    return _command(
        "migrate-continue", "the switchover goes on", {"state": Status.PRE_SWITCHOVER.qmp}, address, as_json,
        only_in=frozenset({Status.PRE_SWITCHOVER.qmp}), wanted="no migration that waits before its switchover",
    )  # fmt: skip


@click.command()
@qmp_option
@json_option
@debug_option
def postcopy(address: str, as_json: bool) -> int:
    """Switch a running migration to postcopy: the guest runs at the destination first, and its memory follows.

    The capability postcopy-ram must have been set on both sides before the migration.
    """
    return _command(
        "migrate-start-postcopy", "the switch to postcopy has been asked for", {}, address, as_json,
        only_in=QMP_BEFORE_POSTCOPY, wanted="no migration that could switch to postcopy",
    )  # fmt: skip


@click.command()
@qmp_option
@json_option
@debug_option
def pause(address: str, as_json: bool) -> int:
    """Drop the connection of a migration in postcopy, to take it up again over another one: trimig recover.

    The guest goes on running at the destination, as far as its memory reaches.
    """
    return _command(
        "migrate-pause", "the connection is being dropped", {}, address, as_json,
        only_in=QMP_PAUSABLE, wanted="no migration in postcopy to pause",
    )  # fmt: skip


@click.command()
@click.argument("uri")
@qmp_option
@json_option
@debug_option
def recover(uri: str, address: str, as_json: bool) -> int:
    """Take a paused postcopy migration up again: the destination listens at URI, the source connects to it.

    First at the destination (--qmp of the one that waits for memory), then at the source; which of the two it is
    follows from what it is doing.
    """

    async def job(remote: Remote) -> int:
        state = await remote.state()
        if state.run_state == "finish-migrate":
            await remote.execute("migrate", uri=uri, resume=True)
            done = f"the source connects to {uri}"
        else:
            await remote.execute("migrate-recover", uri=uri)
            done = f"the destination waits at {_where(await remote.state(), uri)}"
        if as_json:
            write_json({"done": done, **(await remote.state()).record()})
        else:
            print(done, flush=True)
        return DONE

    return _run(address, as_json, job)


@click.command()
@click.argument("uri")
@qmp_option
@json_option
@debug_option
def incoming(uri: str, address: str, as_json: bool) -> int:
    """Have a destination listen at URI: one that was started with --incoming defer, or whose last attempt has ended without a
    guest.

    The QMP command is migrate-incoming. A QEMU listens once; a trimig run listens again after every attempt that has failed
    or was cancelled.
    """

    async def job(remote: Remote) -> int:
        before = await remote.state()
        if before.run_state != "inmigrate" and before.is_here_from_elsewhere:
            raise Refused(f"the guest has arrived there already, and nothing waits for another one ({before.sentence})")
        await remote.execute("migrate-incoming", uri=uri)
        state = await remote.state()
        where = _where(state, uri)
        _tell(f"the destination waits at {where}", {"address": where, **state.record()}, as_json)
        return DONE

    return _run(address, as_json, job)


def _where(state: State, uri: str) -> str:
    """The address that the destination listens at, with the port that the kernel chose."""
    addresses = state.info.get("socket-address", ())
    return qmp.uri_of(addresses[0]) if addresses else uri


@click.command()
@click.option(
    "--until-end", is_flag=True, help="End with the migration: exit code 0 if it has completed, 1 if it has not."
)
@qmp_option
@json_option
@debug_option
def events(address: str, until_end: bool, as_json: bool) -> int:
    """Follow what happens to a guest: one line for each event, with --json as one JSON object.

    A guest has migration events only while its capability "events" is on: trimig set -c events. If the capability is
    off, the command says so.
    """

    async def job(remote: Remote) -> int:
        feed = remote.client.events()  # before the settings are read, so that no event is missed
        if not (await remote.settings()).capabilities.get("events", True):
            off = f"the capability 'events' is off at {remote.address}"
            how = f"trimig set -c events --qmp {remote.address}"
            if until_end:
                raise Refused(f"{off}, so it would not tell when a migration ends; turn it on first: {how}")
            say(f"{off}, so it tells nothing of its migration; {how} turns it on")
        return await _follow(feed, remote, until_end=until_end, as_json=as_json)

    return _run(address, as_json, job)


async def _follow(feed: AsyncIterator[Mapping[str, Any]], remote: Remote, *, until_end: bool, as_json: bool) -> int:
    closing = False
    while True:
        try:
            event = await anext(feed, None)
        except trimig.TransportFailed:
            event = None
        if event is None:
            if closing and not until_end:
                return DONE
            raise Gone(f"{remote.address} has closed the connection")
        data = event.get("data", {})
        if as_json:
            write_json(event)
        else:
            print(_line(event), flush=True)
        closing = closing or event["event"] == "SHUTDOWN"
        ended = data.get("status") if event["event"] == "MIGRATION" else None
        if until_end and ended in QMP_TERMINAL:
            return DONE if ended == Status.COMPLETED.qmp else FAILED


def _line(event: Mapping[str, Any]) -> str:
    """Local time, name, and the values of an event."""
    stamp = event.get("timestamp", {})
    clock = time.strftime("%H:%M:%S", time.localtime(stamp.get("seconds", 0)))
    values = " ".join(map(str, event.get("data", {}).values()))
    return f"{clock}.{stamp.get('microseconds', 0) // 1000:03} {event['event']} {values}".rstrip()
