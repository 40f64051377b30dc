"""The table of all commands of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ..arguments import Argument
from ..command import QmpCommand
from . import dirty_rate, general, human, migration, objects, settings, yank
from .schema import Schema
from .shapes import EVENTS, STR

if TYPE_CHECKING:
    from ..interface import Session
    from ..machine import Machine

_NAMES: Final = Argument("list", items=Argument("object", members={"name": STR}))
#: The commands that the session answers itself, for the schema: arguments and answer.
_OF_THE_CONVERSATION: Final = {
    "qmp_capabilities": (
        {"enable": Argument("list", optional=True, items=Argument("str", choices=("oob",)))},
        Argument("object", members={}),
    ),
    "query-commands": ({}, _NAMES),
}


async def query_schema(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-qmp-schema``: generated from :data:`COMMANDS`."""
    return schema()


def schema() -> list[dict[str, Any]]:
    """Every command, every event, and the types that they need, as QEMU's SchemaInfo."""
    found = Schema()
    for name, (takes, returns) in _OF_THE_CONVERSATION.items():
        found.command(name, Argument("object", members=takes), returns)
    for name, command in COMMANDS.items():
        found.command(name, command.arguments, command.returns)
    for name, data in EVENTS.items():
        found.event(name, data)
    return found.entries()


#: The commands by name, in the order of ``query-commands``.
COMMANDS: Final[Mapping[str, QmpCommand]] = {
    **general.COMMANDS,
    **migration.COMMANDS,
    **settings.COMMANDS,
    **objects.COMMANDS,
    **yank.COMMANDS,
    **dirty_rate.COMMANDS,
    **human.COMMANDS,
    "query-qmp-schema": QmpCommand(
        signature={}, handler=query_schema, returns=Argument("list", items=Argument("object", members={"name": STR}))
    ),
}
