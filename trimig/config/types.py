"""The types of option values: legal values, written forms, and the text of a refusal.

Each option of :class:`~trimig.config.Parameters` and :class:`~trimig.config.Config` carries one of these in its
annotation (``Annotated[int, Whole(0, 9)]``), so that the range stands beside the default and one piece of code checks
all options. A type reads three syntaxes: QMP (JSON), TOML, and the text of a command line. Reading never fails: a value
that cannot be read is returned unchanged and then found illegal, so that every refusal has the same sentence.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import re
import reprlib
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Final

from ..errors import ConfigError

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

#: The largest value of QEMU's type "size".
SIZE_MAX: Final = 2**64 - 1

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": KiB, "m": MiB, "g": GiB, "t": 1024 * GiB}


class Syntax(enum.Enum):
    """The syntax of a written value."""

    #: A JSON value of a QMP command.
    QMP = "QMP"
    #: A TOML value; sizes may be strings.
    TOML = "TOML"
    #: The text behind ``NAME=`` on a command line.
    TEXT = "text"


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: ``"4096"``, ``"32M"``, ``"1.5GiB"``, ``"200 kB"``.

    The suffixes K, M, G and T are powers of 1024, in either case, and may be followed by ``B`` or ``iB``. A fraction
    needs a suffix, and is rounded down to whole bytes.

    Raises:
        ConfigError: not a size; negative; or less than one byte without being zero (which would mean something else).
    """
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        number = Fraction(match[1])
        suffix = (match[2] or "").lower()
        size = math.floor(number * _UNITS[suffix])
        if (suffix or "." not in match[1]) and (size > 0 or number == 0):
            return size
    raise ConfigError(
        f"a size is a number of bytes, or one with K, M, G or T such as 32M or 1.5G, not {short_repr(text)}"
    )


def short_repr(value: object) -> str:
    """*value* for a message, cut to one line, because it may come from a peer or a file."""
    return reprlib.repr(value)


def qmp_name(name: str) -> str:
    """A Python name in QMP spelling."""
    return name.replace("_", "-")


