"""``query-qmp-schema``: the commands and events, described as QEMU describes its own.

The answer is generated from the tables of commands, so it cannot differ from the implementation. Types have numbers as
names, as in QEMU: clients follow these names without knowing them. Commands, events and JSON's types keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..arguments import Argument, Signature

#: The types of JSON: by trimig's name, QEMU's name and the JSON type.
_BUILTIN: Final[Mapping[str, tuple[str, str]]] = {
    "str": ("str", "string"),
    "bool": ("bool", "boolean"),
    "int": ("int", "int"),
    "number": ("number", "number"),
    "null": ("null", "null"),
    "any": ("any", "value"),
}


class Schema:
    """Collects entries; equal types share one entry."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def command(self, name: str, takes: Argument, returns: Argument) -> None:
        """Add a command and the types that the command needs; *takes* is an object."""
        entry = {"name": name, "meta-type": "command", "arg-type": self._type(takes), "ret-type": self._type(returns)}
        self._entries.append(entry)

    def event(self, name: str, data: Signature) -> None:
        """Add an event and the types that the event needs."""
        self._entries.append({"name": name, "meta-type": "event", "arg-type": self._object(data)})

    def entries(self) -> list[dict[str, Any]]:
        """All entries, for JSON."""
        return [dict(entry) for entry in self._entries]

    def _add(self, name: str | None, entry: dict[str, Any]) -> str:
        """The name of the type that *entry* describes; a number if *name* is None. Adds the entry unless it exists."""
        key = repr((name, entry))
        if key not in self._names:
            self._names[key] = str(len(self._names)) if name is None else name
            self._entries.append({"name": self._names[key], **entry})
        return self._names[key]

    def _builtin(self, kind: str) -> str:
        name, json_type = _BUILTIN[kind]
        return self._add(name, {"meta-type": "builtin", "json-type": json_type})

    def _type(self, argument: Argument) -> str:
        match argument.kind:
            case "list":
                element = self._type(argument.items or Argument("any"))
                return self._add(f"[{element}]", {"meta-type": "array", "element-type": element})
            case "object":
                return self._object(argument.members or {}, argument)
            case "str-or-null":
                members = [{"type": self._builtin("str")}, {"type": self._builtin("null")}]
                return self._add(None, {"meta-type": "alternate", "members": members})
            case "str" if argument.choices:
                values = list(argument.choices)
                members = [{"name": value} for value in values]
                return self._add(None, {"meta-type": "enum", "members": members, "values": values})
        return self._builtin(argument.kind)

    def _object(self, members: Signature, argument: Argument | None = None) -> str:
        entry: dict[str, Any] = {"meta-type": "object", "members": [self._member(*item) for item in members.items()]}
        if argument is not None and argument.variants is not None:
            entry["tag"] = argument.tag
            entry["variants"] = [
                {"case": case, "type": self._object(variant)} for case, variant in argument.variants.items()
            ]
        return self._add(None, entry)

    def _member(self, name: str, argument: Argument) -> dict[str, Any]:
        return {"name": name, "type": self._type(argument), **({"default": None} if argument.optional else {})}
