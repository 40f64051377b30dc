"""The module is the command."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.processes.cli.command import ROOT


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trimig", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_module_is_the_command() -> None:
    done = run_python("demo", "--size", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("trimig: ")
