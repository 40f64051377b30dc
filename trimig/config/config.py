"""Config: all settings of one migration, and reading them from a file or a command line."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, final

from ..errors import ConfigError
from ..expected import expect
from .capabilities import CAPABILITY_ALIASES, Capabilities, read_capabilities
from .objects import ConfigObject, TlsX509, check_objects, parse_object, read_object, with_objects
from .parameters import PARAMETER_ALIASES, Parameters, read_parameters
from .peer import BY_MACHINE, PeerProfile, read_peer
from .types import (
    Choice,
    Flag,
    Instance,
    Int,
    MiB,
    OrNone,
    Seconds,
    Size,
    Syntax,
    check_fields,
    check_value,
    qmp_name,
    short_repr,
    types_of,
    unknown_name,
)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of one migration; each side reads the settings for its role.

    Raises:
        ConfigError: on construction, for a value out of its range or a combination that contradicts itself.
    """

    #: The capabilities: the switches of the migration.
    capabilities: Annotated[Capabilities, Instance(Capabilities)] = dataclasses.field(default_factory=Capabilities)
    #: The parameters: the values that control the migration.
    parameters: Annotated[Parameters, Instance(Parameters)] = dataclasses.field(default_factory=Parameters)
    #: The stream format that the other side expects; by default the guest's machine type decides it.
    peer: Annotated[PeerProfile, Instance(PeerProfile)] = BY_MACHINE
    #: The objects that ``tls-creds`` and ``tls-authz`` name; each id once. A missing object is an error when it is
    #: used.
    objects: tuple[ConfigObject, ...] = ()

    #: The longest wait in seconds for the answer to the decision, and before that for the PONG that proves the prepare
    #: step. It bounds a shield, so it must be finite.
    handover_timeout: Annotated[float, Seconds()] = 30.0
    #: The longest time in seconds in which a failed or cancelled attempt restores the guest and closes the connection.
    #: It must be finite, too.
    teardown_grace: Annotated[float, Seconds()] = 5.0
    #: Seconds without a byte in either direction after which the connection counts as lost; ``math.inf`` for never.
    stall_timeout: Annotated[float, Seconds(endless=True)] = 60.0
    #: Postcopy: when the connection is lost, both sides try the same address again, at growing intervals. Off: wait for
    #: :meth:`~trimig.Monitor.recover`, as QEMU does.
    recovery_retry: Annotated[bool, Flag()] = False
    #: Postcopy: seconds without a connection after which the rest of the memory is given up; ``math.inf`` for never.
    recovery_timeout: Annotated[float, Seconds(endless=True)] = math.inf
    #: Number of iterations over RAM after which ``on_bound`` applies; None for any number.
    max_iterations: Annotated[int | None, OrNone(Int(1, None))] = None
    #: Seconds from the start after which ``on_bound`` applies; None (or ``math.inf``) for any time.
    max_total_time: Annotated[float | None, OrNone(Seconds(endless=True))] = None
    #: The action at one of these bounds: give up (:class:`~trimig.errors.NotConverging`), or switch over with any
    #: downtime.
    on_bound: Annotated[Literal["fail", "switchover"], Choice(("fail", "switchover"))] = "fail"
    #: Source: ``auto`` chooses for each batch of pages among the encodings of the capabilities in force (xbzrle, compress) and plain
    #: pages: that by which the pages are soonest gone, as measured. ``off``: each capability does what QEMU does.
    encoding: Annotated[Literal["off", "auto"], Choice(("off", "auto"))] = "off"
    #: Destination: RAM or devices that were never received are an error, or only a warning.
    completeness: Annotated[Literal["fail", "warn"], Choice(("fail", "warn"))] = "fail"
    #: Destination: run the guest if it ran at the source. False leaves it paused, as QEMU's ``-S`` does.
    autostart: Annotated[bool, Flag()] = True
    #: Destination: the largest device section that is accepted, in bytes.
    max_device_bytes: Annotated[int, Size(1, 2**63 - 1)] = 256 * MiB
    #: Destination: the largest description that is accepted, in bytes.
    max_description_bytes: Annotated[int, Size(1, 2**63 - 1)] = 64 * MiB

    def __post_init__(self) -> None:
        check_fields("option", self, _TYPES)
        check_objects(self.objects)
        # Each part has checked itself; only the rules between capabilities and parameters remain.
        self.capabilities.check(
            multifd_compression=self.parameters.multifd_compression,
            tls=bool(self.parameters.tls_creds),
            compressed_pages=self.peer.compressed_pages,
        )

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str]) -> Config:
        """Read a configuration from TOML: a string is the text itself, a path object names a file to read.

        Tables: ``[capabilities]`` and ``[parameters]`` in QMP spelling, ``[peer]`` with ``profile = "by-machine"``
        or single switches, ``[[objects]]`` with ``qom-type`` and ``id``, ``[engine]`` for the rest (these may also
        stand before the first table). Underscores may replace dashes everywhere; sizes are integers or strings such as
        "32M". Absent settings keep their defaults.

        Raises:
            ConfigError: unreadable, not TOML, or a setting that is unknown or illegal, named as ``table.key``.
        """
        expect("source", source, (str, os.PathLike), "TOML text (a str) or a path object")
        if isinstance(source, str):
            return _from_tables(_parse_toml(source))
        path = Path(source)
        try:
            return _from_tables(_parse_toml(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", name=error.name) from error

    def with_options(
        self,
        capabilities: Iterable[str] = (),
        parameters: Iterable[str] = (),
        objects: Iterable[str] = (),
        *,
        tls: str | os.PathLike[str] | None = None,
    ) -> Config:
        """This configuration changed by command-line options; later options override earlier ones.

        Args:
            capabilities: each ``NAME`` or ``NAME=on|off|true|false``, in QMP spelling.
            parameters: each ``NAME=VALUE``, sizes also as "32M".
            objects: each ``TYPE,id=ID,NAME=VALUE,…`` as for QEMU's ``-object``.
            tls: use TLS with the certificates in this directory (:class:`TlsX509`): short for an object and the
                parameter ``tls-creds``.

        Raises:
            ConfigError: an option that is malformed, unknown or illegal, or a contradiction in the result.
        """
        states: list[tuple[str, object]] = []
        for text in capabilities:
            name, equals, state = text.partition("=")
            states.append((name.strip(), state if equals else "on"))
        values: list[tuple[str, object]] = []
        for text in parameters:
            name, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"a parameter is given as NAME=VALUE, not {short_repr(text)}")
            values.append((name.strip(), value))
        more = [parse_object(text) for text in objects]
        if tls is not None:
            more.append(TlsX509(id=_SHORT_ID, dir=tls))
            values.insert(0, ("tls-creds", _SHORT_ID))
        return dataclasses.replace(
            self,
            capabilities=read_capabilities(self.capabilities, states, Syntax.TEXT),
            parameters=read_parameters(self.parameters, values, Syntax.TEXT, repeats=True),
            objects=with_objects(self.objects, more),
        )


_TYPES: Final = types_of(Config)
_PARTS: Final = ("capabilities", "parameters", "peer")
#: The id of the credentials that the short form makes.
_SHORT_ID: Final = "tls"
_TABLES: Final = (*_PARTS, "engine")
_ALIASES: Final = {**CAPABILITY_ALIASES, **PARAMETER_ALIASES}
_Read = TypeVar("_Read")

#: The names of the engine options, with dashes.
ENGINE_OPTIONS: Final[tuple[str, ...]] = tuple(qmp_name(name) for name in _TYPES if name not in _PARTS)


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "" if "\n" in text or not text.endswith(".toml") else "; to read a file, pass a pathlib.Path"
        raise ConfigError(f"not valid TOML: {error}{hint}") from error


def _from_tables(document: Mapping[str, Any]) -> Config:
    tables: dict[str, list[tuple[str, object]]] = {table: [] for table in _TABLES}
    objects: tuple[ConfigObject, ...] = ()
    for key, value in document.items():
        if key == "objects":
            objects = _read_objects(value)
        elif key in _TABLES:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} expects a table, not {short_repr(value)}", name=key)
            tables[key] += value.items()
        elif qmp_name(key) in ENGINE_OPTIONS:
            tables["engine"].append((key, value))
        else:
            raise unknown_name("table or option", key, (*_TABLES, "objects", *ENGINE_OPTIONS))
    capabilities = _read_table(
        tables, "capabilities", lambda pairs: read_capabilities(Capabilities(), pairs, Syntax.TOML)
    )
    parameters = _read_table(tables, "parameters", lambda pairs: read_parameters(Parameters(), pairs, Syntax.TOML))
    peer = _read_table(tables, "peer", lambda pairs: read_peer(pairs, Syntax.TOML))
    engine = _read_table(tables, "engine", _read_engine)
    return Config(capabilities=capabilities, parameters=parameters, peer=peer, objects=objects, **engine)


