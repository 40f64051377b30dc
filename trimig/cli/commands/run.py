"""``trimig run``: hosts a guest, and lets QMP clients drive it."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import uuid as uuids
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import click
import trio

import trimig
from trimig import formats, qmp, transport
from trimig.errors import Ownership
from trimig.guests import ArrivalRecord
from trimig.monitor import blockers
from trimig.status import IDLE

from ..exit_codes import CANCELLED, DONE, INCOMPLETE, UNCERTAIN
from ..guests import listed, opened, resolve
from ..options import encoding_option, migration_options
from ..output import say, write_json
from ..runner import run as run_job

DEFER = "defer"


class _RunCommand(click.Command):
    """The command whose help lists the kinds of guests."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Kinds of guests, for --guest"):
            formatter.write_dl(listed())


@click.command(cls=_RunCommand)
@click.option(
    "--guest",
    "spec",
    metavar="SPEC",
    required=True,
    help="The guest: one of the kinds below.",
)
@click.option("--incoming", metavar="URI|defer", help="Wait for a guest at URI, or for migrate-incoming.")
@click.option("--qmp", "addresses", metavar="ADDR", multiple=True, help="Serve QMP at unix:PATH or tcp:HOST:PORT.")
@click.option("--control", "controls", metavar="ws://HOST:PORT", multiple=True, help="The same over a websocket.")
@click.option("--name", default="", help="The machine's name; both ends must agree on it.")
@click.option("--uuid", metavar="UUID", help="The machine's UUID, for query-uuid, validate-uuid and multifd.")
@click.option("-S", "stopped", is_flag=True, help="Do not start the guest; cont does.")
@click.option("--only-migratable", is_flag=True, help="Allow nothing that would prevent a migration.")
@migration_options
@encoding_option
def run(
    spec: str,
    incoming: str | None,
    addresses: tuple[str, ...],
    controls: tuple[str, ...],
    name: str,
    uuid: str | None,
    stopped: bool,
    only_migratable: bool,
    config: trimig.Config,
    as_json: bool,
) -> int:
    """Host a guest until quit, SIGTERM or Ctrl-C, and let QMP clients drive it as they drive a QEMU.

    For example, in two terminals, and then move the guest from one to the other:

    \b
      trimig run --guest process --qmp unix:a.sock
      trimig run --guest process --qmp unix:b.sock --incoming tcp:127.0.0.1:4444
      trimig migrate tcp:127.0.0.1:4444 --qmp unix:a.sock --wait
    """
    if uuid is not None:
        try:
            uuid = str(uuids.UUID(uuid))
        except ValueError:
            raise click.BadParameter(f"{uuid!r} is no UUID", param_hint="--uuid") from None
    if incoming is not None and incoming != DEFER:
        transport.check(incoming)
    if not addresses and not controls and incoming is None:
        raise click.UsageError("no client could reach this guest: give --qmp ADDR, --control ws://… or --incoming URI")
    if stopped:
        config = dataclasses.replace(config, autostart=False)
    host = _Host(config=config, as_json=as_json)
    job = functools.partial(host.run, spec, incoming, addresses, controls, name, uuid, stopped, only_migratable)
    return run_job(job, as_json=as_json, interrupt=host.interrupt, doing=host.doing)


def _only_migratable(guest: trimig.Guest) -> None:
    """Refuse every blocker of migration for *guest*, present or later."""
    for reason in blockers.reasons(guest):
        raise click.BadParameter(reason, param_hint="--only-migratable")
    if isinstance(guest, blockers.Blockable):
        guest.blockers.refuse_all()


def _other_side(machine: qmp.Machine) -> str | None:
    """The monitor of the side with an uncertain owner; None if the owner is certain."""
    if machine.outgoing.owner is Ownership.UNKNOWN:
        return "destination"
    return "source" if machine.incoming.owner is Ownership.UNKNOWN else None


def _migrates(machine: qmp.Machine) -> bool:
    """A migration is under way. A side that waits for its source has none."""
    waits = machine.incoming.status is trimig.Status.SETUP
    return machine.outgoing.status not in IDLE or not (waits or machine.incoming.status in IDLE)


def _last_words(machine: qmp.Machine, name: str) -> str:
    """What has become of the guest, at the end of its process."""
    if machine.handed_over:
        return (
            f"the guest {name!r} was handed over before, and is at the destination; what was left of it here has ended"
        )
    if machine.waiting:
        return f"no guest has arrived; what waited here for {name!r} has ended"
    return f"the guest {name!r} has ended"


@runtime_checkable
class _WithUuid(Protocol):
    """A guest that takes the UUID of its machine."""

    uuid: str | None


