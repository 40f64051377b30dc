"""Files on a disk that is full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.processes.cli.command import ROOT


def test_a_disk_that_is_full_is_named(saved: Path, tmp_path: Path) -> None:
    """In a process with a limit on the size of files."""
    code = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from trimig.cli import main\nmain()"
    )
    words = ["export", str(saved), "--format", "raw", "--block", "ram", "--out", str(tmp_path / "memory")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, f"trimig: {tmp_path}/memory: File too large\n")
    assert sorted(os.listdir(tmp_path)) == ["guest"]
