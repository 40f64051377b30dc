"""How many inputs the fuzz tests have tried: counted by test, printed at the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

#: The fixture ``fuzzed``: call it with a subject and a number of inputs.
Fuzzed: TypeAlias = Callable[[str, int], None]


class Inputs:
    """Inputs by subject, from the properties of the tests' reports: with several processes, too."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def note(self, properties: Sequence[tuple[str, object]], when: str) -> None:
        """Take in one phase of a test; only that of the call counts."""
        for name, value in properties:
            if when == "call" and name == "fuzzed" and isinstance(value, list | tuple):
                subject, count = value
                self.found[subject] = self.found.get(subject, 0) + count

    def lines(self) -> list[str]:
        """One for each subject."""
        return [f"{count:8,} inputs: {subject}" for subject, count in sorted(self.found.items())]