class _Host:
    """The process around one machine: its output and its end."""

    def __init__(self, *, config: trimig.Config, as_json: bool) -> None:
        self._config = config
        self._as_json = as_json
        self._machine: qmp.Machine | None = None
        self._signal = ""
        self._interrupted = False  # a migration was under way when the signal came
        self._starting = trio.CancelScope()
        #: Statuses before the machine has begun. They are printed when it has, because an address that cannot be listened
        #: on is one error, and not a migration that failed.
        self._early: list[str] = []

    def doing(self) -> str:
        """The text for a first signal: its consequences."""
        machine = self._machine
        if machine is None:
            return "ending; the guest has not been started"
        if not _migrates(machine):
            return "ending"
        return "ending; the migration under way is cancelled first, if that is still possible"

    def interrupt(self, signal: str) -> None:
        """Handle SIGINT or SIGTERM: end in order."""
        self._signal = signal
        if self._machine is None:
            self._interrupted = True
            self._starting.cancel(signal)
        else:
            self._interrupted = _migrates(self._machine)
            self._machine.announce_shutdown("host-signal")
            self._machine.ended.set()

    async def run(
        self,
        spec: str,
        incoming: str | None,
        addresses: tuple[str, ...],
        controls: tuple[str, ...],
        name: str,
        uuid: str | None,
        stopped: bool,
        only_migratable: bool,
    ) -> int:
        """Make the guest, serve it and end it; returns the exit code."""
        with self._starting:
            kind, request = resolve(
                spec, waiting=incoming is not None, stopped=stopped, name=name, peer=self._config.peer
            )
            async with opened(kind, request) as guest, trio.open_nursery(strict_exception_groups=True) as nursery:
                if uuid is not None and isinstance(guest, _WithUuid):
                    guest.uuid = uuid
                if only_migratable:
                    _only_migratable(guest)
                record = kind.record(request)
                machine = qmp.Machine(
                    guest,
                    nursery,
                    self._config,
                    name=name,
                    uuid=uuid,
                    waiting=incoming is not None,
                    version=trimig.__version__,
                    commit=record.decide if record is not None else None,
                )
                if record is not None:
                    machine.outgoing.add_listener(record.on_event)
                if isinstance(record, ArrivalRecord):
                    machine.incoming.add_listener(record.on_incoming_event)
                machine.subscribe(self._event)
                for monitor in (machine.outgoing, machine.incoming):
                    monitor.add_listener(self._happened)
                for address in addresses:
                    self._listening(await nursery.start(qmp.serve, machine, address), "QMP")
                for address in controls:
                    self._listening(await nursery.start(qmp.serve_websocket, machine, address), "control")
                if incoming is not None and incoming != DEFER:
                    await machine.start_incoming(incoming)
                self._machine = machine
                for status in self._early:
                    self._show(status)
                await self._until_the_end(machine, guest)
                nursery.cancel_scope.cancel("the machine has ended")
        return self._code()

    async def _until_the_end(self, machine: qmp.Machine, guest: trimig.Guest) -> None:
        try:
            await machine.ended.wait()
            await machine.shutdown(f"the process ends ({self._signal or 'quit'})")
        finally:
            machine.close()
        if (other := _other_side(machine)) is not None:
            self._say(
                f"it is not certain which side owns the guest: look at the {other} before you start it anywhere",
                owner=Ownership.UNKNOWN.value,
            )
        else:
            self._say(_last_words(machine, guest.name), owner=machine.outgoing.owner.value)

    def _code(self) -> int:
        statuses: tuple[trimig.Status, ...] = ()
        if self._machine is not None:
            if _other_side(self._machine) is not None:
                return UNCERTAIN
            statuses = (self._machine.outgoing.status, self._machine.incoming.status)
            if trimig.Status.POSTCOPY_LOST in statuses:
                return INCOMPLETE
        return CANCELLED if self._interrupted and trimig.Status.COMPLETED not in statuses else DONE

    # -- telling ---------------------------------------------------------------------------------------------------

    def _listening(self, address: str, what: str) -> None:
        self._say(f"{what} at {address}", listening=address, kind=what)

    def _event(self, event: Mapping[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(event), flush=True)

    def _happened(self, event: trimig.Event) -> None:
        match event.name:
            case "LISTENING":
                for address in event.data["addresses"]:
                    self._listening(address, "incoming migration")
            case "MIGRATION" if self._machine is None:
                self._early.append(event.data["status"])
            case "MIGRATION":
                self._show(event.data["status"])
            case "WARNING":
                self._say(f"warning: {event.data['text']}", warning=event.data["text"])

    def _show(self, status: str) -> None:
        if not self._as_json:
            say(f"migration: {status}")
            if status == trimig.Status.COMPLETED.value:
                self._report()

    def _report(self) -> None:
        machine = self._machine
        if machine is not None and (machine.outgoing.status is trimig.Status.COMPLETED):
            figures = machine.outgoing.statistics()
            say(
                f"the guest was handed over: {formats.size(figures.transferred)} in {formats.duration(figures.elapsed)}"
            )

    def _say(self, text: str, **record: Any) -> None:
        if self._as_json:
            write_json({"note": text, **record})
        else:
            say(text)
            sys.stderr.flush()
