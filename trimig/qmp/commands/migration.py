"""Commands that begin, change, end and show migrations."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ... import transport
from ...errors import ConfigError, Ownership
from ...monitor import blockers
from ...status import QMP_STATUSES, RECOVERABLE, Status
from ..arguments import Argument, check, check_value
from ..command import QmpCommand
from ..interface import CommandFailed, Session
from ..jobs import IncomingState
from ..recovery import listen_again
from .shapes import MIGRATION_INFO

if TYPE_CHECKING:
    from ..machine import Machine

_STR: Final = Argument("str")
_OPTIONAL_BOOL: Final = Argument("bool", optional=True)
#: The URI schemes that trimig or a QEMU has.
_KNOWN_SCHEMES: Final = (*transport.SCHEMES, *transport.ABSENT)


async def migrate(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate``: checks in QEMU's order, then migrates in the background."""
    uri = _uri(arguments)
    if arguments.get("resume"):
        return _resume(machine, uri)
    if machine.outgoing.status is Status.UNCERTAIN:
        machine.check_owned_here()
    if machine.busy:
        raise CommandFailed("There's a migration process in progress")
    if machine.waiting:
        raise CommandFailed("Guest is waiting for an incoming migration")
    if machine.handed_over:
        raise CommandFailed("Can't migrate the vm that was paused due to previous migration")
    if reasons := blockers.reasons(machine.guest):
        raise CommandFailed(reasons[0])
    if arguments.get("blk") or arguments.get("inc"):
        raise CommandFailed(
            "block migration ('blk', 'inc') is not built into trimig: mirror the disks over NBD instead"
        )
    # A wrong address gives the status `failed`, as in QEMU; for an unknown scheme there is no error text.
    try:
        to, on_done = _resolve(machine, uri)
    except (ConfigError, CommandFailed) as error:
        machine.record_failed_start(str(error) if uri.partition(":")[0] in _KNOWN_SCHEMES else "")
        raise
    await machine.start_outgoing(to, on_done)
    return {}


def _resolve(machine: Machine, uri: str) -> tuple[str, Callable[[], None]]:
    """The URI for the transport, and the function to call when the attempt is over, in any case.

    The URI has the number of a descriptor in place of its name. The machine no longer holds that descriptor.

    Raises:
        ConfigError: the URI cannot be understood.
        CommandFailed: the URI names a descriptor that does not exist.
    """
    scheme, _, name = uri.partition(":")
    if scheme != "fd":
        transport.check(uri)
        return uri, _nothing
    if name[:1].isdigit():
        transport.check(uri)
        fd = int(name)
        if _identity(fd) is None:
            raise CommandFailed(f"File descriptor named '{name}' has not been found")
    elif (taken := machine.descriptors.pop(name, None)) is not None:
        fd = taken
    else:
        raise CommandFailed(f"File descriptor named '{name}' has not been found")
    return f"fd:{fd}", functools.partial(_close_unused, fd, _identity(fd))


def _nothing() -> None:
    """Do nothing: the attempt used no descriptor."""


def _close_unused(fd: int, identity: tuple[int, int] | None) -> None:
    """Close the descriptor unless the transport took it: then it is closed, or its number belongs to another file."""
    if identity is not None and _identity(fd) == identity:
        os.close(fd)


def _identity(fd: int) -> tuple[int, int] | None:
    """Identity of the open file; None if *fd* is not open."""
    try:
        found = os.fstat(fd)
    except (OSError, OverflowError):
        return None
    return found.st_dev, found.st_ino


def _uri(arguments: Mapping[str, Any]) -> str:
    """The address, from ``uri`` or from newer QEMUs' ``channels``."""
    if ("uri" in arguments) == ("channels" in arguments):
        if "uri" in arguments:
            raise CommandFailed("'uri' and 'channels' arguments are mutually exclusive; exactly one of them is needed")
        raise CommandFailed("Parameter 'uri' is missing")
    if "uri" in arguments:
        uri = arguments["uri"]
        assert isinstance(uri, str)
        return uri
    channels = arguments["channels"]
    if len(channels) != 1:
        raise CommandFailed("Parameter 'channels' expects one channel of the type 'main'")
    check_value("channels[0]", channels[0], Argument("object"))
    signature = {"channel-type": Argument("str", choices=("main",)), "addr": Argument("object")}
    check(channels[0], signature)
    return _address(channels[0]["addr"])


def _address(address: Mapping[str, Any]) -> str:
    _check_member(address, "transport", ("socket", "exec", "file", "rdma"))
    rest = {name: value for name, value in address.items() if name != "transport"}
    match address["transport"]:
        case "exec":
            check(rest, {"args": Argument("list")})
            words = rest["args"]
            if len(words) != 3 or words[:2] != ["/bin/sh", "-c"] or not isinstance(words[2], str):
                raise CommandFailed("Parameter 'args' expects ['/bin/sh', '-c', COMMAND]")
            return f"exec:{words[2]}"
        case "file":
            check(rest, {"filename": _STR, "offset": Argument("int", optional=True)})
            return f"file:{rest['filename']},offset={rest.get('offset', 0)}"
        case "rdma":
            return "rdma:"
    _check_member(address, "type", ("inet", "unix", "fd"))
    kind = rest.pop("type")
    if kind == "unix":
        check(rest, {"path": _STR})
        return f"unix:{rest['path']}"
    if kind == "fd":
        check(rest, {"str": _STR})
        return f"fd:{rest['str']}"
    check(rest, {"host": _STR, "port": _STR})
    host = f"[{rest['host']}]" if ":" in rest["host"] else rest["host"]
    return f"tcp:{host}:{rest['port']}"


