"""The README is one page: its length, its commands, its picture of the demo, and its way to the other pages."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Final

from . import pages, sessions

README: Final = pages.read(pages.README)
#: A stranger reads it in three minutes.
MOST_WORDS: Final = 900


def test_it_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_its_two_commands_stand_alone() -> None:
    """Each begins with an environment of its own; CI runs the second."""
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert [command.rpartition(" && ")[2] for command in commands] == [".venv/bin/trimig demo", ".venv/bin/pytest -n 2"]
    assert f'TEST_COMMAND="{commands[1]}"' in (pages.ROOT / ".ci" / "run").read_text(encoding="utf-8")


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


def test_every_page_for_users_is_linked() -> None:
    linked = set(pages.links(README))
    for path in (pages.ROOT / "trimig" / "docs").glob("*.md"):
        assert f"trimig/docs/{path.name}" in {target.partition("#")[0] for target in linked}
