"""The measures of the package: import chains, files, functions, nesting. ``pytest -s`` prints them.

An import counts if it is executed when the module is imported: not those under ``TYPE_CHECKING``, nor those in functions.
A package counts as a module.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
FILES: Final = sorted((ROOT / "trimig").rglob("*.py"))

#: trio's longest chain of imports has 13 modules.
MOST_CHAINED: Final = 13
MOST_LINES: Final = 500
#: Of a function, without its docstring, comments and empty lines.
MOST_FUNCTION_LINES: Final = 60
MOST_NESTED: Final = 4

_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS: Final = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match,
)  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def executed(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run with the module."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from executed(node.body)
            yield from executed(node.orelse)
        elif isinstance(node, ast.Try):
            yield from executed([*node.body, *(s for handler in node.handlers for s in handler.body)])


def imports(sources: Mapping[str, str], packages: frozenset[str]) -> dict[str, set[str]]:
    """Module -> the modules of *sources* that it imports. *packages*: those modules that are an ``__init__``."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        package = module if module in packages else module.rpartition(".")[0]
        taken: set[str] = set()
        for node in executed(ast.parse(source).body):
            if isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names}
                continue
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *([node.module] if node.module else [])])
            taken |= {f"{base}.{a.name}" if f"{base}.{a.name}" in sources else base for a in node.names}
        found[module] = (taken & sources.keys()) - {module}
    return found


def longest(graph: Mapping[str, set[str]]) -> list[str]:
    """The longest chain of imports. ValueError for a circle, with its modules."""
    known: dict[str, list[str]] = {}

    def from_(module: str, above: tuple[str, ...]) -> list[str]:
        if module in above:
            raise ValueError(" > ".join([*above[above.index(module) :], module]))
        if module not in known:
            below = (from_(other, (*above, module)) for other in sorted(graph[module]))
            known[module] = [module, *max(below, key=len, default=[])]
        return known[module]

    return max((from_(module, ()) for module in sorted(graph)), key=len)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    first = function.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    doc = range(first.lineno, (first.end_lineno or 0) + 1) if text else range(0)
    lines = range(function.lineno, (function.end_lineno or 0) + 1)
    return sum(1 for i in lines if i not in doc and source[i - 1].strip() and not source[i - 1].strip().startswith("#"))


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep blocks stand in each other in *node*; ``elif`` is no deeper than its ``if``."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
                continue
            elif_ = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If) and len(value) == 1
            deepest = max(deepest, nesting(child, depth + (isinstance(child, _BLOCKS) and not elif_)))
    return deepest


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, code lines, nesting) of each."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _FUNCTIONS):
            yield f"{module_of(path)}.{node.name}", code_lines(node, source.splitlines()), nesting(node)


def package_imports() -> dict[str, set[str]]:
    sources = {module_of(path): path.read_text(encoding="utf-8") for path in FILES}
    return imports(sources, frozenset(module_of(path) for path in FILES if path.name == "__init__.py"))


def with_packages(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same graph with the packages that run before an imported module, but those that the importing module is in."""

    def above(module: str) -> set[str]:
        parts = module.split(".")
        return {".".join(parts[:end]) for end in range(1, len(parts))}

    return {
        module: (taken | {p for other in taken for p in above(other) if p in graph}) - above(module) - {module}
        for module, taken in graph.items()
    }


def test_no_circle_of_imports_with_their_packages() -> None:
    """An import of ``a.b.c`` runs ``a.b`` before: a module of another package must not need that one to be there."""
    chain = longest(with_packages(package_imports()))
    sys.stdout.write(f"\nlongest chain with packages: {len(chain)}\n  " + "\n  > ".join(chain) + "\n")
    with pytest.raises(ValueError, match=r"a > a\.b > c\.d > a"):
        longest(with_packages({"a": {"a.b"}, "a.b": {"c.d"}, "c": set(), "c.d": {"a.e"}, "a.e": set()}))


def test_longest_chain_of_imports() -> None:
    chain = longest(package_imports())
    sys.stdout.write(f"\nlongest chain of imports: {len(chain)}\n  " + "\n  > ".join(chain) + "\n")
    assert len(chain) <= MOST_CHAINED, chain


def test_files_are_short() -> None:
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    sys.stdout.write(
        "\nlongest files: "
        + ", ".join(f"{p} {n}" for p, n in sorted(lines.items(), key=lambda item: -item[1])[:5])
        + "\n"
    )
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_functions_are_short_and_flat() -> None:
    found = [entry for path in FILES for entry in functions(path)]
    sys.stdout.write(
        "\nlongest functions: "
        + ", ".join(f"{n} {c}" for n, c, _ in sorted(found, key=lambda item: -item[1])[:5])
        + "\n"
    )
    sys.stdout.write(
        "deepest functions: " + ", ".join(f"{n} {d}" for n, _, d in sorted(found, key=lambda item: -item[2])[:5]) + "\n"
    )
    assert [entry for entry in found if entry[1] > MOST_FUNCTION_LINES or entry[2] > MOST_NESTED] == []


def test_measures_notice_what_they_should() -> None:
    sources = {
        "p": "",
        "p.a": "from . import b",
        "p.b": "from .c import x\nif TYPE_CHECKING:\n    from . import a",
        "p.c": "def f():\n    from . import a",
    }
    packages = frozenset({"p"})
    assert longest(imports(sources, packages)) == ["p.a", "p.b", "p.c"]
    with pytest.raises(ValueError, match=r"p\.a > p\.b > p\.c > p\.a"):
        longest(imports({**sources, "p.c": "from . import a"}, packages))
    text = 'def f():\n    """Doc."""\n    # why\n    if a:\n        pass\n    elif b:\n        for _ in c:\n            pass\n'
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert (code_lines(function, text.splitlines()), nesting(function)) == (6, 2)