def _check_member(given: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> None:
    """The member whose value decides which other members there are."""
    check({name: given[name]} if name in given else {}, {name: Argument("str", choices=choices)})


async def migrate_incoming(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-incoming``: once, or again after a failure."""
    uri = _uri(arguments)
    if machine.incoming_state is IncomingState.NONE:
        raise CommandFailed("'-incoming' was not specified on the command line")
    if machine.incoming_state is IncomingState.ACTIVE:
        raise CommandFailed("The incoming migration has already been started")
    machine.announce_incoming()
    await machine.start_incoming(*_resolve(machine, uri))
    return {}


async def migrate_cancel(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate_cancel``: does nothing without a migration; refused when the commit has been sent."""
    machine.outgoing.cancel("migrate_cancel")
    return {}


async def migrate_continue(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-continue``: leave pre-switchover."""
    status = machine.outgoing.status
    if status is not Status.PRE_SWITCHOVER or arguments["state"] != status.qmp:
        shown = status.qmp if machine.start_error is None else Status.FAILED.qmp
        raise CommandFailed(f"Migration not in expected state: {shown}")
    machine.outgoing.resume()
    return {}


async def query_migrate(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-migrate``."""
    return machine.info()


def _resume(machine: Machine, uri: str) -> dict[str, Any]:
    """``migrate`` with ``resume``: give a paused postcopy a new connection."""
    if machine.outgoing.status not in RECOVERABLE:
        raise CommandFailed("Cannot resume if there is no paused migration")
    to, _ = _resolve(machine, uri)
    machine.outgoing.recover(to)
    return {}


async def start_postcopy(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-start-postcopy``: switch from now on; does nothing when the migration is over."""
    if not machine.config.capabilities.postcopy_ram:
        raise CommandFailed("Enable postcopy with migrate_set_capability before the start of migration")
    if machine.outgoing.status is not Status.NONE:
        machine.outgoing.start_postcopy()
    elif machine.start_error is None:
        raise CommandFailed("Start a migration before postcopy")
    return {}


async def migrate_pause(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-pause``: drop the connection in postcopy, on either side."""
    for monitor in (machine.outgoing, machine.incoming):
        if monitor.status is Status.POSTCOPY_ACTIVE:
            monitor.pause("migrate-pause")
            return {}
    raise CommandFailed("migrate-pause is currently only supported during postcopy-active state")


async def migrate_recover(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-recover``: make a destination listen again."""
    if machine.incoming.status not in RECOVERABLE:
        raise CommandFailed("Migrate recover can only be run when postcopy is paused.")
    to, _ = _resolve(machine, arguments["uri"])
    await listen_again(machine.incoming, to)
    return {}


async def settle(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``x-trimig-settle``, an addition of trimig: set the owner of the guest after an uncertain handover."""
    await machine.settle(Ownership(arguments["owner"]))
    return {}


_ADDRESS: Final = Argument(
    "object",
    members={"transport": Argument("str", choices=("socket", "exec", "file", "rdma"))},
    tag="transport",
    variants={
        "socket": {
            "type": Argument("str", choices=("inet", "unix", "fd")),
            **dict.fromkeys(("host", "port", "path", "str"), Argument("str", optional=True)),
        },
        "exec": {"args": Argument("list", items=_STR)},
        "file": {"filename": _STR, "offset": Argument("int", optional=True)},
        "rdma": {},
    },
)
_CHANNEL: Final = Argument("object", members={"channel-type": Argument("str", choices=("main",)), "addr": _ADDRESS})
_CHANNELS: Final = {
    "uri": Argument("str", optional=True),
    "channels": Argument("list", optional=True, items=_CHANNEL),
}

COMMANDS: Final[Mapping[str, QmpCommand]] = {
    "migrate": QmpCommand(
        signature={
            **_CHANNELS,
            "blk": _OPTIONAL_BOOL,
            "inc": _OPTIONAL_BOOL,
            "detach": _OPTIONAL_BOOL,
            "resume": _OPTIONAL_BOOL,
        },
        handler=migrate,
    ),
    "migrate_cancel": QmpCommand(signature={}, handler=migrate_cancel),
    "migrate-continue": QmpCommand(
        signature={"state": Argument("str", choices=QMP_STATUSES)}, handler=migrate_continue
    ),
    "migrate-incoming": QmpCommand(signature=_CHANNELS, handler=migrate_incoming),
    "migrate-start-postcopy": QmpCommand(signature={}, handler=start_postcopy),
    "migrate-pause": QmpCommand(signature={}, handler=migrate_pause),
    "migrate-recover": QmpCommand(signature={"uri": _STR}, handler=migrate_recover),
    "query-migrate": QmpCommand(signature={}, handler=query_migrate, returns=MIGRATION_INFO),
    "x-trimig-settle": QmpCommand(
        signature={"owner": Argument("str", choices=("source", "destination"))}, handler=settle
    ),
}
