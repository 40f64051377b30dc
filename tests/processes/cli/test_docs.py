"""``trimig docs`` on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path


def test_terminal_gets_colours_through_the_pager(tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat > {tmp_path}/paged\n", encoding="utf-8")
    pager.chmod(0o755)
    leader, follower = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trimig", "docs", "glossary"],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.PIPE,
            env={**os.environ, "PAGER": str(pager), "TERM": "xterm", "COLUMNS": "80"},
            timeout=60,
            check=False,
        )
    finally:
        os.close(follower)
        os.close(leader)
    assert (done.returncode, done.stderr) == (0, b"")
    paged = (tmp_path / "paged").read_text(encoding="utf-8")
    assert "\x1b[" in paged
    assert "Glossary" in paged
