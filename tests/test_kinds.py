"""Tests of milliseconds stay apart from those with processes: what their files may not use.

Every file below ``tests`` but those of :data:`ELSEWHERE` is read. A signal that a test raises for itself is no process.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import tiers

TESTS: Final = Path(__file__).resolve().parent

#: The other kinds of tests, a tool that runs tests, and what the whole run needs.
ELSEWHERE: Final = (*tiers.SLOW_FOLDERS, "tests/mutate/", "tests/tiers.py")

#: Modules that start processes, and the helpers of tests that do. A name stands for everything below it.
PROCESSES: Final = ("subprocess", "multiprocessing", "pty", "tests.processes", "tests.qemu.harness", "tests.qemu.relay")
#: What starts, waits for or ends a process, or sleeps: the last word of a name with a dot, or an imported name.
CALLS: Final = frozenset({
    "run_process", "open_process", "fork", "forkpty", "posix_spawn", "posix_spawnp", "kill", "killpg", "waitpid", "system",
    "WorkloadGuest", "HostProcess",
})  # fmt: skip


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each imported module with its names, and each name with a dot, as (line, dotted name)."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from ((node.lineno, alias.name) for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in aliases)
            case ast.Attribute():
                yield node.lineno, ast.unparse(node)


def complaints(source: str) -> Iterator[str]:
    """What a test of milliseconds may not use, with the line."""
    for line, name in names(ast.parse(source)):
        if (
            name == "time.sleep"
            or name.rpartition(".")[2] in CALLS
            or any(name == module or name.startswith(f"{module}.") for module in PROCESSES)
        ):
            yield f"{line}: {name}"


FILES: Final = sorted(
    name
    for path in TESTS.rglob("*.py")
    if not (name := path.relative_to(TESTS.parent).as_posix()).startswith(ELSEWHERE)
)


def test_folders_of_the_kinds_are_there() -> None:
    assert [name for name in ELSEWHERE if not (TESTS.parent / name).exists()] == []
    assert "tests/engine/test_handover.py" in FILES


@pytest.mark.parametrize("name", FILES)
def test_quick_test_starts_no_process(name: str) -> None:
    assert list(complaints((TESTS.parent / name).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import subprocess", "1: subprocess"),
        ("import multiprocessing.pool", "1: multiprocessing.pool"),
        ("from subprocess import PIPE", "1: subprocess.PIPE"),
        ("def test():\n    import subprocess", "2: subprocess"),
        ("from tests.processes.cli.command import started", "1: tests.processes.cli.command.started"),
        ("from tests.qemu import harness", "1: tests.qemu.harness"),
        ("from trimig import WorkloadGuest", "1: trimig.WorkloadGuest"),
        ("import trimig\ntrimig.WorkloadGuest.open()", "2: trimig.WorkloadGuest"),
        ("import trio\ntrio.run_process(['x'])", "2: trio.run_process"),
        ("import trio\ntrio.lowlevel.open_process(['x'])", "2: trio.lowlevel.open_process"),
        ("import os\nos.kill(1, 9)", "2: os.kill"),
        ("from os import fork", "1: os.fork"),
        ("import time\ntime.sleep(1)", "2: time.sleep"),
    ],
)
def test_guard_notices(source: str, found: str) -> None:
    assert list(complaints(source)) == [found]


@pytest.mark.parametrize(
    "source",
    [
        "import signal\nsignal.raise_signal(signal.SIGINT)",
        "import trio\ntrio.sleep(1)",
        "import trimig\ntrimig.AppGuest('x')",
        "from tests.qemu.table import Outcomes",
        "from tests.cli.scripted import Scripted\nskill = Scripted.kills",
    ],
)
def test_guard_lets_pass(source: str) -> None:
    assert list(complaints(source)) == []
