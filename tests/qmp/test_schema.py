"""``query-qmp-schema``: it is complete, it matches the commands, and clients can follow it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from tests.qmp.driver import hosted
from trimig.config import CAPABILITY_NAMES, PARAMETER_NAMES, read_object
from trimig.qmp.commands import COMMANDS, schema
from trimig.qmp.commands.objects import TYPES
from trimig.qmp.commands.shapes import EVENTS

Entry = Mapping[str, Any]


def by_name() -> dict[str, Entry]:
    entries = schema()
    found: dict[str, Entry] = {entry["name"]: entry for entry in entries}
    assert len(found) == len(entries), "a name is there twice"
    return found


def references(entry: Entry) -> list[str]:
    """The types that an entry names."""
    found = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
    found += [member["type"] for member in entry.get("members", ()) if "type" in member]
    return found + [variant["type"] for variant in entry.get("variants", ())]


def test_every_type_that_is_named_is_there_and_every_one_that_is_there_is_named() -> None:
    entries = by_name()
    named = {name for entry in entries.values() for name in references(entry)}
    tops = {name for name, entry in entries.items() if entry["meta-type"] in ("command", "event")}
    assert named | tops == set(entries)
    assert tops == {"qmp_capabilities", "query-commands", *COMMANDS, *EVENTS}


#: The members of a SchemaInfo of each kind, beside its name and ``meta-type``.
MEMBERS = {
    "builtin": {"json-type"},
    "enum": {"values", "members"},
    "array": {"element-type"},
    "object": {"members"},
    "alternate": {"members"},
    "command": {"arg-type", "ret-type"},
    "event": {"arg-type"},
}


def test_each_entry_is_of_qemus_form() -> None:
    entries = by_name()
    for entry in entries.values():
        assert entry.keys() - {"tag", "variants"} == {"name", "meta-type"} | MEMBERS[entry["meta-type"]]
        if "variants" in entry:
            (tag,) = [member for member in entry["members"] if member["name"] == entry["tag"]]
            cases = {variant["case"] for variant in entry["variants"]}
            assert cases <= set(entries[tag["type"]]["values"])
        for key in ("arg-type", "ret-type"):
            if key in entry and entry["meta-type"] == "event":
                assert entries[entry[key]]["meta-type"] == "object"


def walk(path: str) -> bool:
    """Whether *path* exists; its parts are libvirt's: members, ``+VARIANT``, ``^VALUE``, ``*OPTIONAL``."""
    entries = by_name()
    first, *rest = path.split("/")
    here: Entry | None = entries.get(first)
    for part in rest:
        while here is not None and here["meta-type"] == "array":
            here = entries[here["element-type"]]
        if here is None:
            return False
        if part.startswith("^"):
            return part[1:] in here.get("values", ())
        if part in ("arg-type", "ret-type") and part in here:
            here = entries[here[part]]
        elif part.startswith("+"):
            here = next((entries[v["type"]] for v in here.get("variants", ()) if v["case"] == part[1:]), None)
        else:
            members = {member["name"]: member for member in here.get("members", ()) if "type" in member}
            member = members.get(part.lstrip("*"))
            if member is None or (part.startswith("*") and "default" not in member):
                return False
            here = entries[member["type"]]
    return here is not None


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("migrate-pause", True),
        ("migrate-recover", True),
        ("yank", True),
        ("calc-dirty-rate/arg-type/mode", True),
        ("calc-dirty-rate/arg-type/calc-time-unit/^millisecond", True),
        ("migrate/arg-type/*channels/addr/transport/^file", True),
        ("migrate/arg-type/channels/addr/+file/filename", True),
        ("migrate-set-parameters/arg-type/*downtime-limit", True),
        ("migrate-set-parameters/arg-type/multifd-compression/^zstd", True),
        ("migrate-set-parameters/arg-type/block-bitmap-mapping/bitmaps/transform", True),
        ("migrate-set-parameters/arg-type/mode/^cpr-reboot", True),
        ("migrate-set-capabilities/arg-type/capabilities/capability/^switchover-ack", True),
        ("query-migrate/ret-type/ram/postcopy-bytes", True),
        ("query-migrate/ret-type/*blocked-reasons", True),
        ("query-migrate/ret-type/status/^postcopy-recover", True),
        ("object-add/arg-type/qom-type/^tls-creds-x509", True),
        ("object-add/arg-type/+authz-list/rules/match", True),
        ("MIGRATION/arg-type/status/^completed", True),
        ("MIGRATION_PASS/arg-type/pass", True),
        ("query-migrate/ret-type/status/^no-such", False),
        ("blockdev-add/arg-type/driver", False),
        ("object-add/arg-type/qom-type/^secret", False),
        ("migrate/arg-type/*no-such", False),
        ("query-migrate/ret-type/ram/*total", False),
    ],
)
def test_paths_of_libvirts_kind_are_found(path: str, *, there: bool) -> None:
    assert walk(path) is there


def test_parameters_and_capabilities_are_all_there() -> None:
    for name in PARAMETER_NAMES:
        assert walk(f"migrate-set-parameters/arg-type/*{name}")
        assert walk(f"query-migrate-parameters/ret-type/*{name}")
    for name in CAPABILITY_NAMES:
        assert walk(f"migrate-set-capabilities/arg-type/capabilities/capability/^{name}")


def test_objects_are_those_of_the_configuration() -> None:
    """Every type of the schema is read, and every property of it is known."""
    samples: dict[str, object] = {"bool": True, "str": "x", "list": []}
    for qom_type, properties in TYPES.items():
        values = {
            name: argument.choices[0] if argument.choices else samples[argument.kind]
            for name, argument in properties.items()
        }
        made = read_object({"qom-type": qom_type, "id": "a", **values})
        assert {name.replace("_", "-") for name in (field.name for field in dataclasses.fields(made))} == {
            "id",
            *properties,
        }


async def test_it_is_a_command_and_commands_are_those_of_the_table() -> None:
    async with hosted() as talk:
        entries = await talk.say("query-qmp-schema")
        named = {entry["name"] for entry in entries if entry["meta-type"] == "command"}
        assert named == {*talk.machine.commands, "qmp_capabilities", "query-commands"}


@pytest.mark.parametrize("status", ["none", "completed"])
async def test_answers_are_as_the_schema_says(status: str) -> None:
    """Every query without an argument; the answer has only members that the schema has."""
    async with hosted() as talk:
        if status == "completed":
            await talk.say("calc-dirty-rate", {"calc-time": 50, "calc-time-unit": "millisecond"})
        for name in talk.machine.commands:
            command = COMMANDS[name]
            if not name.startswith("query-") or command.signature is None:
                continue
            answer = await talk.say(name)
            members = command.returns.members
            if command.returns.kind == "object" and members is not None:
                assert answer.keys() <= members.keys(), name
                assert {key for key, member in members.items() if not member.optional} <= answer.keys(), name
