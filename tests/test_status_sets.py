"""Sets of statuses, and of states of a stream, have a name and stand in `trimig/status.py`.

A copy elsewhere is forgotten when a status is added.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from trimig.status import QMP_STATUSES, ReturnPath, Status, Stream

PACKAGE: Final = Path(__file__).parents[1] / "trimig"
#: This file has the sets.
TABLE: Final = "status.py"
WORDS: Final = frozenset(status.value for status in Status) | frozenset(QMP_STATUSES)
#: The members of the enumerations, by the name of each. `trimig.wire.constants` has a `ReturnPath` with other members.
MEMBERS: Final = {kind.__name__: frozenset(kind.__members__) for kind in (Status, Stream, ReturnPath)}


def named(node: ast.expr) -> str | None:
    """The status that *node* is: a member of an enumeration, the word of a status, or a word as a literal."""
    match node:
        case ast.Attribute(value=ast.Name(id=kind) | ast.Attribute(attr=kind), attr=name) if name in MEMBERS.get(
            kind, ()
        ):
            return f"{kind}.{name}"
        case ast.Attribute(value=inner, attr="value" | "qmp"):
            return named(inner)
        case ast.Constant(value=str(word)) if word in WORDS:
            return word
    return None


def alternatives(node: ast.AST) -> list[ast.expr]:
    """The elements of a collection, or the values that an `or`, `and` or `case` compares with."""
    match node:
        case ast.Set(elts=elements) | ast.Tuple(elts=elements) | ast.List(elts=elements):
            return elements
        case ast.Dict(keys=keys):
            return [key for key in keys if key is not None]
        case ast.BoolOp(values=values):
            return [value.comparators[0] for value in values if isinstance(value, ast.Compare)]
        case ast.MatchOr(patterns=patterns):
            return [pattern.value for pattern in patterns if isinstance(pattern, ast.MatchValue)]
    return []


def extensions(node: ast.AST) -> list[ast.expr]:
    """The elements of a display that a union adds to another set."""
    match node:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return [element for side in (left, right) if isinstance(side, ast.Set) for element in side.elts]
    return []


def private_sets(text: str) -> Iterator[str]:
    """Each place of *text* with two or more statuses as alternatives, or with one that is added to a set."""
    for node in ast.walk(ast.parse(text)):
        for elements, least in ((alternatives(node), 2), (extensions(node), 1)):
            found = {name for element in elements if (name := named(element)) is not None}
            if len(found) >= least:
                line = node.lineno if isinstance(node, ast.expr | ast.pattern) else 0
                yield f"line {line}: {sorted(found)}"


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / TABLE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_module_has_a_set_of_statuses_of_its_own(path: Path) -> None:
    assert list(private_sets(path.read_text(encoding="utf-8"))) == []


BAD: Final = [
    "ENDED = frozenset({Status.FAILED, Status.CANCELLED})",
    "ENDED = (trimig.Status.FAILED, trimig.Status.CANCELLED)",
    "known = status in [Status.FAILED, Status.CANCELLED]",
    "WORDS = {Status.FAILED: 'lost', Status.CANCELLED: 'ended'}",
    "known = word in ('failed', 'cancelled')",
    "known = word in {Status.FAILED.value, Status.CANCELLED.qmp}",
    "known = status is Status.FAILED or status is Status.CANCELLED",
    "match status:\n    case Status.FAILED | Status.CANCELLED:\n        pass",
    "ENDED = UNSUCCESSFUL | {Status.COMPLETED}",
    "SENT = SENDING_RAM | {Stream.ENDING}",
    "known = stream.state in (Stream.ENDING, Stream.PACKAGED)",
    "RESUMED = frozenset({ReturnPath.FOLLOWING, ReturnPath.RESUMING})",
    "known = reader.state is status.ReturnPath.BEFORE or reader.state is status.ReturnPath.ENDED",
]
GOOD: Final = [
    "known = status in UNSUCCESSFUL",
    "known = status is Status.FAILED",
    "RARE = UNSUCCESSFUL - {Status.CANCELLED}",
    "known = word in ('none', 'zlib')",
    "known = monitor.status is Status.FAILED and owner is Ownership.SOURCE",
    "new = Status.FAILED if failed else Status.CANCELLED",
    "known = stream.state in STREAM_IN_PRECOPY",
    "known = kind in (ReturnPath.SHUT, ReturnPath.PONG)",  # the messages, which have other members
]


@pytest.mark.parametrize("text", BAD)
def test_such_a_set_is_noticed(text: str) -> None:
    assert list(private_sets(text))


@pytest.mark.parametrize("text", GOOD)
def test_a_use_of_the_table_passes(text: str) -> None:
    assert list(private_sets(text)) == []
