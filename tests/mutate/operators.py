"""Small changes of Python source: their places, and the changed source.

The changes are made in the text, at the places that the syntax tree names, so that the rest of the file stays the same.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is"}
_COMPARISONS |= {"in": "not in", "not in": "in"}
_ARITHMETIC = {"+": "-", "-": "+", "*": "+", "//": "*", "%": "+", "<<": ">>", ">>": "<<", "&": "|", "|": "&"}


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of one file: the text from *start* to *end* becomes *new*."""

    file: str  # relative to the root of the tree
    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: str) -> str:
        """*source*, changed."""
        assert source[self.start : self.end] == self.old
        return source[: self.start] + self.new + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {_short(self.old)} -> {_short(self.new)}"


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else words[:57] + "..."


def changes(file: str, source: str) -> list[Change]:
    """All possible changes of *source*, in the order of the text; a few of them do not compile."""
    finder = _Finder(file, source)
    return sorted(finder.find(ast.parse(source)), key=lambda change: (change.start, change.end, change.new))


def sample(root: Path, files: Sequence[str], count: int, seed: int) -> list[Change]:
    """*count* of all changes of the files, the same ones for the same seed and sources."""
    sources = {file: (root / file).read_text() for file in files}
    every = [change for file, source in sources.items() for change in changes(file, source)]
    random.Random(seed).shuffle(every)
    good = (change for change in every if _compiles(change, sources[change.file]))
    return list(itertools.islice(good, count))


def _compiles(change: Change, source: str) -> bool:
    try:
        compile(change.apply(source), change.file, "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


class _Finder:
    def __init__(self, file: str, source: str) -> None:
        self._file = file
        self._source = source
        lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._lines = lines

    def _place(self, line: int, column: int) -> int:
        """Columns of the syntax tree count bytes of UTF-8."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._place(node.lineno, node.col_offset)

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._place(node.end_lineno, node.end_col_offset)

    def _change(self, start: int, end: int, new: str) -> Change:
        line = self._source.count("\n", 0, start) + 1
        return Change(self._file, line, start, end, self._source[start:end], new)

    def find(self, tree: ast.AST) -> Iterator[Change]:
        """Changes inside of functions: the code outside is mostly tables and types."""
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for statement in node.body:
                    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield from self._inside(statement)

    def _inside(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return  # the nested function is visited separately
        yield from self._one(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._inside(child)

    def _one(self, node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Compare(left=left, comparators=[right]):
                yield from self._operator(self._end(left), self._start(right), _COMPARISONS)
            case ast.BinOp(left=left, right=right):
                yield from self._operator(self._end(left), self._start(right), _ARITHMETIC)
            case ast.BoolOp(values=[first, second, *_]):
                yield from self._operator(self._end(first), self._start(second), {"and": "or", "or": "and"})
            case ast.Constant(value=bool() as value):
                yield self._change(self._start(node), self._end(node), str(not value))
            case ast.Constant(value=int() as value):
                yield self._change(self._start(node), self._end(node), str(value + 1))
                if value > 0:
                    yield self._change(self._start(node), self._end(node), str(value - 1))
            case ast.Return(value=ast.expr() as value):
                yield self._change(self._start(value), self._end(value), f"(not ({ast.unparse(value)}))")
            case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise():
                yield self._change(self._start(node), self._end(node), "pass")

    def _operator(self, start: int, end: int, table: dict[str, str]) -> Iterator[Change]:
        between = self._source[start:end]
        found = re.search(r"not\s+in|is\s+not|[<>=!]=|//|<<|>>|[<>+\-*%&|]|\b(?:is|in|and|or)\b", between)
        if found is not None and (new := table.get(" ".join(found.group().split()))) is not None:
            yield self._change(start + found.start(), start + found.end(), new)
