"""The figures on the page `security` are those of the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import trimig

PAGE = (Path(trimig.__file__).parent / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| .* \| ([0-9.]+) \| `(trimig\.[\w.]+)` \|$", PAGE, re.MULTILINE)


def value_of(dotted: str) -> object:
    """What a constant of a module, or an option of a configuration with its defaults, is."""
    place, _, name = dotted.rpartition(".")
    if place == "trimig.config.Config":
        return getattr(trimig.Config(), name)
    return getattr(importlib.import_module(place), name)


def test_every_row_of_a_table_was_found() -> None:
    assert len(ROWS) == sum(line.endswith("` |") for line in PAGE.splitlines()) >= 20


@pytest.mark.parametrize(("figure", "dotted"), ROWS, ids=[dotted for _, dotted in ROWS])
def test_the_figure_is_that_of_the_code(figure: str, dotted: str) -> None:
    assert value_of(dotted) == float(figure)
