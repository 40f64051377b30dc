"""Objects that parameters name: TLS credentials, and lists of the clients that a TLS server accepts.

Types, properties and spellings are those of QEMU's ``-object``: ``tls-creds-x509``, ``tls-creds-psk``, ``authz-simple``
and ``authz-list``. The parameters ``tls-creds`` and ``tls-authz`` refer to an object by its id. An object is only a
description: its files are read when a connection needs them, so renewed certificates are used from the next migration
on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias, final

from ..errors import ConfigError
from .types import (
    Choice,
    Flag,
    OrNone,
    Syntax,
    Text,
    Type,
    check_fields,
    check_value,
    qmp_name,
    short_repr,
    types_of,
    unknown_name,
)

#: QEMU's id_wellformed.
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True, slots=True)
class _Identifier(Type):
    """The id of an object."""

    @property
    def expects(self) -> str:
        return "a letter, followed by letters, digits, '-', '.' and '_'"

    def legal(self, value: object) -> bool:
        return isinstance(value, str) and _ID.fullmatch(value) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class _Directory(Type):
    """A path; whether it exists is checked when it is used."""

    @property
    def expects(self) -> str:
        return "the path of a directory"

    def legal(self, value: object) -> bool:
        return isinstance(value, (str, os.PathLike)) and str(value) != "" and "\0" not in str(value)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlsX509:
    """Certificates: a directory laid out as for QEMU's ``tls-creds-x509``.

    It holds ``ca-cert.pem`` and, if there is one, the revocation list ``ca-crl.pem``; for a server ``server-cert.pem`` and
    ``server-key.pem``; for a client ``client-cert.pem`` and ``client-key.pem``, without which the client is anonymous.
    A certificate file may also contain the certificates between it and the CA.

    Raises:
        ConfigError: on construction, for a value of the wrong type.
    """

    qom_type: ClassVar[str] = "tls-creds-x509"

    id: Annotated[str, _Identifier()]
    dir: Annotated[str | os.PathLike[str], _Directory()]
    #: The side that uses these credentials: ``client`` connects, ``server`` listens. None for either.
    endpoint: Annotated[Literal["client", "server"] | None, OrNone(Choice(("client", "server")))] = None
    #: Server: refuse clients without a valid certificate. Client: refuse servers without one; False checks *nothing*
    #: about the other side, so an attacker on the network can read and change the guest.
    verify_peer: Annotated[bool, Flag()] = True
    #: Check this side's own certificate first: it must be valid, made for this purpose and signed by the CA.
    sanity_check: Annotated[bool, Flag()] = True

    def __post_init__(self) -> None:
        check_fields(f"{self.qom_type} property", self, _FIELD_TYPES[self.qom_type])


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlsPsk:
    """A shared secret: a directory laid out as for QEMU's ``tls-creds-psk``, with ``keys.psk`` (lines ``user:hex key``).

    Raises:
        ConfigError: on construction, for a value of the wrong type.
    """

    qom_type: ClassVar[str] = "tls-creds-psk"

    id: Annotated[str, _Identifier()]
    dir: Annotated[str | os.PathLike[str], _Directory()]
    #: As for :class:`TlsX509`.
    endpoint: Annotated[Literal["client", "server"] | None, OrNone(Choice(("client", "server")))] = None
    #: Client: the user name in the file whose key the client uses.
    username: Annotated[str, Text()] = "qemu"

    def __post_init__(self) -> None:
        check_fields(f"{self.qom_type} property", self, _FIELD_TYPES[self.qom_type])


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuthzSimple:
    """Accepts the one client whose certificate has this distinguished name, ``CN=host-a,O=Example``.

    The name is written as QEMU (GnuTLS) does: the parts in the order of the certificate, ``C=DE,O=Example,CN=host-a``,
    with a backslash before each of ``, + " \\ < > ;``, and before a ``#`` or a space at the beginning or the end.

    Raises:
        ConfigError: on construction, for a value of the wrong type.
    """

    qom_type: ClassVar[str] = "authz-simple"

    id: Annotated[str, _Identifier()]
    identity: Annotated[str, Text()]

    def __post_init__(self) -> None:
        check_fields(f"{self.qom_type} property", self, _FIELD_TYPES[self.qom_type])

    def allows(self, name: str) -> bool:
        """Whether a client of this distinguished name is let in."""
        return name == self.identity


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuthzRule:
    """One rule of an :class:`AuthzList`.

    Raises:
        ConfigError: on construction, for a value of the wrong type.
    """

    #: A distinguished name, or a pattern for one.
    match: Annotated[str, Text()]
    policy: Annotated[Literal["allow", "deny"], Choice(("allow", "deny"))]
    #: In a pattern (``glob``) ``*`` stands for any characters and ``?`` for one.
    format: Annotated[Literal["exact", "glob"], Choice(("exact", "glob"))] = "exact"

    def __post_init__(self) -> None:
        check_fields("authz-list rule", self, _RULE_TYPES)

    def matches(self, name: str) -> bool:
        """Whether this rule matches *name*."""
        if self.format == "exact":
            return name == self.match
        # Not fnmatch, where a "[" begins a set; here it is an ordinary character.
        parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in self.match)
        return re.fullmatch("".join(parts), name, re.DOTALL) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class _Rules(Type):
    """The rules of an authz-list."""

    @property
    def expects(self) -> str:
        return "a list of rules, each with 'match' and 'policy' and perhaps 'format'"

    def legal(self, value: object) -> bool:
        return isinstance(value, tuple) and all(isinstance(rule, AuthzRule) for rule in value)

    def read(self, value: object, form: Syntax) -> object:
        if not isinstance(value, (list, tuple)) or not all(isinstance(rule, Mapping) for rule in value):
            return value
        return tuple(AuthzRule(**_properties("authz-list rule", AuthzRule, rule, _RULE_TYPES, form)) for rule in value)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuthzList:
    """Accepts or refuses clients by the first rule that matches their distinguished name, and by its policy if none
    matches.

    Raises:
        ConfigError: on construction, for a value of the wrong type.
    """

    qom_type: ClassVar[str] = "authz-list"

    id: Annotated[str, _Identifier()]
    rules: Annotated[tuple[AuthzRule, ...], _Rules()] = ()
    policy: Annotated[Literal["allow", "deny"], Choice(("allow", "deny"))] = "deny"

    def __post_init__(self) -> None:
        check_fields(f"{self.qom_type} property", self, _FIELD_TYPES[self.qom_type])

    def allows(self, name: str) -> bool:
        """Whether a client of this distinguished name is let in."""
        return next((rule.policy for rule in self.rules if rule.matches(name)), self.policy) == "allow"


#: Every kind of object.
ConfigObject: TypeAlias = TlsX509 | TlsPsk | AuthzSimple | AuthzList

_TYPES: Final[Mapping[str, type[ConfigObject]]] = {
    cls.qom_type: cls for cls in (TlsX509, TlsPsk, AuthzSimple, AuthzList)
}
_FIELD_TYPES: Final = {qom_type: types_of(cls) for qom_type, cls in _TYPES.items()}
_RULE_TYPES: Final = types_of(AuthzRule)
#: Properties of QEMU's objects that are not supported, and the reason.
_REFUSED: Final = {
    "priority": "it is an expression of GnuTLS, and trimig uses OpenSSL",
    "passwordid": "keys with a passphrase are not built into trimig; give the key without one",
}


def read_object(properties: Mapping[str, object], form: Syntax = Syntax.QMP) -> ConfigObject:
    """Make the object that *properties* describe: ``qom-type``, ``id`` and the rest, in QEMU's spelling.

    Raises:
        ConfigError: an unknown type, an unknown or missing property, or a value of the wrong type.
    """
    rest = dict(properties)
    qom_type = rest.pop("qom-type", None)
    if not isinstance(qom_type, str):
        raise ConfigError("an object needs its 'qom-type', for example tls-creds-x509", name="qom-type")
    if qom_type not in _TYPES:
        raise unknown_name("object type", qom_type, _TYPES)
    cls = _TYPES[qom_type]
    return cls(**_properties(qom_type, cls, rest, _FIELD_TYPES[qom_type], form))


def _properties(
    what: str, cls: type[Any], properties: Mapping[str, object], kinds: Mapping[str, Type], form: Syntax
) -> dict[str, Any]:
    """The arguments for *cls* in Python spelling."""
    values: dict[str, Any] = {}
    for name, value in properties.items():
        if name in _REFUSED:
            raise ConfigError(f"{what} property '{name}' is not supported: {_REFUSED[name]}", name=name)
        field = str(name).replace("-", "_")
        if field not in kinds:
            raise unknown_name(f"{what} property", name, [qmp_name(known) for known in kinds])
        values[field] = kinds[field].read(value, form)
        check_value(f"{what} property", field, kinds[field], values[field])
    for one in dataclasses.fields(cls):
        if one.default is dataclasses.MISSING and one.name not in values:
            raise ConfigError(f"{what} needs '{qmp_name(one.name)}'", name=qmp_name(one.name))
    return values


def parse_object(text: str) -> ConfigObject:
    """Make the object of one command-line option, as for QEMU's ``-object``.

    ``tls-creds-x509,id=tls0,dir=DIR,endpoint=client,verify-peer=on``: a comma in a value is doubled, and rules are
    ``rules.0.match=…,rules.0.policy=allow``. A text that begins with a brace is JSON.

    Raises:
        ConfigError: malformed, or as for :func:`read_object`.
    """
    if text.lstrip().startswith("{"):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the object {short_repr(text)} is not valid JSON: {error}") from error
        if not isinstance(document, Mapping):
            raise ConfigError(f"an object is described by a JSON object, not {short_repr(text)}")
        return read_object(document, Syntax.QMP)
    first, *pairs = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    properties: dict[str, object] = {"qom-type": first.removeprefix("qom-type=").strip()}
    rules: dict[int, dict[str, object]] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip()
        if not equals:
            raise ConfigError(f"a property of an object is given as NAME=VALUE, not {short_repr(pair)}")
        rule = re.fullmatch(r"rules\.([0-9]{1,4})\.([a-z]+)", name)
        place = properties if rule is None else rules.setdefault(int(rule[1]), {})
        key = name if rule is None else rule[2]
        if key in place:
            raise ConfigError(f"the object property {short_repr(name)} is given twice", name=name)
        place[key] = value
    if rules:
        properties["rules"] = [rules[index] for index in sorted(rules)]
    return read_object(properties, Syntax.TEXT)


def check_objects(objects: object) -> None:
    """Raise ConfigError unless *objects* is a tuple of objects with different ids."""
    if not isinstance(objects, tuple) or not all(isinstance(one, tuple(_TYPES.values())) for one in objects):
        raise ConfigError(f"option 'objects' expects a tuple of objects, not {short_repr(objects)}", name="objects")
    seen: set[str] = set()
    for one in objects:
        if one.id in seen:
            raise ConfigError(f"there are two objects with the id {short_repr(one.id)}", name="objects")
        seen.add(one.id)


def with_objects(present: tuple[ConfigObject, ...], more: Iterable[ConfigObject]) -> tuple[ConfigObject, ...]:
    """*present* and *more*; an object of *more* replaces one with the same id."""
    by_id = {one.id: one for one in present}
    by_id.update((one.id, one) for one in more)
    return tuple(by_id.values())