def near(given: object, names: Iterable[str]) -> str:
    """``; did you mean …?`` with the *names* that are similar to *given*; empty if none is."""
    found = difflib.get_close_matches(str(given)[:100], list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def unknown_name(what: str, given: object, names: Iterable[str]) -> ConfigError:
    """The error for an unknown name, with the most similar known names."""
    names = list(names)
    like = difflib.get_close_matches(str(given)[:100], names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(like)}?" if like else f"known are {', '.join(names)}"
    return ConfigError(
        f"there is no {what} {short_repr(given)}; {hint}", name=given if isinstance(given, str) else None
    )


class Type:
    """Base of all types of option values."""

    @property
    def expects(self) -> str:
        """The legal values, as the end of the sentence "... expects"."""
        raise NotImplementedError

    @property
    def expects_typed(self) -> str:
        """The same for the text of a command line."""
        return self.expects

    def legal(self, value: object) -> bool:
        """Whether *value* may be stored unchanged."""
        raise NotImplementedError

    def read(self, value: object, form: Syntax) -> object:
        """*value*, given in *form*, in its stored form; unchanged if it cannot be read."""
        return value

    def write(self, value: object) -> object:
        """A stored value for QMP."""
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Flag(Type):
    """True or false. Not 1 and not "yes", which QMP does not accept either."""

    @property
    def expects(self) -> str:
        return "true or false"

    @property
    def expects_typed(self) -> str:
        return "on or off"

    def legal(self, value: object) -> bool:
        return isinstance(value, bool)

    def read(self, value: object, form: Syntax) -> object:
        if form is Syntax.TEXT and isinstance(value, str):
            return {"on": True, "true": True, "off": False, "false": False}.get(value.strip().lower(), value)
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Int(Type):
    """An integer from *low* to *high*, both included; *high* None for no upper limit."""

    low: int
    high: int | None
    unit: str = ""

    @property
    def expects(self) -> str:
        limits = f"of at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"
        return f"an integer {limits}{f' ({self.unit})' if self.unit else ''}"

    def legal(self, value: object) -> bool:
        # bool is an int in Python but not in JSON.
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return value >= self.low and (self.high is None or value <= self.high)

    def read(self, value: object, form: Syntax) -> object:
        if form is Syntax.TEXT and isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
            return int(value)
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Size(Type):
    """A number of bytes. As in QMP, -1 is the largest number, 2^64-1."""

    low: int = 0
    high: int = SIZE_MAX
    power_of_two: bool = False
    unit: str = "bytes"

    @property
    def expects(self) -> str:
        number = "a power of two" if self.power_of_two else "a size"
        high = "2^64-1" if self.high == SIZE_MAX else str(self.high)
        return f"{number} from {self.low} to {high} ({self.unit})"

    def legal(self, value: object) -> bool:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        return not self.power_of_two or value.bit_count() == 1

    def read(self, value: object, form: Syntax) -> object:
        if isinstance(value, str) and form is not Syntax.QMP:
            if value.strip() == "-1":
                value = -1
            else:
                try:
                    return parse_size(value)
                except ConfigError:
                    return value
        if isinstance(value, int) and value == -1 and self.high == SIZE_MAX:
            return SIZE_MAX
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Text(Type):
    """A string; QMP's null is the empty string."""

    @property
    def expects(self) -> str:
        return "a string"

    def legal(self, value: object) -> bool:
        return isinstance(value, str)

    def read(self, value: object, form: Syntax) -> object:
        return "" if value is None and form is Syntax.QMP else value


@dataclasses.dataclass(frozen=True, slots=True)
class Choice(Type):
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def expects(self) -> str:
        return f"one of {', '.join(self.words)}"

    def legal(self, value: object) -> bool:
        return isinstance(value, str) and value in self.words


@dataclasses.dataclass(frozen=True, slots=True)
class Words(Type):
    """A list of strings; stored as a tuple."""

    @property
    def expects(self) -> str:
        return "a list of strings"

    def legal(self, value: object) -> bool:
        return isinstance(value, tuple) and all(isinstance(word, str) for word in value)

    def read(self, value: object, form: Syntax) -> object:
        if form is Syntax.TEXT and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value
        return tuple(value) if isinstance(value, list) else value

    def write(self, value: object) -> object:
        assert isinstance(value, tuple), "only legal values are stored"
        return list(value)


@dataclasses.dataclass(frozen=True, slots=True)
class Seconds(Type):
    """A duration above zero; at most a billion seconds, or ``math.inf`` where *endless* allows it."""

    endless: bool = False

    @property
    def expects(self) -> str:
        return f"a number of seconds above 0, at most 1e9{', or inf for no limit' if self.endless else ''}"

    def legal(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        return 0 < value <= 1e9 or (self.endless and value == math.inf)


@dataclasses.dataclass(frozen=True, slots=True)
class OrNone(Type):
    """A value of *kind*, or None for "not set"."""

    kind: Type

    @property
    def expects(self) -> str:
        return f"{self.kind.expects}, or None"

    @property
    def expects_typed(self) -> str:
        return self.kind.expects_typed

    def legal(self, value: object) -> bool:
        return value is None or self.kind.legal(value)

    def read(self, value: object, form: Syntax) -> object:
        return self.kind.read(value, form)


@dataclasses.dataclass(frozen=True, slots=True)
class Instance(Type):
    """An object of the class *of*."""

    of: type

    @property
    def expects(self) -> str:
        return f"an object of class {self.of.__name__}"

    def legal(self, value: object) -> bool:
        return isinstance(value, self.of)


def types_of(cls: type) -> Mapping[str, Type]:
    """The types in the annotations of *cls*, by Python name, in the order of the fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for name, hint in hints.items():
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, Type):
                found[name] = extra
    return found


def check_value(what: str, name: str, kind: Type, value: object, *, typed: str | None = None) -> None:
    """Raise ConfigError unless *value* is legal; *what* is the noun for the option *name* (Python spelling).

    Args:
        typed: the name as it stands on a command line; None for a value from another place.
    """
    if not kind.legal(value):
        shown, wanted = (name, kind.expects) if typed is None else (typed, kind.expects_typed)
        raise ConfigError(f"{what} '{shown}' expects {wanted}, not {short_repr(value)}", name=qmp_name(name))


def name_of(given: object, aliases: Mapping[str, str], form: Syntax) -> object:
    """The QMP name for one that was *given* in *form*; *given* itself if it is no string."""
    if not isinstance(given, str):
        return given
    name = qmp_name(given) if form is Syntax.TEXT else given
    return aliases.get(name, name)


def check_fields(what: str, options: object, kinds: Mapping[str, Type]) -> None:
    """Raise ConfigError for the first attribute of *options* that is not legal."""
    for name, kind in kinds.items():
        check_value(what, name, kind, getattr(options, name))
