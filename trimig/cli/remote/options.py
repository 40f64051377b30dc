"""Options of the commands that drive a guest over QMP, and their form for settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import click

import trimig

from .state import Settings

F = TypeVar("F", bound=Callable[..., Any])


def qmp_option(command: F) -> F:
    """``--qmp``; the command gets ``address``."""
    return click.option(
        "--qmp",
        "address",
        metavar="ADDR",
        required=True,
        envvar="TRIMIG_QMP",
        help="The QMP socket of a trimig run or a QEMU: unix:PATH or tcp:HOST:PORT. [also: $TRIMIG_QMP]",
    )(command)


def settings_options(command: F) -> F:
    """``-c`` and ``-p``; the command gets ``capabilities`` and ``parameters`` as the user wrote them."""
    parameters = click.option(
        "-p",
        "--parameter",
        "parameters",
        metavar="NAME=VALUE",
        multiple=True,
        help="Set a migration parameter there, by its QMP name; for example -p max-bandwidth=1G.",
    )
    capabilities = click.option(
        "-c",
        "--capability",
        "capabilities",
        metavar="NAME[=on|off]",
        multiple=True,
        help="Turn a migration capability on there, or off; for example -c pause-before-switchover.",
    )
    return capabilities(parameters(command))


_ON_OFF: Final = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def read_settings(capabilities: Iterable[str], parameters: Iterable[str], present: Settings) -> Settings:
    """The changes that ``-c`` and ``-p`` ask for.

    A value gets the type of the other side's present value, so that every parameter of every version can be set. A
    setting that the other side does not list is passed on unchanged, and the other side will accept or refuse it.

    Raises:
        trimig.ConfigError: a setting is not NAME, NAME=on, NAME=off or NAME=VALUE, or is no number where one is needed.
    """
    states = {}
    for text in capabilities:
        name, equals, word = text.partition("=")
        if equals and word.lower() not in _ON_OFF:
            raise trimig.ConfigError(f"a capability is on or off, not {word!r}", name=name)
        states[name.strip().replace("_", "-")] = _ON_OFF[word.lower()] if equals else True
    values = {}
    for text in parameters:
        name, equals, word = text.partition("=")
        if not equals:
            raise trimig.ConfigError(f"a parameter is given as NAME=VALUE, not {text!r}")
        name = name.strip().replace("_", "-")
        values[name] = _value(name, word.strip(), present.parameters.get(name))
    return Settings(capabilities=states, parameters=values)


def _value(name: str, word: str, like: object) -> object:
    if isinstance(like, bool):
        if word.lower() not in _ON_OFF:
            raise trimig.ConfigError(f"parameter {name!r} is on or off, not {word!r}", name=name)
        return _ON_OFF[word.lower()]
    if isinstance(like, int):
        if any(part in name for part in ("bandwidth", "size")):
            try:
                return trimig.parse_size(word)
            except trimig.ConfigError as error:
                raise trimig.ConfigError(f"parameter {name!r}: {error}", name=name) from error
        try:
            return int(word)
        except ValueError:
            raise trimig.ConfigError(f"parameter {name!r} expects a whole number, not {word!r}", name=name) from None
    if isinstance(like, str):
        return word
    try:
        return json.loads(word)
    except ValueError:
        return word
