"""Each entry of the glossary is one sentence, and the words that the program shows have one."""

from __future__ import annotations

import re
from typing import Final

from trimig.errors import Owner

from . import pages

PAGE: Final = pages.read(pages.BY_NAME["glossary.md"])
ROWS: Final = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)
ENTRIES: Final = [row for row in ROWS if row[0] != "word" and not row[0].startswith("-")]


def test_entries_are_one_sentence() -> None:
    assert len(ENTRIES) > 50
    wrong = [word for word, meaning, _ in ENTRIES if not re.fullmatch(r"[A-Z](?:[^.]|\.\w)*\.", meaning)]
    assert wrong == []


def test_words_stand_once() -> None:
    words = [word.strip() for first, _, _ in ENTRIES for word in first.split(",")]
    assert len(words) == len(set(words))


def test_owners_are_explained() -> None:
    for owner in Owner:
        assert owner.name in PAGE
