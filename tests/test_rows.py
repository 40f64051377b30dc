"""Each row, gap or rule that a docstring of the tests names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import rows


def test_every_name_in_a_docstring_exists() -> None:
    found = list(rows.tags())
    assert len(found) > 300
    unknown = [f"{tag.test}: {tag.kind} {tag.name}" for tag in found if tag.name not in rows.TABLES[tag.kind]]
    assert unknown == []


def test_a_gap_is_never_named_like_a_row() -> None:
    """Some numbers exist as gaps only, so a test that forgets the word is found by the test above."""
    assert {name for name in rows.GAPS if name not in rows.ROWS} == {f"G{n}" for n in range(17, 25)}


@pytest.mark.parametrize("table", [rows.ROWS, rows.GAPS], ids=["rows", "gaps"])
def test_a_subject_is_short_and_stands_once(table: dict[str, str]) -> None:
    assert len(set(table.values())) == len(table)
    assert all(len(subject.split()) <= 7 for subject in table.values())
    for letter in {name[0] for name in table}:
        numbers = [int(name[1:]) for name in table if name[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), letter


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("M2, P9: neither paused nor resumed.", ["row M2", "row P9"]),
        ("O1-O3 and K5.", ["row O1", "row O2", "row O3", "row K5"]),
        ("T1, gap G3: no peer can be asked.", ["row T1", "gap G3"]),
        ("Gaps G1, G4-G5 and G11 (rule C7).", ["gap G1", "gap G4", "gap G5", "gap G11", "rule C7"]),
        ("Rule C3: as in appendix A.1 row 24, table A.2.", ["rule C3"]),
        ("The bytes 0xC3 and %C3, 2G1 and page 4K.", ["row C3"]),  # only what is a word of its own
        ("nothing", []),
    ],
)
def test_names_are_found(text: str, names: list[str]) -> None:
    assert [f"{kind} {name}" for kind, name in rows.tags_of(text)] == names


def test_the_list_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows.main()
    out = capsys.readouterr().out
    assert re.search(r"\d+ of 232 rows are named; not: ", out)
    here = Path(__file__).name
    assert f"tests/{here}" not in out
