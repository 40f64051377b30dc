"""Commands about the machine: its name and version, its run state, its end, and its descriptors."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...config.parameters import Parameters
from ..arguments import Argument, check_value
from ..command import QmpCommand
from ..interface import CommandFailed, Session
from .shapes import INT, MAYBE_STR, STATUS_INFO, STR, VERSION

if TYPE_CHECKING:
    from ..machine import Machine

log: Final = logging.getLogger("trimig.qmp")


async def query_version(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-version``."""
    return machine.version


async def query_name(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-name``: an empty object for a machine without a name."""
    return {"name": machine.name} if machine.name else {}


async def query_uuid(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-uuid``."""
    return {"UUID": machine.uuid}


async def query_status(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-status``."""
    state = machine.run_state
    return {"status": state, "singlestep": False, "running": state == "running"}


async def stop(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``stop``: does nothing for a paused guest; refused during a handover."""
    await machine.pause()
    return {}


async def cont(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``cont``: refused unless this side certainly owns the guest."""
    await machine.resume()
    return {}


async def quit_(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``quit``: the machine ends when the answer has been written."""
    machine.announce_shutdown("host-qmp-quit")
    session.when_answered(machine.ended.set)
    machine.quit_after_reply()
    return {}


async def getfd(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``getfd``: name the descriptor that came with the command; an older one of that name is closed."""
    name = arguments["fdname"]
    fd = session.take_fd()
    if fd is None:
        raise CommandFailed("No file descriptor supplied via SCM_RIGHTS")
    if name[:1].isdigit():
        os.close(fd)
        raise CommandFailed("Parameter 'fdname' expects a name not starting with a digit")
    if (old := machine.descriptors.pop(name, None)) is not None:
        os.close(old)
    machine.descriptors[name] = fd
    return {}


async def closefd(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``closefd``."""
    name = arguments["fdname"]
    fd = machine.descriptors.pop(name, None)
    if fd is None:
        raise CommandFailed(f"File descriptor named '{name}' not found")
    os.close(fd)
    return {}


async def query_block(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-block``: an empty list, because a guest of trimig has no disks."""
    return []


async def announce_self(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``announce-self``: checks the arguments and sends nothing, because a guest of trimig has no network cards."""
    values = {f"announce-{name}": arguments[name] for name in ("initial", "max", "rounds", "step")}
    Parameters.from_qmp(values)
    for index, name in enumerate(arguments.get("interfaces", ())):
        check_value(f"interfaces[{index}]", name, STR)
        raise CommandFailed(f"there is no network interface '{name}': the guest has no network cards")
    log.info("announce-self: the guest has no network cards, so nothing is announced")
    return {}


_NAME: Final = {"fdname": Argument("str")}

COMMANDS: Final[Mapping[str, QmpCommand]] = {
    "query-version": QmpCommand(signature={}, handler=query_version, returns=VERSION),
    "query-name": QmpCommand(signature={}, handler=query_name, returns=Argument("object", members={"name": MAYBE_STR})),
    "query-uuid": QmpCommand(signature={}, handler=query_uuid, returns=Argument("object", members={"UUID": STR})),
    "query-status": QmpCommand(signature={}, handler=query_status, returns=STATUS_INFO),
    "stop": QmpCommand(signature={}, handler=stop),
    "cont": QmpCommand(signature={}, handler=cont),
    "quit": QmpCommand(signature={}, handler=quit_),
    "getfd": QmpCommand(signature=_NAME, handler=getfd),
    "closefd": QmpCommand(signature=_NAME, handler=closefd),
    "query-block": QmpCommand(signature={}, handler=query_block, returns=Argument("list")),
    "announce-self": QmpCommand(
        signature={
            **dict.fromkeys(("initial", "max", "rounds", "step"), INT),
            "interfaces": Argument("list", optional=True, items=STR),
            "id": MAYBE_STR,
        },
        handler=announce_self,
    ),
}
