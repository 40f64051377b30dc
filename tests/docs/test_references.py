"""What a comment, a docstring or a page refers to is in the repository: pages, their parts, rows of lists, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import rows

from . import pages

FILES: Final = sorted(
    path
    for part in ("trimig", "tests", "bench", "examples", ".ci")
    for path in (pages.ROOT / part).rglob("*")
    if (path.suffix in {".py", ".md", ".sh"} or path.parent.name == ".ci") and path != Path(__file__)
)

_NUMBER: Final = r"(?:[A-Z]\.\d+|\d+(?:\.\d+)*)"
#: "ram.md", "ram.md part 12", "commands.md parts 4.3 to 4.10", "stream.md 10.2 and part 10", "qemu-tests.md A.1".
_REFERENCE: Final = re.compile(
    rf"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.md)\b(?: (?:parts? )?({_NUMBER}(?:(?:, | and (?:part )?| to |-){_NUMBER})*))?"
)
#: Notes that were never part of the repository.
_ABSENT: Final = re.compile(r"\b(?:DESIGN|STYLE|USERS|REVIEW|HOUSE|SPEED|LOCAL|LIBRARIES)(?:\.md\b| \d)")


def running(text: str) -> str:
    """*text* with its lines joined, so that a reference over two lines is found."""
    return re.sub(r"\s*\n\s*(?:#:?\s)?\s*", " ", text)


def complaints(text: str) -> Iterator[str]:
    """The references in *text* that lead nowhere."""
    text = re.sub(r"\]\([^)\s]*\)", "]", running(text))  # what links point to is looked at below
    for found in _ABSENT.finditer(text):
        yield f"{found[0]}: no such page"
    for found in _REFERENCE.finditer(text):
        page = pages.BY_NAME.get(Path(found[1]).name)
        if page is None:
            if not _ABSENT.match(found[1]):
                yield f"{found[1]}: no such page"
            continue
        there = pages.parts(pages.read(page))
        yield from (
            f"{found[0]}: no part {number}" for number in re.findall(_NUMBER, found[2] or "") if number not in there
        )


def test_the_pages_have_names_of_their_own() -> None:
    assert len(pages.BY_NAME) == len(pages.PAGES) > 15


@pytest.mark.parametrize("path", [*FILES, pages.README], ids=pages.short)
def test_references_lead_to_a_page_and_a_part(path: Path) -> None:
    assert list(complaints(path.read_text(encoding="utf-8"))) == []


def test_references_are_found_at_all() -> None:
    found = [found for path in FILES for found in _REFERENCE.finditer(running(path.read_text(encoding="utf-8")))]
    assert len(found) > 100
    assert sum(bool(reference[2]) for reference in found) > 80


@pytest.mark.parametrize(
    "text",
    [
        "as in nothing.md part 1",
        "ram.md part 99",
        "stream.md 10.2 and part 77",
        "commands.md parts 4.3 to 4.99",
        "see the list (qemu-tests.md A.9)",
        "DESIGN.md part 5",
        "USERS 3",
        "ram.md part\n    # 99",
    ],
)
def test_a_reference_to_nothing_is_noticed(text: str) -> None:
    assert list(complaints(text))


def test_good_references_are_not_complained_of() -> None:
    assert list(complaints("ram.md part 12, states.md parts 1 and 14; stream.md 10.2. qemu-tests.md A.1\n#: x")) == []


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.short)
def test_relative_links_resolve(page: Path) -> None:
    wrong = []
    for target in pages.links(pages.read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        there = path.is_relative_to(pages.ROOT) and path.exists()
        if not there or (fragment and fragment not in pages.anchors(pages.read(path))):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.short)
def test_files_that_a_page_names_exist(page: Path) -> None:
    # tests/qtest is a folder of QEMU.
    named = re.findall(r"`((?:trimig|tests(?!/qtest)|examples|bench|\.ci)/[\w./*-]+)`", pages.prose(pages.read(page)))
    assert [name for name in named if not any(pages.ROOT.glob(name))] == []


def test_a_page_is_reached_by_links_from_the_readme() -> None:
    """Over any number of links."""
    seen = {pages.README}
    todo = [pages.README]
    while todo:
        page = todo.pop()
        for target in pages.links(pages.read(page)):
            path = (page.parent / target.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.exists() and path not in seen:
                seen.add(path)
                todo.append(path)
    assert set(pages.PAGES) - seen == set()


def test_rows_gaps_and_rules_stand_on_their_pages() -> None:
    assert pages.ids(pages.read(pages.BY_NAME["features.md"])) == set(rows.ROWS)
    assert pages.ids(pages.read(pages.BY_NAME["states.md"])) == set(rows.GAPS)
    assert pages.ids(pages.read(pages.BY_NAME["design.md"])) == set(rows.RULES)


def test_gaps_and_rules_that_the_package_names_exist() -> None:
    """In the package ``G7`` is always a gap; there is no other list with that letter."""
    named = {
        (path, name)
        for path in (pages.ROOT / "trimig").rglob("*.py")
        for name in re.findall(r"\bG\d{1,2}\b|(?<=\brule )C\d{1,2}\b", running(path.read_text(encoding="utf-8")))
    }
    assert named
    assert {(path, name) for path, name in named if name not in {*rows.GAPS, *rows.RULES}} == set()


def test_rows_of_the_tests_of_qemu_exist() -> None:
    page = pages.read(pages.BY_NAME["qemu-tests.md"])
    there = set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))
    assert len(there) == 44
    named = set()
    for path in FILES:
        for found in re.findall(
            r"\bA\.1 rows? ((?:\d+(?:-\d+)?(?:, | and | to )?)+)", running(path.read_text("utf-8"))
        ):
            named |= set(re.findall(r"\d+", found))
    assert len(named) > 15
    assert named <= there
