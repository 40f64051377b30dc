"""The pages of trimig/docs as the tests of this folder read them: headings, parts, links, code blocks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "trimig" / "docs"
README: Final = ROOT / "README.md"
#: Every page, the README included.
PAGES: Final = (README, *sorted(DOCS.rglob("*.md")))
#: File name -> path; a reference in a comment has the name alone.
BY_NAME: Final = {path.name: path for path in PAGES}

_FENCED: Final = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_HEADING: Final = re.compile(r"^(#{1,6}) +(.+?) *$", re.MULTILINE)
_LINK: Final = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, the text in it, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def read(page: Path) -> str:
    """The text of a page."""
    return page.read_text(encoding="utf-8")


def short(page: Path) -> str:
    """A page's path below the top level."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page in order."""
    text = read(page)
    for found in _FENCED.finditer(text):
        indent = found[1]
        body = re.sub(rf"^{indent}", "", found[3], flags=re.MULTILINE)
        yield Block(found[2].strip(), body, text.count("\n", 0, found.start(3)) + 1)


def prose(text: str) -> str:
    """*text* with its fenced blocks made empty; the numbers of lines stay."""
    return _FENCED.sub(lambda found: "\n" * found[0].count("\n"), text)


def headings(text: str) -> list[str]:
    """The headings of a page, without their marks."""
    return [found[2] for found in _HEADING.finditer(prose(text))]


def anchors(text: str) -> set[str]:
    """The fragments that a forge gives to the headings: lower case, words joined by hyphens, marks left out."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}


def parts(text: str) -> set[str]:
    """The numbers that headings begin with: ``14``, ``4.1``, ``A.1``; ``7.6`` also for item 6 of a list in part 7."""
    found: set[str] = set()
    part = ""
    for line in prose(text).splitlines():
        if heading := _HEADING.match(line):
            number = re.match(r"((?:[A-Z]\.)?\d+(?:\.\d+)*|[A-Z](?=\.))\.? ", heading[2])
            part = number[1] if number else ""
            found.add(part)
        elif item := re.match(r"(\d+)\. ", line):
            found.add(f"{part}.{item[1]}")
    return found - {""}


def ids(text: str) -> set[str]:
    """The ids that rows of tables begin with: ``G13``, ``A1``, ``C7``."""
    return set(re.findall(r"^\| ([A-Z]\d{1,2}) \|", text, re.MULTILINE))


def links(text: str) -> list[str]:
    """The targets of the links of a page."""
    return _LINK.findall(prose(text))
