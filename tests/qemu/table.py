"""The table of the matrix: the outcome of each tested cell.

``pytest --matrix FILE`` writes it. A run of some of the tests gives a table in which the other cells are "not run".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from tests.qemu import cells
from tests.qemu.cells import Cell

#: The words of pytest, from the best to the worst: the phases of a test may end differently.
_ORDER: Final = ("passed", "skipped", "failed")
_WORDS: Final = {"passed": "ok", "skipped": "not here", "failed": "**FAILED**"}
_TITLES: Final = {
    "to": "From trimig to QEMU",
    "from": "From QEMU to trimig, parked",
    "through": "From QEMU through trimig to the next version that has the machine type",
}


@dataclasses.dataclass
class Outcomes:
    """The outcomes of the tested cells."""

    found: dict[Cell, str] = dataclasses.field(default_factory=dict)

    def note(self, properties: Sequence[tuple[str, object]], outcome: str) -> None:
        """Add one phase of a test; a test without a cell in its properties is skipped."""
        for name, value in properties:
            if name == "cell" and isinstance(value, list | tuple):
                cell = Cell(*value)
                self.found[cell] = max(self.found.get(cell, "passed"), outcome, key=_ORDER.index)

    def counts(self) -> str:
        """One line: the number of cells, and their outcomes."""
        number = {outcome: list(self.found.values()).count(outcome) for outcome in _ORDER}
        rest = f", {number['skipped']} not possible on this machine" if number["skipped"] else ""
        return f"QEMU: {len(self.found)} cells: {number['passed']} passed, {number['failed']} failed{rest}"

    def failed(self) -> list[Cell]:
        """Those that failed."""
        return sorted(cell for cell, outcome in self.found.items() if outcome == "failed")


def written(outcomes: Mapping[Cell, str], versions: Sequence[str]) -> str:
    """The table in Markdown: a part for each direction, a line for each mode, a column for each version and machine type."""
    reasons: list[str] = []

    def word(cell: Cell) -> str:
        if (reason := cells.impossible(cell)) is not None:
            if reason not in reasons:
                reasons.append(reason)
            return f"({reasons.index(reason) + 1})"
        return _WORDS[outcomes[cell]] if cell in outcomes else "not run"

    lines = ["# trimig and QEMU", ""]
    columns = [(version, machine) for version in versions for machine in cells.MACHINES]
    for direction in cells.DIRECTIONS:
        lines += [f"## {_TITLES[direction]}", ""]
        lines.append("| mode | " + " | ".join(f"{version} {machine}" for version, machine in columns) + " |")
        lines.append("|---" * (len(columns) + 1) + "|")
        for mode, meaning in cells.MODES.items():
            words = [word(Cell(version, machine, direction, mode)) for version, machine in columns]
            lines.append(f"| {mode}: {meaning} | " + " | ".join(words) + " |")
        lines.append("")
    lines += [f"({number}) {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"
