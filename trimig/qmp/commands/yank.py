"""Commands that break a connection whose peer has stopped answering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...status import IN_PROGRESS
from ..arguments import Argument, check, check_value
from ..command import QmpCommand
from ..interface import CommandFailed, Session
from .shapes import STR

if TYPE_CHECKING:
    from ...monitor.monitor import Monitor
    from ..machine import Machine

#: QEMU's types of instances, and the member that names one. trimig has only the last.
_INSTANCES: Final[Mapping[str, Mapping[str, Argument]]] = {
    "block-node": {"node-name": STR},
    "chardev": {"id": STR},
    "migration": {},
}
_INSTANCE: Final = Argument(
    "object",
    members={"type": Argument("str", choices=tuple(_INSTANCES))},
    tag="type",
    variants=_INSTANCES,
)


def _connected(machine: Machine) -> list[Monitor]:
    """The migrations that have a connection, or look for one."""
    return [monitor for monitor in (machine.outgoing, machine.incoming) if monitor.status in IN_PROGRESS]


async def query_yank(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-yank``."""
    return [{"type": "migration"}] if _connected(machine) else []


async def yank(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``yank``: break the connection of a migration at once. A precopy fails; a postcopy is paused."""
    wanted = False
    for index, instance in enumerate(arguments["instances"]):
        where = f"instances[{index}]"
        check_value(where, instance, Argument("object"))
        kind = Argument("str", choices=tuple(_INSTANCES))
        check({"type": instance["type"]} if "type" in instance else {}, {"type": kind})
        rest = {name: value for name, value in instance.items() if name != "type"}
        check(rest, _INSTANCES[instance["type"]])
        if instance["type"] != "migration" or not _connected(machine):
            raise CommandFailed("Instance not found", error_class="DeviceNotFound")
        wanted = True
    if wanted:
        for monitor in _connected(machine):
            monitor.yank()
    return {}


COMMANDS: Final[Mapping[str, QmpCommand]] = {
    "yank": QmpCommand(
        signature={"instances": Argument("list", items=_INSTANCE)},
        handler=yank,
    ),
    "query-yank": QmpCommand(signature={}, handler=query_yank, returns=Argument("list", items=_INSTANCE)),
}
