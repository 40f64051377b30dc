"""Commands about objects that parameters name: TLS credentials and lists of clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...config.objects import read_object
from ...status import IDLE
from ..arguments import Argument, check_value
from ..command import QmpCommand
from ..interface import CommandFailed, Session
from .shapes import MAYBE_BOOL, MAYBE_STR, STR

if TYPE_CHECKING:
    from ..machine import Machine

_ENDPOINT: Final = Argument("str", optional=True, choices=("client", "server"))
_POLICY: Final = Argument("str", optional=True, choices=("allow", "deny"))
_RULE: Final = Argument(
    "object",
    members={
        "match": STR,
        "policy": Argument("str", choices=("allow", "deny")),
        "format": Argument("str", optional=True, choices=("exact", "glob")),
    },
)
#: The properties of each object type; order and types are those of :mod:`trimig.config.objects`.
TYPES: Final[Mapping[str, Mapping[str, Argument]]] = {
    "tls-creds-x509": {
        "dir": STR,
        "endpoint": _ENDPOINT,
        "verify-peer": MAYBE_BOOL,
        "sanity-check": MAYBE_BOOL,
    },
    "tls-creds-psk": {"dir": STR, "endpoint": _ENDPOINT, "username": MAYBE_STR},
    "authz-simple": {"identity": STR},
    "authz-list": {"rules": Argument("list", optional=True, items=_RULE), "policy": _POLICY},
}


async def object_add(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``object-add``: takes effect at the next migration."""
    for name in ("qom-type", "id"):
        if name not in arguments:
            raise CommandFailed(f"Parameter '{name}' is missing")
        check_value(name, arguments[name], STR)
    added = read_object(arguments)
    if any(present.id == added.id for present in machine.config.objects):
        raise CommandFailed(f"there is an object with the id '{added.id}' already: delete it first with object-del")
    machine.configure(objects=(*machine.config.objects, added))
    return {}


async def object_del(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``object-del``: refused while a migration uses the object. A parameter that names the object keeps that name, and
    the next migration reports that the object does not exist."""
    name = arguments["id"]
    rest = tuple(present for present in machine.config.objects if present.id != name)
    if len(rest) == len(machine.config.objects):
        raise CommandFailed(f"object '{name}' not found")
    for monitor in (machine.outgoing, machine.incoming):
        parameters = monitor.config.parameters
        if monitor.status not in IDLE and name in (parameters.tls_creds, parameters.tls_authz):
            raise CommandFailed(f"object '{name}' is in use by a migration, and can not be deleted")
    machine.configure(objects=rest)
    return {}


COMMANDS: Final[Mapping[str, QmpCommand]] = {
    "object-add": QmpCommand(
        signature=None,
        handler=object_add,
        takes=Argument(
            "object",
            members={"qom-type": Argument("str", choices=tuple(TYPES)), "id": STR},
            tag="qom-type",
            variants=TYPES,
        ),
    ),
    "object-del": QmpCommand(signature={"id": STR}, handler=object_del),
}
