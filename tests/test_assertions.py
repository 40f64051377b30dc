"""Tests of the tests: each one asserts something, and what it asserts can fail.

Three kinds of assertions hold whatever the program does, or may be left out without a word:

* ``assert a or b``, where one of the two can hide that the other is never true. Say ``if not a: assert b``.
* ``assert b if a else True``, which is the same in other words.
* assertions that all stand in a loop over something that may be empty.

And a test without any assertion, of its own or of what it calls, only shows that nothing raises.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

TESTS = Path(__file__).parent
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
#: What asserts, of other people's and of ours in trimig.testing.
ASSERTING = {
    "raises", "warns", "fail", "check", "check_one_way_stream", "check_two_way_stream", "check_half_closeable_stream",
    "assert_checkpoints", "assert_no_checkpoints", "run_sweep", "replay", "fail_after",
}  # fmt: skip


def functions(tree: ast.AST) -> Iterator[Function]:
    """All, at any depth."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def called(node: ast.AST) -> set[str]:
    """The last word of what is called, or passed on by name."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def asserting() -> set[str]:
    """Names of functions below tests/ that assert, themselves or by what they call."""
    found = set(ASSERTING)
    bodies: dict[str, list[ast.AST]] = {}
    for path in TESTS.rglob("*.py"):
        for function in functions(ast.parse(path.read_text())):
            bodies.setdefault(function.name, []).append(function)
    found |= {
        name for name, nodes in bodies.items() if any(isinstance(n, ast.Assert) for b in nodes for n in ast.walk(b))
    }
    while True:
        more = {name for name, nodes in bodies.items() if any(called(node) & found for node in nodes)} - found
        if not more:
            return found
        found |= more


NAMES = asserting()


class Certain:
    """Whether something asserts for sure.

    Args:
        tree: the module; what a name is bound to there counts, if it is bound once.
    """

    def __init__(self, tree: ast.AST) -> None:
        self._full: set[str] = set()
        for node in ast.walk(tree):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value):
                    if self.full(value):
                        self._full.add(name)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    if self.full(value):
                        self._full.add(name)

    def asserts(self, node: ast.AST) -> bool:
        """Something below *node* asserts, and not only in a loop that may be left out."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Assert):
                return True
            if isinstance(child, ast.Name) and child.id in NAMES:
                return True
            if isinstance(child, ast.Attribute) and child.attr in NAMES:
                return True
            if isinstance(child, ast.For | ast.AsyncFor) and not self.full(child.iter):
                continue
            if isinstance(child, ast.While) and not isinstance(child.test, ast.Constant):
                continue
            if self.asserts(child):
                return True
        return False

    def full(self, node: ast.expr) -> bool:
        """It is not empty, as far as can be seen: a literal, a constant, a range, an enum, what is made of such."""
        match node:
            case ast.Tuple(elts=some) | ast.List(elts=some) | ast.Set(elts=some) | ast.Dict(keys=some):
                return bool(some)
            case ast.Constant(value=value):
                return bool(value)
            case ast.Name(id=name):
                return name in self._full or name.isupper() or name[0].isupper()
            case ast.Attribute(attr=name):
                return name.isupper()
            case ast.Call(func=ast.Name(id="range")):
                return True
            case ast.Call(func=ast.Name(id="zip"), keywords=[ast.keyword(arg="strict")], args=some):
                return any(map(self.full, some))
            case ast.Call(func=ast.Name(id="enumerate" | "sorted" | "list" | "reversed"), args=[first, *_]):
                return self.full(first)
            case ast.Call(func=ast.Attribute(attr="product"), args=some):
                return all(map(self.full, some))
            case ast.Call(func=ast.Attribute(value=value, attr="items" | "values" | "keys")):
                return self.full(value)
            case ast.BinOp(left=left, right=right, op=ast.Add() | ast.BitOr()):
                return self.full(left) or self.full(right)
            case ast.BinOp(left=left, op=ast.Sub()):
                return self.full(left)  # the test is to say what is taken away
            case ast.Starred(value=value):
                return self.full(value)
        return False


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of the tests in *tree*."""
    certain = Certain(tree)
    for function in functions(tree):
        if not function.name.startswith("test_"):
            continue
        for node in ast.walk(function):
            match node:
                case ast.Assert(test=ast.BoolOp(op=ast.Or())):
                    yield node.lineno, "assert a or b"
                case ast.Assert(test=ast.IfExp()):
                    yield node.lineno, "assert a if b else c"
                case ast.Assert(test=ast.Tuple() | ast.Constant(value=True)):
                    yield node.lineno, "assertion that is always true"
        if not called(function) & NAMES and not any(isinstance(n, ast.Assert) for n in ast.walk(function)):
            yield function.lineno, "no assertion"
        elif not certain.asserts(function):
            yield function.lineno, "assertions only in loops that may be empty"


def files() -> list[str]:
    return sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("file", files())
def test_every_test_asserts_what_can_fail(file: str) -> None:
    assert list(faults(ast.parse((TESTS / file).read_text()))) == []


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("assert x == 1", []),
        ("assert x == 1 or y", ["assert a or b"]),
        ("assert (x if y else True)", ["assert a if b else c"]),
        ("assert (x, 'text')", ["assertion that is always true"]),
        ("x()", ["no assertion"]),
        ("for x in y(): assert x", ["assertions only in loops that may be empty"]),
        ("for x in (): assert x", ["assertions only in loops that may be empty"]),
        ("for x in (1, 2): assert x", []),
        ("for x in enumerate(CASES): assert x", []),
        ("for x in some: assert x", []),
        ("for x in zip(y, some, strict=True): assert x", []),
        ("while y: assert x", ["assertions only in loops that may be empty"]),
        ("with pytest.raises(ValueError): x()", []),
    ],
)
def test_faults_are_found(body: str, found: list[str]) -> None:
    tree = ast.parse(f"some = [1]\ndef test_a():\n {body}")
    assert [what for _, what in faults(tree)] == found
