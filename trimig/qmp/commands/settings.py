"""Commands that show and change capabilities and parameters, including commands of older QEMUs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...config.bitmaps import Mappings
from ...config.capabilities import CAPABILITY_NAMES, Capabilities
from ...config.parameters import PARAMETER_TYPES, Parameters
from ...config.types import Choice, Flag, Int, OrNone, Size, Text, Type, Words
from ...engine.destination.lazy import obstacle
from ...status import IDLE, Status, check_idle
from ..arguments import Argument, check_value
from ..command import QmpCommand
from ..interface import CommandFailed, Session

if TYPE_CHECKING:
    from ..machine import Machine

log: Final = logging.getLogger("trimig.qmp")

_BOOL: Final = Argument("bool")
_STR: Final = Argument("str")


async def query_capabilities(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-migrate-capabilities``."""
    return machine.config.capabilities.to_qmp()


async def set_capabilities(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-set-capabilities``: sets all or none; refused during a migration."""
    for index, item in enumerate(arguments["capabilities"]):
        where = f"capabilities[{index}]"
        check_value(where, item, Argument("object"))
        for member, argument in (("capability", _STR), ("state", _BOOL)):
            if member not in item:
                raise CommandFailed(f"Parameter '{where}.{member}' is missing")
            check_value(f"{where}.{member}", item[member], argument)
        for member in item:
            if member not in ("capability", "state"):
                raise CommandFailed(f"Parameter '{where}.{member}' is unexpected")
        if item["capability"] not in (*CAPABILITY_NAMES, "x-multifd"):
            raise CommandFailed(f"Parameter 'capability' does not accept value '{item['capability']}'")
    check_idle(machine.outgoing.status)
    if machine.incoming.status is not Status.SETUP:  # no source has connected yet, so no migration has begun
        check_idle(machine.incoming.status)
    changed = Capabilities.from_qmp(arguments["capabilities"], machine.config.capabilities)
    changed.check(
        before=machine.config.capabilities,
        inmigrate=machine.waiting,
        listening=machine.incoming.status is Status.SETUP,
        postcopy_obstacle=obstacle(machine.guest) if changed.postcopy_ram else None,
    )
    machine.configure(capabilities=changed)
    machine.incoming.reconfigure(capabilities=changed)
    return {}


async def query_parameters(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-migrate-parameters``."""
    return machine.config.parameters.to_qmp()


async def set_parameters(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-set-parameters``: sets all or none; a migration under way uses the new values at once."""
    changed = Parameters.from_qmp(arguments, machine.config.parameters)
    before = machine.config.parameters.warnings()
    for text in changed.warnings():
        if text not in before:
            log.warning("%s", text)
    _put(machine, changed)
    return {}


def _put(machine: Machine, parameters: Parameters) -> None:
    machine.configure(parameters=parameters)
    for monitor in (machine.outgoing, machine.incoming):
        if monitor.status not in IDLE:
            fields = {field.name: getattr(parameters, field.name) for field in dataclasses.fields(parameters)}
            monitor.set_parameters(**fields)


async def set_speed(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate_set_speed``, of older QEMUs: bytes per second."""
    return await set_parameters(machine, {"max-bandwidth": arguments["value"]}, session)


async def set_downtime(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate_set_downtime``, of older QEMUs: *seconds*; the fraction of a millisecond is cut off."""
    seconds = arguments["value"]
    if not 0 <= seconds <= 2000:
        raise CommandFailed("Parameter 'downtime_limit' expects an integer in the range of 0 to 2000 seconds")
    return await set_parameters(machine, {"downtime-limit": int(seconds * 1000)}, session)


async def set_cache_size(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``migrate-set-cache-size``, of older QEMUs: the size of the XBZRLE cache."""
    return await set_parameters(machine, {"xbzrle-cache-size": arguments["value"]}, session)


async def query_cache_size(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-migrate-cache-size``."""
    return machine.config.parameters.xbzrle_cache_size


def _described(kind: Type) -> Argument:
    """The type of a parameter, for the schema."""
    match kind:
        case OrNone():
            return _described(kind.kind)
        case Flag():
            return Argument("bool")
        case Int() | Size():
            return Argument("int")
        case Text():
            return Argument("str-or-null")
        case Choice():
            return Argument("str", choices=kind.words)
        case Words():
            return Argument("list", items=_STR)
    assert isinstance(kind, Mappings), kind
    bitmap = Argument(
        "object",
        members={
            "name": _STR,
            "alias": _STR,
            "transform": Argument("object", optional=True, members={"persistent": Argument("bool", optional=True)}),
        },
    )
    node = {"node-name": _STR, "alias": _STR, "bitmaps": Argument("list", items=bitmap)}
    return Argument("list", items=Argument("object", members=node))


_PARAMETERS: Final = {
    name: dataclasses.replace(_described(kind), optional=True) for name, kind in PARAMETER_TYPES.items()
}
_CAPABILITY: Final = Argument(
    "object", members={"capability": Argument("str", choices=CAPABILITY_NAMES), "state": _BOOL}
)
_CAPABILITIES: Final = Argument("list", items=_CAPABILITY)

COMMANDS: Final[Mapping[str, QmpCommand]] = {
    "migrate-set-capabilities": QmpCommand(signature={"capabilities": _CAPABILITIES}, handler=set_capabilities),
    "query-migrate-capabilities": QmpCommand(signature={}, handler=query_capabilities, returns=_CAPABILITIES),
    "migrate-set-parameters": QmpCommand(
        signature=None, handler=set_parameters, takes=Argument("object", members=_PARAMETERS)
    ),
    "query-migrate-parameters": QmpCommand(
        signature={}, handler=query_parameters, returns=Argument("object", members=_PARAMETERS)
    ),
    "migrate_set_speed": QmpCommand(signature={"value": Argument("int")}, handler=set_speed),
    "migrate_set_downtime": QmpCommand(signature={"value": Argument("number")}, handler=set_downtime),
    "migrate-set-cache-size": QmpCommand(signature={"value": Argument("int")}, handler=set_cache_size),
    "query-migrate-cache-size": QmpCommand(signature={}, handler=query_cache_size, returns=Argument("int")),
}
