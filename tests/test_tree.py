"""The shape of the tree: what lies at the top, how long a file is, and that each says what it is for."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
#: Everything that belongs at the top level; what .gitignore names may lie there too.
TOP: Final = frozenset(
    {".ci", ".git", ".gitignore", "LICENSE", "README.md", "bench", "examples", "pyproject.toml", "tests", "trimig"}
)
PARTS: Final = ("trimig", "tests", "examples", "bench")
#: About 400 lines is the aim.
MOST_LINES: Final = 600

FILES: Final = sorted(path.relative_to(ROOT).as_posix() for part in PARTS for path in (ROOT / part).rglob("*.py"))


def strangers(names: list[str], ignored: list[str]) -> list[str]:
    """Which of the *names* neither belong at the top level nor match a line of .gitignore."""
    patterns = [line.rstrip("/") for line in ignored if line and not line.startswith("#")]
    return sorted(name for name in names if name not in TOP and not any(fnmatch.fnmatch(name, p) for p in patterns))


def complaints(source: str) -> list[str]:
    """What is wrong with a Python file as a file."""
    found = []
    if (lines := source.count("\n")) > MOST_LINES:
        found.append(f"{lines} lines, {MOST_LINES} is the most: which of its subjects is a file of its own?")
    if not (ast.get_docstring(ast.parse(source)) or "").strip():
        found.append("no module docstring")
    return found


def test_top_level_holds_only_what_belongs_there() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert strangers([path.name for path in ROOT.iterdir()], ignored) == []


def test_the_parts_are_there() -> None:
    missing = [name for name in ("trimig/__init__.py", "README.md", "LICENSE", ".ci/run") if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("path", FILES)
def test_file_is_short_and_says_what_it_is_for(path: str) -> None:
    assert complaints((ROOT / path).read_text(encoding="utf-8")) == []


def test_guard_catches_bad_files_and_strangers() -> None:
    assert complaints('"""Good."""\n') == []
    assert "601 lines" in complaints('"""Long."""\n' + "\n" * 600)[0]
    assert complaints("x = 1\n") == ["no module docstring"]
    assert complaints('""" """\n') == ["no module docstring"]
    assert strangers(["trimig", ".venv", "x.egg-info", "notes.txt"], ["*.egg-info/", ".venv/", ""]) == ["notes.txt"]
