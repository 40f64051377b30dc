"""Runs a page's console blocks: one shell for each page, each command's exit code and output compared with the page.

* A line that begins with ``$ `` is a command. What follows is what it prints, standard error included.
* ``...`` stands for any text within a line; a line of its own for any number of lines. No output shown: any output.
* A command must exit with 0, or the next command is ``echo $?``.
* A command that ends with ``&`` goes on in the background; the page goes on when it has printed what is shown.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

#: One command may take so long beside other work.
SECONDS: Final = 100.0
_SCRIPTS: Final = Path(sys.executable).parent


@dataclasses.dataclass(frozen=True)
class Step:
    """A command and the output that the page shows; None if it shows none."""

    command: str
    shown: str | None

    @property
    def in_background(self) -> bool:
        """It ends with an ampersand."""
        return self.command.endswith(" &")


def steps(text: str) -> list[Step]:
    """The commands of a console block."""
    found: list[Step] = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        command = lines.pop(0)
        while command.endswith("\\"):
            command += "\n" + lines.pop(0)
        found.append(Step(command, "\n".join(lines).strip("\n") if any(lines) else None))
    return found


def matches(shown: str, printed: str) -> bool:
    """Whether *printed* is what the page shows; blanks at the ends of lines do not count."""
    pattern = ""
    for line in shown.strip().splitlines():
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*?"
        else:
            pattern += ".*?".join(re.escape(part.rstrip()) for part in line.split("...")) + r"[ ]*\n"
    text = "".join(line.rstrip() + "\n" for line in printed.strip().splitlines())
    return re.fullmatch(pattern, text) is not None


def environment() -> dict[str, str]:
    """What a command of a page finds: this interpreter's scripts first on the path, no terminal."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TRIMIG_", "COV"))},
        "PATH": f"{_SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }


class Session:
    """One shell in *directory*; ends everything that it has started."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._code = 0
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process, _ in self._started:
            with_group(process, signal.SIGTERM)
        for process, _ in self._started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                with_group(process, signal.SIGKILL)
                process.wait()

    def run(self, todo: Sequence[Step]) -> None:
        """Run the commands in order. AssertionError at the first that does other than the page says."""
        for index, step in enumerate(todo):
            if step.in_background:
                self._background(step)
                continue
            if step.command == "echo $?":
                assert step.shown == str(self._code), f"the page shows the exit code {step.shown}, it was {self._code}"
                continue
            printed = self._foreground(step.command)
            wanted = index + 1 < len(todo) and todo[index + 1].command == "echo $?"
            assert wanted or self._code == 0, f"$ {step.command}\nexit code {self._code}\n{printed}\n{self.said()}"
            if step.shown is not None:
                assert matches(step.shown, printed), f"$ {step.command}\n{printed}\nthe page shows:\n{step.shown}"

    def said(self) -> str:
        """What the commands in the background have printed."""
        return "\n".join(path.read_text("utf-8", "replace") for _, path in self._started)

    def _open(self) -> tuple[Path, IO[bytes]]:
        self._count += 1
        path = self._directory / f".output-{self._count}"
        return path, path.open("wb")

    def _start(self, command: str) -> tuple[subprocess.Popen[bytes], Path]:
        path, file = self._open()
        with file:
            process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self._directory,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, path

    def _foreground(self, command: str) -> str:
        process, path = self._start(command)
        try:
            self._code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"$ {command}\ndoes not end\n{path.read_text()}\n{self.said()}") from None
        finally:
            if process.returncode is None:
                with_group(process, signal.SIGKILL)
                process.wait()
        return path.read_text("utf-8", "replace")

    def _background(self, step: Step) -> None:
        process, path = self._start(f"exec {step.command.removesuffix(' &')}")
        self._started.append((process, path))
        end = time.monotonic() + SECONDS
        while step.shown is not None and not matches(step.shown, path.read_text("utf-8", "replace")):
            ended = process.poll() is not None
            assert not ended or matches(step.shown, path.read_text()), f"$ {step.command}\n{path.read_text()}"
            assert time.monotonic() < end, f"$ {step.command}\nprints something else:\n{path.read_text()}"
            time.sleep(0.05)


def with_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and to what it has started; nothing if it has gone."""
    if process.poll() is None:
        os.killpg(process.pid, number)
