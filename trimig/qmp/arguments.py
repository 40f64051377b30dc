"""Checks the arguments of commands: names and types. Errors have QEMU's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from ..config.types import near
from .interface import CommandFailed

#: JSON type -> (the Python types it arrives as, QEMU's word for it).
_TYPES: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "str": ((str,), "string"),
    "bool": ((bool,), "boolean"),
    "int": ((int,), "integer"),
    "number": ((int, float), "number"),
    "list": ((list,), "array"),
    "object": ((dict,), "object"),
    "any": ((object,), "value"),
    "str-or-null": ((str, type(None)), "string"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command, or a part of its answer.

    Args:
        kind: ``str``, ``bool``, ``int``, ``number``, ``list``, ``object``, ``str-or-null`` or ``any``.
        optional: it may be absent.
        choices: the values that a string may have; empty for any.
        items: of a list: what each of its items is; ``any`` if unspecified. For the schema: :func:`check` looks at
            the list itself only.
        members: of an object; for the schema as well.
        variants: of an object: its further members, by the value of the member *tag*.
    """

    kind: str
    optional: bool = False
    choices: tuple[str, ...] = ()
    items: Argument | None = None
    members: Mapping[str, Argument] | None = None
    tag: str = ""
    variants: Mapping[str, Mapping[str, Argument]] | None = None


Signature = Mapping[str, Argument]


def check(arguments: Mapping[str, Any], signature: Signature) -> None:
    """Refuse arguments that do not match *signature*; first missing or wrongly typed ones, as QEMU does.

    Raises:
        CommandFailed: with QEMU's sentence.
    """
    for name, argument in signature.items():
        if name not in arguments:
            if not argument.optional:
                raise CommandFailed(f"Parameter '{name}' is missing")
            continue
        check_value(name, arguments[name], argument)
    for name in arguments:
        if name not in signature:
            raise CommandFailed(f"Parameter '{name}' is unexpected{near(name, signature)}")


def check_value(name: str, value: Any, argument: Argument) -> None:
    """Refuse *value* for *argument*.

    Raises:
        CommandFailed: with QEMU's sentence.
    """
    types, word = _TYPES[argument.kind]
    wrong_bool = isinstance(value, bool) and argument.kind not in ("bool", "any")
    if not isinstance(value, types) or wrong_bool:
        raise CommandFailed(f"Invalid parameter type for '{name}', expected: {word}")
    if argument.choices and value not in argument.choices:
        raise CommandFailed(f"Parameter '{name}' does not accept value '{value}'{near(value, argument.choices)}")
