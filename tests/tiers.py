"""Which tests run: ``pytest -m smoke`` some, plain ``pytest`` most, ``pytest -m full`` all.

A test marked ``full`` runs only with ``-m full``. Sweeps over very many points, of which any sample is as good as another, take a
part of them in the ordinary run: which part, the id of the commit decides. So a failure can be repeated at its commit, and in
time all points are visited. ``TRIMIG_TEST_SEED`` sets another number.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

#: Set by the option ``-m`` before tests are collected.
_everything = False


def choose(expression: str, arguments: list[str]) -> str:
    """The expression of marks with which pytest is to select the tests, for the one that was given.

    Tests that are named one by one (``FILE::NAME``) run whatever their marks are.
    """
    global _everything
    _everything = expression == "full"
    if _everything:
        return ""
    if expression or any("::" in argument for argument in arguments):
        return expression
    return "not full"


def everything() -> bool:
    """Whether this run is to leave nothing out."""
    return _everything


@functools.cache
def seed() -> int:
    """The number that this run's samples are drawn with: of the commit, or 0 where there is no git."""
    if given := os.environ.get("TRIMIG_TEST_SEED"):
        return int(given)
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=True, stdin=subprocess.DEVNULL
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int.from_bytes(hashlib.sha256(commit).digest()[:4], "big")
