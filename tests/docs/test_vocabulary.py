"""Plain words: no sentence has "nobody", "whoever" and the like as its subject, nor a clause with "who" or "what".

A reader with school English and QEMU's documentation shall understand each line. So a sentence names its subject, and does not
begin with a clause in its place ("Who reads as fast as ..."). What a regular expression cannot tell is left to reviews.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from . import pages

#: What is read: files such as the README, and folders with their Markdown, Python, shell and C.
READ: Final = ("README.md", "trimig", "tests", "examples", "bench", ".ci/run")
_SUFFIXES: Final = frozenset({".md", ".py", ".sh", ".c"})

#: This file has the words, and so has the page that asks for them to be left out.
_ABOUT_WORDS: Final = frozenset({"tests/docs/test_vocabulary.py"})
#: A word in quotation marks or in backticks is named, not used; in a program quotation marks begin what a user reads.
_NAMED: Final = re.compile(r"`[^`\n]*`")
_NAMED_IN_MARKDOWN: Final = re.compile(r"`[^`\n]*`|\"[^\"\n]*\"")
#: The name of a test is a sentence too.
_TEST: Final = re.compile(r"\bdef test_(\w+)")

_PEOPLE: Final = re.compile(
    r"\b(?:nobody|somebody|whoever|anybody|everybody|whomever|whosoever|somebody's|nobody's)\b", re.IGNORECASE
)
#: At the start of a sentence or of a clause: "Who asks gets", "What has gone, is gone", "It is who sends that waits".
_SUBJECT: Final = re.compile(
    r"(?:^|(?<=[.;:!] )|(?<=\"\"\"))(?:Who|He who|Those who|The one who|Whose) (?!is trusted\b)[^.?|\n]*[^?|\n.]\."
    r"|\b(?:by|for|to|with|of|from|than|that|wakes|tells|asks) (?:who|him who|the one who|those who) [a-z]+s?\b"
)
_HE: Final = re.compile(r"\b(?:he|him|his|himself)\b", re.IGNORECASE)


def files() -> list[Path]:
    """Everything that is read."""
    found = []
    for name in READ:
        path = pages.ROOT / name
        found += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
    return [path for path in found if pages.short(path) not in _ABOUT_WORDS]


def complaints(text: str, suffix: str = ".md") -> Iterator[str]:
    """Each line of *text*, of a file with that suffix, that has such a word, with its number."""
    named = _NAMED_IN_MARKDOWN if suffix == ".md" else _NAMED
    for number, line in enumerate(pages.prose(text).splitlines(), 1):
        plain = named.sub("`", line)
        if name := _TEST.search(plain):
            plain = f"{name[1].replace('_', ' ').capitalize()}."
        for pattern in (_PEOPLE, _SUBJECT, _HE):
            if found := pattern.search(plain):
                yield f"{number}: {found[0][:60]!r} in {line.strip()[:100]!r}"


@pytest.mark.parametrize("path", files(), ids=pages.short)
def test_words_are_plain(path: Path) -> None:
    assert list(complaints(path.read_text(encoding="utf-8"), path.suffix)) == []


@pytest.mark.parametrize(
    "line",
    [
        "Nobody can tell.",
        "It waits for somebody to connect.",
        "Whoever waits is woken.",
        "Who reads as fast as the sender writes gets a few segments.",
        "First a. Who died is the cause.",
        "It wakes those who wait.",
        "Give him a moment.",
    ],
)
def test_such_a_line_is_noticed(line: str) -> None:
    assert list(complaints(line))


@pytest.mark.parametrize(
    "line",
    [
        "## Who is trusted",
        "A person who reads this understands it.",
        "The page says who is trusted.",
        'A test looks for words such as "nobody".',
        "The source waits up to 30 s for the first PONG.",
        "Then the others follow.",
        "```\nnobody\n```",
    ],
)
def test_a_plain_line_passes(line: str) -> None:
    assert list(complaints(line)) == []


def test_a_message_in_a_program_is_read() -> None:
    line = 'raise Failed("nobody answers")'
    assert list(complaints(line, ".py"))
    assert list(complaints(line)) == []


@pytest.mark.parametrize(
    "name", ["nobody_is_asked", "who_waits_is_told", "closing_wakes_who_waits", "all_but_him_are_told"]
)
def test_name_of_a_test_is_read(name: str) -> None:
    assert list(complaints(f"async def test_{name}() -> None:", ".py"))
    assert list(complaints("def test_errors_say_which_side_has_the_guest() -> None:", ".py")) == []


@pytest.mark.parametrize(
    "name", ["README.md", "trimig/cli", "tests/docs", "tests/conftest.py", "examples", "bench", ".ci/run"]
)
def test_each_part_of_the_repository_is_read(name: str) -> None:
    assert any(pages.short(path).startswith(name) for path in files())


def test_pages_are_read() -> None:
    assert len(files()) > 20
