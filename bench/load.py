"""The load of the machine, which stands beside every figure.

On a busy machine everything takes longer, and a program that hops between tasks suffers most. The load average is the
kernel's for one minute. It is read before the first measurement and at the end of each one, and includes the measured
processes themselves: a figure of a benchmark that uses two processors for minutes is not from a quiet run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Final

#: A run is quiet if no reading of the load reaches this value.
QUIET: Final = 1.5


def load_now() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


class LoadLog:
    """The readings of one run of a benchmark."""

    def __init__(self, readings: Iterable[float] = ()) -> None:
        self._readings = list(readings)

    def read(self) -> float:
        """Take a reading, and return it."""
        self._readings.append(load_now())
        return self._readings[-1]

    @property
    def quiet(self) -> bool:
        """True if every reading is below QUIET."""
        return bool(self._readings) and max(self._readings) < QUIET

    def sentence(self) -> str:
        """Whether the run was quiet, with the readings that decide it."""
        if not self._readings:
            return "load: it was not read"
        word = "quiet run" if self.quiet else "NOT a quiet run"
        return (
            f"{word}: load average {self._readings[0]:.2f} before it and {max(self._readings):.2f} at most "
            f"(quiet is below {QUIET:g})"
        )

    def as_json(self) -> dict[str, Any]:
        """The member ``load`` of the document of ``--json``."""
        if not self._readings:
            return {"quiet": False}
        return {"before": self._readings[0], "most": max(self._readings), "quiet": self.quiet}
