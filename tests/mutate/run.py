"""Run tests against changed copies of the tree."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .operators import Change

#: The files of a copy.
PARTS = ("trimig", "tests", "examples", "bench", "pyproject.toml", "README.md")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change, and the tests that must notice it: arguments for pytest, the likeliest first."""

    change: Change
    tests: tuple[str, ...]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.change}" if self.name else str(self.change)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of one change.

    ``outcome``: *noticed* (a test failed), *hung* (it took longer than the limit, which a person notices), *survived*.
    ``by``: the test that failed, or the last line that pytest printed.
    """

    mutant: Mutant
    outcome: str
    by: str
    seconds: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        change = self.mutant.change
        return {
            "name": self.mutant.name, "file": change.file, "line": change.line, "old": change.old, "new": change.new,
            "outcome": self.outcome, "by": self.by, "seconds": round(self.seconds, 1), "tests": list(self.mutant.tests),
        }  # fmt: skip


@contextlib.contextmanager
def copies(root: Path, count: int) -> Iterator[list[Path]]:
    """So many copies of the tree, in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        made = []
        for number in range(count):
            copy = Path(directory) / str(number)
            for part in PARTS:
                source = root / part
                if source.is_dir():
                    shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
                elif source.exists():
                    copy.mkdir(exist_ok=True)
                    shutil.copy(source, copy / part)
            made.append(copy)
        yield made


def pytest(tree: Path, tests: Sequence[str], limit: float) -> tuple[int | None, str]:
    """(exit code, or None after *limit* seconds; the most informative line) of the tests in *tree*."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "CI": ""}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as out,
        subprocess.Popen(
            command, cwd=tree, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        ) as process,
    ):
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # The tests have a session of their own, so this also ends the processes that they have started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        lines = [line.strip() for line in out.read().splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return code, (failed or lines or [""])[-1]


def judge(tree: Path, mutant: Mutant, limit: float) -> Verdict:
    """Change *tree*, run the tests, restore *tree*."""
    file = tree / mutant.change.file
    source = file.read_text()
    began = time.monotonic()
    try:
        file.write_text(mutant.change.apply(source))
        code, line = pytest(tree, mutant.tests, limit)
    finally:
        file.write_text(source)
    outcome = "hung" if code is None else "survived" if code == 0 else "noticed"
    return Verdict(mutant, outcome, line, time.monotonic() - began)


def run(
    root: Path,
    mutants: Sequence[Mutant],
    *,
    jobs: int = 1,
    limit: float = 300.0,
    told: Callable[[Verdict], None] = lambda _: None,
    broken: Callable[[str], None],
) -> list[Verdict]:
    """Test all changes, in *jobs* copies at a time; *told* is called with each result.

    Changes whose tests fail twice in an unchanged copy are skipped; *broken* is called for them.
    """
    with copies(root, jobs) as trees, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for tree in trees:
            free.put(tree)

        def one(mutant: Mutant) -> Verdict:
            tree = free.get()
            try:
                verdict = judge(tree, mutant, limit)
            finally:
                free.put(tree)
            told(verdict)
            return verdict

        sound = []
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            for again in (True, False):
                code, line = pytest(trees[0], tests, 3 * limit)
                if code == 0:
                    sound.append(tests)
                    break
                if not again:
                    broken(f"without any change: {' '.join(tests)}: {line}")
        return list(pool.map(one, (mutant for mutant in mutants if mutant.tests in sound)))
