"""The README is one page: its length, its commands, and its way to the other pages."""

from __future__ import annotations

from typing import Final

from . import pages

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


def test_every_page_for_users_is_linked() -> None:
    linked = set(pages.links(README))
    for path in (pages.ROOT / "trimig" / "docs").glob("*.md"):
        assert f"trimig/docs/{path.name}" in {target.partition("#")[0] for target in linked}
