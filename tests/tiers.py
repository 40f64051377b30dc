"""The tiers of tests: ``pytest -m smoke`` runs some, plain ``pytest`` most, ``pytest -m full`` all.

``pytest -m "not slow"`` runs the tests of milliseconds: all but those in :data:`SLOW_FOLDERS` and those marked ``slow``
or ``full``.

A test marked ``full`` runs only with ``-m full``. Sweeps over very many points run a sample of them in the ordinary
run, because any sample is as good as another: some points always, and others that the id of the commit decides
(:mod:`tests.sweeps.sampled`). So a failure can be repeated at its commit, and over time all points run.
``TRIMIG_TEST_SEED`` sets another number.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

#: The tests of ``-m smoke``: files, and single tests. Some of every subject; a minute on a busy machine of two cores.
SMOKE: Final = (
    "tests/cli/test_exit_codes.py",
    "tests/processes/cli/test_frame.py::test_the_module_is_the_command",
    "tests/docs/test_operating.py",
    "tests/engine/test_handover.py",
    "tests/engine/test_lifecycle.py",
    "tests/processes/engine/test_postcopy.py::test_a_guest_runs_while_its_memory_follows[0.0]",
    "tests/guests/test_app.py",
    "tests/guests/test_parked.py",
    "tests/memory/test_block.py",
    "tests/policy/test_convergence.py",
    "tests/qemu/test_table.py",
    "tests/qemu/test_versions.py::test_guest_arrives_whole[7.2-pc-through-precopy]",
    "tests/qmp/test_messages.py",
    "tests/stream/test_commands.py",
    "tests/test_config.py",
    "tests/test_conftest.py",
    "tests/test_errors.py",
    "tests/test_layers.py",
    "tests/test_status.py",
    "tests/testing/test_link.py",
    "tests/transport/test_tcp.py",
    "tests/transport/test_unix.py",
    "tests/wire/test_description.py",
    "tests/wire/test_postcopy.py",
    "tests/wire/test_ram.py",
    "tests/wire/test_return_path.py",
)

#: Every test in these is slow: it has processes, a QEMU, or very many runs.
SLOW_FOLDERS: Final = ("tests/processes/", "tests/qemu/", "tests/sweeps/")
_QUICK: Final = "not slow"

#: A fuzz test or a sweep with all its inputs may take so long, beside other work.
LONG_SECONDS = 1800

#: Set by the option ``-m`` before tests are collected.
_everything = False


def choose(expression: str, arguments: list[str]) -> str:
    """The expression of marks with which pytest selects the tests, for the given one.

    Tests that are named one by one (``FILE::NAME``) run with any marks.
    """
    global _everything
    _everything = expression == "full"
    if _everything:
        return ""
    if expression or any("::" in argument for argument in arguments):
        return expression
    return "not full"


def smoke(name: str) -> bool:
    """Whether the test of that id is one of :data:`SMOKE`."""
    return name in SMOKE or name.partition("::")[0] in SMOKE


def slow(name: str) -> bool:
    """The test of that id, or file, is in one of :data:`SLOW_FOLDERS`."""
    return name.startswith(SLOW_FOLDERS)


def without_use(path: Path, expression: str) -> bool:
    """Whether a test file need not even be read, because the expression of marks leaves out all of its tests."""
    if expression not in ("smoke", _QUICK) or path.suffix != ".py" or not path.name.startswith("test_"):
        return False
    name = path.relative_to(ROOT).as_posix()
    if expression == _QUICK:
        return slow(name)
    return not any(wanted.partition("::")[0] == name for wanted in SMOKE)


def long(nodeid: str) -> bool:
    """The test is a sweep, which takes minutes with all its inputs."""
    return nodeid.startswith("tests/sweeps/")


def everything() -> bool:
    """Whether this run leaves no test out."""
    return _everything


@functools.cache
def seed() -> int:
    """The seed of this run's samples: from the commit, or 0 without git."""
    if given := os.environ.get("TRIMIG_TEST_SEED"):
        return int(given)
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=True, stdin=subprocess.DEVNULL
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int.from_bytes(hashlib.sha256(commit).digest()[:4], "big")
