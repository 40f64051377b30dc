"""``trimig receive``, ``send`` and ``settle``: save a guest in a file, and send it again.

Before the source sends the commit, a record beside the file says that the owner is unknown; the answer corrects the
record. So neither a lost answer nor a crash lets the same guest be started twice by accident.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click

import trimig
from trimig import formats, stream, transport
from trimig.errors import Ownership

from .. import display, postcopy, saved
from ..encodings import encoding_records, encoding_words
from ..exit_codes import DONE
from ..options import FILE, debug_option, encoding_option, json_option, migration_options
from ..output import out, same_output, say, write_json
from ..picture import watched
from ..runner import run
from ..stop import words_for
from ..summary import summary_record
from ..tasks import alongside


@click.command()
@click.argument("uri")
@click.option("--save", "file", metavar="FILE", required=True, type=FILE, help="Keep the guest in this file.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@postcopy.recover_option
@migration_options
def receive(uri: str, file: Path, force: bool, recover_for: float | None, config: trimig.Config, as_json: bool) -> int:
    """Be the destination of a QEMU or trimig that migrates to URI, and keep its guest in FILE.

    FILE appears when the guest is complete and on the disk; only then the source is told so. It is a plain stream: a
    QEMU of the same machine type loads it with -incoming "exec:cat FILE".

    With -c postcopy-ram the source may switch to postcopy: the guest is ready when its last page has come. If the
    connection is lost after the switch, the command waits at URI again.
    """
    config = postcopy.recovering(config, recover_for)
    transport.check(uri)
    _check_target(file, force=force)
    monitor = trimig.Monitor()
    monitor.add_listener(saved.Arrival(file).on_event)
    job = functools.partial(_receive, uri, file, force, config, as_json, monitor)
    truth = functools.partial(postcopy.PostcopyInterrupts.truth, monitor)
    doing = functools.partial(words_for, monitor, file)
    decide = postcopy.PostcopyInterrupts.of(monitor).decide
    with saved.replacing(file):
        return run(job, as_json=as_json, doing=doing, decide=decide, truth=truth)


def _check_target(file: Path, *, force: bool) -> None:
    """Refuse a bad path before a source connects."""
    if not file.parent.is_dir():
        raise click.BadParameter(f"there is no directory {file.parent}", param_hint="--save")
    if os.path.lexists(file) and not force:
        what = "is a symbolic link" if file.is_symlink() else "exists"
        raise click.BadParameter(f"{file} {what}; --force replaces it", param_hint="--save")
    try:
        trimig.ParkedGuest(file, replace=force).check_store()
    except trimig.GuestFailed as error:
        raise click.BadParameter(str(error), param_hint="--save") from error


async def _receive(
    uri: str, file: Path, force: bool, config: trimig.Config, as_json: bool, monitor: trimig.Monitor
) -> int:
    with (
        trimig.ParkedGuest(file, replace=force, peer=config.peer) as guest,
        display.open_view(as_json=as_json) as view,
    ):
        begun = functools.partial(_announce, monitor.events(), view, as_json)
        call = functools.partial(trimig.receive, guest, uri, config, monitor=monitor)
        view.begin(f"receiving into {file}", file=str(file))
        try:
            summary = await watched(functools.partial(alongside, call, begun), monitor, view)
        finally:
            # For every end, also a cancellation: there is no second chance to keep the received memory.
            if monitor.status is trimig.Status.POSTCOPY_LOST:
                await _keep_partial(guest, file, monitor, view)
        text = (
            f"received {_called(guest)} with {formats.size(summary.ram_bytes)} of RAM and "
            f"{len(guest.sections)} devices in {formats.duration(summary.total_time)}; it is in {file} "
            f"({guest.guest_run_state} when it is resumed)"
        )
        view.end(text, on_stdout=True)
        if as_json:
            write_json(_received(guest, file, summary))
            return DONE
        out(
            f"received {_called(guest)} into {file}\n"
            f"  RAM: {', '.join(f'{block.name} {formats.size(block.length)}' for block in guest.ram)}\n"
            f"  devices: {', '.join(_device_name(s) for s in guest.sections)}"
        )
        _print_warnings(summary)
    return DONE


def _print_warnings(summary: trimig.Summary) -> None:
    """Print the warnings, which were shown during the migration, with the result as well."""
    if not same_output():
        for warning in summary.warnings:
            out(f"  warning: {warning}")


async def _keep_partial(guest: trimig.ParkedGuest, file: Path, monitor: trimig.Monitor, view: display.View) -> None:
    """Keep the received memory, and print its path.

    **Cancellation:** held off while the file is written.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        await stream.keep_partial(guest, monitor.counters.missing, partial)
    except trimig.TrimigError as error:
        view.note(f"what has come could not be kept: {error}")
        return
    view.note(
        f"what has come is in {partial}: if the source still has its half, trimig merge makes one guest of both, and "
        "trimig export --partial writes what is there",
        partial=str(partial),
    )


