"""The arguments of commands: names, types, and QEMU's words for what is wrong with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from .interface import CommandFailed

#: JSON type -> (the Python types it arrives as, QEMU's word for it).
_TYPES: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "str": ((str,), "string"),
    "bool": ((bool,), "boolean"),
    "int": ((int,), "integer"),
    "number": ((int, float), "number"),
    "list": ((list,), "array"),
    "object": ((dict,), "object"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command.

    Args:
        kind: ``str``, ``bool``, ``int``, ``number``, ``list`` or ``object``.
        optional: it may be absent.
        choices: the values that a string may have; empty for any.
    """

    kind: str
    optional: bool = False
    choices: tuple[str, ...] = ()


Signature = Mapping[str, Argument]


def check(arguments: Mapping[str, Any], signature: Signature) -> None:
    """Refuse arguments that are not as *signature* says; first what is missing or of the wrong type, as QEMU does.

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
            raise CommandFailed(f"Parameter '{name}' is unexpected")


def check_value(name: str, value: Any, argument: Argument) -> None:
    """Refuse *value* for *argument*.

    Raises:
        CommandFailed: with QEMU's sentence.
    """
    types, word = _TYPES[argument.kind]
    if not isinstance(value, types) or (isinstance(value, bool) and argument.kind != "bool"):
        raise CommandFailed(f"Invalid parameter type for '{name}', expected: {word}")
    if argument.choices and value not in argument.choices:
        raise CommandFailed(f"Parameter '{name}' does not accept value '{value}'")