def _read_objects(tables: object) -> tuple[ConfigObject, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ConfigError(f"objects expects tables, each under [[objects]], not {short_repr(tables)}", name="objects")
    found = []
    for number, table in enumerate(tables):
        try:
            found.append(read_object({qmp_name(key): value for key, value in table.items()}, Syntax.TOML))
        except ConfigError as error:
            raise ConfigError(f"objects[{number}]: {error}", name=error.name) from error
    return tuple(found)


def _read_table(
    tables: Mapping[str, list[tuple[str, object]]], table: str, read: Callable[[list[tuple[str, object]]], _Read]
) -> _Read:
    """Read one table with *read*, which gets pairs of QMP name and value; errors name the table and the key."""
    pairs: dict[str, object] = {}
    for key, value in tables[table]:
        name = _ALIASES.get(qmp_name(key), qmp_name(key))
        if name in pairs:
            raise ConfigError(f"{table}.{key}: '{name}' is given twice", name=name)
        pairs[name] = value
    try:
        return read(list(pairs.items()))
    except ConfigError as error:
        raise ConfigError(f"{table}{f'.{error.name}' if error.name else ''}: {error}", name=error.name) from error


def _read_engine(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name not in ENGINE_OPTIONS:
            raise unknown_name("engine option", name, ENGINE_OPTIONS)
        field = name.replace("-", "_")
        values[field] = _TYPES[field].read(value, Syntax.TOML)
        check_value("option", field, _TYPES[field], values[field])
    return values