def _called(guest: trimig.ParkedGuest) -> str:
    """The guest in a sentence; a name such as ``none`` alone would read as nothing."""
    return f"the guest (machine type {guest.name})" if guest.name else "the guest"


def _device_name(section: Any) -> str:
    return f"{section.idstr}/{section.instance_id}" if section.instance_id else str(section.idstr)


def _received(guest: trimig.ParkedGuest, file: Path, summary: trimig.Summary) -> dict[str, Any]:
    return {
        "file": str(file),
        "file_bytes": file.stat().st_size,
        "machine": guest.name,
        "run_state": guest.guest_run_state,
        "blocks": [{"name": block.name, "length": block.length} for block in guest.ram],
        "devices": [
            {
                "idstr": s.idstr,
                "instance_id": s.instance_id,
                "section_id": s.section_id,
                "version_id": s.version_id,
                "size": len(s.payload),
            }
            for s in guest.sections
        ],
        **summary_record(summary),
    }


async def _announce(events: AsyncIterator[trimig.Event], view: display.View, as_json: bool) -> None:
    # Requested before the migration begins: this task may get its first turn when the listener is open already.
    async for event in events:
        if event.name == "LISTENING":
            for address in event.data["addresses"]:
                display.note_and_print(view, f"listening on {address}", as_json=as_json, address=address)


@click.command()
@click.argument("file", type=FILE)
@click.argument("uri")
@click.option("--force", is_flag=True, help="Send it although it was handed over before: there may be two of it then.")
@postcopy.options
@postcopy.recover_option
@migration_options
@encoding_option
def send(
    file: Path,
    uri: str,
    force: bool,
    postcopy_after: float | None,
    recover_for: float | None,
    config: trimig.Config,
    as_json: bool,
) -> int:
    """Give the guest in FILE to the QEMU or trimig that waits at URI.

    FILE may be one that trimig receive has saved, or any stream that a QEMU has written to a file. It is not changed.
    What became of it is kept in FILE.owner; if it cannot be known, trimig settle says it.

    --postcopy turns the capability postcopy-ram on, which the destination must have too.
    """
    postcopy.refuse_pause(config, "send")
    schedule = None if postcopy_after is None else postcopy.PostcopySchedule(after=postcopy_after)
    config = postcopy.recovering(config, recover_for)
    target = _target_file(file, *transport.check(uri))
    with stream.locked(file):
        record = stream.read_record(file)
        if record is not None and record.owner is Ownership.UNKNOWN:
            raise saved.unsettled(file, record)
        if record is not None and record.owner is Ownership.DESTINATION:
            handed = f"{file} was handed over to {record.destination} from {record.host} at {record.time}"
            if not force:
                raise trimig.NotOwner(f"{handed}; --force sends it again, and there may be two of this guest then")
            say(f"warning: {handed}; it is sent again, so there may be two of this guest")
        monitor = trimig.Monitor()
        job = functools.partial(_send, file, uri, record, config, schedule, as_json, monitor)
        truth = functools.partial(postcopy.PostcopyInterrupts.truth, monitor)
        doing = functools.partial(words_for, monitor, file)
        code = run(
            job, as_json=as_json, doing=doing, decide=postcopy.PostcopyInterrupts.of(monitor).decide, truth=truth
        )
        if code == DONE and target is not None:
            with stream.locked(target):
                saved.forget_record(target)
        return code


def _target_file(file: Path, scheme: str, rest: str) -> Path | None:
    """The file that the guest goes into; None if *rest* is no file. Refuse one whose guest would be lost."""
    if scheme != "file":
        return None
    there = Path(rest.partition(",offset=")[0])
    if there.exists() and file.exists() and there.samefile(file):
        raise click.BadParameter(f"file:{rest} is FILE itself: the guest in it would be lost", param_hint="URI")
    saved.check_settled(there)
    return there


