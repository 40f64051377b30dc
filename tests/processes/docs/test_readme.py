"""The README's picture of the demo."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.docs import pages

from . import sessions


def test_the_demo_prints_what_it_shows() -> None:
    """The same lines with other figures; the README leaves out one."""
    shown = next(block.text for block in pages.blocks(pages.README) if "Verified" in block.text)
    done = subprocess.run(
        [sys.executable, "-m", "trimig", "demo", "--size", "64M"],
        env=sessions.environment(),
        capture_output=True,
        text=True,
        timeout=sessions.SECONDS,
        check=True,
    )
    printed = done.stdout.splitlines()
    for line in shown.splitlines():
        label = re.match(r"  [a-z ]+?(?=  )|Verified: all|Not one write was lost or replayed\.$|$", line)
        assert label, line
        assert any(other.startswith(label[0]) for other in printed), line
