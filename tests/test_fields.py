"""Each public attribute is explained where it is declared, and each number has a unit there.

Public attributes are those of the classes that :mod:`trimig`, :mod:`trimig.portal` and :mod:`trimig.testing` export, and of
their base classes in the package. An attribute is explained by a ``#:`` comment above it, by the docstring of its property,
by an entry in the docstring of its class, or by its name there, as ``*name*`` or in double backticks.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Final

import pytest

import trimig
import trimig.portal
import trimig.testing

MODULES: Final = (trimig, trimig.portal, trimig.testing)
#: The units. Something that is counted has a word such as "number".
UNIT: Final = re.compile(
    r"\b(?:(?:micro|milli)?seconds?|bytes?|[KMG]i?B|pages?|percent|share|number|count(?:er|s)?|process id)\b",
    re.IGNORECASE,
)
NUMBERS: Final = frozenset({"int", "float"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """One public attribute: its annotation, if there is one, and the text about it."""

    name: str
    annotation: ast.expr | None
    text: str


def is_number(annotation: ast.expr | None) -> bool:
    """Whether a value of that type is an int or a float, or may be None instead."""
    match annotation:
        case ast.Name(id=name):
            return name in NUMBERS
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return is_number(left) or is_number(right)
        case ast.Subscript(value=ast.Name(id="Annotated" | "Final"), slice=ast.Tuple(elts=[inner, *_])):
            return is_number(inner)
        case ast.Subscript(value=ast.Name(id="Final" | "ClassVar"), slice=inner):
            return is_number(inner)
        case ast.Constant(value=value):  # of an attribute that begins as a plain number
            return type(value) in (int, float)
    return False


def comment(lines: list[str], line: int) -> str:
    """The ``#:`` comment that ends above *line*, which counts from 1."""
    found: list[str] = []
    while line >= 2 and (above := lines[line - 2].strip()).startswith("#:"):
        found.insert(0, above.removeprefix("#:").strip())
        line -= 1
    return " ".join(found)


def declared(node: ast.ClassDef, lines: list[str]) -> Iterator[Attribute]:
    """The attributes that the body of a class declares, and those that its ``__init__`` makes."""
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, lineno=line):
                yield Attribute(name=name, annotation=annotation, text=comment(lines, line))
            case ast.FunctionDef(name="__init__"):
                yield from _made(statement, lines)
            case ast.FunctionDef(name=name, returns=returns, decorator_list=decorators):
                if any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in decorators):
                    yield Attribute(name=name, annotation=returns, text=ast.get_docstring(statement) or "")


def _made(function: ast.FunctionDef, lines: list[str]) -> Iterator[Attribute]:
    arguments = {a.arg: a.annotation for a in (*function.args.args, *function.args.kwonlyargs)}
    for node in ast.walk(function):
        match node:
            case ast.AnnAssign(target=ast.Attribute(value=ast.Name(id="self"), attr=name), annotation=annotation):
                yield Attribute(name=name, annotation=annotation, text=comment(lines, node.lineno))
            case ast.Assign(targets=targets, value=value):
                kind = arguments.get(value.id) if isinstance(value, ast.Name) else value
                for target in targets:
                    if (
                        isinstance(target, ast.Attribute)
                        and isinstance(target.value, ast.Name)
                        and target.value.id == "self"
                    ):
                        yield Attribute(name=target.attr, annotation=kind, text=comment(lines, node.lineno))


def explained(docstring: str, name: str) -> str:
    """What the docstring of a class says about one attribute: its entry, or the paragraph that has its name."""
    if entry := re.search(rf"^ +{name}: ((?:.|\n(?! *\w+: |\n))*)", docstring, re.MULTILINE):
        return entry[1]
    for paragraph in docstring.split("\n\n"):
        if re.search(rf"\*{name}\*|``{name}(?:=\S*)?``|:attr:`{name}`", paragraph):
            return paragraph
    return ""


def complaints(source: str, class_name: str) -> list[str]:
    """What is missing at the attributes of one class."""
    node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == class_name)
    docstring = ast.get_docstring(node) or ""
    found = []
    for attribute in declared(node, source.splitlines()):
        if attribute.name.startswith("_"):
            continue
        text = attribute.text or explained(docstring, attribute.name)
        if not text:
            found.append(f"{attribute.name} is not explained")
        elif is_number(attribute.annotation) and not UNIT.search(text):
            found.append(f"{attribute.name} is a number without a unit: {text[:60]!r}")
    return found


def public(modules: tuple[ModuleType, ...]) -> dict[str, type]:
    """The exported classes and their base classes in the package, by their dotted names."""
    exported = [found for module in modules for name, found in vars(module).items() if not name.startswith("_")]
    bases = [base for found in exported if inspect.isclass(found) for base in found.__mro__]
    return {f"{base.__module__}.{base.__qualname__}": base for base in bases if base.__module__.startswith("trimig.")}


CLASSES: Final = public(MODULES)


@pytest.mark.parametrize("dotted", sorted(CLASSES))
def test_public_attribute_is_explained_with_its_unit(dotted: str) -> None:
    found = CLASSES[dotted]
    assert complaints(inspect.getsource(sys.modules[found.__module__]), found.__name__) == []


def test_something_was_looked_at() -> None:
    assert {"trimig.monitor.statistics.Statistics", "trimig.guests.base.GuestBase", "trimig.testing.pipe.Fault"} <= set(
        CLASSES
    )


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("elapsed: float", "elapsed is not explained"),
        (
            "#: How long it took.\n    elapsed: float | None = None",
            "elapsed is a number without a unit: 'How long it took.'",
        ),
        (
            "@property\n    def elapsed(self) -> float:\n        '''How long.'''",
            "elapsed is a number without a unit: 'How long.'",
        ),
        ("def __init__(self, count: int) -> None:\n        self.count = count", "count is not explained"),
        (
            "def __init__(self) -> None:\n        #: Runs.\n        self.runs = 0",
            "runs is a number without a unit: 'Runs.'",
        ),
        (
            "'''It has a *limit*.'''\n    limit: Annotated[int, Int()]",
            "limit is a number without a unit: 'It has a *limit*.'",
        ),
        ("name: str", "name is not explained"),
    ],
)
def test_what_is_missing_is_noticed(body: str, complaint: str) -> None:
    assert complaints(f"class It:\n    {body}\n", "It") == [complaint]


@pytest.mark.parametrize(
    "body",
    [
        "#: In seconds.\n    elapsed: float",
        "#: How long it took,\n    #: in seconds.\n    elapsed: float",
        "#: The number of runs.\n    runs: int | None = None",
        "'''It.\n\n    Attributes:\n        runs: the number of runs.\n    '''\n    runs: int",
        "'''It waits for *seconds* seconds.'''\n    seconds: float",
        "#: The times of all runs.\n    times: list[float]",
        "_private: int = 0",
        "#: Whether it runs.\n    runs: bool = False",
    ],
)
def test_what_is_explained_passes(body: str) -> None:
    assert complaints(f"class It:\n    {body}\n", "It") == []