async def _send(
    file: Path,
    uri: str,
    before: stream.OwnerRecord | None,
    config: trimig.Config,
    schedule: postcopy.PostcopySchedule | None,
    as_json: bool,
    monitor: trimig.Monitor,
) -> int:
    uncertain: trimig.HandoverUncertain | None = None
    sent = False
    commit = functools.partial(stream.record_decision, file, uri)
    with saved.naming(file):
        loaded = await trimig.ParkedGuest.load(file, partial=config.completeness == "warn")
    with loaded as guest, display.open_view(as_json=as_json) as view:
        for warning in guest.warnings:
            view.note(f"warning: {warning}")
        profile = guest.peer
        view.begin(f"sending {file} to {uri}", file=str(file), destination=uri)
        monitor.add_listener(functools.partial(_switch_note, view, uri, monitor))
        call = functools.partial(
            trimig.migrate, guest, uri, _as_the_file(config, profile), monitor=monitor, commit=commit
        )
        try:
            steered = (
                call
                if schedule is None
                else functools.partial(alongside, call, functools.partial(schedule.run, monitor))
            )
            summary = await watched(steered, monitor, view)
            sent = True
        except trimig.HandoverUncertain as error:
            uncertain = error
        finally:
            # Synchronous, because a cancelled task may run this.
            if sent or monitor.owner is Ownership.DESTINATION:
                _record_handed_over(file, uri)
            elif monitor.owner is Ownership.SOURCE:
                stream.write_record(file, before)
        if uncertain is not None:
            raise trimig.HandoverUncertain(f"{uncertain}. {saved.how_to_settle(file, uri)}") from uncertain
        text = f"sent {_called(guest)} to {uri} in {formats.duration(summary.total_time)}"
        if not summary.confirmed:
            text += "; no answer has confirmed that it arrived, because there was no return path"
        view.end(text, on_stdout=True)
    if as_json:
        write_json({"file": str(file), "destination": uri, "machine": guest.name, **summary_record(summary)})
        return DONE
    moved = formats.transfer(summary.bytes_transferred, summary.throughput)
    chosen = encoding_words(encoding_records(summary.encodings))
    out(f"{text}: {moved}{postcopy.followed(monitor.info())}{f'; {chosen}' if chosen else ''}")
    _print_warnings(summary)
    return DONE


def _switch_note(view: display.View, uri: str, monitor: trimig.Monitor, event: trimig.Event) -> None:
    """Say that the guest is at the destination before its memory."""
    if event.name == "MIGRATION" and event.data["status"] == trimig.Status.POSTCOPY_ACTIVE.value:
        left = monitor.counters.remaining
        view.note(
            f"switched to postcopy: the guest is at {uri}, and the rest of its memory follows ({formats.size(left)})",
            remaining=left,
        )


def _as_the_file(config: trimig.Config, profile: trimig.PeerProfile) -> trimig.Config:
    """The configuration for the guest's stream, whose machine type may have a configuration section and footers."""
    peer = dataclasses.replace(
        config.peer,
        send_configuration=config.peer.send_configuration and profile.send_configuration,
        send_section_footer=config.peer.send_section_footer and profile.send_section_footer,
    )
    return config if peer == config.peer else dataclasses.replace(config, peer=peer)


def _record_handed_over(file: Path, uri: str) -> None:
    try:
        stream.write_record(file, stream.OwnerRecord.now(Ownership.DESTINATION, uri))
    except OSError as error:
        say(
            f"warning: the guest was handed over, but {stream.record_path(file)} could not be written "
            f"({error.strerror}) and still says that the owner is unknown; run: trimig settle {file} "
            "--owner destination"
        )


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--owner",
    required=True,
    type=click.Choice(["source", "destination"]),
    help="Who has the guest: source, then FILE may be sent again; destination, then it is handed over.",
)
@json_option
@debug_option
def settle(file: Path, owner: str, as_json: bool) -> int:
    """Say who owns the guest in FILE, after a send whose answer was lost.

    Find out first: a guest that is started on a wrong word runs twice.
    """
    with stream.locked(file):
        try:
            record = stream.read_record(file)
        except trimig.StateError as error:
            say(str(error))  # the record is damaged; the user's word replaces it
            record = stream.OwnerRecord.now(Ownership.UNKNOWN, "an unknown place")
        if record is None:
            raise trimig.StateError(f"there is nothing to settle: {file} is with its source")
        if record.owner is Ownership.DESTINATION:
            raise trimig.StateError(
                f"there is nothing to settle: {file} was handed over to {record.destination} at {record.time}",
                owner=Ownership.DESTINATION,
            )
        if owner == "source":
            stream.write_record(file, None)
            text = f"settled: the guest in {file} is here, and can be sent"
        else:
            stream.write_record(file, stream.OwnerRecord.now(Ownership.DESTINATION, record.destination))
            text = f"settled: the guest in {file} is at {record.destination}"
    if as_json:
        write_json({"file": str(file), "owner": owner, "destination": record.destination})
    else:
        out(text)
    return DONE
