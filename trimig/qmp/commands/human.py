"""``human-monitor-command``: the commands of QEMU's human monitor that show migrations.

Texts are as QEMU's: one line for each value, ended by CR LF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ...monitor.blockers import Blockable
from ..arguments import Argument
from ..command import QmpCommand
from ..interface import CommandFailed, Session
from .shapes import MAYBE_INT, STR

if TYPE_CHECKING:
    from ..machine import Machine

#: The unit behind the value of a parameter.
_UNITS: Final = {
    **dict.fromkeys(("announce-initial", "announce-max", "announce-step", "downtime-limit"), "ms"),
    **dict.fromkeys(("x-checkpoint-delay", "x-vcpu-dirty-limit-period"), "ms"),
    **dict.fromkeys(("max-bandwidth", "max-postcopy-bandwidth", "avail-switchover-bandwidth"), "bytes/second"),
    **dict.fromkeys(("xbzrle-cache-size", "x-rdma-chunk-size"), "bytes"),
    "vcpu-dirty-limit": "MB/s",
}
#: The shown members of ``ram``, their form and their unit.
_RAM: Final = (
    ("transferred", "transferred ram", "kbytes"),
    ("mbps", "throughput", "mbps"),
    ("remaining", "remaining ram", "kbytes"),
    ("total", "total ram", "kbytes"),
    ("duplicate", "duplicate", "pages"),
    ("skipped", "skipped", "pages"),
    ("normal", "normal", "pages"),
    ("normal-bytes", "normal bytes", "kbytes"),
    ("dirty-sync-count", "dirty sync count", ""),
    ("page-size", "page size", "kbytes"),
    ("multifd-bytes", "multifd bytes", "kbytes"),
    ("pages-per-second", "pages-per-second", ""),
    ("dirty-pages-rate", "dirty pages rate", "pages"),
    ("postcopy-requests", "postcopy request count", ""),
    ("precopy-bytes", "precopy ram", "kbytes"),
    ("downtime-bytes", "downtime ram", "kbytes"),
    ("postcopy-bytes", "postcopy ram", "kbytes"),
)
#: Members that only one capability has: the object, its member, the label and the unit.
_MORE: Final = (
    ("xbzrle-cache", "cache-size", "cache size", "bytes"),
    ("xbzrle-cache", "bytes", "xbzrle transferred", "kbytes"),
    ("xbzrle-cache", "pages", "xbzrle pages", "pages"),
    ("xbzrle-cache", "cache-miss", "xbzrle cache miss", "pages"),
    ("xbzrle-cache", "cache-miss-rate", "xbzrle cache miss rate", ""),
    ("xbzrle-cache", "encoding-rate", "xbzrle encoding rate", ""),
    ("xbzrle-cache", "overflow", "xbzrle overflow", ""),
    ("compression", "pages", "compression pages", "pages"),
    ("compression", "busy", "compression busy", ""),
    ("compression", "busy-rate", "compression busy rate", ""),
    ("compression", "compressed-size", "compressed size", "kbytes"),
    ("compression", "compression-rate", "compression rate", ""),
)
_TIMES: Final = (
    ("total-time", "total time"),
    ("expected-downtime", "expected downtime"),
    ("downtime", "downtime"),
    ("setup-time", "setup"),
    ("postcopy-blocktime", "postcopy blocktime"),
)


def _lines(lines: list[str]) -> str:
    return "".join(f"{line}\r\n" for line in lines)


def _figure(label: str, value: float, unit: str) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else value >> 10 if unit == "kbytes" else value
    return f"{label}: {shown} {unit}".rstrip()


def _on(state: object) -> str:
    return "on" if state else "off"


def _globals(machine: Machine) -> list[str]:
    peer = machine.config.peer.for_machine(None)
    guest = machine.guest
    return [
        "globals:",
        f"store-global-state: {_on(peer.store_global_state)}",
        "only-migratable: " + _on(isinstance(guest, Blockable) and guest.blockers.only_migratable),
        f"send-configuration: {_on(peer.send_configuration)}",
        f"send-section-footer: {_on(peer.send_section_footer)}",
        f"send-switchover-start: {_on(peer.send_switchover_start)}",
    ]


def info_migrate(machine: Machine) -> str:
    """``info migrate``: the globals, and the answer of query-migrate."""
    info = machine.info()
    lines = _globals(machine)
    if "status" in info:
        lines.append(
            f"Migration status: {info['status']}" + (f" ({info['error-desc']})" if "error-desc" in info else "")
        )
        lines.append(f"owner of the guest: {info['owner']}")
    lines += [f"{label}: {info[name]} ms" for name, label in _TIMES if name in info]
    ram = info.get("ram", {})
    for name, label, unit in _RAM:
        if name in ram:
            lines.append(_figure(label, ram[name], unit))
    lines += [_figure(label, info[of][name], unit) for of, name, label, unit in _MORE if of in info]
    if "multifd-bytes" in info:  # a destination has no `ram`
        lines.append(_figure("multifd bytes", info["multifd-bytes"], "kbytes"))
    if (throttle := info.get("cpu-throttle-percentage")) is not None:
        lines.append(f"cpu throttle percentage: {throttle}")
    lines += [f"blocked reason: {reason}" for reason in info.get("blocked-reasons", ())]
    lines += [f"warning: {text}" for text in info.get("warnings", ())]
    for address in info.get("socket-address", ()):
        lines.append("socket address: " + " ".join(f"{name}={value}" for name, value in address.items()))
    return _lines(lines)


def info_capabilities(machine: Machine) -> str:
    """``info migrate_capabilities``."""
    return _lines([f"{row['capability']}: {_on(row['state'])}" for row in machine.config.capabilities.to_qmp()])


def info_parameters(machine: Machine) -> str:
    """``info migrate_parameters``."""
    lines = []
    for name, value in machine.config.parameters.to_qmp().items():
        shown: object = value
        if isinstance(value, bool):
            shown = _on(value)
        elif name.startswith("tls-"):
            shown = f"'{value}'"
        elif isinstance(value, list):
            shown = " ".join(str(item) for item in value)
        lines.append(f"{name}: {shown} {_UNITS.get(name, '')}".rstrip())
    return _lines(lines)


_INFO: Final[Mapping[str, Callable[[Machine], str]]] = {
    "migrate": info_migrate,
    "migrate_capabilities": info_capabilities,
    "migrate_parameters": info_parameters,
}


async def human_monitor_command(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``human-monitor-command``: an unknown command is reported in the text, as QEMU does."""
    if "cpu-index" in arguments:
        raise CommandFailed("Parameter 'cpu-index' expects a CPU number, and this machine has no numbered processors")
    line = arguments["command-line"].strip()
    words = line.split()
    if words[:1] != ["info"] or len(words) < 2 or words[1] not in _INFO:
        known = ", ".join(f"info {name}" for name in _INFO)
        return _lines([f"unknown command: '{line}'", f"known are: {known}"])
    # Newer QEMUs show the globals only with -a; trimig always shows them.
    if words[2:] not in ([], ["-a"]) or (words[2:] and words[1] != "migrate"):
        return _lines([f"{words[1]}: extraneous characters at the end of line"])
    return _INFO[words[1]](machine)


COMMANDS: Final[Mapping[str, QmpCommand]] = {
    "human-monitor-command": QmpCommand(
        signature={"command-line": Argument("str"), "cpu-index": MAYBE_INT},
        handler=human_monitor_command,
        returns=STR,
    ),
}
