"""Pictures of the statuses, made from the tables of `trimig/status.py`: `python -m tests.diagram` writes them.

A picture stands between two marks, in a page between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from trimig.errors import Ownership
from trimig.status import TRANSITIONS, Role, Status, owner

ROOT: Final = Path(__file__).parents[1]


def _followers(role: Role, status: Status) -> list[str]:
    """The words of the statuses that may follow, in the order of the enumeration."""
    return [after.value for after in Status if after in TRANSITIONS[role][status]]


def _owner(role: Role, status: Status) -> str:
    found = owner(role, status)
    return "unknown" if found is Ownership.UNKNOWN else found.value


def markdown() -> str:
    """For a page: a table with both roles."""
    lines = [
        "| status | owner, by the source | may follow, at the source | owner, by the destination | may follow, at the destination |",
        "|---|---|---|---|---|",
    ]
    for status in Status:
        cells = [f"`{status.value}`"]
        for role in Role:
            if status in TRANSITIONS[role]:
                cells += [_owner(role, status), ", ".join(f"`{word}`" for word in _followers(role, status))]
            else:
                cells += ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _id(status: Status) -> str:
    return status.value.replace("-", "_")


def mermaid(role: Role) -> str:
    """A diagram that forges draw. The colour and the shape of a status say who owns the guest."""
    shapes = {"source": ("[", "]"), "destination": ("([", "])"), "unknown": ("{{", "}}")}
    lines = ["```mermaid", "flowchart LR"]
    for status in Status:
        if status in TRANSITIONS[role]:
            left, right = shapes[_owner(role, status)]
            lines.append(f'    {_id(status)}{left}"{status.value}"{right}')
    for status in Status:
        if status in TRANSITIONS[role]:
            lines += [f"    {_id(status)} --> {_id(after)}" for after in Status if after in TRANSITIONS[role][status]]
    return "\n".join([*lines, "```"])


class Place(NamedTuple):
    """A marked region of a file."""

    path: Path
    begin: str
    end: str
    picture: Callable[[], str]

    @property
    def name(self) -> str:
        """The words of the first mark."""
        return self.begin.strip("<!->").strip()

    def written(self) -> str:
        """The file with the picture in it."""
        pattern = re.compile(f"({re.escape(self.begin)}\n\n).*?\n?(\n{re.escape(self.end)}\n)", re.DOTALL)
        text, count = pattern.subn(
            lambda marks: f"{marks[1]}{self.picture()}\n{marks[2]}", self.path.read_text("utf-8")
        )
        if count != 1:
            raise ValueError(f"{self.path} has {count} places for the statuses")
        return text


_DESIGN: Final = ROOT / "trimig" / "docs" / "design.md"
PLACES: Final = (
    Place(_DESIGN, "<!-- transitions -->", "<!-- /transitions -->", markdown),
    *(
        Place(
            _DESIGN,
            f"<!-- diagram {role.value} -->",
            f"<!-- /diagram {role.value} -->",
            functools.partial(mermaid, role),
        )
        for role in Role
    ),
)


if __name__ == "__main__":
    for place in PLACES:
        place.path.write_text(place.written(), encoding="utf-8")
