"""``trimig inspect``: shows the contents of a saved guest, or of any stream of QEMU's format."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Final

import click

from trimig import formats, stream

from ..exit_codes import DONE, FAILED
from ..options import FILE_OR_DASH, debug_option, json_option
from ..output import say, write_json
from ..runner import run

#: The number of array elements that are printed.
_SHOWN: Final = 8
#: RAM sections that are printed one by one; a live migration has thousands.
_RAM_SECTIONS: Final = 6


@click.command()
@click.argument("file", metavar="FILE|-", type=FILE_OR_DASH)
@click.option("--device", "devices", metavar="NAME", multiple=True, help="Only this device, with its fields.")
@click.option("--fields", is_flag=True, help="Print the fields of every device.")
@json_option
@debug_option
def inspect(file: str, devices: tuple[str, ...], fields: bool, as_json: bool) -> int:
    """Print what is in a stream: RAM, sections, commands, devices by field.

    FILE may be a guest that trimig receive has saved, anything that a QEMU wrote, or - for standard input. Of a damaged
    stream everything up to the damage is printed, and the exit code is 1.
    """
    return run(functools.partial(_inspect, file, devices, fields, as_json), as_json=as_json)


async def _inspect(file: str, names: tuple[str, ...], fields: bool, as_json: bool) -> int:
    report = await stream.inspect_stream(file)
    if names:
        chosen = [d for d in report.devices if d.idstr in names or _name(d) in names]
        if not chosen and report.error is None:
            known = ", ".join(_name(d) for d in report.devices) or "none"
            raise click.BadParameter(
                f"there is no device {' or '.join(names)}; there are {known}", param_hint="--device"
            )
        report = dataclasses.replace(report, devices=chosen)
    if as_json:
        write_json({"file": file, **report.record()})
    elif names:
        for device in report.devices:
            _print_device(device, fields=True)
    else:
        _print_report(file, report, fields=fields)
    if report.error is None:
        return DONE
    say(f"{file} {'is damaged' if report.damaged else _unread(report)}: {report.error}")
    return FAILED


def _unread(report: stream.StreamReport) -> str:
    return "cannot be read any further" if report.good else "cannot be read"


def _name(device: stream.DeviceInfo) -> str:
    return f"{device.idstr}/{device.instance_id}" if device.instance_id else device.idstr


def _print_report(file: str, report: stream.StreamReport, *, fields: bool) -> None:
    print(f"{file}: {formats.size(report.size)} ({report.size} bytes)")
    if report.version is not None:
        machine = "no configuration section" if report.machine is None else f"machine {report.machine!r}"
        state = f", run state {report.run_state}" if report.run_state else ""
        print(f"  stream version {report.version}, {machine}{state}{'' if report.footers else ', no footers'}")
    for sub in report.subsections:
        print(f"  {sub.name}: {sub.payload.hex() or 'empty'}")
    if report.blocks:
        print("\nRAM blocks")
        width = max(len(block.name) for block in report.blocks)
        for block in report.blocks:
            missing = f", {block.unplugged} not plugged in" if block.unplugged else ""
            missing += f", {block.missing} MISSING" if block.missing else ""
            print(
                f"  {block.name:{width}}  {formats.size(block.length):>9}  {block.pages} pages, "
                f"{block.zero_pages} zero pages{missing}"
            )
    _print_sections(report)
    if report.commands:
        print("\nCommands")
        for command in report.commands:
            print(f"  0x{command.offset:08x}  {command.name} {command.payload.hex()}")
    if report.devices:
        print(f"\nDevices ({len(report.devices)})")
        for device in report.devices:
            _print_device(device, fields=fields)
    print()
    if report.eof_offset is not None:
        text = "no description" if report.description is None else f"description of {len(report.description)} bytes"
        print(f"End of stream at 0x{report.eof_offset:x}, {text}, {report.trailing} trailing bytes")
    for problem in report.problems:
        print(f"note: {problem}")
    if report.error is not None:
        print(f"{'DAMAGED' if report.damaged else _unread(report).upper()}: {report.error}")
        print(f"understood up to byte {report.good} (0x{report.good:x})")


def _print_sections(report: stream.StreamReport) -> None:
    ram = [s for s in report.sections if s.kind != "full"]
    if not ram:
        return
    print(f"\nSections ({len(report.sections) + report.unlisted} with those of the devices)")
    shown = ram if len(ram) <= _RAM_SECTIONS else [*ram[: _RAM_SECTIONS - 2], *ram[-2:]]
    for place, section in enumerate(shown):
        if len(shown) < len(ram) and place == _RAM_SECTIONS - 2:
            print(f"  … {len(ram) - _RAM_SECTIONS} more")
        size = "cut short" if section.size is None else f"{section.size} bytes"
        print(
            f"  0x{section.offset:08x}  {section.kind:5} {section.idstr} (id {section.section_id}, version "
            f"{section.version_id}): {size}, {section.pages} pages, {section.zero_pages} zero pages"
        )


def _print_device(device: stream.DeviceInfo, *, fields: bool) -> None:
    print(
        f"  0x{device.offset:08x}  {_name(device)} (id {device.section_id}, version {device.version_id}): "
        f"{device.size} bytes"
    )
    if device.problem:
        print(f"      not decoded: {device.problem}")
    if fields:
        for node in device.fields or ():
            _print_node(node, 3)


def _print_node(node: Any, depth: int) -> None:
    name = node.name if node.index is None else f"{node.name}[{node.index}]"
    indent = "  " * depth
    if node.children:
        print(f"{indent}{name}: {node.vmsd_name or node.type}")
        for child in node.children:
            _print_node(child, depth + 1)
        return
    print(f"{indent}{name} = {_value(node)}  ({node.type})")


def _value(node: Any) -> str:
    value = node.value
    if isinstance(value, tuple):
        more = f", … {len(value) - _SHOWN} more" if len(value) > _SHOWN else ""
        return f"[{', '.join(map(str, value[:_SHOWN]))}{more}]"
    if value is not None:
        return f"{value} (0x{value:x})" if type(value) is int and value > 9 else str(value)
    raw = node.raw.hex()
    return raw if len(raw) <= 64 else f"{raw[:64]}… ({node.size} bytes)"
