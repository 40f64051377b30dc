"""The check for children that are left behind is able to fail."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import LeakCheck


def test_running_child_and_zombie_are_leaks() -> None:
    check = LeakCheck()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert [line for line in check.leaks() if f"child process {child.pid}" in line]
    child.communicate(b"\n")
    assert check.leaks() == []
